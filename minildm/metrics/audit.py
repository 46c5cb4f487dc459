"""``python -m minildm audit FAKE --train DATA --holdout DATA``: has the model memorised training images?

Each generated image is compared with its nearest training image and its nearest held-out image. A model that has learnt
the *distribution* is equally near to both kinds; one that copies is nearer to what it was trained on. (Comparing three
samples is the idea of Meehan et al. 2020, arXiv:2004.05675. Training images extracted from diffusion models: Carlini et
al. 2023, arXiv:2301.13188.) Two comparisons, each with its own distance:

- pixels: 1 - the best correlation over shifts (up to 8 % of the side, in half pixels) and mirroring, of 64 x 64 images
  without their low frequencies. Insensitive to brightness, contrast and compression, and to what all chests share.
- features: Euclidean distance of a network's features.

Held-out images show how near *independent* real images come to training images; a generated image that comes nearer is
called a near-copy (``near_copies``). Not detected: copies that are rotated, strongly scaled, or only part of an image.
Training and held-out images must come from different patients and the same source.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minildm.data.open import DataSettings
from minildm.data.reading import Transform
from minildm.distributed import gather_to_first, is_first, join
from minildm.errors import InputError
from minildm.files import writable_folder, written_beside
from minildm.loading import find_weights
from minildm.metrics.extractors import FeatureSettings, feature_settings, open_extractor
from minildm.metrics.features import batches
from minildm.metrics.inception import WEIGHTS_NAME
from minildm.metrics.run_split import settings_for
from minildm.metrics.sources import (
    RECORD_SIZE,
    as_tensor,
    image_name,
    list_as_training,
    list_images,
    read_as_training,
    write_json,
)
from minildm.settings import Parser, add_flags, from_flags

COMPARED_SIZE, SHIFT = 64, 5  # pixels a side of the compared images; largest shift in each direction
DETAIL = 9  # pixels: broader structures are filtered out
CANDIDATES = 10  # images nearest at half the size, which are then compared at full size
NEIGHBOURS = 5  # held-out images that a training image's distance is compared with
FALSE_ALARM = 0.01  # probability of any false near-copy in a whole audit
FEWEST_HELD_OUT = 10
NOT_OF_AUDIT = ("limit", "balance", "prompt_template", "split", "skip_bad")  # data flags that do not apply


@dataclass(frozen=True)
class Comparison:
    """The audit by one distance. Arrays have one entry per generated image, (n,)."""

    name: str
    nearest_train: np.ndarray  # index
    nearest_holdout: np.ndarray
    to_train: np.ndarray  # distance to it
    to_holdout: np.ndarray
    score: np.ndarray  # low: unusually near to a training image; see near_copies
    threshold: float  # near-copies score below it
    near_copy: np.ndarray  # bool
    share: float  # of generated images whose nearest image is a training image
    expected: float  # that share if the model were independent of which images it was trained on
    p: float  # probability of a share at least as large, by relabelling images (one-sided)
    leaked: np.ndarray  # indices of held-out images that are themselves near-copies of training images


def audit(generated, train, holdout, extractor, batch_size=16, seed=0, progress=False, transform=None):
    """Audit lists of images (paths or records): a Comparison by pixels and one by the extractor's features.

    Args: transform: reading.Transform with which all images are read, as training does; default: 512 px, the centre.
    Of several processes that work together, the first gets the result, and the others None.
    """
    transform = Transform(RECORD_SIZE) if transform is None else transform
    _check_held_out(holdout)
    described = [
        _describe(images, transform, extractor, batch_size, name if progress else None)
        for name, images in (("generated", generated), ("training", train), ("held out", holdout))
    ]
    return compare_described(*described, extractor.label, seed) if is_first() else None


def compare_described(generated, train, holdout, label, seed=0):
    """The two Comparisons of images that are described already.

    Args: generated, train, holdout: each (pixels (n, 4, 64, 64) from `detail`, features (n, d)), tensors. label: the
        features' name.
    """
    (pixels_g, features_g), (pixels_t, features_t), (pixels_h, features_h) = generated, train, holdout
    _check_held_out(pixels_h)
    tests = 2 * len(pixels_g)  # Bonferroni: two comparisons of each image
    return [
        _compare("pixels", pixel_distances, pixels_g, pixels_t, pixels_h, tests, seed),
        _compare(label, feature_distances, features_g, features_t, features_h, tests, seed),
    ]


def _check_held_out(images):
    if len(images) < FEWEST_HELD_OUT:
        raise InputError(
            f"{len(images)} held-out images are too few to show how near independent images come; give at least "
            f"{FEWEST_HELD_OUT}"
        )


def _describe(images, transform, extractor, batch_size, progress):
    """Pixels (n, 4, 64, 64) and features (n, d) of the images, in one pass; None in a process that is not the first."""
    pixels = {}

    def prepare(image):
        square = read_as_training(image, transform)
        pixels[image] = detail(as_tensor(square))
        return extractor.prepare(square)

    deepest = max(extractor.dims)
    features = [batch[deepest] for _, batch in batches(images, extractor, batch_size, progress, prepare)]
    own = [i for i, image in enumerate(images) if image in pixels]
    parts = gather_to_first((own, torch.stack([pixels[images[i]] for i in own]) if own else []))
    if parts is None:
        return None
    pixels = {i: values for indices, part in parts for i, values in zip(indices, part)}
    return torch.stack([pixels[i] for i in range(len(images))]), torch.from_numpy(np.concatenate(features))


# --- distances -------------------------------------------------------------------------------------------------------


def detail(image):
    """uint8 (3, H, W) -> float32 (4, 64, 64): grey without its low frequencies, at four half-pixel shifts."""
    grey = image.float().mean(0)[None, None]
    grey = F.interpolate(grey, (2 * COMPARED_SIZE, 2 * COMPARED_SIZE), mode="bilinear", antialias=True)
    shifted = torch.cat([grey.roll((dy, dx), dims=(2, 3)) for dy in (0, 1) for dx in (0, 1)])  # (4, 1, 128, 128)
    small = F.avg_pool2d(shifted, 2)  # (4, 1, 64, 64)
    return (small - _box(_box(small)))[:, 0]  # two box filters are nearly a Gaussian


def _box(x):
    return F.avg_pool2d(F.pad(x, [DETAIL // 2] * 4, mode="reflect"), DETAIL, stride=1)


def pixel_distances(a, b, itself=False):
    """1 - correlation of the middle of a_i with the best-fitting window of b_j or of its mirror image.

    Args: a (n, 4, 64, 64), b (m, 4, 64, 64) from ``detail``. itself: b is a, and i = j does not count.
    Returns: (n, m) in [0, 2]; inf except for the CANDIDATES of each row.
    """
    b = b[:, 0]
    coarse = _coarse_similarity(F.avg_pool2d(a[:, 0], 2), F.avg_pool2d(b, 2))
    if itself:
        coarse.fill_diagonal_(-torch.inf)
    candidates = coarse.topk(min(CANDIDATES, len(b) - itself), dim=1).indices  # (n, K)
    return torch.full_like(coarse, torch.inf).scatter(1, candidates, 1 - _fine_similarity(a, b, candidates))


def _coarse_similarity(a, b, block=64):
    """Best correlation of all pairs over whole-pixel shifts and mirroring: (n, 32, 32), (m, 32, 32) -> (n, m)."""
    shift = (SHIFT + 1) // 2
    inner = a.shape[-1] - 2 * shift
    query = _standardised(a[:, shift:-shift, shift:-shift].flatten(1))  # (n, inner^2)
    best = []
    for part in b.split(block):
        windows = torch.stack([part, part.flip(-1)], dim=1).unfold(2, inner, 1).unfold(3, inner, 1)
        windows = _standardised(windows.flatten(4).flatten(1, 3))  # (block, 2 * shifts, inner^2)
        best.append((query @ windows.flatten(0, 1).T).unflatten(1, windows.shape[:2]).amax(2))
    return torch.cat(best, dim=1)


def _fine_similarity(a, b, candidates, block=16):
    """Best correlation at full size and in half-pixel shifts, for the candidate pairs only.

    Args: a (n, 4, 64, 64), b (m, 64, 64), candidates (n, K). Returns: (n, K).
    By Fourier transform: with zeros around it, the middle of a cannot wrap around.
    """
    inner, shifts = COMPARED_SIZE - 2 * SHIFT, 2 * SHIFT + 1
    query = _standardised(a[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT].flatten(2)).unflatten(2, (inner, inner))
    query = torch.fft.rfft2(query, s=(COMPARED_SIZE, COMPARED_SIZE)).conj()  # (n, 4, 64, 33)
    both = torch.stack([b, b.flip(-1)], dim=1)  # (m, 2, 64, 64)
    mean, square = (F.avg_pool2d(x, inner, stride=1) for x in (both, both.square()))
    norm = inner * (square - mean.square()).clamp(min=1e-6).sqrt()  # of each centred window, (m, 2, 11, 11)
    both = torch.fft.rfft2(both)
    best = []
    for q, chosen in zip(query.split(block), candidates.split(block)):
        products = q[:, None, :, None] * both[chosen][:, :, None]  # (block, K, 4, 2, 64, 33)
        similarity = torch.fft.irfft2(products)[..., :shifts, :shifts] / norm[chosen][:, :, None]
        best.append(similarity.flatten(2).amax(2))
    return torch.cat(best)


def _standardised(x):
    """Zero mean and unit length along the last axis; a constant becomes zero."""
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-3)


def feature_distances(a, b, itself=False):
    """Euclidean distances between features (n, d) and (m, d): (n, m); inf on the diagonal if b is a (``itself``)."""
    # By matrix products, whose rounding grows with the features' length, not with the distance: copies are at tiny
    # distances, hence in float64.
    a = a.double()
    parts = (torch.cdist(a, part.double(), compute_mode="use_mm_for_euclid_dist") for part in b.split(8192))
    distances = torch.cat([part.float() for part in parts], dim=1)
    return distances.fill_diagonal_(torch.inf) if itself else distances


# --- statistics ------------------------------------------------------------------------------------------------------


def _compare(name, distances, generated, train, holdout, tests, seed):
    from_holdout, between = distances(holdout, train), distances(holdout, holdout, itself=True)
    leaked, _, _ = near_copies(from_holdout, between, from_holdout, between, tests)
    kept = ~leaked  # a held-out twin of a training image would hide the copies of that image
    if kept.sum() < FEWEST_HELD_OUT:
        raise InputError(
            f"{int(leaked.sum())} of {len(holdout)} held-out images are near-copies of training images; give images of "
            "other patients"
        )
    if leaked.any():
        between = distances(holdout[kept], holdout[kept], itself=True)
    to_train, to_holdout = distances(generated, train), distances(generated, holdout[kept])
    near_copy, score, threshold = near_copies(to_train, to_holdout, from_holdout[kept], between, tests)
    share, expected, p = share_test(to_train, to_holdout, seed)
    return Comparison(
        name=name,
        nearest_train=to_train.argmin(1).numpy(),
        nearest_holdout=kept.nonzero()[:, 0][to_holdout.argmin(1)].numpy(),
        to_train=to_train.amin(1).numpy(),
        to_holdout=to_holdout.amin(1).numpy(),
        score=score.numpy(),
        threshold=threshold,
        near_copy=near_copy.numpy(),
        share=share,
        expected=expected,
        p=p,
        leaked=leaked.nonzero()[:, 0].numpy(),
    )


def near_copies(to_train, to_holdout, null_to_train, null_to_holdout, tests):
    """Which images are nearer to a training image than independent images are.

    For each image, r = log(nearest training distance) - mean of log(the five nearest held-out distances). Among
    independent images r and log(nearest training distance) are assumed normal; median and MAD replace mean and standard
    deviation, so that a few duplicates do no harm. An image is a near-copy if its r lies below the prediction bound
    that any of ``tests`` independent images crosses with probability FALSE_ALARM, and its distance lies below the 1 %
    point of the independent ones.

    Args:
        to_train, to_holdout: distances (n, n_train) and (n, n_holdout) of the images.
        null_to_train, null_to_holdout: the same of independent images, here the held-out ones.
    Returns: bool (n,), standard scores of r (n,), the bound on these.
    """
    from scipy import stats

    def logs(train, holdout):
        nearest = train.double().amin(1).clamp(min=1e-6).log()
        around = holdout.double().topk(NEIGHBOURS, dim=1, largest=False).values.clamp(min=1e-6).log().mean(1)
        return nearest, nearest - around

    (nearest, r), (null_nearest, null_r) = logs(to_train, to_holdout), logs(null_to_train, null_to_holdout)
    score, n = _robust_score(r, null_r), len(null_r)
    bound = float(stats.t.ppf(FALSE_ALARM / tests, n - 1) * (1 + 1 / n) ** 0.5)
    return (score < bound) & (_robust_score(nearest, null_nearest) < stats.norm.ppf(0.01)), score, bound


def _robust_score(values, null):
    median = null.median()
    return (values - median) / (1.4826 * (null - median).abs().median()).clamp(min=1e-3)


def share_test(to_train, to_holdout, seed, relabellings=9999):
    """Share of generated images whose nearest image of all is a training image, and its permutation test.

    If the model is independent of its training set, "training" and "held out" are mere labels and can be shuffled.
    Returns: share, expected share, one-sided p.
    """
    n_train, n_all = to_train.shape[1], to_train.shape[1] + to_holdout.shape[1]
    nearest = torch.cat([to_train, to_holdout], dim=1).argmin(1).numpy()
    votes = np.bincount(nearest, minlength=n_all)  # how many generated images each real one is nearest to
    share, rng = votes[:n_train].sum() / len(nearest), np.random.default_rng(seed)
    shuffled = np.array([rng.permutation(votes)[:n_train].sum() for _ in range(relabellings)]) / len(nearest)
    return float(share), n_train / n_all, float((1 + (shuffled >= share - 1e-12).sum()) / (1 + relabellings))


# --- results ---------------------------------------------------------------------------------------------------------


def side_by_side(path, comparisons, generated, train, holdout, transform, rows=8):
    """Write a figure: the most suspicious generated images beside their nearest training and held-out images."""
    from matplotlib.figure import Figure

    suspicion = [np.where(c.near_copy, c.score - 1e6, c.score) for c in comparisons]  # near-copies first
    order = np.argsort(np.min(suspicion, axis=0))[:rows]
    figure = Figure(figsize=(7.5, 2.7 * len(order)), layout="constrained")
    axes = figure.subplots(len(order), 3, squeeze=False)
    for row, index in zip(axes, order):
        worst = min(comparisons, key=lambda c: (not c.near_copy[index], c.score[index]))
        verdict, colour = ("NEAR-COPY", "firebrick") if worst.near_copy[index] else ("not flagged", "black")
        cells = (
            ("generated", generated[index], verdict),
            ("nearest training", train[worst.nearest_train[index]], f"{worst.name}: {worst.to_train[index]:.3g}"),
            ("nearest held out", holdout[worst.nearest_holdout[index]], f"{worst.name}: {worst.to_holdout[index]:.3g}"),
        )
        for axis, (title, image, remark) in zip(row, cells):
            axis.imshow(read_as_training(image, transform).resize((256, 256)))
            axis.set_axis_off()
            axis.set_title(f"{title}\n{image_name(image)}\n{remark}", fontsize=7, color=colour)
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=110)


def summary_table(comparisons, holdout):
    """The result as lines of text. ``holdout``: names of the held-out images."""
    lines = [f"{'':>12}  {'nearer to training':>18}  {'by chance':>9}  {'p':>7}  {'near-copies':>11}"]
    for c in comparisons:
        lines.append(f"{c.name:>12}  {c.share:>18.1%}  {c.expected:>9.1%}  {c.p:>7.4f}  {c.near_copy.sum():>11}")
        if len(c.leaked):
            lines.append(
                f"warning: {len(c.leaked)} held-out images are near-copies of training images ({c.name}) and were "
                f"left out, first {holdout[c.leaked[0]]}: split by patient"
            )
    return lines


def as_entries(comparisons, generated, train, holdout):
    """One dict per comparison and generated image, for audit.json. The arguments after the first are names."""
    return [
        {
            "generated": name,
            "view": c.name,
            "train": train[c.nearest_train[i]],
            "holdout": holdout[c.nearest_holdout[i]],
            "to_train": float(c.to_train[i]),
            "to_holdout": float(c.to_holdout[i]),
            "score": float(c.score[i]),
            "near_copy": bool(c.near_copy[i]),
        }
        for c in comparisons
        for i, name in enumerate(generated)
    ]


def as_views(comparisons, holdout):
    """One dict per comparison, for audit.json. ``holdout``: names."""
    return [
        {
            "view": c.name,
            "share": c.share,
            "expected": c.expected,
            "p": c.p,
            "threshold": c.threshold,
            "near_copies": int(c.near_copy.sum()),
            "leaked": [holdout[i] for i in c.leaked],
        }
        for c in comparisons
    ]


def main(argv):
    parser = Parser(prog="python -m minildm audit", description="Has the model memorised training images?")
    parser.add_argument("generated", help="folder or run of generated images")
    parser.add_argument(
        "--train",
        required=True,
        metavar="DATA",
        help="what the model was trained on: run:RUN:train, a folder or a name:path data set",
    )
    parser.add_argument(
        "--holdout",
        required=True,
        metavar="DATA",
        help="other patients, never trained on: run:RUN:test (or validation, held-out: both), ...",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for audit.json and audit.png (default: GENERATED/audit, or audit here for a data set)",
    )
    add_flags(parser, FeatureSettings, "features")
    add_flags(parser, DataSettings, "how training selected and read its images", skip=NOT_OF_AUDIT)
    parser.set_defaults(features="inception" if find_weights(WEIGHTS_NAME).is_file() else "random")
    arguments = parser.parse_args(argv)
    settings = feature_settings(parser, argv)
    if arguments.train == arguments.holdout:
        raise InputError(
            f"--train and --holdout are both {arguments.train}; give --holdout images the model was not trained on"
        )
    sources = (arguments.train, arguments.holdout)
    data = settings_for(sources, from_flags(DataSettings, arguments), parser.given(argv))
    transform = data.transform(RECORD_SIZE)
    lists = [list_images(arguments.generated)]
    lists += [list_as_training(source, data) for source in sources]
    beside = Path(arguments.generated) / "audit" if Path(arguments.generated).is_dir() else Path("audit")
    out = writable_folder(beside if arguments.out is None else arguments.out)
    join()  # the other processes, if torchrun has started several
    extractor = open_extractor(settings, dims=(2048,))
    comparisons = audit(*lists, extractor, settings.batch_size, settings.seed, progress=True, transform=transform)
    if comparisons is None:
        return 0

    generated, train, holdout = ([image_name(image) for image in images] for images in lists)
    print(f"{len(generated)} generated, {len(train)} training, {len(holdout)} held-out images")
    print("\n".join(summary_table(comparisons, holdout)))
    entries = as_entries(comparisons, generated, train, holdout)
    for entry in entries:
        if entry["near_copy"]:
            print(
                f"near-copy: {entry['generated']} of {entry['train']} ({entry['view']}: {entry['to_train']:.3g}, "
                f"against {entry['to_holdout']:.3g} to the nearest held-out image)"
            )
    result = {
        "views": as_views(comparisons, holdout),
        "pictures": entries,
        "train": arguments.train,
        "holdout": arguments.holdout,
    }
    result |= {
        "features": extractor.facts,
        "seed": settings.seed,
        "false_alarm": FALSE_ALARM,
        "transform": str(transform),
    }
    write_json(out / "audit.json", result)
    side_by_side(out / "audit.png", comparisons, *lists, transform)
    print(f"wrote {out / 'audit.json'} and {out / 'audit.png'}: look at the images side by side")
    return 0
