"""Which pictures train, validate and test: by patient, seeded, the same on every machine."""

from collections import Counter

from minildm.data.records import order_key
from minildm.errors import InputError

# Shares of the pictures. 80/16/4 and 80/20: SeLoRA paper (arXiv:2408.07196) for IU X-ray and Montgomery.
SPLITS = {
    "80/16/4": {"train": 0.80, "validation": 0.16, "test": 0.04},
    "80/20": {"train": 0.80, "test": 0.20},
    "98/2": {"train": 0.98, "validation": 0.02},  # of sets so large that two hundredths are enough to look at
    "70/10/20": {"train": 0.70, "validation": 0.10, "test": 0.20},
}


def split_by_patient(records, preset="80/16/4", seed=0):
    """Share the records out so that no patient is in two splits.

    Patients come in an order that depends only on (seed, patient); each goes to the split that still lacks most
    pictures, so the shares are met to within one patient's pictures.
    Returns: {split name: list of indices into ``records``, ascending}.
    Raises: InputError for an unknown preset or a split that stays empty.
    """
    if preset not in SPLITS:
        raise InputError(f"unknown split {preset!r}; one of: {', '.join(SPLITS)}")
    shares = SPLITS[preset]
    pictures = Counter(record.patient for record in records)
    lacking = {name: share * len(records) for name, share in shares.items()}
    split_of = {}
    for patient in sorted(pictures, key=lambda patient: order_key(seed, patient)):
        split_of[patient] = max(lacking, key=lacking.get)
        lacking[split_of[patient]] -= pictures[patient]
    if empty := [name for name in shares if name not in split_of.values()]:
        raise InputError(
            f"the {empty[0]} split is empty: {len(records)} pictures of {len(pictures)} patients are too "
            f"few for {preset}; give more data or another --split ({', '.join(SPLITS)})"
        )
    return {name: [i for i, record in enumerate(records) if split_of[record.patient] == name] for name in shares}


def classes_of(records, field):
    """The classes a caption field puts each record into: "Edema|Effusion" and "COVID-19, ARDS" are two each.

    Returns: one tuple of names a record; () where the field is not known.
    Raises: InputError if no record has the field, listing those there are.
    """
    if not any(field in record.fields for record in records):
        there = sorted({name for record in records for name in record.fields})
        raise InputError(f"no record has a field {field!r} to balance by; known: {', '.join(there)}")
    return [
        tuple(
            dict.fromkeys(
                part.strip() for part in record.fields.get(field, "").replace("|", ",").split(",") if part.strip()
            )
        )
        for record in records
    ]
