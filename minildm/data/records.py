"""What a data set is to the rest of the library: a list of records, and ``open_data_set("name:path")`` that makes it.

One file a data set (``padchest.py``, ``folder.py``, ...), each with ``records(root)`` -> (records, notes) and the
``PROMPT`` its captions are written by; what holds for all of them (views, ages, absent files, limits) is done here.
"""

import csv
import gzip
import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minildm.errors import InputError

BUILT_IN = ("phantom", "procedural")  # made when asked for: no path
DATA_SETS = (*BUILT_IN, "folder", "iu-xray", "montgomery", "padchest", "patch-gastric", "mimic-cxr")


@dataclass(frozen=True)
class Record:
    """One picture and what is known about it. A field that is not known is not in ``fields``."""

    name: str  # unique in its data set, the same on every machine: the path below the root
    patient: str  # splits keep a patient's pictures together
    fields: dict[str, str] = field(default_factory=dict, hash=False)  # of captions: age (years), sex, view, ...
    path: Path | None = None  # the image file, or
    render: Callable[[int], np.ndarray] | None = None  # draws it: side in pixels -> uint8 (side, side) or (..., 3)
    frontal: bool | None = True  # False: a lateral view; None: the data set has both and does not say


@dataclass(frozen=True)
class DataSet:
    name: str  # as given: "padchest:/data/PadChest"
    records: tuple[Record, ...]  # in the order of their names
    prompt: str  # the template its captions are written by unless the user gives another
    notes: tuple[str, ...] = ()  # what was left out, and why, one sentence each

    def __len__(self):
        return len(self.records)


def open_data_set(
    spec, views="frontal", drop_pediatric=False, min_age=None, limit=None, exclude=None, skip_bad=False, seed=0
):
    """Read a data set's tables; no picture is opened yet.

    Args:
        spec: "name:path", name one of DATA_SETS; "phantom" and "procedural" need no path.
        views: "frontal" (as the SeLoRA paper, arXiv:2408.07196, trains) or "all".
        drop_pediatric: leave out what PadChest flags as paediatric. That flag is no age test: see ``min_age``.
        min_age: leave out who is younger, in years, and whose age is not known.
        limit: keep this many records, drawn with ``seed``.
        exclude: a file of record names to leave out, one a line, a tab before a remark: ``check`` writes one.
        skip_bad: go on without images that are listed but absent.
    Returns: DataSet. Raises: InputError in one line for whatever a user can put right.
    """
    name, _, path = spec.partition(":")
    if name not in DATA_SETS:
        raise InputError(f"unknown data set {name!r}; give --data name:path with name one of: {', '.join(DATA_SETS)}")
    if views not in ("frontal", "all"):
        raise InputError(f"views must be frontal or all, got {views!r}")
    source = importlib.import_module("minildm.data.sets." + name.replace("-", "_"))
    if name in BUILT_IN:
        records, notes = source.records()
    elif not path:
        raise InputError(f"--data {name} needs a path: {name}:/where/it/is")
    elif not Path(path).is_dir():
        raise InputError(f"{path} is not a folder; --data {name}: expects the folder that holds {source.LOOKED_FOR}")
    else:
        records, notes = source.records(Path(path))
    prompt = source.PROMPT if hasattr(source, "PROMPT") else source.default_prompt(records)
    records, notes = sorted(records, key=lambda record: record.name), list(notes)

    def keep(wanted, reason):
        nonlocal records
        kept = [record for record in records if wanted(record)]
        if len(kept) < len(records):
            notes.append(f"{len(records) - len(kept):,} of {len(records):,} left out: {reason}")
        records = kept

    if views == "frontal":
        if unsure := sum(record.frontal is None for record in records):
            raise InputError(
                f"{unsure:,} of {len(records):,} pictures do not say whether they are frontal; "
                f"{source.VIEW_HINT}, or give --views all"
            )
        keep(lambda record: record.frontal, "lateral views (--views all keeps them)")
    if drop_pediatric:
        keep(lambda record: record.fields.get("pediatric") != "yes", "flagged as paediatric (--drop-pediatric)")
    if min_age is not None:
        keep(lambda record: int(record.fields.get("age", -1)) >= min_age, f"younger than {min_age} or of unknown age")
    if exclude is not None:
        names = _excluded(exclude, records)
        keep(lambda record: record.name not in names, f"named in {exclude}")
    absent = _absent(records)
    if absent and not skip_bad:
        raise InputError(
            f"{len(absent):,} of {len(records):,} images listed in {spec} are absent, such as "
            f"{', '.join(sorted(absent)[:5])}; --skip-bad goes on with the others"
        )
    keep(lambda record: record.name not in absent, "listed but absent, such as " + ", ".join(sorted(absent)[:5]))
    if not records:
        raise InputError(f"{spec} holds no usable picture; {'; '.join(notes) or 'expected ' + source.LOOKED_FOR}")
    if limit is not None and limit < len(records):
        drawn = sorted(records, key=lambda record: order_key(seed, record.name))[:limit]
        notes.append(f"{limit:,} of {len(records):,} drawn with seed {seed} (--limit)")
        records = sorted(drawn, key=lambda record: record.name)
    return DataSet(spec, tuple(records), prompt, tuple(notes))


def order_key(seed, name):
    """A pseudo-random number for a name, the same on every machine and in every version: sorts a list into a shuffle
    in which every name's place is independent of the others present."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _absent(records):
    """Names of the records whose file is not there. One listing a folder: 160,000 single questions would take long."""
    listings = {}
    absent = set()
    for record in records:
        if record.path is None:
            continue
        folder = record.path.parent
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if record.path.name not in listings[folder]:
            absent.add(record.name)
    return absent


def _excluded(path, records):
    with open(path, encoding="utf-8") as file:
        names = {line.split("\t")[0].strip() for line in file if line.strip()}
    if names and not names & {record.name for record in records}:
        raise InputError(f"none of the {len(names)} names in {path} is in the data set; it was made for another one")
    return names


def read_table(path, columns):
    """Rows of a CSV (.tsv: tab-separated; .gz: packed) as (row number as an editor shows it, dict of stripped text).

    Args: columns: names that must be in the header. Missing values ("", "nan", "None") are left out of the dict.
    Raises: InputError with the file and the row for anything that does not parse.
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
                "".join(row).encode()  # fails for what was not UTF-8, here where the row is known
                if row and len(row) != len(header):
                    raise InputError(f"{path}, row {row_number}: {len(row)} fields where the header has {len(header)}")
                values = {name: value.strip() for name, value in zip(header, row)}
                yield row_number, {name: value for name, value in values.items() if value not in ("", "nan", "None")}
                row_number = reader.line_num + 1
        except (csv.Error, UnicodeEncodeError, EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}, row {row_number}: not readable as CSV in UTF-8 ({error})") from None


def known(**fields):
    """The caption fields that have a value, as one-line text: nothing that is missing stays as an empty string."""
    return {name: " ".join(str(value).split()) for name, value in fields.items() if value not in (None, "")}


def sex(text):
    """ "M", "male", "F", "Female" -> "male" or "female"; anything else ("O", blank) -> None: not known."""
    return {"m": "male", "f": "female"}.get((text or "").strip().lower()[:1])


def years(text):
    """ "47", "047Y", "47.0" -> "47"; anything else -> None."""
    text = (text or "").strip().rstrip("Yy")
    try:
        return str(int(float(text)))
    except ValueError:
        return None
    except OverflowError:  # "inf"
        return None


def view(text):
    """The several words for one view -> "PA", "AP" or "L"; another word as it is; blank -> None."""
    text = (text or "").strip().replace("_", " ")
    words = {"POSTEROANTERIOR": "PA", "ANTEROPOSTERIOR": "AP", "LATERAL": "L", "LL": "L", "RL": "L", "LLD": "L"}
    return words.get(text.upper(), text) or None


def files_below(root, *suffixes):
    """{file name: path} of the files below ``root`` with one of the suffixes (lower case), hidden ones left out.
    Publishers' zips unpack to different depths; their file names are unique."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                found.setdefault(name, Path(folder) / name)
    return found


def not_found(root, looked_for):
    """The error for a folder that is not the data set: what was looked for, what is there."""
    there = sorted(os.listdir(root))
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    return InputError(f"{root} does not hold {looked_for}; it holds {shown or 'nothing'}")
