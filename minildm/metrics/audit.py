"""``python -m minildm audit RUN|FAKE --train DATA --holdout DATA``: has the model memorised its training pictures?

Every generated picture is compared with its nearest training and its nearest held-out picture: a model that has learnt
the *distribution* is as near to either; one that copies is nearer to what it has seen. (The three-sample idea is that of
Meehan et al. 2020, arXiv:2004.05675; extraction of training pictures from diffusion models: Carlini et al. 2023,
arXiv:2301.13188.) Two views, each with its own distance:

- pixels: 1 - the best correlation over shifts (to 8 % a side) and mirroring, of 64 x 64 pictures without their low
  frequencies. Blind to brightness, contrast and compression; what all chests share is filtered out.
- features: Euclidean distance of the chosen network's features.

Held-out pictures show how near *independent* real pictures come to training pictures; a generated one is called a
near-copy when its distances lie outside of that (``near_copies``). Not found: copies that are rotated, much scaled, or only a part of
the picture. Training and held-out pictures must come from different patients, of the same source.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minildm.errors import InputError
from minildm.files import writable_folder, written_beside
from minildm.metrics.features import as_tensor, batches, list_pictures, open_rgb, picture_name
from minildm.metrics.fid_score import add_feature_arguments, extractor_from, write_json
from minildm.metrics.inception import DEFAULT_WEIGHTS

SIDE, SHIFT = 64, 5       # pixels of the compared pictures; largest shift each way
FALSE_ALARM = 0.01        # probability of any false near-copy in a whole audit
FEWEST_HELD_OUT = 10


@dataclass(frozen=True)
class View:
    """What one distance says. Arrays are a generated picture each, (n,)."""

    name: str
    nearest_train: np.ndarray     # index
    nearest_holdout: np.ndarray
    to_train: np.ndarray          # distance
    to_holdout: np.ndarray
    score: np.ndarray             # robust standard score of log(to_train / to_holdout) among held-out pictures
    threshold: float              # near-copies score below
    near_copy: np.ndarray         # bool
    share: float                  # of generated pictures whose nearest picture is a training picture
    expected: float               # that share if the model were independent of which pictures it was trained on
    p: float                      # of a share at least as large, by relabelling pictures (one-sided)
    leaked: np.ndarray            # indices of held-out pictures that are themselves near-copies of training pictures


def audit(generated, train, holdout, extractor, batch_size=16, seed=0, progress=False):
    """Audit lists of pictures (as ``list_pictures`` gives them): a View of pixels and one of the extractor's features."""
    if len(holdout) < FEWEST_HELD_OUT:
        raise InputError(f"{len(holdout)} held-out pictures are too few to know what independence looks like; give at "
                         f"least {FEWEST_HELD_OUT}")
    described = [_describe(pictures, extractor, batch_size, name if progress else None)
                 for name, pictures in (("generated", generated), ("training", train), ("held out", holdout))]
    (pixels_g, features_g), (pixels_t, features_t), (pixels_h, features_h) = described
    tests = 2 * len(generated)  # Bonferroni: two views of every picture
    return [_view("pixels", pixel_distances, pixels_g, pixels_t, pixels_h, tests, seed),
            _view(extractor.label, torch.cdist, features_g, features_t, features_h, tests, seed)]


def _describe(pictures, extractor, batch_size, progress):
    """Pixels (n, 64, 64) and features (n, d) of the pictures' central squares, in one pass."""
    pixels = {}

    def prepare(picture):
        image = _central_square(open_rgb(picture))
        pixels[picture] = detail(as_tensor(image))
        return extractor.prepare(image)

    features = torch.cat([torch.from_numpy(batch[max(extractor.dims)])
                          for _, batch in batches(pictures, extractor, batch_size, progress, prepare)])
    return torch.stack([pixels[picture] for picture in pictures]), features


def _central_square(image):
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def detail(image):
    """uint8 (3, H, W) -> float32 (64, 64): grey, without what is broader than about a quarter of the picture."""
    grey = F.interpolate(image.float().mean(0)[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)
    window = SIDE // 4 + 1
    return (grey - F.avg_pool2d(F.pad(grey, [window // 2] * 4, mode="reflect"), window, stride=1))[0, 0]


def pixel_distances(a, b, block=32):
    """1 - correlation of the middle of a_i with the best-fitting window of b_j or its mirror image: (n, m) in [0, 2]."""
    inner = SIDE - 2 * SHIFT
    query = _standardised(a[:, SHIFT:-SHIFT, SHIFT:-SHIFT].flatten(1))  # (n, inner^2)
    best = torch.empty(len(a), len(b))
    for start in range(0, len(b), block):
        some = torch.cat([b[start:start + block], b[start:start + block].flip(-1)])
        windows = some.unfold(1, inner, 1).unfold(2, inner, 1).flatten(3).flatten(1, 2)  # (2 block, shifts, inner^2)
        similarity = (query @ _standardised(windows).flatten(0, 1).T).unflatten(1, (2, -1, windows.shape[1]))
        best[:, start:start + block] = similarity.amax(dim=(1, 3))
    return 1 - best


def _standardised(x):
    """Zero mean and unit length along the last axis; a constant stays zero."""
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-3)


def _view(name, distances, generated, train, holdout, tests, seed):
    between = _without_self(distances(holdout, holdout))
    from_holdout = distances(holdout, train)
    own = from_holdout.amin(1), between.amin(1)
    leaked, _, _ = near_copies(*own, *own, tests)
    kept = ~leaked  # a held-out twin of a training picture would hide that picture's copies
    if kept.sum() < FEWEST_HELD_OUT:
        raise InputError(f"{int(leaked.sum())} of {len(holdout)} held-out pictures are near-copies of training pictures; "
                         "give pictures of other patients")
    to_train, to_holdout = distances(generated, train), distances(generated, holdout[kept])
    near, score, threshold = near_copies(to_train.amin(1), to_holdout.amin(1),
                                         from_holdout[kept].amin(1), between[kept][:, kept].amin(1), tests)
    share, expected, p = share_test(to_train, to_holdout, seed)
    return View(name, to_train.argmin(1).numpy(), kept.nonzero()[:, 0][to_holdout.argmin(1)].numpy(),
                to_train.amin(1).numpy(), to_holdout.amin(1).numpy(), score.numpy(), threshold, near.numpy(),
                share, expected, p, leaked.nonzero()[:, 0].numpy())


def near_copies(to_train, to_holdout, null_to_train, null_to_holdout, tests):
    """Which pictures are nearer to training data than independent pictures are.

    The null: of each held-out picture, the distances to its nearest training and nearest other held-out picture. Both
    log(to_train / to_holdout) and log(to_train) are taken for normal there, with median and MAD for mean and deviation
    (a few duplicates among the held-out pictures then do no harm). A near-copy's ratio lies below the prediction bound
    that one of ``tests`` independent pictures crosses with probability FALSE_ALARM, and its distance to training data
    below the null's 1 % point.
    Returns: bool (n,), standard scores of the ratio (n,), the bound on these.
    """
    from scipy import stats
    logs = [x.double().clamp(min=1e-6).log() for x in (to_train, to_holdout, null_to_train, null_to_holdout)]
    score = _robust_score(logs[0] - logs[1], logs[2] - logs[3])
    n = len(null_to_train)
    threshold = float(stats.t.ppf(FALSE_ALARM / tests, n - 1) * (1 + 1 / n) ** 0.5)
    return (score < threshold) & (_robust_score(logs[0], logs[2]) < stats.norm.ppf(0.01)), score, threshold


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


def _without_self(square):
    return square.clone().fill_diagonal_(torch.inf)


def side_by_side(path, views, generated, train, holdout, rows=8):
    """A picture of the most suspicious pictures beside their nearest training and held-out ones."""
    from matplotlib.figure import Figure
    order = np.argsort(np.min([np.where(view.near_copy, view.score - 1e6, view.score) for view in views], axis=0))[:rows]
    figure = Figure(figsize=(7.5, 2.7 * len(order)), layout="constrained")
    axes = figure.subplots(len(order), 3, squeeze=False)
    for row, index in zip(axes, order):
        view = min(views, key=lambda view: (not view.near_copy[index], view.score[index]))
        cells = (("generated", generated[index], None),
                 ("nearest training", train[view.nearest_train[index]], view.to_train[index]),
                 ("nearest held out", holdout[view.nearest_holdout[index]], view.to_holdout[index]))
        for axis, (title, picture, distance) in zip(row, cells):
            axis.imshow(_central_square(open_rgb(picture)).resize((256, 256)))
            axis.set_axis_off()
            detail = f"{view.name}: {distance:.3g}" if distance is not None else \
                "NEAR-COPY" if view.near_copy[index] else "not flagged"
            axis.set_title(f"{title}\n{picture_name(picture)}\n{detail}", fontsize=7,
                           color="firebrick" if view.near_copy[index] else "black")
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=110)


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m minildm audit", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("generated", help="run or folder of generated pictures")
    parser.add_argument("--train", required=True, help="folder or name:path data set the model was trained on")
    parser.add_argument("--holdout", required=True, help="the same, other patients, never trained on")
    parser.add_argument("--out", type=Path, help="folder for audit.json and audit.png (default: GENERATED/audit)")
    add_feature_arguments(parser, default="inception" if DEFAULT_WEIGHTS.is_file() else "random")
    arguments = parser.parse_args(argv)
    if arguments.train == arguments.holdout:
        raise InputError(f"--train and --holdout are both {arguments.train}; give pictures the model has not seen")
    lists = [list_pictures(source) for source in (arguments.generated, arguments.train, arguments.holdout)]
    out = writable_folder(Path(arguments.generated) / "audit" if arguments.out is None else arguments.out)
    extractor = extractor_from(arguments, dims=(2048,))
    views = audit(*lists, extractor, arguments.batch_size, arguments.seed, progress=True)

    generated, train, holdout = ([picture_name(picture) for picture in pictures] for pictures in lists)
    print(f"{len(generated)} generated, {len(train)} training, {len(holdout)} held-out pictures")
    print(f"{'':>12}  {'nearer to training':>18}  {'by chance':>9}  {'p':>7}  {'near-copies':>11}")
    for view in views:
        print(f"{view.name:>12}  {view.share:>18.1%}  {view.expected:>9.1%}  {view.p:>7.4f}  {view.near_copy.sum():>11}")
        if len(view.leaked):
            print(f"warning: {len(view.leaked)} held-out pictures are near-copies of training pictures in {view.name} and were "
                  f"left out, first {holdout[view.leaked[0]]}: split by patient")
    found = [{"generated": generated[i], "view": view.name, "train": train[view.nearest_train[i]],
              "holdout": holdout[view.nearest_holdout[i]], "to_train": float(view.to_train[i]),
              "to_holdout": float(view.to_holdout[i]), "score": float(view.score[i]), "near_copy": bool(view.near_copy[i])}
             for view in views for i in range(len(generated))]
    for entry in found:
        if entry["near_copy"]:
            print(f"near-copy: {entry['generated']} of {entry['train']} ({entry['view']}: {entry['to_train']:.3g} against "
                  f"{entry['to_holdout']:.3g} to the nearest held-out picture)")
    summary = [{"view": v.name, "share": v.share, "expected": v.expected, "p": v.p, "threshold": v.threshold,
                "near_copies": int(v.near_copy.sum()), "leaked": [holdout[i] for i in v.leaked]} for v in views]
    write_json(out / "audit.json", {"views": summary, "pictures": found, "train": arguments.train, "holdout": arguments.holdout,
                                    "features": extractor.facts, "seed": arguments.seed, "false_alarm": FALSE_ALARM})
    side_by_side(out / "audit.png", views, *lists)
    print(f"wrote {out / 'audit.json'} and {out / 'audit.png'}: look at the pictures side by side")
    return 0
