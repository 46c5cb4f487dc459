"""``python -m minildm fid REAL FAKE``: the Frechet distance at several depths, and how far to trust it."""

from pathlib import Path

import torch

import minildm
from minildm.distributed import is_first, join
from minildm.errors import InputError
from minildm.files import writable_file
from minildm.metrics.extractors import WITH_DIMS, FeatureSettings, feature_settings, inception_extractor, open_extractor
from minildm.metrics.features import FeatureSet, collect, require_several
from minildm.metrics.frechet import SavedStatistics
from minildm.metrics.inception import DIMS
from minildm.metrics.manifold import precision_recall_density_coverage
from minildm.metrics.mmd import cmmd, kid, suits_kid
from minildm.metrics.run_split import is_run_split, open_run_split
from minildm.metrics.small_sample import small_sample
from minildm.metrics.sources import RECORD_SIZE, list_images, read_as_training, write_json
from minildm.settings import Parser, add_flags, at_least

FEWEST_FOR_INTERVALS = 8


def fid(real_dir, fake_dir, weights=None, dims=(2048, 192, 64), device="cpu", batch_size=16):
    """Frechet Inception Distance between two folders of images.

    Args:
        real_dir, fake_dir: folders, runs, ``name:path`` data sets, or .npz statistics (then of one dim).
        weights: pytorch-fid's .pth, or the same as .safetensors; None = the file in weights/.
    Returns: {dim: float}. Memory does not grow with the number of images.
    Raises: FileNotFoundError, InputError: no images, a broken one, other dims than the statistics'.
    """
    extractor = inception_extractor(weights, dims, device)
    real, fake = (gather(source, extractor, keep=0, batch_size=batch_size) for source in (real_dir, fake_dir))
    return {dim: real.statistics[dim].distance(fake.statistics[dim]) for dim in dims}


def gather(source, extractor, keep, batch_size=16, seed=0, progress=None):
    """A folder, run, data set or .npz -> FeatureSet. An .npz has the statistics of one dim and no rows."""
    opened = open_source(source)
    require_dims(opened, source, extractor)
    return measure_source(opened, extractor, keep, batch_size, seed, progress)


def open_source(source):
    """What needs no image to be read: a folder, run, data set or run's split -> (images, Transform or None); an .npz ->
    SavedStatistics. Raises: FileNotFoundError, InputError if there are too few images.
    """
    if is_run_split(source):
        split = open_run_split(source)
        return list(split.records), split.settings.transform(RECORD_SIZE)
    if Path(source).suffix != ".npz":
        images = list_images(source)
        require_several(images)
        return images, None
    return SavedStatistics(source)


def require_dims(opened, source, extractor):
    """Raise InputError for statistics of other dims than the extractor's."""
    if isinstance(opened, SavedStatistics) and set(extractor.dims) != {opened.dim}:
        deep = opened.dim in DIMS and extractor.label.startswith(("FID", "FD-random"))
        advice = f"give --dims {opened.dim}" if deep else "give the --features that they were made with"
        raise InputError(
            f"{source} holds statistics of {opened.dim} dims, expected {list(extractor.dims)} of {extractor.label}; "
            f"{advice}"
        )


def measure_source(opened, extractor, keep, batch_size=16, seed=0, progress=None):
    """What `open_source` has opened -> FeatureSet."""
    if isinstance(opened, SavedStatistics):
        return FeatureSet(opened.n, {opened.dim: opened}, {}, [])
    images, transform = opened
    prepare = None if transform is None else lambda image: extractor.prepare(read_as_training(image, transform))
    return collect(images, extractor, keep, batch_size, seed, progress, prepare)


def measure(real, fake, extractor, replicates=100, seed=0, progress=False):
    """All the numbers for two FeatureSets: {"label", "n_real", "n_fake", "dims": {dim: ...}, "warnings", ...}."""
    result = {"label": extractor.label, "n_real": real.n, "n_fake": fake.n, "dims": {}, "warnings": []}
    fewest = min((n for n in (real.n, fake.n) if n is not None), default=None)
    for dim in extractor.dims:
        entry = result["dims"][dim] = {"distance": real.statistics[dim].distance(fake.statistics[dim])}
        if real.complete and fake.complete and fewest >= FEWEST_FOR_INTERVALS:
            bar_title = f"resampling at {dim}" if progress else None
            entry.update(vars(small_sample(real.rows[dim], fake.rows[dim], replicates, seed, bar_title)))
        if fewest is not None and fewest <= dim:
            result["warnings"].append(
                f"n = {fewest} <= {dim} dims: the covariance is singular and the value mostly "
                "bias; compare only at equal n, against the floor"
            )
    if None in (real.n, fake.n):
        result["warnings"].append("the statistics do not say their n: compare only with values of the same reference")
    if not (real.complete and fake.complete):
        result["warnings"].append(
            "no interval, floor or extrapolation: they need the features of every image "
            "(folders, not .npz; at most --keep images per side)"
        )
    elif fewest < FEWEST_FOR_INTERVALS:
        result["warnings"].append(
            f"no interval, floor or extrapolation: they need {FEWEST_FOR_INTERVALS} images on either side"
        )
    deepest = max(extractor.dims)
    if deepest in real.rows and deepest in fake.rows:
        a, b = real.rows[deepest], fake.rows[deepest]
        if min(len(a), len(b)) > 5:
            result["prdc"] = precision_recall_density_coverage(a, b)
            if suits_kid(a) and suits_kid(b):
                result["kid"] = vars(kid(a, b))
            else:
                result["warnings"].append("no KID: these features are far larger than its kernel is made for")
            if extractor.label == "FD-clip":
                result["cmmd"] = vars(cmmd(a, b))
    return result


def table(result):
    """The result of ``measure`` as lines of text."""
    label = result["label"]
    rows = [("dims", label, "95 % interval", "at half: fake", "real (floor)", "n to infinity")]
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
    lines = [f"{label}: {result['n_real'] or 'unknown n'} real against {result['n_fake'] or 'unknown n'} fake images"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    halves = {entry["half"] for entry in result["dims"].values() if "half" in entry}
    lines += [f"(half: {half} images per side; the floor is real against other real images)" for half in halves]
    where = f"at {max(result['dims'])} dims"
    if "kid" in result:
        value, low, high = (1e3 * result["kid"][name] for name in ("value", "low", "high"))
        lines.append(f"KID x 1000 {where}: {value:.4f}, 95 % interval {low:.4f} - {high:.4f}")
    if "prdc" in result:
        lines.append(", ".join(f"{name} {value:.3f}" for name, value in result["prdc"].items()) + f" {where}, k = 5")
    if "cmmd" in result:
        lines.append("CMMD: {value:.4f}, 95 % interval {low:.4f} - {high:.4f}".format(**result["cmmd"]))
    return lines + [f"warning: {warning}" for warning in result["warnings"]]


def main(argv):
    description = "The Frechet distance of two sets of images at several depths, and how far to trust it."
    parser = Parser(prog="python -m minildm fid", description=description)
    parser.add_argument("real", help="folder, run, run:RUN:SPLIT, name:path data set or .npz statistics")
    parser.add_argument("fake", help="the same")
    parser.add_argument("--dims", type=int, nargs="+", default=[2048, 192, 64], choices=DIMS, help="Inception depths")
    parser.add_argument(
        "--keep", type=at_least(2), default=2000, metavar="N", help="images per side whose features intervals may use"
    )
    parser.add_argument("--replicates", type=at_least(1), default=100, metavar="N", help="bootstrap resamples")
    parser.add_argument(
        "--save-stats", type=Path, metavar="FILE.npz", help="save the statistics of REAL (with a single --dims)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file of results (default: fid.json beside FAKE's images, or here if FAKE is a data set)",
    )
    add_flags(parser, FeatureSettings, "features")
    arguments = parser.parse_args(argv)
    settings = feature_settings(parser, argv)
    if arguments.save_stats is not None:
        if arguments.save_stats.suffix != ".npz":
            raise InputError(f"--save-stats {arguments.save_stats} is not the name of a file; give FILE.npz")
        if settings.features in WITH_DIMS and len(arguments.dims) > 1:
            raise InputError(f"--save-stats writes one depth, and --dims gives {len(arguments.dims)}; give one number "
                             "to --dims")  # fmt: skip
        if Path(arguments.real).suffix == ".npz":
            raise InputError(f"{arguments.real} holds statistics already; --save-stats needs images as REAL")
        writable_file(arguments.save_stats, "--save-stats")
    out = writable_file(_default_out(arguments.fake) if arguments.out is None else arguments.out)

    join()  # the other processes, if torchrun has started several
    sources = (arguments.real, arguments.fake)
    opened = [open_source(source) for source in sources]  # both, then weights, then images
    extractor = open_extractor(settings, arguments.dims)
    for source, one in zip(sources, opened):
        require_dims(one, source, extractor)
    real, fake = (
        measure_source(source, extractor, arguments.keep, settings.batch_size, settings.seed, name)
        for name, source in zip(("real", "fake"), opened)
    )
    if not is_first():
        return 0
    result = measure(real, fake, extractor, arguments.replicates, settings.seed, progress=True)
    result |= {
        "real": arguments.real,
        "fake": arguments.fake,
        "features": extractor.facts,
        "seed": settings.seed,
        "replicates": arguments.replicates,
        "minildm": minildm.__version__,
        "torch": torch.__version__,
    }
    if extractor.label != "FID":
        result["warnings"].append(
            f"{extractor.label} is not FID: comparable only with {extractor.label} of the same weights"
        )
    print("\n".join(table(result)))
    write_json(out, result)
    print(f"wrote {out}")
    if arguments.save_stats is not None:
        real.statistics[extractor.dims[0]].save(arguments.save_stats)
        print(f"wrote {arguments.save_stats}")
    return 0


def _default_out(source):
    """fid.json beside the images or the .npz; in the current folder for a data set."""
    path = Path(source)
    if not path.exists():
        return Path("fid.json")
    return (path.parent if path.suffix == ".npz" else list_images(path)[0].parent) / "fid.json"
