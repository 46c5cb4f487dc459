"""Montgomery County chest X-rays: 138 frontal radiographs, 58 with tuberculosis (Jaeger et al. 2014, NLM).

Layout of NLM-MontgomeryCXRSet.zip: ``CXR_png/MCUCXR_NNNN_X.png`` and ``ClinicalReadings/MCUCXR_NNNN_X.txt``, where X
is 0 for normal and 1 for tuberculosis. A reading has the lines ``Patient's Sex: F`` and ``Patient's Age: 027Y``,
followed by the findings. The masks, which have the same file names as the images, are not read.
"""

import dataclasses
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
    linked = [_record(path, images / f"{path.stem}.png") for path in readings.values()]
    patient_of = {}  # number of the image -> number of the patient's first image
    for record, links in sorted(linked, key=lambda pair: pair[0].name):
        patient_of[record.patient] = min([record.patient, *(patient_of.get(link, link) for link in links)])
    return [dataclasses.replace(record, patient=patient_of[record.patient]) for record, _ in linked], []


def _record(path, image):
    """(Record, the numbers of other images of the same patient that its reading names: "same pt as MCUCXR_0113_1")."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    values = dict(re.findall(r"Patient's (Sex|Age)\s*:\s*(\S*)", "\n".join(lines)))
    reading = " ".join(line for line in lines if not line.startswith("Patient's"))
    links = re.findall(r"MCUCXR_(\d+)", reading)
    findings = re.sub(r"\s*\(same pt as [^)]*\)", "", reading).strip()
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
