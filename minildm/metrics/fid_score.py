"""``python -m minildm fid REAL FAKE``: the Frechet distance at several depths, and how far to trust it."""

import argparse
import json
from pathlib import Path

import torch

import minildm
from minildm.errors import InputError
from minildm.files import written_beside
from minildm.loading import usable_device
from minildm.metrics.extractors import Collected, collect, list_images, open_extractor
from minildm.metrics.frechet import SavedStatistics
from minildm.metrics.inception import DIMS, WEIGHTS_NAME
from minildm.metrics.manifold import precision_recall_density_coverage
from minildm.metrics.mmd import cmmd, kid
from minildm.metrics.small_sample import small_sample
from minildm.settings import Help, at_least

FEWEST_FOR_INTERVALS = 8


def fid(real_dir, fake_dir, weights=None, dims=(2048, 192, 64), device="cpu", batch_size=16):
    """Frechet Inception Distance between two folders of pictures (or .npz statistics, then of one dim).

    Args:
        weights: pytorch-fid's .pth or the same as .safetensors; None means weights/ of this repository.
    Returns: {dim: float}. Memory does not grow with the number of pictures.
    Raises: FileNotFoundError, InputError: no pictures, a broken one, other dims than the statistics'.
    """
    extractor = open_extractor("inception", weights, dims, device=device)
    real, fake = (gather(source, extractor, keep=0, batch_size=batch_size) for source in (real_dir, fake_dir))
    return {dim: real.statistics[dim].distance(fake.statistics[dim]) for dim in dims}


def gather(source, extractor, keep, batch_size=16, seed=0, progress=None):
    """A folder, run, data set or .npz -> Collected (an .npz has statistics of one dim and no rows)."""
    if Path(source).suffix != ".npz":
        return collect(list_images(source), extractor, keep, batch_size, seed, progress)
    saved = SavedStatistics(source)
    if set(extractor.dims) != {saved.dim}:
        raise InputError(
            f"{source} holds statistics of {saved.dim} dims, asked for {list(extractor.dims)}; give --dims {saved.dim}"
        )
    return Collected(saved.n, {saved.dim: saved}, {}, [])


def measure(real, fake, extractor, replicates=100, seed=0, progress=False):
    """Everything that can be said of two Collected sets: {"label", "n_real", "n_fake", "dims": {dim: ...}, ...}."""
    result = {"label": extractor.label, "n_real": real.n, "n_fake": fake.n, "dims": {}, "warnings": []}
    for dim in extractor.dims:
        entry = result["dims"][dim] = {"distance": real.statistics[dim].distance(fake.statistics[dim])}
        if real.complete and fake.complete and min(real.n, fake.n) >= FEWEST_FOR_INTERVALS:
            sample = small_sample(
                real.rows[dim], fake.rows[dim], replicates, seed, f"resampling at {dim}" if progress else None
            )
            entry.update(vars(sample))
        fewest = min((n for n in (real.n, fake.n) if n is not None), default=None)
        if fewest is not None and fewest <= dim:
            result["warnings"].append(
                f"n = {fewest} <= {dim} dims: the covariance is singular and the value mostly "
                "bias; compare only at equal n, against the floor"
            )
    if None in (real.n, fake.n):
        result["warnings"].append("the statistics do not say their n: compare only with values of the same reference")
    if not (real.complete and fake.complete):
        result["warnings"].append(
            "no interval, floor or extrapolation: they need the features of every picture "
            "(folders, not .npz; at most --keep pictures a side)"
        )
    deepest = max(extractor.dims)
    if deepest in real.rows and deepest in fake.rows:
        a, b = real.rows[deepest], fake.rows[deepest]
        if min(len(a), len(b)) > 5:
            result["prdc"] = precision_recall_density_coverage(a, b)
            result["kid"] = vars(kid(a, b))
            if extractor.label == "FD-clip":
                result["cmmd"] = vars(cmmd(a, b))
    return result


def table(result):
    """The result as lines of text."""
    label, rows = (
        result["label"],
        [("dims", result["label"], "95 % interval", "at half: fake", "real (floor)", "n to infinity")],
    )
    for dim, entry in result["dims"].items():
        row = [str(dim), f"{entry['distance']:.4f}"]
        if "low" in entry:
            row += [
                f"{entry['low']:.4f} - {entry['high']:.4f}",
                f"{entry['distance_at_half']:.4f}",
                f"{entry['floor']:.4f}",
                f"{entry['infinity']:.4f} +- {entry['infinity_error']:.4f}",
            ]
        rows.append(row + ["-"] * (6 - len(row)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = [f"{label}: {result['n_real'] or 'unknown n'} real against {result['n_fake'] or 'unknown n'} fake pictures"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    halves = {entry["half"] for entry in result["dims"].values() if "half" in entry}
    lines += [f"(half: {half} pictures a side; the floor is real against other real pictures)" for half in halves]
    where = f"at {max(result['dims'])} dims"
    if "kid" in result:
        value, low, high = (1e3 * result["kid"][name] for name in ("value", "low", "high"))
        lines.append(f"KID x 1000 {where}: {value:.4f}, 95 % interval {low:.4f} - {high:.4f}")
        lines.append(", ".join(f"{name} {value:.3f}" for name, value in result["prdc"].items()) + f" {where}, k = 5")
    if "cmmd" in result:
        lines.append("CMMD: {value:.4f}, 95 % interval {low:.4f} - {high:.4f}".format(**result["cmmd"]))
    return lines + [f"warning: {warning}" for warning in result["warnings"]]


def add_feature_arguments(parser, default="inception"):
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        default=default,
        metavar="NAME",
        help="inception | random | vae | clip | FILE.pt (TorchScript: (B,3,224,224) in [0,1] -> (B,d))",
    )
    group.add_argument("--weights", type=Path, help=f"Inception weights (default: weights/{WEIGHTS_NAME})")
    group.add_argument("--base", help="Stable Diffusion base for --features vae")
    group.add_argument("--clip-model", default="ViT-L-14-336", help="open_clip architecture")
    group.add_argument("--clip-pretrained", default="openai", help="open_clip tag or a file of weights")
    group.add_argument("--batch-size", type=at_least(1), default=16, help="pictures at a time")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    group.add_argument("--seed", type=at_least(0), default=0, help="of every random draw")


def extractor_from(arguments, dims=DIMS):
    return open_extractor(
        arguments.features,
        arguments.weights,
        dims,
        arguments.base,
        arguments.clip_model,
        arguments.clip_pretrained,
        usable_device(arguments.device),
        arguments.seed,
    )


def write_json(path, content):
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m minildm fid", description=__doc__, formatter_class=Help)
    parser.add_argument("real", help="folder, name:path data set or .npz statistics")
    parser.add_argument("fake", help="the same")
    parser.add_argument("--dims", type=int, nargs="+", default=[2048, 192, 64], choices=DIMS, help="Inception depths")
    parser.add_argument(
        "--keep", type=at_least(2), default=2000, help="pictures a side whose features are held for intervals"
    )
    parser.add_argument("--replicates", type=at_least(1), default=100, help="bootstrap resamples")
    parser.add_argument("--save-stats", type=Path, metavar="FILE.npz", help="keep REAL's statistics (one --dims only)")
    parser.add_argument(
        "--out",
        type=Path,
        help="the manifest (default: fid.json beside FAKE's pictures, or here if FAKE is a data set)",
    )
    add_feature_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.save_stats is not None and (len(arguments.dims) > 1 or arguments.save_stats.suffix != ".npz"):
        raise InputError("--save-stats writes one FILE.npz of one depth; give one number to --dims")

    extractor = extractor_from(arguments, arguments.dims)
    real, fake = (
        gather(source, extractor, arguments.keep, arguments.batch_size, arguments.seed, name)
        for name, source in (("real", arguments.real), ("fake", arguments.fake))
    )
    result = measure(real, fake, extractor, arguments.replicates, arguments.seed, progress=True)
    result |= {
        "real": arguments.real,
        "fake": arguments.fake,
        "features": extractor.facts,
        "seed": arguments.seed,
        "replicates": arguments.replicates,
        "minildm": minildm.__version__,
        "torch": torch.__version__,
    }
    if extractor.label != "FID":
        result["warnings"].append(
            f"{extractor.label} is not FID: comparable only with {extractor.label} of the same weights"
        )
    print("\n".join(table(result)))
    out = arguments.out
    if out is None:
        first = fake.image_paths[0] if fake.image_paths else Path(arguments.fake)
        out = (first.parent if isinstance(first, Path) else Path()) / "fid.json"
    write_json(out, result)
    print(f"wrote {out}")
    if arguments.save_stats is not None:
        if not real.image_paths:
            raise InputError(f"{arguments.real} is already a file of statistics; --save-stats needs pictures")
        real.statistics[arguments.dims[0]].save(arguments.save_stats)
        print(f"wrote {arguments.save_stats}")
    return 0
