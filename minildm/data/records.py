"""Records, the common form of all data sets, and the helpers that sets/ uses to read tables and spell fields."""

import csv
import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minildm.errors import InputError

BUILT_IN = ("phantom", "procedural")  # data sets that are rendered on demand and need no path


@dataclass(frozen=True)
class Record:
    """One image and what is known about it. ``fields`` holds known values only."""

    name: str  # unique in its data set and the same on every machine: usually the path below the data set's folder
    patient: str  # all images of a patient go to the same split
    fields: dict[str, str] = field(default_factory=dict, hash=False)  # for prompts: age (years), sex, view, ...
    path: Path | None = None  # the image file; None if ``render`` makes the image
    render: Callable[[int], np.ndarray] | None = None  # side in pixels -> uint8 (side, side) or (side, side, 3)
    frontal: bool | None = True  # False: a lateral view; None: unknown, in a data set that has both


@dataclass(frozen=True)
class DataSet:
    """An opened data set."""

    name: str  # as given: "padchest:/data/PadChest"
    records: tuple[Record, ...]  # sorted by name
    prompt: str | None  # default prompt template; None: there are no captions, the user must give a template
    notes: tuple[str, ...] = ()  # what was left out and why, one sentence each

    def __len__(self):
        return len(self.records)


# --- tables and folders -----------------------------------------------------------------------------------------------
def read_table(path, columns):
    """Yield (row number as an editor shows it, {column: stripped text}) for each row of a CSV file.

    Missing values ("", "nan", "None") are left out of the dict. A .tsv file is tab-separated, a .gz file compressed.

    Args: columns: names the header must contain.
    Raises: InputError naming the file and the row if it cannot be parsed.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        row_number = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in columns if name not in header]:
                raise InputError(f"{path}: no column {', '.join(missing)}; its columns: {', '.join(header) or 'none'}")
            row_number = reader.line_num + 1
            for row in reader:
                "".join(row).encode()  # fails on bytes that were not UTF-8, here where the row number is known
                if row and len(row) != len(header):
                    raise InputError(f"{path}, row {row_number}: {len(row)} fields where the header has {len(header)}")
                values = {name: value.strip() for name, value in zip(header, row)}
                yield row_number, {name: value for name, value in values.items() if value not in ("", "nan", "None")}
                row_number = reader.line_num + 1
        except (csv.Error, UnicodeEncodeError, EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}, row {row_number}: not readable as CSV in UTF-8 ({error})") from None


def files_below(root, *suffixes):
    """{file name: path} of all files below ``root`` with one of the (lower-case) suffixes, except hidden ones.

    Published zip files unpack to different depths, but their file names are unique.
    """
    paths = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                paths.setdefault(name, Path(folder) / name)
    return paths


def not_found(root, looked_for):
    """The InputError for a folder that does not hold the data set: what was expected and what is there."""
    names = sorted(os.listdir(root))
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return InputError(f"{root} does not hold {looked_for}; it holds {shown or 'nothing'}")


# --- fields -----------------------------------------------------------------------------------------------------------
def known(**fields):
    """The fields that have a value, as text on one line. Missing fields (None or "") are dropped."""
    return {name: " ".join(str(value).split()) for name, value in fields.items() if value not in (None, "")}


def sex(text):
    """ "M", "male", "F", "Female" -> "male" or "female"; anything else ("O", blank) -> None."""
    return {"m": "male", "f": "female"}.get((text or "").strip().lower()[:1])


def years(text):
    """An age: "47", "047Y", "47.0" -> "47"; anything else -> None."""
    text = (text or "").strip().rstrip("Yy")
    try:
        return str(int(float(text)))
    except (ValueError, OverflowError):  # OverflowError: "inf"
        return None


def view(text):
    """The common spellings of a view -> "PA", "AP" or "L"; another word unchanged; blank -> None."""
    text = (text or "").strip().replace("_", " ")
    words = {"POSTEROANTERIOR": "PA", "ANTEROPOSTERIOR": "AP", "LATERAL": "L", "LL": "L", "RL": "L", "LLD": "L"}
    return words.get(text.upper(), text) or None
