"""IU X-ray (Open-i, Indiana University): 7,470 pictures with reports (Demner-Fushman et al. 2016).

Two layouts: Kaggle's tables (``indiana_reports.csv``, ``indiana_projections.csv``, ``images/images_normalized/*.png``)
and the publisher's XML (``NLMCXR_reports/ecgen-radiology/*.xml`` with ``<image id>.png``). The XML does not say which
picture is frontal (nor does the DICOM header: 1,368 lateral pictures are marked PA there), so frontal training on it
needs ``indiana_projections.csv`` beside it. Reports without findings are left out: the SeLoRA paper (arXiv:2408.07196)
trains on findings, and 4 % of the 3,307 frontal pictures that have them are its 132 test images.
"""

import re
import xml.etree.ElementTree as ElementTree

from minildm.data.records import Record, files_below, known, not_found, read_table
from minildm.errors import InputError

LOOKED_FOR = "indiana_reports.csv and indiana_projections.csv, or NLMCXR_reports/ecgen-radiology/*.xml"
PROMPT = "findings"
VIEW_HINT = "put Kaggle's indiana_projections.csv beside the XML reports"


def records(root):
    """A patient is a report here: the data set has no other mark of one."""
    images = files_below(root, ".png")
    projections = _projections(root)
    if (root / "indiana_reports.csv").is_file():
        if not projections:
            raise InputError(f"{root} holds indiana_reports.csv but no indiana_projections.csv, which names the images")
        pairs = _kaggle(root / "indiana_reports.csv", projections)
    else:
        reports = sorted(root.rglob("ecgen-radiology/*.xml")) or sorted(root.glob("*.xml"))
        if not reports:
            raise not_found(root, LOOKED_FOR)
        pairs = (pair for report in reports for pair in _open_i(report))
    found, silent = {}, 0
    for file_name, report, fields in pairs:
        if "findings" not in fields:
            silent += 1
            continue
        frontal = {"Frontal": True, "Lateral": False}.get(projections.get(_key(file_name), (None,))[0])
        found[file_name] = Record(file_name, report, fields, images.get(file_name, root / file_name), None, frontal)
    notes = [f"{silent:,} of {silent + len(found):,} left out: no findings in the report"] if silent else []
    return list(found.values()), notes


def _projections(root):
    """{image key: (Frontal or Lateral, file name, report)}"""
    table = root / "indiana_projections.csv"
    if not table.is_file():
        return {}
    rows = read_table(table, ("uid", "filename", "projection"))
    return {_key(row["filename"]): (row["projection"], row["filename"], row["uid"]) for _, row in rows}


def _key(file_name):
    """One key for both layouts: Kaggle's ``1_IM-0001-3001.dcm.png`` is Open-i's ``CXR1_1_IM-0001-3001.png``."""
    stem = file_name.removesuffix(".png").removesuffix(".dcm")
    return re.sub(r"^CXR\d+_(?=\d+_IM)|^CXR", "", stem)


def _kaggle(table, projections):
    reports = {row["uid"]: row for _, row in read_table(table, ("uid", "findings", "impression"))}
    for _, file_name, report in projections.values():
        row = reports.get(report, {})
        yield (
            file_name,
            report,
            known(
                findings=row.get("findings"),
                impression=row.get("impression"),
                indication=row.get("indication"),
                diagnosis=_list(row.get("Problems")),
            ),
        )


def _open_i(path):
    try:
        root = ElementTree.parse(path).getroot()
        report = root.find("uId").get("id").removeprefix("CXR")
    except (ElementTree.ParseError, AttributeError) as error:
        raise InputError(f"{path}: not an Open-i report ({error})") from None
    texts = {node.get("Label"): node.text for node in root.iter("AbstractText")}
    major = [node.text for node in root.iterfind("MeSH/major") if node.text]
    for image in root.iter("parentImage"):
        yield (
            f"{image.get('id')}.png",
            report,
            known(
                findings=texts.get("FINDINGS"),
                impression=texts.get("IMPRESSION"),
                indication=texts.get("INDICATION"),
                diagnosis=_list(";".join(term.split("/")[0] for term in major)),
            ),
        )


def _list(text):
    """ "Cardiomegaly;Pulmonary Artery;Cardiomegaly" -> "Cardiomegaly, Pulmonary Artery"."""
    return ", ".join(dict.fromkeys(part.strip() for part in (text or "").split(";") if part.strip()))
