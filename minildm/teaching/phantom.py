"""A procedural chest radiograph with exact labels: the data set that every clone carries.

In: labels and a seed. Out: uint8 pictures (size, size), bones white, the patient's right on the left of a frontal view.

``labels`` draws who is examined and what is found, ``render`` makes the picture (``thorax`` holds the anatomy,
``xray`` the physics), ``fields`` gives the caption's parts in the words of PadChest, and ``ruler`` measures the truth
back from pixels. Frequencies are plausible for a hospital, with rare findings made common enough to learn. Left out:
children. Not for clinical use.
"""

from dataclasses import dataclass

import numpy as np

from minildm.errors import InputError
from minildm.teaching.thorax import LOBES, Thorax
from minildm.teaching.xray import generators

VIEWS = ("PA", "AP", "lateral")
# Each finding: its share, the places it may have, the range of its size and that size's meaning.
FINDINGS = {
    "normal": (0.26, ("",), (0, 0)),
    "cardiomegaly": (0.12, ("",), (0, 0)),  # its extent is the field ctr
    "pleural effusion": (0.15, ("right", "left"), (0.2, 0.6)),  # share of the lung's height under fluid, at the wall
    "pneumothorax": (0.09, ("right", "left"), (1.5, 4.0)),  # cm between chest wall and lung
    "nodule": (0.07, tuple(LOBES), (0.7, 1.5)),  # cm, radius
    "calcified granuloma": (0.07, tuple(LOBES), (0.35, 0.6)),  # cm, radius
    "consolidation": (0.10, tuple(LOBES), (0.8, 1.2)),  # times the lobe's own radius
    "pacemaker": (0.07, ("",), (0, 0)),
    "scoliosis": (0.07, ("",), (1.0, 2.4)),  # cm the spine leaves the midline, to each side
}
FRONTAL_ONLY = ("pneumothorax", "scoliosis")  # what a lateral view does not show


@dataclass(frozen=True)
class PhantomLabels:
    """What is true of a picture."""

    age: int  # years, 18 to 92
    sex: str  # male, female
    view: str  # PA, AP (supine or sitting, portable tube), lateral (facing the picture's left)
    finding: str  # a key of FINDINGS
    place: str  # side or lobe, or empty
    size: float  # extent of the finding, in the unit that FINDINGS names
    ctr: float  # cardiothoracic ratio as a frontal view shows it: widest heart over widest inner thorax
    patient: str  # one picture each

    def __post_init__(self):
        if self.view not in VIEWS or self.sex not in ("male", "female") or self.finding not in FINDINGS:
            raise InputError(
                f"no phantom for {self.sex} {self.view} {self.finding!r}; sex is male or female, "
                f"view one of {', '.join(VIEWS)}, finding one of {', '.join(FINDINGS)}"
            )
        if self.place not in FINDINGS[self.finding][1] or (self.view == "lateral" and self.finding in FRONTAL_ONLY):
            raise InputError(
                f"no phantom for {self.finding!r} at {self.place!r} in a {self.view} view; places are "
                f"{FINDINGS[self.finding][1]}, and {' and '.join(FRONTAL_ONLY)} need PA or AP"
            )


def labels(seed, view=None, finding=None):
    """Labels drawn at plausible frequencies; ``seed`` is a number or a tuple such as (set, index)."""
    (rng,) = generators([seed], 0)
    view = view or str(rng.choice(VIEWS, p=(0.6, 0.22, 0.18)))
    names = [name for name in FINDINGS if not (view == "lateral" and name in FRONTAL_ONLY)]
    shares = np.array([FINDINGS[name][0] for name in names])
    finding = finding or str(rng.choice(names, p=shares / shares.sum()))
    old = finding in ("cardiomegaly", "pleural effusion", "pacemaker")
    age = int(np.clip(rng.normal(69 if old else 52, 12 if old else 18), 18, 92))
    _, places, (low, high) = FINDINGS[finding]
    big = finding == "cardiomegaly"
    ctr = rng.uniform(0.55, 0.66) if big else rng.uniform(0.39, 0.48)
    if view == "AP":  # the heart lies far from the detector and the diaphragm is high
        ctr += 0.04
    return PhantomLabels(
        age=age,
        sex=str(rng.choice(("male", "female"))),
        view=view,
        finding=finding,
        place=str(rng.choice(places)),
        size=round(float(rng.uniform(low, high)), 3),
        ctr=round(float(ctr), 3),
        patient="-".join(str(part) for part in (seed if isinstance(seed, tuple) else (seed,))),
    )


def fields(labels):
    """The caption fields of a record, named as in every data set here; an empty text is a missing field."""
    return {
        "patient_id": f"phantom-{labels.patient}",
        "age": str(labels.age),
        "sex": labels.sex,
        "view": "LATERAL" if labels.view == "lateral" else labels.view,
        "projection": "L" if labels.view == "lateral" else labels.view,
        "modality": "CR" if labels.view == "AP" else "DX",  # portable cassettes against fixed flat panels
        "diagnosis": labels.finding,
        "loc": labels.place,
    }


def render(labels, seed, size=128):
    """The picture of ``labels``: uint8 (size, size). Another seed is another patient with the same findings."""
    return render_batch([labels], [seed], size)[0]


def render_batch(batch, seeds, size=128):
    """Pictures of many labels: uint8 (B, size, size), each the same whatever else is in the batch."""
    if not isinstance(size, int) or size < 32:
        raise InputError(f"a phantom's size must be a whole number of pixels from 32 up, got {size!r}")
    if len(batch) != len(seeds):
        raise InputError(f"each phantom needs a seed of its own, got {len(batch)} labels and {len(seeds)} seeds")
    images = np.empty((len(batch), size, size), np.uint8)
    # One large block, freed at once, makes glibc keep the smaller ones it gets back: the page faults saved are a fifth
    # of the time.
    np.empty(24 << 20, np.uint8)
    alike = {}  # pictures of one kind share a code path
    for i, label in enumerate(batch):
        alike.setdefault((label.view == "lateral", label.finding), []).append(i)
    chunk = max(1, (1 << 17) // size**2)  # a few at a time stay in the processor's cache
    for indices in alike.values():
        for start in range(0, len(indices), chunk):
            some = indices[start : start + chunk]
            images[some] = Thorax([batch[i] for i in some], [seeds[i] for i in some], size).film()
    return images
