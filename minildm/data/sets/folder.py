"""A folder of the user's own images, with captions in one of three forms.

- ``metadata.csv`` or ``metadata.jsonl``, as in Hugging Face's imagefolder. Column ``file_name``, ``file``, ``image`` or
  ``path`` holds the image's path below the folder, ``text`` the caption, ``patient_id``, ``patient`` or ``subject_id``
  the patient. Every other column is a caption field of that name.
- a ``.txt`` caption beside each image, as for kohya's trainers.
- images alone, with one prompt for all of them: ``--prompt-template "chest x-ray"``.
"""

import json

from minildm.data.records import Record, known, not_found, read_table, sex, view, years
from minildm.errors import InputError

LOOKED_FOR = "metadata.csv, metadata.jsonl, or images (.png .jpg .tif .dcm ...) with .txt captions beside them"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
IMAGE_COLUMNS = ("file_name", "file", "image", "path")
PATIENT_COLUMNS = ("patient_id", "patient", "subject_id")


def records(root):
    for name, read in (("metadata.csv", lambda path: read_table(path, ())), ("metadata.jsonl", _read_json_lines)):
        if (root / name).is_file():
            return _from_table(root, root / name, read(root / name))
    return _from_captions(root)


def default_prompt(records):
    """The captions if every record has one, else the full chest X-ray prompt if there are fields for it."""
    if all("text" in record.fields for record in records):
        return "{text}"
    if any(record.fields.keys() & {"age", "sex", "view", "diagnosis"} for record in records):
        return "full"
    return None


# --- metadata.csv, metadata.jsonl -------------------------------------------------------------------------------------
def _from_table(root, table, rows):
    """Records of a table's ``rows``: (row number, dict)."""
    by_name, image_column, has_patients = {}, None, False
    for row_number, row in rows:
        image_column = image_column or next((name for name in IMAGE_COLUMNS if name in row), None)
        if image_column is None:
            raise InputError(
                f"{table}: no column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]} that names the image; its "
                f"columns: {', '.join(row)}"
            )
        if image_column not in row:
            raise InputError(f"{table}, row {row_number}: no image in column {image_column}")
        name = row.pop(image_column)
        if name in by_name:
            raise InputError(f"{table}, row {row_number}: {name} is listed twice")
        patient_column = next((column for column in PATIENT_COLUMNS if column in row), None)
        has_patients = has_patients or patient_column is not None
        patient = row.pop(patient_column) if patient_column else name
        by_name[name] = Record(name, patient, _fields(row), root / name, None, view(row.get("view")) != "L")
    if not by_name:
        raise InputError(f"{table} lists no image")
    notes = [] if has_patients else [_no_patients(f"no column {', '.join(PATIENT_COLUMNS)}")]
    return list(by_name.values()), notes + _caption_notes(by_name, row)


def _fields(row):
    """The row as caption fields, ages, sexes and views in one spelling, so that one template fits all data sets."""
    fields = {**row, "age": years(row.get("age")), "sex": sex(row.get("sex")), "view": view(row.get("view"))}
    if "diagnosis" not in row and "finding" in row:
        fields["diagnosis"] = ", ".join(part.strip() for part in row["finding"].replace("|", ",").split(","))
    return known(**fields)


def _no_patients(reason):
    return f"{reason}: each image counts as a patient, so images of one patient may be in different splits"


def _caption_notes(by_name, last_row):
    """Notes on captions that are there but will not be used."""
    without_text = [name for name, record in by_name.items() if "text" not in record.fields]
    if 0 < len(without_text) < len(by_name):
        return [
            f"{len(without_text):,} of {len(by_name):,} images have no text, such as {without_text[0]}, so prompts are "
            "made from the other columns; fill in the column text, or give --prompt-template"
        ]
    if without_text and (unused := {"caption", "prompt"} & last_row.keys()):
        return [f"column {min(unused)} is not used: captions are read from a column named text"]
    return []


def _read_json_lines(path):
    with open(path, "rb") as file:
        for row_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = {str(key): str(value) for key, value in json.loads(line).items() if value not in (None, "")}
            except (ValueError, AttributeError) as error:
                raise InputError(f"{path}, row {row_number}: not a JSON object ({error})") from None
            yield row_number, row


# --- images with or without .txt captions -----------------------------------------------------------------------------
def _from_captions(root):
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not paths:
        raise not_found(root, LOOKED_FOR)
    captions = [_caption(path.with_suffix(".txt")) for path in paths]
    missing = captions.count(None)
    if 0 < missing < len(paths):
        raise InputError(
            f"{missing:,} of {len(paths):,} images in {root} have no .txt caption beside them; add the captions or "
            "move these images away"
        )
    names = [str(path.relative_to(root)) for path in paths]
    records = [Record(name, name, known(text=text), path) for name, text, path in zip(names, captions, paths)]
    return records, [_no_patients("no patients are named")]


def _caption(path):
    """The text of a caption file, None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
