"""MIMIC-CXR: 377,110 radiographs with reports (Johnson et al. 2019, arXiv:1901.07042; credentialed access).

Layout of MIMIC-CXR-JPG (PhysioNet): ``mimic-cxr-2.0.0-metadata.csv`` (or .csv.gz), optionally
``mimic-cxr-2.0.0-chexpert.csv``, and ``files/p10/p10000032/s50414267/<dicom_id>.jpg`` (or .dcm). The reports of
MIMIC-CXR are ``files/p10/p10000032/s50414267.txt``, possibly below ``mimic-cxr-reports``. Age and sex are not
included (MIMIC-IV has them).
"""

import os
import re

from minildm.data.folders import not_found
from minildm.data.records import Record, described
from minildm.data.values import is_frontal
from minildm.tables import left_out_note, read_table, read_text

LOOKED_FOR = "mimic-cxr-2.0.0-metadata.csv(.gz) and files/p10/p.../s.../<dicom_id>.jpg"
NEEDED = ("dicom_id", "subject_id", "study_id")
POSITIVE, NOT_POSITIVE = {"1", "1.0"}, {"0", "0.0", "-1", "-1.0"}
SECTIONS = {  # field: names of its section, the best first
    "findings": ("findings", "finding"),
    "impression": ("impression", "impressions", "conclusion", "conclusions"),
    "indication": ("indication", "indications"),
}
_NAMES = "|".join(name for names in SECTIONS.values() for name in names)
HEADING = re.compile(
    rf"""^[ \t]* (
        [A-Z][A-Z /&()]+ (?=:)                                                       # anything in capitals, and a colon
      | (?i:(?:{_NAMES}) (?:[ \t]*(?:/|&|and)[ \t]*\w+)?) [ \t]* (?=:)              # a known name, and a colon
      | (?=[A-Z]) (?i:{_NAMES}) (?=[ \t]*$)                                          # a known name, alone on its line
    ) [ \t]* :?""",
    re.MULTILINE | re.VERBOSE,
)


def records(root):
    table = _find_table(root, "metadata")
    if table is None:
        raise not_found(root, LOOKED_FOR)
    labels, notes = _labels(_find_table(root, "chexpert"))
    reports, listed, left_out = {}, [], []
    for _, row in read_table(table, (*NEEDED, "ViewPosition"), NEEDED, left_out):
        patient, study, position = row["subject_id"], row["study_id"], row.get("ViewPosition")
        patient_folder = f"p{patient[:2]}/p{patient}"
        if study not in reports:
            reports[study] = _report(root, f"{patient_folder}/s{study}.txt")
        path = root / "files" / patient_folder / f"s{study}" / f"{row['dicom_id']}.jpg"
        if not os.path.exists(path) and os.path.exists(path.with_suffix(".dcm")):  # False for names that are too long
            path = path.with_suffix(".dcm")
        listed.append(
            Record(
                name=f"{patient_folder}/s{study}/{path.name}",
                patient=patient,
                path=path,
                frontal=is_frontal(position),  # often blank: unknown
                **described(view=position, projection=position, diagnosis=labels.get(study), **reports[study]),
            )
        )
    return listed, left_out_note(table, left_out, NEEDED) + notes


def default_prompt(records):
    """The impression, on which RoentGen (arXiv:2211.12737) is conditioned, too; without reports what the tables say."""
    return "impression" if any("impression" in record.fields for record in records) else "full"


def _find_table(root, name):
    tables = (path for suffix in (".csv", ".csv.gz") for path in sorted(root.glob(f"mimic-cxr-2.*-{name}{suffix}")))
    return next(tables, None)


def _labels(table):
    """({study: "Cardiomegaly, Edema"}, notes): the positive labels (1.0). Uncertain ones (-1.0) are not used."""
    if table is None:
        return {}, []
    labels, left_out, unread = {}, [], []
    for row_number, row in read_table(table, ("study_id",), ("study_id",), left_out):
        values = {name: value for name, value in row.items() if name not in ("study_id", "subject_id")}
        labels[row["study_id"]] = ", ".join(name for name, value in values.items() if value in POSITIVE)
        unread += [(row_number, value) for value in values.values() if value not in POSITIVE | NOT_POSITIVE]
    notes = left_out_note(table, left_out, ("study_id",))
    if unread:
        row_number, value = unread[0]
        notes.append(
            f"labels of {table.name} that are none of 1, 0 and -1 and are not used: {len(unread):,}, such as "
            f"{value[:40]!r} in row {row_number}"
        )
    return labels, notes


def _report(root, relative_path):
    """The findings, impression and indication of a study's report; empty if there is no report.

    A section starts with its name: anything in capitals before a colon, or a known name in any case, before a colon or
    alone on its line. "FINDINGS AND IMPRESSION" is both; a section with a name of its own comes before such a one, and
    the last of several with the same name counts.
    """
    paths = [root / folder / relative_path for folder in ("files", "mimic-cxr-reports/files", "reports/files")]
    path = next((path for path in paths if os.path.isfile(path)), None)
    if path is None:
        return {}
    parts = HEADING.split(read_text(path))  # text, heading, section, heading, section, ...
    sections = {}
    for heading, section in zip(parts[1::2], parts[2::2]):
        if section.strip():
            sections[" ".join(heading.lower().split())] = section
    return {field: _section(sections, names) for field, names in SECTIONS.items()}


def _section(sections, names):
    """The section of one of these ``names``, else the last one that has one of them as a word of its heading."""
    for name in names:
        if name in sections:
            return sections[name]
    shared = [heading for heading in sections if set(re.findall(r"\w+", heading)) & set(names)]
    return sections[shared[-1]] if shared else None
