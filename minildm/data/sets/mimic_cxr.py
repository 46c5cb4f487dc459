"""MIMIC-CXR: 377,110 radiographs with reports (Johnson et al. 2019, arXiv:1901.07042; credentialed access).

Layout of MIMIC-CXR-JPG (PhysioNet): ``mimic-cxr-2.0.0-metadata.csv`` (or .csv.gz), optionally
``mimic-cxr-2.0.0-chexpert.csv``, and ``files/p10/p10000032/s50414267/<dicom_id>.jpg`` (or .dcm). The reports of
MIMIC-CXR are ``files/p10/p10000032/s50414267.txt``, possibly below ``mimic-cxr-reports``. Age and sex are not
included (MIMIC-IV has them).
"""

import re

from minildm.data.records import Record, known, not_found, read_table, view
from minildm.errors import InputError

LOOKED_FOR = "mimic-cxr-2.0.0-metadata.csv(.gz) and files/p10/p.../s.../<dicom_id>.jpg"
PROMPT = "impression"  # RoentGen (arXiv:2211.12737) is conditioned on the impression, too


def records(root):
    table = _find_table(root, "metadata")
    if table is None:
        raise not_found(root, LOOKED_FOR)
    labels = _labels(_find_table(root, "chexpert"))
    reports, listed = {}, []
    for _, row in read_table(table, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        patient, study, position = row["subject_id"], row["study_id"], view(row.get("ViewPosition"))
        patient_folder = f"p{patient[:2]}/p{patient}"
        if study not in reports:
            reports[study] = _report(root, f"{patient_folder}/s{study}.txt")
        path = root / "files" / patient_folder / f"s{study}" / f"{row['dicom_id']}.jpg"
        if not path.exists() and path.with_suffix(".dcm").exists():
            path = path.with_suffix(".dcm")
        listed.append(
            Record(
                name=f"{patient_folder}/s{study}/{path.name}",
                patient=patient,
                path=path,
                frontal=position in ("PA", "AP"),
                fields=known(view=position, projection=position, diagnosis=labels.get(study), **reports[study]),
            )
        )
    return listed, []


def _find_table(root, name):
    return next(iter(sorted(root.glob(f"mimic-cxr-2.*-{name}.csv*"))), None)


def _labels(table):
    """{study: "Cardiomegaly, Edema"}: the positive labels (1.0). Uncertain ones (-1.0) are not used."""
    if table is None:
        return {}
    return {
        row["study_id"]: ", ".join(
            name for name, value in row.items() if name not in ("study_id", "subject_id") and float(value) == 1
        )
        for _, row in read_table(table, ("study_id",))
    }


def _report(root, relative_path):
    """The findings, impression and indication of a study's report; empty if there is no report.

    A section starts with its name in capitals and a colon.
    """
    paths = [root / folder / relative_path for folder in ("files", "mimic-cxr-reports/files", "reports/files")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
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
