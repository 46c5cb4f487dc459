"""The phantom's ruler: what a frontal or lateral chest picture shows, measured from its pixels alone.

In: uint8 pictures of any size, (H, W) or (B, H, W). Out: one ``Reading`` each. It scores whether a *generated*
picture obeys its prompt, so it must not mind slight blur or noise.

A reading is linear: the picture becomes some 1,500 numbers (greys, the strength of fine detail, the brightest small
spots and the spine's course, each on a coarse grid), and each label is a weighted sum of them. The weights come from
ridge regression on phantoms whose labels are known (half of them blurred or noisy), fitted anew in each process, in
seconds: so the ruler always matches the phantom it measures. ``tests/benchmarks/bench_phantom.py`` gives its accuracy
on other phantoms. Not for clinical use.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from minildm.errors import InputError
from minildm.teaching import phantom

RULER_SIDE = 128  # pixels of the picture that is measured
CALIBRATION = (
    987_654_321,
    1250,
    450,
)  # seed of the calibration set, pictures that fit the weights, pictures that set the thresholds
RIDGE = 15.0
SIDES = ("right", "left")


@dataclass(frozen=True)
class Reading:
    """What a picture shows. The findings of a lateral view are not read: all but its view and sex are then absent."""

    view: str  # PA, AP, lateral
    sex: str  # male, female
    ctr: float  # cardiothoracic ratio; nan in a lateral view
    effusion: str  # right, left or empty; bilateral ones read as the larger
    effusion_size: float  # share of the lung's height, as PhantomLabels.size; 0 without one
    pneumothorax: str  # right, left or empty
    consolidation: str  # a lobe or empty
    granuloma: str  # a lobe or empty; softer nodules are too faint to be read
    pacemaker: bool
    scoliosis: bool

    @property
    def cardiomegaly(self):
        return bool(self.ctr > (0.545 if self.view == "AP" else 0.51))


def measure(images):
    """A ``Reading`` of a picture (H, W), or a list of them for pictures (B, H, W) or a list of pictures."""
    single = isinstance(images, np.ndarray) and images.ndim == 2
    images = [images] if single else list(images)
    readings = _read(np.stack([_features(_square(image)) for image in images]))
    return readings[0] if single else readings


def obeys(reading, wanted):
    """Whether a reading shows what a prompt's fields (``phantom.fields``) ask for: {field: True or False}."""
    verdict = {}
    if wanted.get("view"):
        verdict["view"] = reading.view.upper() == wanted["view"].upper()
    if wanted.get("sex"):
        verdict["sex"] = reading.sex == wanted["sex"]
    finding, place = wanted.get("diagnosis"), wanted.get("loc", "")
    seen = {
        "cardiomegaly": reading.cardiomegaly,
        "pacemaker": reading.pacemaker,
        "scoliosis": reading.scoliosis,
        "pleural effusion": reading.effusion,
        "pneumothorax": reading.pneumothorax,
        "consolidation": reading.consolidation,
        "calcified granuloma": reading.granuloma,
    }
    if finding == "normal":
        del seen["calcified granuloma"]  # too many false alarms to count against a healthy chest
        verdict["diagnosis"] = not any(seen.values())
    elif finding in seen:
        verdict["diagnosis"] = bool(seen[finding])
        if place:
            verdict["loc"] = seen[finding] == place
    return verdict


def _square(image):
    """Centre crop, then RULER_SIDE x RULER_SIDE by area averages: float32."""
    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8 or min(image.shape) < 32:
        raise InputError(
            f"the ruler measures grey uint8 pictures (H, W) of 32 pixels or more, got {image.dtype} {image.shape}; "
            "convert with PIL's convert('L') first"
        )
    side = min(image.shape)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return np.asarray(
        crop.resize((RULER_SIDE, RULER_SIDE), Image.Resampling.BOX if side >= RULER_SIDE else Image.Resampling.BICUBIC),
        np.float32,
    )


def _pool(a, cells, how):
    k = RULER_SIDE // cells
    return how(a.reshape(cells, k, cells, k), axis=(1, 3))


@lru_cache(maxsize=16)
def _filter(sigma, order=0):
    """(RULER_SIDE, RULER_SIDE): a Gaussian filter along one axis, or its derivative, as a matrix."""
    return ndimage.gaussian_filter1d(np.eye(RULER_SIDE), sigma, axis=0, order=order).astype(np.float32)


def _smooth(a, sigma_y, sigma_x):
    return _filter(sigma_y) @ a @ _filter(sigma_x).T


def _features(a):
    """(RULER_SIDE, RULER_SIDE) greys -> the features that readings are sums of; the first 256 describe round spots."""
    inner = a[8:-8, 8:-8]
    a = (a - inner.mean()) / max(float(inner.std()), 1.0)
    # Round bright spots: the lesser of the two downward curvatures, so that no line counts.
    bend, still = _filter(1.0, 2), _filter(1.0)
    yy, xx, xy = bend @ a @ still.T, still @ a @ bend.T, _filter(1.0, 1) @ a @ _filter(1.0, 1).T
    blobs = np.maximum(-(yy + xx) / 2 - np.sqrt((yy - xx) ** 2 / 4 + xy**2), 0)
    blobs = np.minimum(_pool(blobs, 16, np.max), 1.0)
    grey = _pool(a, 32, np.mean)
    detail = _smooth(a, 1.0, 1.0) - _smooth(a, 2.5, 2.5)
    energy = np.sqrt(_pool(detail * detail, 16, np.mean))
    box = _smooth(a, 2.0, 2.0) - _smooth(a, 5.5, 5.5)  # what a pacemaker's can stands out by
    boxes = np.maximum(_pool(box, 16, np.max) - 0.4, 0)
    # The spine: the brightest line within the middle third, row by row; its bends, whichever way they go.
    middle = _smooth(a, 4.0, 1.5)[:, RULER_SIDE // 3 : RULER_SIDE - RULER_SIDE // 3]
    weight = np.exp(4 * (middle - middle.max(1, keepdims=True)))
    course = (weight * np.arange(middle.shape[1])).sum(1) / weight.sum(1)
    course = _WITHOUT_LINE @ course.reshape(16, -1).mean(1)
    parts = (blobs, grey, 3 * energy, 2 * boxes, 0.5 * np.abs(course), 0.3 * np.abs(_WAVES @ course), np.ones(1))
    return np.concatenate([np.ravel(part) for part in parts])


_T = np.linspace(-1, 1, 16)
_LINE = np.stack([np.ones(16) / 4, _T / np.linalg.norm(_T)])
_WITHOUT_LINE = np.eye(16) - _LINE.T @ _LINE  # takes offset and tilt out of the spine's course
_WAVES = np.stack([np.sin(np.pi * k * _T / 2 + np.pi * shift / 4) for k in (1, 2, 3) for shift in range(4)])


def blemish(image, rng):
    """The image as a generator might give it: softer, noisier, another contrast."""
    a = image.astype(np.float32)
    a = ndimage.gaussian_filter(a, rng.uniform(0, 1.0)) + rng.standard_normal(a.shape, dtype=np.float32) * rng.uniform(
        0, 8
    )
    return np.clip((a - 128) * rng.uniform(0.8, 1.15) + 128 + rng.uniform(-15, 15), 0, 255).astype(np.uint8)


def _targets(batch):
    """{name: (which pictures count, value)}: yes or no as +1, -1; ratios and sizes as they are."""
    frontal = np.array([label.view != "lateral" for label in batch])
    everywhere = np.ones(len(batch), bool)

    def sign(test):
        return np.array([1.0 if test(label) else -1.0 for label in batch])

    ill = np.array([label.finding == "pleural effusion" for label in batch])
    targets = {
        "lateral": (everywhere, sign(lambda label: label.view == "lateral")),
        "AP": (frontal, sign(lambda label: label.view == "AP")),
        "female": (everywhere, sign(lambda label: label.sex == "female")),
        "ctr": (frontal, np.array([label.ctr for label in batch])),
        "effusion size": (frontal & ill, np.array([label.size for label in batch])),
        "pacemaker": (frontal, sign(lambda label: label.finding == "pacemaker")),
        "scoliosis": (frontal, sign(lambda label: label.finding == "scoliosis")),
    }
    for name, findings, places in _PLACED:
        for place in places:
            hit = sign(lambda label, findings=findings, place=place: label.finding in findings and label.place == place)
            targets[f"{name} {place}"] = (frontal, hit)
    return targets


_PLACED = (
    ("effusion", ("pleural effusion",), SIDES),
    ("pneumothorax", ("pneumothorax",), SIDES),
    ("consolidation", ("consolidation",), tuple(phantom.LOBES)),
    ("granuloma", ("calcified granuloma",), tuple(phantom.LOBES)),
)
_NUMBERS = ("ctr", "effusion size")
_GROUPS = {name: (name,) for name in ("lateral", "AP", "female", "pacemaker", "scoliosis")} | {
    name: tuple(f"{name} {place}" for place in places) for name, _, places in _PLACED
}


@lru_cache(maxsize=1)
def _calibrate():
    """What ``_fit`` gives, from phantoms of every finding in turn, 15 % of them lateral."""
    seed, fit, check = CALIBRATION
    names = list(phantom.FINDINGS)
    batch, features = [], []
    for start in tqdm(range(0, fit + check, 250), desc="calibrating the ruler", leave=False):
        seeds = [(seed, i) for i in range(start, start + 250)]
        rng = np.random.default_rng((seed, start, 1))
        views = rng.choice(phantom.VIEWS, 250, p=(0.55, 0.3, 0.15))
        some = []
        for (_, i), view in zip(seeds, views):
            finding = names[i % len(names)]
            finding = "normal" if view == "lateral" and finding in phantom.FRONTAL_ONLY else finding
            some.append(phantom.labels((seed, i), view=str(view), finding=finding))
        images = phantom.render_batch(some, seeds, RULER_SIDE)
        features += [_features(_square(blemish(a, rng) if i % 2 else a)) for i, a in enumerate(images)]
        batch += some
    return _fit(np.stack(features), _targets(batch), fit)


def _fit(features, targets, fit):
    """Readings from labelled pictures: ridge weights from the first ``fit``, thresholds from the others, where they
    miss least.

    Returns ({name: weights}, {name: mean and spread of the score where the answer is no}, {group: threshold}).
    """
    inverses, weights, spread, thresholds = {}, {}, {}, {}
    for name, (counts, value) in targets.items():
        a, no = features[:fit][counts[:fit]], counts & (value < 0)
        if name.startswith(
            "granuloma"
        ):  # not a sum but a maximum: the blob that stands out most, given what its place is used to
            spread[name] = features[no, :256].mean(0), features[no, :256].std(0) + 0.02
            continue
        if (key := counts.tobytes()) not in inverses:
            inverses[key] = np.linalg.inv(a @ a.T + RIDGE * np.eye(len(a)))  # dual: fewer pictures than numbers
        weights[name] = a.T @ (inverses[key] @ value[:fit][counts[:fit]])
        if name not in _NUMBERS:
            score = (features @ weights[name])[fit:][no[fit:]]
            spread[name] = score.mean(), score.std()
    scores = _scores(features[fit:], weights, spread)
    for group, names in _GROUPS.items():
        counts = targets[names[0]][0][fit:]
        yes = np.max([targets[name][1][fit:] for name in names], 0)[counts] > 0
        score = np.max([scores[name] for name in names], 0)[counts]
        steps = np.sort(score)
        missed = np.searchsorted(np.sort(score[yes]), steps) / yes.sum()
        alarms = 1 - np.searchsorted(np.sort(score[~yes]), steps) / (~yes).sum()
        thresholds[group] = steps[np.argmin(missed + alarms)]
    return weights, spread, thresholds


def _scores(features, weights, spread):
    """{name: (B,)}: yes-or-no readings in standard deviations above a picture without, numbers as they are."""
    scores = {name: features @ weights[name] for name in _NUMBERS}
    cells = (np.arange(16) + 0.5) / 16 - 0.5
    x, y = np.meshgrid(cells * 35.5, cells * 35.5 + 0.9)  # cm, in the phantom's middle frame
    centres = np.array(list(phantom.LOBES.values()))
    nearest = np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1]).argmin(-1).ravel()
    lung = (np.abs(x) > 3) & (np.abs(x) < 13.5) & (y > -12) & (y < 9)
    for name, (mean, deviation) in spread.items():
        if name in weights:
            scores[name] = (features @ weights[name] - mean) / deviation
        else:
            lobe = lung.ravel() & (nearest == list(phantom.LOBES).index(name.removeprefix("granuloma ")))
            scores[name] = ((features[:, :256] - mean) / deviation)[:, lobe].max(1)
    return scores


def _read(features):
    weights, spread, thresholds = _calibrate()
    scores = _scores(features, weights, spread)
    found = {}
    for group, names in _GROUPS.items():
        every = np.stack([scores[name] for name in names])
        found[group] = [names[k] if high > thresholds[group] else "" for k, high in zip(every.argmax(0), every.max(0))]
    return [
        _reading({group: hits[i] for group, hits in found.items()}, {name: float(scores[name][i]) for name in _NUMBERS})
        for i in range(len(features))
    ]


def _reading(found, numbers):
    if found["lateral"]:
        found = {group: found[group] if group in ("lateral", "female") else "" for group in found}
    places = {name: found[name].removeprefix(name).strip() for name, *_ in _PLACED}
    return Reading(
        view="lateral" if found["lateral"] else "AP" if found["AP"] else "PA",
        sex="female" if found["female"] else "male",
        ctr=float("nan") if found["lateral"] else numbers["ctr"],
        effusion_size=numbers["effusion size"] if places["effusion"] else 0.0,
        pacemaker=bool(found["pacemaker"]),
        scoliosis=bool(found["scoliosis"]),
        **places,
    )
