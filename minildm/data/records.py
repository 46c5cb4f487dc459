"""Records, the common form of all data sets, and how sets/ describes an image by its fields."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minildm.data import values
from minildm.tables import present

BUILT_IN = ("phantom", "procedural", "textures")  # data sets that are rendered on demand and need no path
MOST_RENDERED = 10**6  # images of such a data set


@dataclass(frozen=True)
class Record:
    """One image and what is known about it. ``fields`` holds known values only."""

    name: str  # unique in its data set and the same on every machine: usually the path below the data set's folder
    patient: str  # all images of a patient go to the same split
    fields: dict[str, str] = field(default_factory=dict, hash=False)  # for prompts: age (years), sex, view, ...
    path: Path | None = None  # the image file; None if ``render`` makes the image
    render: Callable[[int], np.ndarray] | None = None  # side in pixels -> uint8 (side, side) or (side, side, 3)
    recipe: str | None = None  # names all that ``render`` depends on, so that a rendered image can be found again
    frontal: bool | None = True  # False: a lateral or other view; None: unknown, in a data set that has both
    unread: dict[str, str] = field(default_factory=dict, hash=False)  # given but not understood: {"age": "414"}


@dataclass(frozen=True)
class DataSet:
    """An opened data set."""

    name: str  # as given: "padchest:/data/PadChest"
    records: tuple[Record, ...]  # sorted by name
    prompt: str | None  # default prompt template; None: there are no captions, the user must give a template
    notes: tuple[str, ...] = ()  # what was left out and why, one sentence each

    def __len__(self):
        return len(self.records)


# --- fields -----------------------------------------------------------------------------------------------------------
SPELLED = {
    "age": values.years,
    "sex": values.sex,
    "view": values.view,
    "projection": values.view,
    "pediatric": values.yes_or_no,
}


def described(**texts):
    """The arguments ``fields`` and ``unread`` of a Record, from its texts by field: each on one line, missing ones
    (None, or as in tables.present) left out, those of SPELLED in one spelling or, where not understood, unread.
    """
    fields, unread = {}, {}
    for name, text in texts.items():
        text = None if text is None else present(text)
        if text is None:
            continue
        text = " ".join(text.split())
        value = SPELLED[name](text) if name in SPELLED else text
        if value is None:
            unread[name] = text
        else:
            fields[name] = value
    return {"fields": fields, "unread": unread}
