"""A procedural chest radiograph with exact labels: the data set that every clone carries.

In: labels and a seed. Out: uint8 images (size, size), bones white, the patient's right on the left of a frontal view.

``labels`` samples a patient and a finding, ``render`` makes the image (``thorax``, ``frontal`` and ``lateral`` hold the
anatomy, ``xray`` the physics), ``fields`` gives the caption fields in PadChest's terms, and ``ruler`` measures the
labels back from the pixels. Frequencies are plausible for a hospital, except that rare findings are common enough to be
learnt. Not modelled: children. Not for clinical use.
"""

from dataclasses import dataclass

import numpy as np

from minildm.errors import InputError
from minildm.teaching.frontal import Frontal
from minildm.teaching.lateral import Lateral
from minildm.teaching.thorax import LOBES
from minildm.teaching.xray import generators

VIEWS = ("PA", "AP", "lateral")
# Each finding: its share, the places where it occurs, the range of its size and the unit of that size.
FINDINGS = {
    "normal": (0.26, ("",), (0, 0)),
    "cardiomegaly": (0.12, ("",), (0, 0)),  # its extent is the field ctr
    "pleural effusion": (0.15, ("right", "left"), (0.2, 0.6)),  # share of the lung's height under fluid, at the wall
    "pneumothorax": (0.09, ("right", "left"), (1.5, 4.0)),  # cm between chest wall and lung
    "nodule": (0.07, tuple(LOBES), (0.7, 1.5)),  # cm, radius
    "calcified granuloma": (0.07, tuple(LOBES), (0.35, 0.6)),  # cm, radius
    "consolidation": (0.10, tuple(LOBES), (0.8, 1.2)),  # in radii of the lobe
    "pacemaker": (0.07, ("",), (0, 0)),
    "scoliosis": (0.07, ("",), (1.0, 2.4)),  # cm the spine leaves the midline, to each side
}
FRONTAL_ONLY = ("pneumothorax", "scoliosis")  # not visible in a lateral view


@dataclass(frozen=True)
class PhantomLabels:
    """The true labels of one image."""

    age: int  # years, 18 to 92
    sex: str  # male, female
    view: str  # PA, AP (supine or sitting, portable tube), lateral (facing the image's left)
    finding: str  # a key of FINDINGS
    place: str  # side or lobe, or empty
    size: float  # extent of the finding, in the unit given in FINDINGS
    ctr: float  # cardiothoracic ratio as seen in a frontal view: widest heart over widest inner thorax
    patient: str  # each patient has one image

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
    """Sample labels at plausible frequencies.

    Args: seed: a number or a tuple such as (set, index). view, finding: fixed instead of sampled.
    """
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
    """The caption fields of a record, named as in every data set; an empty string is a missing field."""
    return {
        "patient_id": f"phantom-{labels.patient}",
        "age": str(labels.age),
        "sex": labels.sex,
        "view": "LATERAL" if labels.view == "lateral" else labels.view,
        "projection": "L" if labels.view == "lateral" else labels.view,
        "modality": "CR" if labels.view == "AP" else "DX",  # portable cassette or fixed flat panel
        "diagnosis": labels.finding,
        "loc": labels.place,
    }


def render(labels, seed, size=128):
    """The image of ``labels``: uint8 (size, size). Another seed gives another patient with the same labels."""
    return render_batch([labels], [seed], size)[0]


def render_batch(batch, seeds, size=128):
    """Images of many labels: uint8 (B, size, size). No image depends on the others in its batch."""
    if not isinstance(size, int) or size < 32:
        raise InputError(f"a phantom's size must be a whole number of pixels of at least 32, got {size!r}")
    if len(batch) != len(seeds):
        raise InputError(f"each phantom needs its own seed, got {len(batch)} labels and {len(seeds)} seeds")
    images = np.empty((len(batch), size, size), np.uint8)
    # A large block, freed at once, makes glibc keep the smaller blocks that follow instead of returning them to the
    # system. The page faults it saves are a fifth of the time.
    np.empty(24 << 20, np.uint8)
    groups = {}  # a Thorax renders patients with the same finding and kind of view
    for i, label in enumerate(batch):
        groups.setdefault((label.view == "lateral", label.finding), []).append(i)
    chunk = max(1, (1 << 17) // size**2)  # as many images at a time as stay in the processor's cache
    for (lateral, _), members in groups.items():
        view = Lateral if lateral else Frontal
        for start in range(0, len(members), chunk):
            indices = members[start : start + chunk]
            images[indices] = view([batch[i] for i in indices], [seeds[i] for i in indices], size).render()
    return images
