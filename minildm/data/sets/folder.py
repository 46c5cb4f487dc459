"""A folder of the user's own images, with captions in one of three forms.

- ``metadata.csv`` or ``metadata.jsonl``, as in Hugging Face's imagefolder. Column ``file_name``, ``file``, ``image`` or
  ``path`` holds the image's path below the folder, ``text`` the caption, ``patient_id``, ``patient`` or ``subject_id``
  the patient. Every other column is a caption field of that name; capitals make no difference. If the column ``view``
  (or ``ViewPosition``, else ``projection``) has any value, images are frontal where it names a frontal view; without
  one, all are.
- a ``.txt`` caption beside each image, as for kohya's trainers.
- images alone, with one prompt for all of them: ``--prompt-template "chest x-ray"``.
"""

import os

from minildm.data.folders import IMAGE_SUFFIXES, Finder, not_found, paths_below, record_name
from minildm.data.records import Record, described
from minildm.data.values import is_frontal
from minildm.errors import InputError
from minildm.tables import left_out_note, present, read_table, read_text

LOOKED_FOR = "metadata.csv, metadata.jsonl, or images (.png .jpg .tif .dcm ...) with .txt captions beside them"
IMAGE_COLUMNS = ("file_name", "file", "image", "path")
PATIENT_COLUMNS = ("patient_id", "patient", "subject_id")
OTHER_COLUMNS = ("text", "age", "sex", "view", "projection", "finding", "diagnosis")
VIEW_COLUMNS = ("viewposition", "view_position", "view position")  # read as the view if there is no column view
VIEW_HINT = "name the view, such as PA, AP or lateral, in the column view"


def records(root):
    for name in ("metadata.csv", "metadata.jsonl"):
        if (root / name).is_file():
            return _from_table(root, root / name)
    return _from_captions(root)


def default_prompt(records):
    """The captions if most records have one, else the full chest X-ray prompt if there are fields for it."""
    with_text = sum("text" in record.fields for record in records)
    if 2 * with_text > len(records):
        return "{text}"
    if any(record.fields.keys() & {"age", "sex", "view", "diagnosis"} for record in records):
        return "full"
    return "{text}" if with_text else None


# --- metadata.csv, metadata.jsonl -------------------------------------------------------------------------------------
def _from_table(root, table):
    rows = list(read_table(table))
    if not rows:
        raise InputError(f"{table} lists no image")
    names = _names(list(dict.fromkeys(column for _, row in rows for column in row)))
    rows = [(row_number, {names[column]: text for column, text in row.items()}) for row_number, row in rows]
    columns = list(names.values())
    image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image_column is None:
        raise InputError(
            f"{table}: no column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]} that names the image; its "
            f"columns: {', '.join(columns)}"
        )
    view_column = next((name for name in ("view", "projection") if name in columns), None)
    codes = {row.get("sex", "").upper() for _, row in rows} & {"H", "V"}  # hombre, varon: M may be mujer
    by_name, without_image, without_patient, finder = {}, [], [], Finder(root)
    for row_number, row in rows:
        if image_column not in row:
            without_image.append(row_number)
            continue
        name = row.pop(image_column)
        if name in by_name:
            raise InputError(f"{table}, row {row_number}: {name} is listed twice")
        patient_column = next((column for column in PATIENT_COLUMNS if column in row), None)
        if patient_column is None:
            without_patient.append(name)
        patient = row.pop(patient_column) if patient_column else name
        frontal = True if view_column is None else is_frontal(row.get(view_column))
        by_name[name] = Record(name, patient, path=finder.find(name), frontal=frontal, **_described(row, codes))
    notes = left_out_note(table, without_image, (image_column,))
    if len(without_patient) == len(by_name):
        notes.append(_no_patients(f"no column {', '.join(PATIENT_COLUMNS)}"))
    elif without_patient:
        notes.append(_no_patients(f"no patient for {len(without_patient):,} images, such as {without_patient[0]}"))
    listed = list(by_name.values())
    return listed, notes + _caption_notes(listed, columns)


def _names(columns):
    """{column: the name it is read under}: without capitals if that gives a name known here."""
    names = {column: column for column in columns}
    for column in columns:
        lower = column.lower()
        if lower in (*IMAGE_COLUMNS, *PATIENT_COLUMNS, *OTHER_COLUMNS) and lower not in names.values():
            names[column] = lower
    for column in columns:
        if column.lower() in VIEW_COLUMNS and "view" not in names.values():
            names[column] = "view"
    return names


def _described(row, other_codes):
    """The row as caption fields. ``other_codes``: of sexes, beside which "M" may be mujer, and so is not read."""
    if "diagnosis" not in row and "finding" in row:
        parts = (present(row["finding"]) or "").replace("|", ",").split(",")
        row = row | {"diagnosis": ", ".join(part.strip() for part in parts)}
    found = described(**row)
    if other_codes and row.get("sex", "").upper() == "M":
        del found["fields"]["sex"]
        found["unread"]["sex"] = row["sex"]
    return found


def _no_patients(reason):
    return f"{reason}: each image counts as a patient, so images of one patient may be in different splits"


def _caption_notes(records, columns):
    """Notes on captions that are there but will not be used."""
    without_text = [record.name for record in records if "text" not in record.fields]
    if 0 < len(without_text) < len(records) and default_prompt(records) != "{text}":
        return [
            f"{len(without_text):,} of {len(records):,} images have no text, such as {without_text[0]}, so prompts are "
            "made from the other columns; fill in the column text, or give --prompt-template"
        ]
    if len(without_text) == len(records) and (unused := {"caption", "prompt"} & set(columns)):
        return [f"column {min(unused)} is not used: captions are read from a column named text"]
    return []


# --- images with or without .txt captions -----------------------------------------------------------------------------
def _from_captions(root):
    paths = paths_below(root, *IMAGE_SUFFIXES)
    if not paths:
        raise not_found(root, LOOKED_FOR)
    finder, records = Finder(root), {}
    for path in paths:
        name, caption = record_name(path, root), finder.find(os.path.relpath(path.with_suffix(".txt"), root))
        if name in records:
            raise InputError(f"{root} holds two images named {name}, in other bytes; rename one of them")
        text = read_text(caption) if caption.is_file() else None
        records[name] = Record(name, name, path=path, **described(text=text))
    return list(records.values()), [_no_patients("no patients are named")]
