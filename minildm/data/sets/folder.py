"""A user's own pictures: a folder of images with captions, in one of three forms.

- ``metadata.csv`` or ``metadata.jsonl`` (as Hugging Face's imagefolder has it): the image's path below the folder in
  column ``file_name``, ``file``, ``image`` or ``path``; the caption in ``text``; the patient in ``patient_id``,
  ``patient`` or ``subject_id``; every other column is a caption field under its own name.
- a ``.txt`` caption beside each image (as kohya's trainers have it).
- images alone, for a fixed caption: ``--prompt-template "chest x-ray"``.
"""

import json

from minildm.data.records import Record, known, not_found, read_table, sex, view, years
from minildm.errors import InputError

LOOKED_FOR = "metadata.csv, metadata.jsonl, or images (.png .jpg .tif .dcm ...) with .txt captions beside them"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
IMAGE_COLUMNS = ("file_name", "file", "image", "path")
PATIENT_COLUMNS = ("patient_id", "patient", "subject_id")


def records(root):
    table = next((root / name for name in ("metadata.csv", "metadata.jsonl") if (root / name).is_file()), None)
    if table is None:
        return _beside(root)
    rows = read_table(table, ()) if table.suffix == ".csv" else _json_lines(table)
    found, column, patients = {}, None, False
    for row_number, row in rows:
        column = column or next((name for name in IMAGE_COLUMNS if name in row), None)
        if column is None:
            raise InputError(
                f"{table}: no column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]} that names "
                f"the image; its columns are: {', '.join(row)}"
            )
        if column not in row:
            raise InputError(f"{table}, row {row_number}: no image in column {column}")
        name = row.pop(column)
        patient_column = next((key for key in PATIENT_COLUMNS if key in row), None)
        patients = patients or patient_column is not None
        patient = row.pop(patient_column) if patient_column else name
        if name in found:
            raise InputError(f"{table}, row {row_number}: {name} is listed twice")
        found[name] = Record(name, patient, _fields(row), root / name, None, view(row.get("view")) != "L")
    if not found:
        raise InputError(f"{table} lists no image")
    notes = (
        []
        if patients
        else [
            f"no column {', '.join(PATIENT_COLUMNS)}: every picture counts as a patient of its own, so a patient with "
            "several may be on both sides of a split"
        ]
    )
    silent = [name for name, record in found.items() if "text" not in record.fields]
    if 0 < len(silent) < len(found):
        notes.append(
            f"{len(silent):,} of {len(found):,} pictures have no text, first {silent[0]}, so no text is used: "
            "prompts are made of the other columns; fill it, or give --prompt-template"
        )
    elif silent and (meant := {"caption", "prompt"} & row.keys()):
        notes.append(f"column {min(meant)} is not used: captions are read from a column called text")
    return list(found.values()), notes


def _fields(row):
    """Ages, sexes and views in one spelling, so that one prompt template serves all data sets."""
    fields = {**row, "age": years(row.get("age")), "sex": sex(row.get("sex")), "view": view(row.get("view"))}
    if "diagnosis" not in row and "finding" in row:
        fields["diagnosis"] = ", ".join(part.strip() for part in row["finding"].replace("|", ",").split(","))
    return known(**fields)


def _json_lines(path):
    with open(path, "rb") as file:
        for row_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = {str(key): str(value) for key, value in json.loads(line).items() if value not in (None, "")}
            except (ValueError, AttributeError) as error:
                raise InputError(f"{path}, row {row_number}: not a JSON object ({error})") from None
            yield row_number, row


def _beside(root):
    images = {
        str(path.relative_to(root)): path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    }
    if not images:
        raise not_found(root, LOOKED_FOR)
    found, silent = [], 0
    for name, path in images.items():
        caption = path.with_suffix(".txt")
        silent += not caption.is_file()
        try:
            text = caption.read_text(encoding="utf-8-sig") if caption.is_file() else None
        except UnicodeDecodeError as error:
            raise InputError(f"{caption}: not UTF-8 text ({error})") from None
        found.append(Record(name, name, known(text=text), path))
    notes = ["no patients are named: every picture counts as a patient of its own"]
    if 0 < silent < len(found):
        raise InputError(
            f"{silent:,} of {len(found):,} images in {root} have no .txt caption beside them; add them or "
            "move those images away"
        )
    return found, notes


def default_prompt(records):
    """The captions where every record has one; else the full chest X-ray prompt from the fields there are."""
    if all("text" in record.fields for record in records):
        return "{text}"
    if any(record.fields.keys() & {"age", "sex", "view", "diagnosis"} for record in records):
        return "full"
    return None
