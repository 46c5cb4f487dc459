"""PadChest: 160,861 chest radiographs of a Spanish hospital with labels (Bustos et al. 2020, arXiv:1901.07441).

Layout as published by BIMCV: the table ``PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv`` (or .csv.gz) and
16-bit PNG files, flat or in the folders 0 ... 54 of its ``ImageDir`` column. Without that table the authors' smaller
``.tsv`` tables are read, which lack ``ImageDir`` and the reports.
"""

import re

from minildm.data.folders import composed, files_below, is_left_behind, not_found
from minildm.data.records import Record, described
from minildm.data.values import is_frontal
from minildm.errors import InputError
from minildm.tables import left_out_note, list_items, read_table

LOOKED_FOR = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv (or .tsv tables) and the PNG files"
PROMPT = "full"
COLUMNS = ("ImageID", "PatientID", "PatientBirth", "StudyDate_DICOM", "PatientSex_DICOM", "Projection", "Labels")
NEEDED = ("ImageID", "PatientID")
STUDY, BIRTH = r"(\d{4})\d{4}(?:\.0*)?", r"(\d{4})(?:\.0*)?"  # 20140915, 1930.0

# PNG files that are truncated or broken in the distribution, from two independent lists:
# github.com/mlmed/torchxrayvision, datasets.py, and a list of all files that Pillow cannot open.
_BROKEN = """
012283393834152009033102258826_00-059-087 012283393834152009033140208626_00-059-118
012339356563862009072111404053_00-043-192 012373310883942009117084022290_00-064-025
012373310883942009152114636712_00-102-045 012373310883942009170084120009_00-097-074
012373310883942009180082307973_00-097-011 012487858717522009280135853083_00-075-001
012558082906712009327122220177_00-102-064 012819207061112010281134410801_00-129-131
012819207061112010306085429121_04-020-102 012819207061112010307142602253_04-014-084
012819207061112010315104455352_04-024-184 012959786098432011033083840143_00-176-115
012989926673512011074122523403_00-163-058 012989926673512011083134050913_00-168-009
012989926673512011151082430686_00-157-045 013076187734852011291090445391_00-196-188
013590140476722013043111952381_02-065-198 013590140476722013049100117076_02-063-097
013590140476722013058110301622_02-056-111 013649110343042013092101343018_02-075-146
013686042548532013208193054515_02-026-007 013829543166512013353113303615_02-092-190
013962490064942014134093945580_01-178-104
"""
BROKEN = frozenset(f"216840111366964{rest}.png" for rest in _BROKEN.split())


def records(root):
    tables = sorted(root.glob("PADCHEST*.csv")) + sorted(root.glob("PADCHEST*.csv.gz")) or sorted(root.glob("*.tsv"))
    tables = [table for table in tables if not is_left_behind(table.name)]
    if not tables:
        raise not_found(root, LOOKED_FOR)
    paths = files_below(root, ".png")
    by_name, broken, notes = {}, 0, []
    for table in tables:
        left_out = []
        for row_number, row in read_table(table, COLUMNS, NEEDED, left_out):
            try:
                record = _record(row, paths, root)
            except ValueError as error:
                raise InputError(f"{table}, row {row_number}: cannot be parsed ({error})") from None
            if record.name in BROKEN:
                broken += 1
            elif by_name.setdefault(record.name, record) is not record:
                raise InputError(f"{table}, row {row_number}: ImageID {record.name} is listed twice")
        notes += left_out_note(table, left_out, NEEDED)
    if broken:
        notes.append(f"{broken} of {len(by_name) + broken:,} left out: known to be broken in the distribution")
    return list(by_name.values()), notes


def _record(row, paths, root):
    diagnoses = [label for label in items(row.get("Labels")) if label != "exclude"]
    places = [place.removeprefix("loc ").strip() for place in items(row.get("Localizations"))]
    return Record(
        name=row["ImageID"],
        patient=row["PatientID"],
        path=paths.get(composed(row["ImageID"]), root / row["ImageID"]),
        frontal=is_frontal(row.get("Projection")),  # EXCLUDE and UNK: unknown
        **described(
            age=age(row.get("StudyDate_DICOM"), row.get("PatientBirth")),
            sex=row.get("PatientSex_DICOM"),
            view=row.get("ViewPosition_DICOM"),
            projection=row.get("Projection"),
            modality=row.get("Modality_DICOM"),
            diagnosis=", ".join(diagnoses),
            loc=", ".join(places),
            report=row.get("Report"),  # Spanish, stemmed
            labelled_by={"Physician": "physician", "RNN_model": "model"}.get(row.get("MethodLabel")),
            pediatric=row.get("Pediatric"),  # a flag, not an age test: see docs/data.md
        ),
    )


def age(study_date, birth_year):
    """Year of the study date (YYYYMMDD) minus year of birth ("1930.0"), as text; None if one is missing. Can be one
    year too high: the birthday is unknown. Where they are no years, both as they are, for `described` to count."""
    if not study_date or not birth_year:
        return None
    study, birth = (re.fullmatch(pattern, text) for pattern, text in ((STUDY, study_date), (BIRTH, birth_year)))
    return str(int(study[1]) - int(birth[1])) if study and birth else f"{study_date} - {birth_year}"


def items(text):
    """ "consolidation,  pneumonia, consolidation", or the same as a Python list -> ["consolidation", "pneumonia"].

    One item may hold several values: "loc  tracheal, loc  left".
    """
    whole = list_items(text or "")
    parts = (" ".join(part.split()) for item in ([text or ""] if whole is None else whole) for part in item.split(","))
    found = list(dict.fromkeys(part for part in parts if part))
    if any(part[0] in "[(" for part in found):
        raise ValueError(f"a list is not closed: {text[:60]}")
    return found
