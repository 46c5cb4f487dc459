"""``python -m minildm merge``: adapters into a full checkpoint, a single file or a diffusers-layout folder.

    W' = W + sum over adapters of multiplier scale B A

is computed in float32 and rounded once, to the precision in which the base stores W (or to --dtype). Tensors that no
adapter changes keep their bits, unless --dtype asks for others. One tensor at a time is in memory, besides the
adapters. Moving averages and whatever else the networks do not need are left out.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from minildm import checkpoint
from minildm.adapters.files import merge_file
from minildm.adapters.reading import read_adapter
from minildm.checkpoint.folder import write_folder
from minildm.checkpoint.load import require_match
from minildm.checkpoint.statements import stated_prediction
from minildm.checkpoint.writing import CODES, LazyTensor, write_single_file
from minildm.errors import InputError
from minildm.files import UMASK, read_json, temporary_path, writable_folder
from minildm.latent_diffusion import LatentDiffusion
from minildm.loading import find_base, parse_adapter, with_those_below
from minildm.progress import Progress
from minildm.settings import Parser
from minildm.tokenizer import vocabulary_files

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # precisions that a sum may be stored in


def merge(base, adapters, out, dtype=None, prediction=None, vae=None):
    """Write ``base`` with ``adapters`` merged into it to ``out``.

    Args:
        base, adapters, prediction, vae: as in `minildm.load`, which also merges what an adapter was trained on top of.
        out: a path that ends in .safetensors, or a folder to make.
        dtype: of every tensor; None = what the base stores it in.
    Raises: InputError or FileNotFoundError if the base, an adapter or ``out`` cannot be used, before anything is
        written; InputError if a sum overflows its precision.
    """
    out = Path(out)
    _check_out(out)
    plan = checkpoint.inspect(find_base() if base is None else base, prediction)
    if vae is not None:
        checkpoint.replace_vae(plan, vae)
    require_match(plan, {network: module.state_dict() for network, module in plan.networks.items()})
    model = LatentDiffusion(plan.config, **plan.networks, files=plan)  # shapes without memory: checks every adapter
    deltas = {}
    for adapter in with_those_below(adapters):
        path, multiplier, rank = parse_adapter(adapter)
        merge_file(model, path, multiplier, rank)
        for module, factors in read_adapter(path).factors.items():
            deltas.setdefault(module, []).append((factors, multiplier, rank))
    about = _unknown_prediction(plan, prediction) | {
        "minildm": json.dumps({"base": model.base_hash, "vae": model.vae_hash, "merged": model.merged})
    }
    tensors = merged_tensors(plan, deltas, dtype)
    with _progress(tensors) as tensors:
        if out.suffix == ".safetensors":
            write_single_file(tensors, plan.networks, plan.config, out, about)
        else:
            _write_pipeline(tensors, plan, out, about)


def _unknown_prediction(plan, prediction):
    """Metadata that must not be written where the prediction of an SD v2.x single file was only assumed."""
    file = next(iter(plan.sources["unet"].values())).file
    known = prediction or plan.path.is_dir() or stated_prediction(file) or not plan.config.unet.linear_projection
    keys = ("architecture", "resolution", "prediction_type")
    return {} if known else {f"modelspec.{key}": None for key in keys}


def merged_tensors(plan, deltas, dtype=None):
    """{network: {parameter: LazyTensor}} of a Checkpoint with {module path: [(Factors, multiplier, rank)]} added."""
    readers = {}  # one for each file
    return {
        network: {
            parameter: _merged(
                source,
                tuple(plan.networks[network].get_parameter(parameter).shape),
                deltas.get(f"{network}.{parameter.removesuffix('.weight')}", [])
                if parameter.endswith(".weight")
                else [],
                dtype,
                readers,
            )
            for parameter, source in sources.items()
        }
        for network, sources in plan.sources.items()
    }


def _merged(source, shape, deltas, dtype, readers):
    dtype = source.file.dtypes[source.name] if dtype is None else dtype
    if dtype not in (FLOATS if deltas else CODES):
        raise InputError(
            f"{source.file.path} stores {source.name} as {str(dtype).removeprefix('torch.')}, which cannot hold a sum; "
            "give --dtype float16"
        )

    def read():
        if source.file not in readers:
            readers[source.file] = source.file.reader()
        tensor = readers[source.file](source.name)
        tensor = (tensor if source.third is None else tensor.chunk(3)[source.third]).reshape(shape)
        if deltas:
            tensor = tensor.float()
            for factors, multiplier, rank in deltas:
                tensor = tensor + multiplier * delta(factors, rank).reshape(shape)
        result = tensor.to(dtype)
        if not result.isfinite().all() and tensor.isfinite().all():
            raise InputError(
                f"{source.name} has values that {str(dtype).removeprefix('torch.')} cannot hold; give another --dtype"
            )
        return result

    return LazyTensor(dtype, shape, read)


def delta(factors, rank=None):
    """scale B A in float32, (out, in, ...), of the first ``rank`` rows; None = all."""
    A, B = factors.A[:rank].float(), factors.B[:, :rank].float()
    return factors.scale * (B.flatten(1) @ A.flatten(1))


# --- output ----------------------------------------------------------------------------------------------------------
def _check_out(out):
    """Raise InputError or PermissionError unless ``out`` can be made."""
    if out.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise InputError(f"--out {out}: minildm writes .safetensors files and folders, no pickles; change the suffix")
    if out.exists() and (out.is_file() or out.suffix == ".safetensors" or any(out.iterdir())):
        what = "a file" if out.is_file() else "a folder"
        raise InputError(f"--out {out} is {what} already; move it away, or give another --out")
    writable_folder(out.absolute().parent)


@contextlib.contextmanager
def _progress(tensors):
    """Yield the same LazyTensors, which move a progress bar as they are read."""
    n = sum(len(network) for network in tensors.values())
    with Progress("merging", "tensor", n, leave=False) as bar:

        def counted(tensor):
            def read():
                bar.update()
                return tensor.read()

            return tensor._replace(read=read)

        yield {network: {name: counted(tensor) for name, tensor in named.items()} for network, named in tensors.items()}


def _write_pipeline(tensors, plan, out, about):
    """Write the folder ``out``, whole or not at all: the networks, and what else a diffusers pipeline needs."""
    with tempfile.TemporaryDirectory(prefix=f"{temporary_path(out).name}-", dir=out.absolute().parent) as temporary:
        folder = Path(temporary) / out.name
        write_folder(tensors, plan.config, folder)
        if plan.path.is_dir():  # the base's own scheduler class and tokenizer
            scheduler = read_json(plan.path / "scheduler" / "scheduler_config.json")
            prediction = "v_prediction" if plan.config.schedule.prediction == "v" else "epsilon"
            _write_json(folder / "scheduler" / "scheduler_config.json", scheduler | {"prediction_type": prediction})
            if (plan.path / "tokenizer").is_dir():
                shutil.copytree(plan.path / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        if not (folder / "tokenizer" / "vocab.json").is_file():
            for name, text in vocabulary_files(plan.config.pad_token_id).items():
                (folder / "tokenizer" / name).write_text(text, encoding="utf-8")
        _write_json(folder / "model_index.json", pipeline_index(folder))
        (folder / "minildm.json").write_text(about["minildm"] + "\n", encoding="utf-8")
        folder.chmod(0o777 & ~UMASK)
        os.replace(folder, out)


def pipeline_index(folder):
    """diffusers' model_index.json: which class reads which subfolder."""
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name", "PNDMScheduler")
    return {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _write_json(path, document):
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


# --- command ---------------------------------------------------------------------------------------------------------
def main(arguments):
    parser = Parser(prog="python -m minildm merge", description="Merge adapters into a full checkpoint.")
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER[@RANK][:0.6]", help="adapter files or run folders, in order")
    add("--base", metavar="PATH", help="checkpoint file or diffusers-layout folder (default: the one in weights/)")
    add("--vae", metavar="PATH", help="autoencoder to put in place of the base's own")
    add("--prediction", choices=("epsilon", "v"), help="what the U-Net predicts, where a single file cannot say")
    add("--out", type=Path, required=True, metavar="PATH", help="FILE.safetensors, or a folder in diffusers' layout")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="precision of all tensors (default: that of the base, tensor by tensor)",
    )
    args = parser.parse_args(arguments)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        merge(args.base, args.adapters, args.out, dtype, args.prediction, args.vae)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
            raise
        raise InputError(f"could not write {args.out} ({error.strerror}); nothing was left behind") from None
    print(f"wrote {args.out}")
    print(f'next: python sample.py "..." --base {args.out}')
    return 0
