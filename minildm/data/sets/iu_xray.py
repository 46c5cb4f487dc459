"""IU X-ray (Open-i, Indiana University): 7,470 images with reports (Demner-Fushman et al. 2016).

Two layouts: Kaggle's tables (``indiana_reports.csv``, ``indiana_projections.csv``, ``images/images_normalized/*.png``)
and the publisher's XML (``NLMCXR_reports/ecgen-radiology/*.xml`` with ``<image id>.png``). The XML does not say which
images are frontal, and neither do the DICOM headers, which mark 1,368 lateral images as PA. Training on frontal views
therefore needs ``indiana_projections.csv`` beside the XML.

Reports without findings are left out, because the SeLoRA paper (arXiv:2408.07196) trains on findings. 3,307 frontal
images have them, and 4 % of these are the paper's 132 test images.
"""

import re
import xml.etree.ElementTree as ElementTree

from minildm.data.records import Record, files_below, known, not_found, read_table
from minildm.errors import InputError

LOOKED_FOR = "indiana_reports.csv and indiana_projections.csv, or NLMCXR_reports/ecgen-radiology/*.xml"
PROMPT = "findings"
VIEW_HINT = "put Kaggle's indiana_projections.csv beside the XML reports"


def records(root):
    """A report counts as a patient: the data set does not identify patients."""
    paths = files_below(root, ".png")
    projections = _projections(root)
    if (root / "indiana_reports.csv").is_file():
        if not projections:
            raise InputError(f"{root} holds indiana_reports.csv but no indiana_projections.csv, which names the images")
        images = _kaggle_images(root / "indiana_reports.csv", projections)
    else:
        reports = sorted(root.rglob("ecgen-radiology/*.xml")) or sorted(root.glob("*.xml"))
        if not reports:
            raise not_found(root, LOOKED_FOR)
        images = (image for report in reports for image in _xml_images(report))
    by_name, without_findings = {}, 0
    for name, report, fields in images:
        if "findings" not in fields:
            without_findings += 1
            continue
        frontal = {"Frontal": True, "Lateral": False}.get(projections.get(_key(name), (None,))[0])
        by_name[name] = Record(name, report, fields, paths.get(name, root / name), None, frontal)
    total = without_findings + len(by_name)
    notes = [f"{without_findings:,} of {total:,} left out: no findings in the report"] if without_findings else []
    return list(by_name.values()), notes


def _projections(root):
    """{image key: ("Frontal" or "Lateral", file name, report)}, empty without Kaggle's table."""
    table = root / "indiana_projections.csv"
    if not table.is_file():
        return {}
    rows = read_table(table, ("uid", "filename", "projection"))
    return {_key(row["filename"]): (row["projection"], row["filename"], row["uid"]) for _, row in rows}


def _key(file_name):
    """One key for both layouts: Kaggle's ``1_IM-0001-3001.dcm.png`` is Open-i's ``CXR1_1_IM-0001-3001.png``."""
    stem = file_name.removesuffix(".png").removesuffix(".dcm")
    return re.sub(r"^CXR\d+_(?=\d+_IM)|^CXR", "", stem)


def _kaggle_images(table, projections):
    """Yield (file name, report, fields) for each image of Kaggle's tables."""
    reports = {row["uid"]: row for _, row in read_table(table, ("uid", "findings", "impression"))}
    for _, file_name, report in projections.values():
        row = reports.get(report, {})
        fields = known(
            findings=row.get("findings"),
            impression=row.get("impression"),
            indication=row.get("indication"),
            diagnosis=_comma_separated(row.get("Problems")),
        )
        yield file_name, report, fields


def _xml_images(path):
    """Yield (file name, report, fields) for each image of one of the publisher's reports."""
    try:
        root = ElementTree.parse(path).getroot()
        report = root.find("uId").get("id").removeprefix("CXR")
    except (ElementTree.ParseError, AttributeError) as error:
        raise InputError(f"{path}: not an Open-i report ({error})") from None
    texts = {node.get("Label"): node.text for node in root.iter("AbstractText")}
    terms = [node.text.split("/")[0] for node in root.iterfind("MeSH/major") if node.text]
    fields = known(
        findings=texts.get("FINDINGS"),
        impression=texts.get("IMPRESSION"),
        indication=texts.get("INDICATION"),
        diagnosis=_comma_separated(";".join(terms)),
    )
    for image in root.iter("parentImage"):
        yield f"{image.get('id')}.png", report, fields


def _comma_separated(text):
    """ "Cardiomegaly;Pulmonary Artery;Cardiomegaly" -> "Cardiomegaly, Pulmonary Artery"."""
    return ", ".join(dict.fromkeys(part.strip() for part in (text or "").split(";") if part.strip()))
