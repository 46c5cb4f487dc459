"""IU X-ray (Open-i, Indiana University): 7,470 images with reports (Demner-Fushman et al. 2016).

Two layouts: Kaggle's tables (``indiana_reports.csv``, ``indiana_projections.csv``, ``images/images_normalized/*.png``)
and the publisher's XML (``NLMCXR_reports/ecgen-radiology/*.xml`` with ``<image id>.png``). The XML does not say which
images are frontal, and neither do the DICOM headers, which mark 1,368 lateral images as PA. Training on frontal views
therefore needs ``indiana_projections.csv`` beside the XML.

The SeLoRA paper (arXiv:2408.07196) trains on findings, the default prompt. 3,307 frontal images have them, and 4 % of
these are the paper's 132 test images.
"""

import re
import xml.etree.ElementTree as ElementTree

from minildm.data.folders import composed, files_below, is_left_behind, not_found, paths_below
from minildm.data.records import Record, described
from minildm.data.values import is_frontal
from minildm.errors import InputError
from minildm.files import file_bytes
from minildm.tables import left_out_note, read_table

LOOKED_FOR = "indiana_reports.csv and indiana_projections.csv, or NLMCXR_reports/ecgen-radiology/*.xml"
PROMPT = "findings"
VIEW_HINT = "put Kaggle's indiana_projections.csv beside the XML reports"


def records(root):
    """A report counts as a patient: the data set does not identify patients."""
    paths = files_below(root, ".png")
    projections, notes = _projections(root)
    if (root / "indiana_reports.csv").is_file():
        if not projections:
            raise InputError(f"{root} holds indiana_reports.csv but no indiana_projections.csv, which names the images")
        images = _kaggle_images(root / "indiana_reports.csv", projections, notes)
    else:
        reports = [path for path in paths_below(root, ".xml") if path.parent.name == "ecgen-radiology"]
        reports = reports or [path for path in sorted(root.glob("*.xml")) if not is_left_behind(path.name)]
        if not reports:
            raise not_found(root, LOOKED_FOR)
        images = (image for report in reports for image in _xml_images(report))
    by_name = {}
    for name, report, texts in images:
        frontal = is_frontal(projections.get(_key(name), (None,))[0])
        path = paths.get(composed(name), root / name)
        by_name[name] = Record(name, report, path=path, frontal=frontal, **described(**texts))
    return list(by_name.values()), notes


def _projections(root):
    """({image key: ("Frontal" or "Lateral", file name, report)}, notes), empty without Kaggle's table."""
    table, left_out, needed = root / "indiana_projections.csv", [], ("uid", "filename")
    if not table.is_file():
        return {}, []
    rows = read_table(table, (*needed, "projection"), needed, left_out)
    projections = {_key(row["filename"]): (row.get("projection"), row["filename"], row["uid"]) for _, row in rows}
    return projections, left_out_note(table, left_out, needed)


def _key(file_name):
    """One key for both layouts: Kaggle's ``1_IM-0001-3001.dcm.png`` is Open-i's ``CXR1_1_IM-0001-3001.png``."""
    stem = file_name.removesuffix(".png").removesuffix(".dcm")
    return re.sub(r"^CXR\d+_(?=\d+_IM)|^CXR", "", stem)


def _kaggle_images(table, projections, notes):
    """Yield (file name, report, texts) for each image of Kaggle's tables; append to ``notes`` what is left out."""
    left_out = []
    rows = read_table(table, ("uid", "findings", "impression"), ("uid",), left_out)
    reports = {row["uid"]: row for _, row in rows}
    notes += left_out_note(table, left_out, ("uid",))
    for _, file_name, report in projections.values():
        row = reports.get(report, {})
        texts = {name: row.get(name) for name in ("findings", "impression", "indication")}
        yield file_name, report, texts | {"diagnosis": _comma_separated(row.get("Problems"))}


def _xml_images(path):
    """Yield (file name, report, texts) for each image of one of the publisher's reports."""
    try:
        root = ElementTree.fromstring(file_bytes(path))
        report = root.find("uId").get("id").removeprefix("CXR")
    except (ElementTree.ParseError, AttributeError, ValueError, LookupError) as error:  # the last two: its encoding
        raise InputError(f"{path}: not an Open-i report ({error})") from None
    texts = {node.get("Label"): node.text for node in root.iter("AbstractText")}
    terms = [node.text.split("/")[0] for node in root.iterfind("MeSH/major") if node.text]
    fields = {name: texts.get(name.upper()) for name in ("findings", "impression", "indication")}
    for image in root.iter("parentImage"):
        if image.get("id"):
            yield f"{image.get('id')}.png", report, fields | {"diagnosis": _comma_separated(";".join(terms))}


def _comma_separated(text):
    """ "Cardiomegaly;Pulmonary Artery;Cardiomegaly" -> "Cardiomegaly, Pulmonary Artery"."""
    return ", ".join(dict.fromkeys(part.strip() for part in (text or "").split(";") if part.strip()))
