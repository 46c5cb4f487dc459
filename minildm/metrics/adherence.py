"""Prompt adherence: do pictures show what their prompts ask for, as a ruler measures it?

A ruler is any function from pixels to labels, such as one that knows a phantom's geometry, or a classifier:
uint8 (H, W, 3) -> {field: value}, with the field names of the prompts. It may leave out what it cannot see.
"""

from dataclasses import dataclass

import numpy as np

from minildm.errors import InputError
from minildm.metrics.features import open_rgb


@dataclass(frozen=True)
class Agreement:
    share: float   # of the pictures whose measured value is the wanted one
    chance: float  # the same with every other picture's wanted value: what guessing the frequencies gives
    n: int         # pictures whose prompt and ruler both say something about the field


def prompt_adherence(pictures, wanted, ruler, tolerance=None):
    """Compare what was asked for with what is seen.

    Args:
        pictures: paths or records; wanted: a dict of fields for each, from its prompt.
        ruler: see above. tolerance: {field: largest difference that agrees}; other fields must be equal.
    Returns: {field: Agreement}.
    """
    if len(pictures) != len(wanted) or not pictures:
        raise InputError(f"{len(pictures)} pictures and {len(wanted)} prompts: expected one prompt a picture")
    measured = [ruler(np.asarray(open_rgb(picture))) for picture in pictures]
    result = {}
    for name in sorted({name for fields in wanted for name in fields}):
        pairs = [(want[name], seen[name]) for want, seen in zip(wanted, measured) if name in want and name in seen]
        if pairs:
            within = (tolerance or {}).get(name)
            agree = np.array([[seen == want if within is None else abs(float(seen) - float(want)) <= within
                               for want, _ in pairs] for _, seen in pairs])  # (n, n): seen i, wanted j
            n = len(pairs)
            others = (agree.sum() - agree.trace()) / (n * (n - 1)) if n > 1 else float("nan")
            result[name] = Agreement(float(agree.trace() / n), float(others), n)
    return result
