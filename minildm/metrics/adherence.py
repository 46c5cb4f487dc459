"""Prompt adherence: do images show what their prompts ask for, according to a ruler?

A ruler is two functions: ``measure``, from a grey image uint8 (H, W) to a reading, and ``obeys``, from a reading and
the fields of a prompt to {field: True or False}, without the fields it cannot judge.
"""

from dataclasses import dataclass

import numpy as np

from minildm.errors import InputError
from minildm.metrics.sources import read_as_training


@dataclass(frozen=True)
class Agreement:
    share: float  # of the images that show what their own prompt asks for
    low: float  # 95 % interval of the share (Wilson)
    high: float
    chance: float  # that share with every other image's prompt: what ignoring the prompt gives
    n: int  # images whose prompt asks for a value of this field


def prompt_adherence(images, wanted, measure, obeys):
    """Compare each image with its own prompt, and with all others' for the level of chance.

    Args:
        images: paths or records.
        wanted: the fields of each image's prompt.
        measure, obeys: the ruler.
    Returns: {field: Agreement}.
    """
    if len(images) != len(wanted) or not images:
        raise InputError(f"{len(images)} images and {len(wanted)} prompts: expected one prompt per image")
    readings = [measure(np.asarray(read_as_training(image).convert("L"))) for image in images]
    verdicts = [[obeys(reading, fields) for fields in wanted] for reading in readings]  # image i, prompt j
    result = {}
    for name in sorted({name for row in verdicts for verdict in row for name in verdict}):
        matched = [row[i][name] for i, row in enumerate(verdicts) if name in row[i]]
        mismatched = [
            verdict[name]
            for i, row in enumerate(verdicts)
            for j, verdict in enumerate(row)
            if i != j and name in verdict
        ]
        chance = float(np.mean(mismatched)) if mismatched else float("nan")
        share = float(np.mean(matched))
        result[name] = Agreement(share, *wilson(share, len(matched)), chance, len(matched))
    return result


def wilson(share, n, z=1.96):
    """95 % interval of a share of n independent trials (Wilson 1927, JASA 22, 209), also near 0 and 1."""
    centre, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
