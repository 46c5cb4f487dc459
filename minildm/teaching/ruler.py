"""The phantom's ruler: measures from the pixels alone what a frontal or lateral chest image shows.

In: uint8 images of any size, (H, W) or (B, H, W). Out: one ``Reading`` each. It tells whether *generated* images follow
their prompts, so it must tolerate slight blur and noise.

A reading is linear: an image becomes about 1,500 features (greys, strength of fine detail, brightest small spots and
course of the spine, each on a coarse grid), and each label is a weighted sum of them. The weights come from ridge
regression on phantoms with known labels, half of them blurred and noisy. Each process fits them anew, in seconds, so
the ruler always matches the phantom it measures. ``tests/benchmarks/bench_phantom.py`` gives its accuracy on other
phantoms. Not for clinical use.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from minildm.errors import InputError
from minildm.progress import Progress
from minildm.teaching import phantom

RULER_SIZE = 128  # pixels a side of the image that is measured
CALIBRATION_SEED = 987_654_321
N_FIT, N_THRESHOLD = 1250, 450  # phantoms that fit the weights, phantoms that set the thresholds
RIDGE = 15.0
SIDES = ("right", "left")


@dataclass(frozen=True)
class Reading:
    """What an image shows. In a lateral view only the view and the sex are read; all findings are then absent."""

    view: str  # PA, AP, lateral
    sex: str  # male, female
    ctr: float  # cardiothoracic ratio; nan in a lateral view
    effusion: str  # right, left or empty; of effusions on both sides the larger
    effusion_size: float  # share of the lung's height, as PhantomLabels.size; 0 without an effusion
    pneumothorax: str  # right, left or empty
    consolidation: str  # a lobe or empty
    granuloma: str  # a lobe or empty; softer nodules are too faint to be read
    pacemaker: bool
    scoliosis: bool

    @property
    def cardiomegaly(self):
        return bool(self.ctr > (0.545 if self.view == "AP" else 0.51))


def measure(images):
    """The ``Reading`` of an image (H, W), or a list of readings of images (B, H, W) or of a list of images."""
    single = isinstance(images, np.ndarray) and images.ndim == 2
    images = [images] if single else list(images)
    readings = _read(np.stack([_features(_square(image)) for image in images]))
    return readings[0] if single else readings


def obeys(reading, wanted):
    """Whether a reading shows what the fields of a prompt (``phantom.fields``) ask for: {field: True or False}.

    Fields that the ruler cannot judge, such as age or a soft nodule, are not in the result.
    """
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
        del seen["calcified granuloma"]  # its false alarms are too many to count against a healthy chest
        verdict["diagnosis"] = not any(seen.values())
    elif finding in seen:
        verdict["diagnosis"] = bool(seen[finding])
        if place:
            verdict["loc"] = seen[finding] == place
    return verdict


# --- from an image to features ---------------------------------------------------------------------------------------


def _square(image):
    """Centre crop resized to (RULER_SIZE, RULER_SIZE) float32: area averages down, bicubic up."""
    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8 or min(image.shape) < 32:
        raise InputError(
            f"the ruler measures grey uint8 images (H, W) of at least 32 pixels, got {image.dtype} {image.shape}; "
            "convert with PIL's convert('L') first"
        )
    side = min(image.shape)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    method = Image.Resampling.BOX if side >= RULER_SIZE else Image.Resampling.BICUBIC
    return np.asarray(crop.resize((RULER_SIZE, RULER_SIZE), method), np.float32)


def _pool(a, cells, reduce):
    k = RULER_SIZE // cells
    return reduce(a.reshape(cells, k, cells, k), axis=(1, 3))


@lru_cache(maxsize=16)
def _filter(sigma, order=0):
    """(RULER_SIZE, RULER_SIZE): a Gaussian filter along one axis, or its derivative, as a matrix."""
    return ndimage.gaussian_filter1d(np.eye(RULER_SIZE), sigma, axis=0, order=order).astype(np.float32)


def _smooth(a, sigma_y, sigma_x):
    return _filter(sigma_y) @ a @ _filter(sigma_x).T


def _features(a):
    """Greys (RULER_SIZE, RULER_SIZE) -> features. The first 256 describe round spots, one per cell of 16 x 16."""
    inner = a[8:-8, 8:-8]
    a = (a - inner.mean()) / max(float(inner.std()), 1.0)
    # Round bright spots: the smaller of the two downward curvatures, which is zero on a line.
    bend, still = _filter(1.0, 2), _filter(1.0)
    yy, xx, xy = bend @ a @ still.T, still @ a @ bend.T, _filter(1.0, 1) @ a @ _filter(1.0, 1).T
    blobs = np.maximum(-(yy + xx) / 2 - np.sqrt((yy - xx) ** 2 / 4 + xy**2), 0)
    blobs = np.minimum(_pool(blobs, 16, np.max), 1.0)
    grey = _pool(a, 32, np.mean)
    detail = _smooth(a, 1.0, 1.0) - _smooth(a, 2.5, 2.5)
    energy = np.sqrt(_pool(detail * detail, 16, np.mean))
    box = _smooth(a, 2.0, 2.0) - _smooth(a, 5.5, 5.5)  # the scale of a pacemaker's can
    boxes = np.maximum(_pool(box, 16, np.max) - 0.4, 0)
    # The spine: the brightest line within the middle third, row by row. Its bends count in either direction.
    middle = _smooth(a, 4.0, 1.5)[:, RULER_SIZE // 3 : RULER_SIZE - RULER_SIZE // 3]
    weight = np.exp(4 * (middle - middle.max(1, keepdims=True)))
    course = (weight * np.arange(middle.shape[1])).sum(1) / weight.sum(1)
    course = _WITHOUT_LINE @ course.reshape(16, -1).mean(1)
    parts = (blobs, grey, 3 * energy, 2 * boxes, 0.5 * np.abs(course), 0.3 * np.abs(_WAVES @ course), np.ones(1))
    return np.concatenate([np.ravel(part) for part in parts])


_T = np.linspace(-1, 1, 16)
_LINE = np.stack([np.ones(16) / 4, _T / np.linalg.norm(_T)])
_WITHOUT_LINE = np.eye(16) - _LINE.T @ _LINE  # removes offset and tilt from the course of the spine
_WAVES = np.stack([np.sin(np.pi * k * _T / 2 + np.pi * shift / 4) for k in (1, 2, 3) for shift in range(4)])


# --- calibration -----------------------------------------------------------------------------------------------------

_PLACED = (  # (field of Reading, findings, places)
    ("effusion", ("pleural effusion",), SIDES),
    ("pneumothorax", ("pneumothorax",), SIDES),
    ("consolidation", ("consolidation",), tuple(phantom.LOBES)),
    ("granuloma", ("calcified granuloma",), tuple(phantom.LOBES)),
)
_MEASUREMENTS = ("ctr", "effusion size")  # numbers; all other targets are yes or no
_GROUPS = {name: (name,) for name in ("lateral", "AP", "female", "pacemaker", "scoliosis")} | {
    name: tuple(f"{name} {place}" for place in places) for name, _, places in _PLACED
}


def blemish(image, rng):
    """The image as a generator might give it: softer, noisier, with another contrast."""
    a = ndimage.gaussian_filter(image.astype(np.float32), rng.uniform(0, 1.0))
    a = a + rng.standard_normal(a.shape, dtype=np.float32) * rng.uniform(0, 8)
    return np.clip((a - 128) * rng.uniform(0.8, 1.15) + 128 + rng.uniform(-15, 15), 0, 255).astype(np.uint8)


def _targets(batch):
    """{name: (mask of the images that count, value)}: +1 or -1 for yes or no, ratios and sizes as they are."""
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


@lru_cache(maxsize=1)
def _calibrate():
    """The result of ``_fit`` on phantoms with each finding in turn, 15 % of them lateral."""
    names = list(phantom.FINDINGS)
    batch, features = [], []
    for start in Progress("calibrating the ruler", "batch", iterable=range(0, N_FIT + N_THRESHOLD, 250), leave=False):
        seeds = [(CALIBRATION_SEED, i) for i in range(start, start + 250)]
        rng = np.random.default_rng((CALIBRATION_SEED, start, 1))
        views = rng.choice(phantom.VIEWS, 250, p=(0.55, 0.3, 0.15))
        labels = []
        for (seed, i), view in zip(seeds, views):
            finding = names[i % len(names)]
            finding = "normal" if view == "lateral" and finding in phantom.FRONTAL_ONLY else finding
            labels.append(phantom.labels((seed, i), view=str(view), finding=finding))
        images = phantom.render_batch(labels, seeds, RULER_SIZE)
        features += [_features(_square(blemish(a, rng) if i % 2 else a)) for i, a in enumerate(images)]
        batch += labels
    return _fit(np.stack(features), _targets(batch), N_FIT)


def _fit(features, targets, n_fit):
    """Fit ridge weights to the first ``n_fit`` images; set each threshold where the others give the fewest errors.

    Returns: ({name: weights}, {name: (mean, standard deviation) of the score where the answer is no},
        {group: threshold}).
    """
    inverses, weights, spread, thresholds = {}, {}, {}, {}
    for name, (counts, value) in targets.items():
        a, no = features[:n_fit][counts[:n_fit]], counts & (value < 0)
        if name.startswith("granuloma"):  # not a sum but a maximum: the spot that stands out most against its cell
            spread[name] = features[no, :256].mean(0), features[no, :256].std(0) + 0.02
            continue
        if (key := counts.tobytes()) not in inverses:
            inverses[key] = np.linalg.inv(a @ a.T + RIDGE * np.eye(len(a)))  # dual form: fewer images than features
        weights[name] = a.T @ (inverses[key] @ value[:n_fit][counts[:n_fit]])
        if name not in _MEASUREMENTS:
            score = (features @ weights[name])[n_fit:][no[n_fit:]]
            spread[name] = score.mean(), score.std()
    scores = _scores(features[n_fit:], weights, spread)
    for group, names in _GROUPS.items():
        counts = targets[names[0]][0][n_fit:]
        yes = np.max([targets[name][1][n_fit:] for name in names], 0)[counts] > 0
        score = np.max([scores[name] for name in names], 0)[counts]
        steps = np.sort(score)
        missed = np.searchsorted(np.sort(score[yes]), steps) / yes.sum()
        alarms = 1 - np.searchsorted(np.sort(score[~yes]), steps) / (~yes).sum()
        thresholds[group] = steps[np.argmin(missed + alarms)]
    return weights, spread, thresholds


# --- from features to a reading --------------------------------------------------------------------------------------


def _scores(features, weights, spread):
    """{name: (B,)}: measurements as they are, the others in standard deviations above an image without."""
    scores = {name: features @ weights[name] for name in _MEASUREMENTS}
    cells = (np.arange(16) + 0.5) / 16 - 0.5
    x, y = np.meshgrid(cells * 35.5, cells * 35.5 + 0.9)  # cm, in the frame of an average phantom
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
    """Features (B, F) -> a list of Reading."""
    weights, spread, thresholds = _calibrate()
    scores = _scores(features, weights, spread)
    hits = {}  # group -> the name above the threshold with the highest score, or "", for each image
    for group, names in _GROUPS.items():
        score = np.stack([scores[name] for name in names])
        hits[group] = [names[k] if high > thresholds[group] else "" for k, high in zip(score.argmax(0), score.max(0))]
    readings = []
    for i in range(len(features)):
        measurements = {name: float(scores[name][i]) for name in _MEASUREMENTS}
        readings.append(_reading({group: names[i] for group, names in hits.items()}, measurements))
    return readings


def _reading(hits, measurements):
    if hits["lateral"]:
        hits = {group: name if group in ("lateral", "female") else "" for group, name in hits.items()}
    places = {name: hits[name].removeprefix(name).strip() for name, *_ in _PLACED}
    return Reading(
        view="lateral" if hits["lateral"] else "AP" if hits["AP"] else "PA",
        sex="female" if hits["female"] else "male",
        ctr=float("nan") if hits["lateral"] else measurements["ctr"],
        effusion_size=measurements["effusion size"] if places["effusion"] else 0.0,
        pacemaker=bool(hits["pacemaker"]),
        scoliosis=bool(hits["scoliosis"]),
        **places,
    )
