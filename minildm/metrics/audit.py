"""``python -m minildm audit FAKE --train DATA --holdout DATA``: has the model memorised its training pictures?

Every generated picture is compared with its nearest training and its nearest held-out picture: a model that has
learnt the *distribution* is as near to either; one that copies is nearer to what it has seen. (The three
samples are the idea of Meehan et al. 2020, arXiv:2004.05675; training pictures drawn out of diffusion models: Carlini
et al. 2023, arXiv:2301.13188.) Two views, each with its own distance:

- pixels: 1 - the best correlation over shifts (to 8 % a side, by half a pixel) and mirroring, of 64 x 64 pictures
  without their low frequencies. Blind to brightness, contrast and compression; what all chests share is filtered out.
- features: Euclidean distance of the chosen network's features.

Held-out pictures show how near *independent* real pictures come to training pictures; a generated one is called a
near-copy when it comes nearer than that (``near_copies``). Not found: copies that are rotated, much scaled, or only a
part of the picture. Training and held-out pictures must come from different patients, of the same source.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minildm.errors import InputError
from minildm.files import writable_folder, written_beside
from minildm.metrics.extractors import as_tensor, batches, image_name, list_images, open_rgb
from minildm.metrics.fid_score import add_feature_arguments, extractor_from, write_json
from minildm.metrics.inception import DEFAULT_WEIGHTS
from minildm.settings import Help

COMPARED_SIDE, SHIFT = 64, 5  # pixels of the compared pictures; largest shift each way
DETAIL = 9  # pixels: broader structures are filtered out
CANDIDATES = 10  # pictures that look nearest at half the size are compared at the full one
NEIGHBOURS = 5  # held-out pictures whose distance a training picture's is compared with
FALSE_ALARM = 0.01  # probability of any false near-copy in a whole audit
FEWEST_HELD_OUT = 10


@dataclass(frozen=True)
class View:
    """What one distance says. Arrays are a generated picture each, (n,)."""

    name: str
    nearest_train: np.ndarray  # index
    nearest_holdout: np.ndarray
    to_train: np.ndarray  # distance
    to_holdout: np.ndarray
    score: np.ndarray  # how unusually near to training data: see near_copies
    threshold: float  # near-copies score below
    near_copy: np.ndarray  # bool
    share: float  # of generated pictures whose nearest picture is a training picture
    expected: float  # that share if the model were independent of which pictures it was trained on
    p: float  # of a share at least as large, by relabelling pictures (one-sided)
    leaked: np.ndarray  # indices of held-out pictures that are themselves near-copies of training pictures


def audit(generated, train, holdout, extractor, batch_size=16, seed=0, progress=False):
    """Audit lists of pictures (of ``list_images``): a View of their pixels and one of the extractor's features."""
    if len(holdout) < FEWEST_HELD_OUT:
        raise InputError(
            f"{len(holdout)} held-out pictures are too few to know what independence looks like; give at "
            f"least {FEWEST_HELD_OUT}"
        )
    described = [
        _describe(pictures, extractor, batch_size, name if progress else None)
        for name, pictures in (("generated", generated), ("training", train), ("held out", holdout))
    ]
    (pixels_g, features_g), (pixels_t, features_t), (pixels_h, features_h) = described
    tests = 2 * len(generated)  # Bonferroni: two views of every picture
    return [
        _view("pixels", pixel_distances, pixels_g, pixels_t, pixels_h, tests, seed),
        _view(extractor.label, feature_distances, features_g, features_t, features_h, tests, seed),
    ]


def _describe(pictures, extractor, batch_size, progress):
    """Pixels (n, 4, 64, 64) and features (n, d) of the pictures' central squares, in one pass."""
    pixels = {}

    def prepare(picture):
        image = _central_square(open_rgb(picture))
        pixels[picture] = detail(as_tensor(image))
        return extractor.prepare(image)

    features = torch.cat(
        [
            torch.from_numpy(batch[max(extractor.dims)])
            for _, batch in batches(pictures, extractor, batch_size, progress, prepare)
        ]
    )
    return torch.stack([pixels[picture] for picture in pictures]), features


def _central_square(image):
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def detail(image):
    """uint8 (3, H, W) -> float32 (4, 64, 64): grey without its low frequencies, at four half-pixel shifts."""
    grey = image.float().mean(0)[None, None]
    grey = F.interpolate(grey, (2 * COMPARED_SIDE, 2 * COMPARED_SIDE), mode="bilinear", antialias=True)
    shifted = torch.cat([grey.roll((dy, dx), dims=(2, 3)) for dy in (0, 1) for dx in (0, 1)])  # (4, 1, 128, 128)
    small = F.avg_pool2d(shifted, 2)  # (4, 1, 64, 64)
    return (small - _box(_box(small)))[:, 0]  # twice a box: nearly a Gaussian


def _box(x):
    return F.avg_pool2d(F.pad(x, [DETAIL // 2] * 4, mode="reflect"), DETAIL, stride=1)


def pixel_distances(a, b, itself=False):
    """1 - correlation of the middle of a_i with the best-fitting window of b_j or its mirror image.

    Args: a (n, 4, 64, 64), b (m, 4, 64, 64) of ``detail``; ``itself``: b is a, and i = j does not count.
    Returns: (n, m) in [0, 2]; inf for all but each row's CANDIDATES.
    """
    b = b[:, 0]
    coarse = _coarse_similarity(F.avg_pool2d(a[:, 0], 2), F.avg_pool2d(b, 2))
    if itself:
        coarse.fill_diagonal_(-torch.inf)
    candidates = coarse.topk(min(CANDIDATES, len(b) - itself), dim=1).indices  # (n, K)
    return torch.full_like(coarse, torch.inf).scatter(1, candidates, 1 - _fine_similarity(a, b, candidates))


def _coarse_similarity(a, b, block=64):
    """Best correlation over whole-pixel shifts and mirroring, all pairs, as matrix products: (n, 32, 32) -> (n, m)."""
    shift = (SHIFT + 1) // 2
    inner = a.shape[-1] - 2 * shift
    query = _standardised(a[:, shift:-shift, shift:-shift].flatten(1))  # (n, inner^2)
    best = []
    for some in b.split(block):
        windows = torch.stack([some, some.flip(-1)], dim=1).unfold(2, inner, 1).unfold(3, inner, 1)
        windows = _standardised(windows.flatten(4).flatten(1, 3))  # (block, 2 * shifts, inner^2)
        best.append((query @ windows.flatten(0, 1).T).unflatten(1, windows.shape[:2]).amax(2))
    return torch.cat(best, dim=1)


def _fine_similarity(a, b, candidates, block=16):
    """The same at the full size and by half pixels, for chosen pairs only: a (n, 4, 64, 64), b (m, 64, 64),
    candidates (n, K) -> (n, K). Correlations by Fourier transform: the middle of a, zero around it, cannot wrap."""
    inner, shifts = COMPARED_SIDE - 2 * SHIFT, 2 * SHIFT + 1
    query = _standardised(a[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT].flatten(2)).unflatten(2, (inner, inner))
    query = torch.fft.rfft2(query, s=(COMPARED_SIDE, COMPARED_SIDE)).conj()  # (n, 4, 64, 33)
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
    """Zero mean and unit length along the last axis; a constant stays zero."""
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-3)


def _view(name, distances, generated, train, holdout, tests, seed):
    from_holdout, between = distances(holdout, train), distances(holdout, holdout, itself=True)
    leaked, _, _ = near_copies(from_holdout, between, from_holdout, between, tests)
    kept = ~leaked  # a held-out twin of a training picture would hide that picture's copies
    if kept.sum() < FEWEST_HELD_OUT:
        raise InputError(
            f"{int(leaked.sum())} of {len(holdout)} held-out pictures are near-copies of training "
            "pictures; give pictures of other patients"
        )
    to_train, to_holdout = distances(generated, train), distances(generated, holdout[kept])
    near, score, threshold = near_copies(to_train, to_holdout, from_holdout[kept], between[kept][:, kept], tests)
    share, expected, p = share_test(to_train, to_holdout, seed)
    return View(
        name,
        to_train.argmin(1).numpy(),
        kept.nonzero()[:, 0][to_holdout.argmin(1)].numpy(),
        to_train.amin(1).numpy(),
        to_holdout.amin(1).numpy(),
        score.numpy(),
        threshold,
        near.numpy(),
        share,
        expected,
        p,
        leaked.nonzero()[:, 0].numpy(),
    )


def near_copies(to_train, to_holdout, null_to_train, null_to_holdout, tests):
    """Which pictures are nearer to a training picture than independent pictures are.

    Args: distances (n, n_train), (n, n_holdout) of the pictures and, as the null, of the held-out pictures themselves.

    Of each picture: r = log(nearest training distance) - mean of log(the five nearest held-out distances). Among
    independent pictures r and log(nearest training distance) are taken for normal, with median and MAD for mean and
    deviation, so that a few duplicates do no harm. A near-copy's r lies below the prediction bound that any of
    ``tests`` independent pictures crosses with probability FALSE_ALARM, and its distance below the null's 1 % point.
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
    """Share of generated pictures whose nearest of all pictures is a training picture, and its permutation test.

    Under independence "training" and "held out" are mere labels, so they are shuffled among the pictures.
    Returns: share, expected share, one-sided p.
    """
    n_train, n_all = to_train.shape[1], to_train.shape[1] + to_holdout.shape[1]
    nearest = torch.cat([to_train, to_holdout], dim=1).argmin(1).numpy()
    votes = np.bincount(nearest, minlength=n_all)  # how many generated pictures each real one is nearest to
    share, rng = votes[:n_train].sum() / len(nearest), np.random.default_rng(seed)
    shuffled = np.array([rng.permutation(votes)[:n_train].sum() for _ in range(relabellings)]) / len(nearest)
    return float(share), n_train / n_all, float((1 + (shuffled >= share - 1e-12).sum()) / (1 + relabellings))


def feature_distances(a, b, itself=False):
    """Euclidean distances of features (n, d) and (m, d): (n, m); inf on the diagonal if ``itself``."""
    distances = torch.cdist(a, b)
    return distances.fill_diagonal_(torch.inf) if itself else distances


def side_by_side(path, views, generated, train, holdout, rows=8):
    """A picture of the most suspicious pictures beside their nearest training and held-out ones."""
    from matplotlib.figure import Figure

    suspicion = [np.where(view.near_copy, view.score - 1e6, view.score) for view in views]  # near-copies first
    order = np.argsort(np.min(suspicion, axis=0))[:rows]
    figure = Figure(figsize=(7.5, 2.7 * len(order)), layout="constrained")
    axes = figure.subplots(len(order), 3, squeeze=False)
    for row, index in zip(axes, order):
        view = min(views, key=lambda view: (not view.near_copy[index], view.score[index]))
        cells = (
            ("generated", generated[index], None),
            ("nearest training", train[view.nearest_train[index]], view.to_train[index]),
            ("nearest held out", holdout[view.nearest_holdout[index]], view.to_holdout[index]),
        )
        for axis, (title, picture, distance) in zip(row, cells):
            axis.imshow(_central_square(open_rgb(picture)).resize((256, 256)))
            axis.set_axis_off()
            verdict = "NEAR-COPY" if view.near_copy[index] else "not flagged"
            remark = verdict if distance is None else f"{view.name}: {distance:.3g}"
            axis.set_title(
                f"{title}\n{image_name(picture)}\n{remark}",
                fontsize=7,
                color="firebrick" if view.near_copy[index] else "black",
            )
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=110)


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m minildm audit", description=__doc__.splitlines()[0], formatter_class=Help
    )
    parser.add_argument("generated", help="folder of generated pictures")
    parser.add_argument("--train", required=True, help="folder or name:path data set the model was trained on")
    parser.add_argument("--holdout", required=True, help="the same, other patients, never trained on")
    parser.add_argument("--out", type=Path, help="folder for audit.json and audit.png (default: GENERATED/audit)")
    add_feature_arguments(parser, default="inception" if DEFAULT_WEIGHTS.is_file() else "random")
    arguments = parser.parse_args(argv)
    if arguments.train == arguments.holdout:
        raise InputError(f"--train and --holdout are both {arguments.train}; give pictures the model has not seen")
    lists = [list_images(source) for source in (arguments.generated, arguments.train, arguments.holdout)]
    out = writable_folder(Path(arguments.generated) / "audit" if arguments.out is None else arguments.out)
    extractor = extractor_from(arguments, dims=(2048,))
    views = audit(*lists, extractor, arguments.batch_size, arguments.seed, progress=True)

    generated, train, holdout = ([image_name(picture) for picture in pictures] for pictures in lists)
    print(f"{len(generated)} generated, {len(train)} training, {len(holdout)} held-out pictures")
    print(f"{'':>12}  {'nearer to training':>18}  {'by chance':>9}  {'p':>7}  {'near-copies':>11}")
    for view in views:
        print(
            f"{view.name:>12}  {view.share:>18.1%}  {view.expected:>9.1%}  {view.p:>7.4f}  {view.near_copy.sum():>11}"
        )
        if len(view.leaked):
            print(
                f"warning: {len(view.leaked)} held-out pictures are near-copies of training pictures ({view.name}) "
                f"and were left out, first {holdout[view.leaked[0]]}: split by patient"
            )
    found = [
        {
            "generated": generated[i],
            "view": view.name,
            "train": train[view.nearest_train[i]],
            "holdout": holdout[view.nearest_holdout[i]],
            "to_train": float(view.to_train[i]),
            "to_holdout": float(view.to_holdout[i]),
            "score": float(view.score[i]),
            "near_copy": bool(view.near_copy[i]),
        }
        for view in views
        for i in range(len(generated))
    ]
    for entry in found:
        if entry["near_copy"]:
            print(
                f"near-copy: {entry['generated']} of {entry['train']} ({entry['view']}: {entry['to_train']:.3g} "
                f"against {entry['to_holdout']:.3g} to the nearest held-out picture)"
            )
    summary = [
        {
            "view": v.name,
            "share": v.share,
            "expected": v.expected,
            "p": v.p,
            "threshold": v.threshold,
            "near_copies": int(v.near_copy.sum()),
            "leaked": [holdout[i] for i in v.leaked],
        }
        for v in views
    ]
    write_json(
        out / "audit.json",
        {
            "views": summary,
            "pictures": found,
            "train": arguments.train,
            "holdout": arguments.holdout,
            "features": extractor.facts,
            "seed": arguments.seed,
            "false_alarm": FALSE_ALARM,
        },
    )
    side_by_side(out / "audit.png", views, *lists)
    print(f"wrote {out / 'audit.json'} and {out / 'audit.png'}: look at the pictures side by side")
    return 0
