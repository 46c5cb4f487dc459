"""``python -m minildm shrink``: an adapter of lower rank that changes the weights almost as the given one does.

The best approximation of dW = scale B A at rank k keeps its k largest singular values (Eckart and Young 1936). dW may
have 10 million numbers and is never formed: with B = Q_B R_B and A^T = Q_A R_A (QR of the thin factors), the singular
values of dW are those of the small matrix scale R_B R_A^T = U S V^T, and dW = (Q_B U) S (Q_A V)^T.

The new factors are balanced, B' = Q_B U S^(1/2) and A' = S^(1/2) (Q_A V)^T with scale 1, so that both
have the same norm and fit half precision equally well. Energy is the share of the squared singular values that is kept,
which equals 1 - |dW - dW'|^2 / |dW|^2 in the Frobenius norm.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from minildm.adapters.formats import CLONEOFSIMO, PEFT
from minildm.adapters.reading import Factors, read_adapter
from minildm.adapters.writing import check_out, inherited, write_adapter
from minildm.errors import InputError
from minildm.files import sha256, writable_folder
from minildm.loading import whole_adapter
from minildm.settings import Parser, at_least


class Shrunk(NamedTuple):
    """A layer's new factors, and the sums of its squared singular values: of those kept, and of all."""

    factors: Factors
    kept: float
    total: float


def shrink_layer(factors, rank=None, energy=None):
    """Lower a layer's rank: to ``rank`` at most, or to the smallest with the share ``energy`` of the squared singular
    values. A convolution's factors are taken as matrices; its shapes stay. Computed in float64.

    Returns: Shrunk.
    """
    A, B = factors.A, factors.B
    q_b, r_b = torch.linalg.qr(B.double().flatten(1))  # (out, m), (m, r)
    q_a, r_a = torch.linalg.qr(A.double().flatten(1).T)  # (in, n), (n, r)
    u, s, vh = torch.linalg.svd(factors.scale * r_b @ r_a.T, full_matrices=False)
    squares = s.square()
    if rank is None:
        short = squares.cumsum(0) < energy * squares.sum() * (1 - 1e-12)  # at 1.0 rounding must not ask for more
        rank = int(short.sum()) + 1
    k = min(rank, len(s))
    root = s[:k].sqrt()
    new_A = (root[:, None] * (q_a @ vh[:k].T).T).reshape(k, *A.shape[1:])
    new_B = (q_b @ u[:, :k] * root).reshape(B.shape[0], k, *B.shape[2:])
    return Shrunk(Factors(new_A.float(), new_B.float(), 1.0), squares[:k].sum().item(), squares.sum().item())


def shrink(path, out, rank=None, energy=None):
    """Write the adapter ``path`` with lower ranks to ``out``, as a plain LoRA with the names of its dialect (PEFT's as
    diffusers', cloneofsimo's as kohya's).

    Args: rank: of every layer, at most; or energy: the share to keep in every layer, in (0, 1].
    Returns: {network or "all": {"layers", "rank_before", "rank_after" (means), "parameters_before", "parameters_after",
        "energy"}}.
    Raises: InputError or FileNotFoundError for a file or a value that cannot be used, before anything is written.
    """
    path, out = Path(path), Path(out)
    if (rank is None) == (energy is None):
        raise InputError("give either --rank N or --energy SHARE")
    if rank is not None and rank < 1:
        raise InputError(f"--rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"--energy is a share above 0 and at most 1, got {energy}")
    check_out(out)
    adapter = read_adapter(path)
    writable_folder(out.absolute().parent)
    shrunk = {name: shrink_layer(factors, rank, energy) for name, factors in adapter.factors.items()}
    report = {}
    for network in (*dict.fromkeys(name.partition(".")[0] for name in shrunk), "all"):
        names = [name for name in shrunk if network in ("all", name.partition(".")[0])]
        report[network] = _summary([adapter.factors[name] for name in names], [shrunk[name] for name in names])
    shrinkage = {"from": sha256(path), "rank": rank, "energy": energy, "kept": report["all"]["energy"]}
    about = inherited(adapter.about) | {"shrunk": shrinkage}
    format = {PEFT: "diffusers", CLONEOFSIMO: "kohya"}.get(adapter.dialect, adapter.dialect)
    write_adapter({name: layer.factors for name, layer in shrunk.items()}, out, "lora", about, format)
    return report


def _summary(before, after):
    kept, total = sum(layer.kept for layer in after), sum(layer.total for layer in after)
    now = [layer.factors for layer in after]
    return {
        "layers": len(before),
        "rank_before": sum(len(factors.A) for factors in before) / len(before),
        "rank_after": sum(len(factors.A) for factors in now) / len(now),
        "parameters_before": sum(factors.A.numel() + factors.B.numel() for factors in before),
        "parameters_after": sum(factors.A.numel() + factors.B.numel() for factors in now),
        "energy": kept / total if total else 1.0,
    }


def main(arguments):
    parser = Parser(prog="python -m minildm shrink", description="Lower an adapter's rank by singular values.")
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="adapter file or run folder")
    add("--rank", type=at_least(1), metavar="N", help="rank of every layer, at most")
    add(
        "--energy",
        type=float,
        metavar="SHARE",
        help="share of the squared singular values to keep in every layer: 0.95",
    )
    add("--out", type=Path, metavar="FILE", help="(default: beside ADAPTER, such as adapter-rank4.safetensors)")
    args = parser.parse_args(arguments)
    path = whole_adapter(args.adapter)
    choice = f"rank{args.rank}" if args.energy is None else f"energy{args.energy:g}"
    out = path.with_name(f"{path.stem}-{choice}.safetensors") if args.out is None else args.out
    report = shrink(path, out, args.rank, args.energy)
    for network, numbers in report.items():
        print(
            "{0}: {layers} layers, rank {rank_before:.2f} -> {rank_after:.2f} on average, "
            "{parameters_before:,} -> {parameters_after:,} parameters, energy kept {1:.2f} %".format(
                network, 100 * numbers["energy"], **numbers
            )
        )
    print(f"wrote {out}")
    print(f'next: python sample.py "..." --adapter {out}')
    return 0
