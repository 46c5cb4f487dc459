"""Prompt adherence: do pictures show what their prompts ask for, as a ruler measures it?

A ruler is two functions: ``measure``, from a grey picture uint8 (H, W) to a reading, and ``obeys``, from a reading and
the fields of a prompt to {field: True or False}, without the fields it cannot judge.
"""

from dataclasses import dataclass

import numpy as np

from minildm.errors import InputError
from minildm.metrics.extractors import open_rgb


@dataclass(frozen=True)
class Agreement:
    share: float  # of the pictures that show what their own prompt asks for
    chance: float  # that share with every other picture's prompt: what ignoring the prompt gives
    n: int  # pictures whose prompt asks for something of this field


def prompt_adherence(pictures, wanted, measure, obeys):
    """Compare what was asked for with what is seen.

    Args: pictures, as paths or records; wanted, the fields of each one's prompt; the ruler.
    Returns: {field: Agreement}.
    """
    if len(pictures) != len(wanted) or not pictures:
        raise InputError(f"{len(pictures)} pictures and {len(wanted)} prompts: expected one prompt a picture")
    readings = [measure(np.asarray(open_rgb(picture).convert("L"))) for picture in pictures]
    verdicts = [[obeys(reading, fields) for fields in wanted] for reading in readings]  # picture i, prompt j
    result = {}
    for name in sorted({name for row in verdicts for verdict in row for name in verdict}):
        own = [row[i][name] for i, row in enumerate(verdicts) if name in row[i]]
        others = [
            verdict[name]
            for i, row in enumerate(verdicts)
            for j, verdict in enumerate(row)
            if i != j and name in verdict
        ]
        result[name] = Agreement(float(np.mean(own)), float(np.mean(others)) if others else float("nan"), len(own))
    return result
