"""Training, validation and test splits: by patient, seeded, the same on every machine."""

import hashlib
from collections import Counter

from minildm.errors import InputError

# Share of the images in each split. 80/16/4 and 80/20 are the SeLoRA paper's (arXiv:2408.07196) for IU X-ray and
# Montgomery.
SPLITS = {
    "80/16/4": {"train": 0.80, "validation": 0.16, "test": 0.04},
    "80/20": {"train": 0.80, "test": 0.20},
    "98/2": {"train": 0.98, "validation": 0.02},  # for data sets so large that 2 % are enough for validation
    "70/10/20": {"train": 0.70, "validation": 0.10, "test": 0.20},
}


def order_key(seed, name):
    """A sort key that shuffles names: pseudo-random, the same on every machine and in every version.

    Adding or removing names does not change the order of the others.
    """
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def split_by_patient(records, preset="80/16/4", seed=0):
    """Divide the records so that no patient is in two splits.

    Patients are taken in an order that depends only on (seed, patient). Each goes to the split that still lacks most
    images, so the shares are met up to about one patient's images.

    Returns: {split name: ascending list of indices into ``records``}.
    Raises: InputError for an unknown preset, or if a split would be empty.
    """
    if preset not in SPLITS:
        raise InputError(f"unknown split {preset!r}; one of: {', '.join(SPLITS)}")
    shares = SPLITS[preset]
    image_counts = Counter(record.patient for record in records)
    lacking = {name: share * len(records) for name, share in shares.items()}
    split_of = {}
    for patient in sorted(image_counts, key=lambda patient: order_key(seed, patient)):
        split_of[patient] = max(lacking, key=lacking.get)
        lacking[split_of[patient]] -= image_counts[patient]
    if empty := [name for name in shares if name not in split_of.values()]:
        raise InputError(
            f"the {empty[0]} split is empty: {len(records)} images of {len(image_counts)} patients are too few for "
            f"{preset}; give more data or another --split ({', '.join(SPLITS)})"
        )
    return {name: [i for i, record in enumerate(records) if split_of[record.patient] == name] for name in shares}


def classes_of(records, field):
    """The classes of each record by a caption field, for balanced sampling.

    "Edema|Effusion" and "COVID-19, ARDS" are two classes each.

    Returns: a tuple of class names for each record; () where the field is unknown.
    Raises: InputError if no record has the field, listing the fields there are.
    """
    if not any(field in record.fields for record in records):
        names = sorted({name for record in records for name in record.fields})
        raise InputError(f"no record has a field {field!r} to balance by; known: {', '.join(names)}")
    return [_classes(record.fields.get(field, "")) for record in records]


def _classes(text):
    """ "Edema|Effusion" -> ("Edema", "Effusion"), without repeats."""
    parts = (part.strip() for part in text.replace("|", ",").split(","))
    return tuple(dict.fromkeys(part for part in parts if part))
