"""MIMIC-CXR: 377,110 radiographs with reports (Johnson et al. 2019, arXiv:1901.07042; credentialed access).

Layout of MIMIC-CXR-JPG (PhysioNet): ``mimic-cxr-2.0.0-metadata.csv`` (.gz too), ``mimic-cxr-2.0.0-chexpert.csv`` if
it is there, ``files/p10/p10000032/s50414267/<dicom_id>.jpg`` (or .dcm), and MIMIC-CXR's reports as
``files/p10/p10000032/s50414267.txt``, also below ``mimic-cxr-reports``. Age and sex are not in it
(MIMIC-IV has them).
"""

import re

from minildm.data.records import Record, known, not_found, read_table, view
from minildm.errors import InputError

LOOKED_FOR = "mimic-cxr-2.0.0-metadata.csv(.gz) and files/p10/p.../s.../<dicom_id>.jpg"
PROMPT = "impression"  # as RoentGen (arXiv:2211.12737) conditions


def records(root):
    table = _table(root, "metadata")
    if table is None:
        raise not_found(root, LOOKED_FOR)
    labels = _labels(_table(root, "chexpert"))
    reports, found = {}, []
    for _, row in read_table(table, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        patient, study, position = row["subject_id"], row["study_id"], view(row.get("ViewPosition"))
        below = f"p{patient[:2]}/p{patient}"
        if study not in reports:
            reports[study] = _report(root, f"{below}/s{study}.txt")
        picture = root / "files" / below / f"s{study}" / f"{row['dicom_id']}.jpg"
        if not picture.exists() and picture.with_suffix(".dcm").exists():
            picture = picture.with_suffix(".dcm")
        found.append(
            Record(
                name=f"{below}/s{study}/{picture.name}",
                patient=patient,
                path=picture,
                frontal=position in ("PA", "AP"),
                fields=known(view=position, projection=position, diagnosis=labels.get(study), **reports[study]),
            )
        )
    return found, []


def _table(root, name):
    return next((path for path in sorted(root.glob(f"mimic-cxr-2.*-{name}.csv*"))), None)


def _labels(table):
    """{study: "Cardiomegaly, Edema"}: the labels that are positive (1.0); uncertain (-1.0) ones are not used."""
    if table is None:
        return {}
    return {
        row["study_id"]: ", ".join(
            name for name, value in row.items() if name not in ("study_id", "subject_id") and float(value) == 1
        )
        for _, row in read_table(table, ("study_id",))
    }


def _report(root, below):
    """Findings and impression of a study's report, which marks its sections by words in capitals and a colon."""
    for folder in ("files", "mimic-cxr-reports/files", "reports/files"):
        path = root / folder / below
        if path.is_file():
            break
    else:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    parts = re.split(r"^\s*([A-Z][A-Z /]+):", text, flags=re.MULTILINE)  # text, heading, section, heading, section, ...
    sections = {heading.strip().lower(): section for heading, section in zip(parts[1::2], parts[2::2])}
    return known(
        findings=sections.get("findings"), impression=sections.get("impression"), indication=sections.get("indication")
    )
