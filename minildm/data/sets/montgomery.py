"""Montgomery County chest X-rays: 138 frontal radiographs, 58 with tuberculosis (Jaeger et al. 2014, NLM).

Layout of NLM-MontgomeryCXRSet.zip: ``CXR_png/MCUCXR_NNNN_X.png`` and ``ClinicalReadings/MCUCXR_NNNN_X.txt`` (X: 0
normal, 1 tuberculosis), whose lines are ``Patient's Sex: F``, ``Patient's Age: 027Y`` and the reading. Masks, which
have the pictures' names, are not read.
"""

import re

from minildm.data.records import Record, files_below, known, not_found, sex, years
from minildm.errors import InputError

LOOKED_FOR = "MontgomerySet/CXR_png/*.png and MontgomerySet/ClinicalReadings/*.txt"
PROMPT = "montgomery"


def records(root):
    readings = {name: path for name, path in files_below(root, ".txt").items() if name.startswith("MCUCXR_")}
    if not readings:
        raise not_found(root, LOOKED_FOR)
    images = next(iter(sorted(root.rglob("CXR_png"))), root)
    found = [_record(path, images / f"{path.stem}.png") for path in readings.values()]
    same_patient = {}  # the readings say "same pt as MCUCXR_0113_1" of a later picture
    for record, links in sorted(found, key=lambda pair: pair[0].name):
        same_patient[record.patient] = min([record.patient, *(same_patient.get(link, link) for link in links)])
    return [_with_patient(record, same_patient[record.patient]) for record, _ in found], []


def _record(path, image):
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    values = dict(re.findall(r"Patient's (Sex|Age)\s*:\s*(\S*)", "\n".join(lines)))
    reading = " ".join(line for line in lines if not line.startswith("Patient's"))
    links = re.findall(r"MCUCXR_(\d+)", reading)
    findings = re.sub(r"\s*\(same pt as [^)]*\)|^NO REPORT", "", reading).strip()
    record = Record(
        name=f"{path.stem}.png",
        patient=path.stem.split("_")[1],
        path=image,
        fields=known(
            age=years(values.get("Age")),
            sex=sex(values.get("Sex")),
            findings=re.sub(r"^NO REPORT", "", findings).strip(),
            diagnosis={"0": "normal", "1": "tuberculosis"}.get(path.stem[-1]),
        ),
    )
    return record, links


def _with_patient(record, patient):
    return Record(record.name, patient, record.fields, record.path)
