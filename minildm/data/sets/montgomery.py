"""Montgomery County chest X-rays: 138 frontal radiographs, 58 with tuberculosis (Jaeger et al. 2014, NLM).

Layout of NLM-MontgomeryCXRSet.zip: ``CXR_png/MCUCXR_NNNN_X.png`` and ``ClinicalReadings/MCUCXR_NNNN_X.txt``, where X
is 0 for normal and 1 for tuberculosis. A reading has the lines ``Patient's Sex: F`` and ``Patient's Age: 027Y``,
followed by the findings. The masks, which have the same file names as the images, are not read.
"""

import dataclasses
import re

from minildm.data.folders import files_below, not_found, paths_below
from minildm.data.records import Record, described
from minildm.tables import read_text

LOOKED_FOR = "MontgomerySet/CXR_png/*.png and MontgomerySet/ClinicalReadings/*.txt"
PROMPT = "montgomery"


def records(root):
    readings = {name: path for name, path in files_below(root, ".txt").items() if name.startswith("MCUCXR_")}
    if not readings:
        raise not_found(root, LOOKED_FOR)
    images = {path.name: path for path in paths_below(root, ".png") if path.parent.name == "CXR_png"}
    linked = [_record(path, images.get(f"{path.stem}.png", root / f"{path.stem}.png")) for path in readings.values()]
    same = {}  # number of an image -> a smaller number of the same patient

    def first(number):
        while number in same:
            number = same[number]
        return number

    for record, links in linked:
        for link in links:
            low, high = sorted((first(record.patient), first(link)))
            if low != high:
                same[high] = low
    return [dataclasses.replace(record, patient=first(record.patient)) for record, _ in linked], []


def _record(path, image):
    """(Record, the numbers of other images of the same patient that its reading names: "same pt as MCUCXR_0113_1")."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    known = [re.fullmatch(r"Patient.s\s+(Sex|Age)\s*:\s*(.*)", line) for line in lines]
    values = {match[1]: match[2] for match in known if match}
    reading = " ".join(line for line, match in zip(lines, known) if not match)
    links = re.findall(r"MCUCXR_(\d+)", reading)
    findings = re.sub(r"\s*\(same pt as [^)]*\)", "", reading).strip()
    record = Record(
        name=f"{path.stem}.png",
        patient=path.stem.split("_")[1],
        path=image,
        **described(
            age=values.get("Age"),
            sex=values.get("Sex"),
            findings=re.sub(r"^NO REPORT", "", findings).strip(),
            diagnosis={"0": "normal", "1": "tuberculosis"}.get(path.stem[-1]),
        ),
    )
    return record, links
