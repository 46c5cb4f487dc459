"""``python -m minildm convert``: an adapter of any dialect in another one's names, for another tool.

The change of the weights stays the same. AdaLoRA and SeLoRA are plain LoRA with a rank for each layer; of DyLoRA's
ranks, --rank takes one (by default the highest).
"""

from pathlib import Path

from minildm.adapters.files import check_rank
from minildm.adapters.formats import DIFFUSERS, KOHYA, NATIVE
from minildm.adapters.reading import Factors, read_adapter
from minildm.adapters.writing import FORMATS, check_out, inherited, write_adapter
from minildm.files import writable_folder
from minildm.loading import whole_adapter
from minildm.settings import Parser, at_least

NEXT = {
    KOHYA: "copy it to ComfyUI's models/loras/ or A1111's models/Lora/",
    DIFFUSERS: 'pipe.load_lora_weights("{folder}", weight_name="{name}")',
    NATIVE: 'python sample.py "..." --adapter {path}',
}


def convert(path, out, to, rank=None):
    """Write the adapter ``path`` in the format ``to`` to the file ``out``. Returns: the Adapter that was read.

    Args: rank: of a DyLoRA adapter, which is then an ordinary LoRA of this rank; None = all rows.
    Raises: InputError or FileNotFoundError for what cannot be read or written, before anything is written.
    """
    out = Path(out)
    check_out(out)
    adapter = read_adapter(path)
    factors, kind = adapter.factors, adapter.kind
    if rank is not None:
        check_rank(rank, adapter, "--rank")
        factors = {name: Factors(A[:rank], B[:, :rank], scale) for name, (A, B, scale) in factors.items()}
        kind = "lora"
    writable_folder(out.absolute().parent)
    write_adapter(factors, out, kind, inherited(adapter.about), to)
    return adapter


def main(arguments):
    parser = Parser(prog="python -m minildm convert", description="Write an adapter for another tool.")
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="adapter of any dialect, or the folder of a run, PEFT or diffusers")
    add("--to", required=True, choices=FORMATS, help="kohya: for ComfyUI, A1111 and Forge")
    add("--rank", type=at_least(1), metavar="N", help="of a DyLoRA adapter: the rank to take (default: the highest)")
    add("--out", type=Path, metavar="FILE", help="(default: beside ADAPTER, such as adapter.kohya.safetensors)")
    args = parser.parse_args(arguments)
    path = whole_adapter(args.adapter)
    at_rank = "" if args.rank is None else f"-rank{args.rank}"
    out = path.with_name(f"{path.stem}{at_rank}.{args.to}.safetensors") if args.out is None else args.out
    adapter = convert(path, out, args.to, args.rank)
    ranks = sorted({len(entry.A[: args.rank]) for entry in adapter.factors.values()})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"{path}: {adapter.dialect} names, {len(adapter.factors)} layers, {shown}")
    print(f"wrote {out}")
    print(f"next: {NEXT[args.to].format(path=out, folder=out.parent, name=out.name)}")
    return 0
