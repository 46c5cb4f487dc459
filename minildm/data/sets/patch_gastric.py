"""PatchGastricADC22: 262,777 patches (300 px, 20x) of 991 stomach biopsies with captions (Tsuneki & Kanavati 2022).

Layout of Zenodo record 6550925: ``captions.csv`` (id, subtype, text) and ``patches_captions/<id>_<hash>.jpg``. The id
before the first ``_`` names the slide. A slide counts as a patient, so its patches are never in different splits.
"""

from minildm.data.folders import files_below, not_found
from minildm.data.records import Record, described
from minildm.tables import left_out_note, read_table

LOOKED_FOR = "captions.csv and patches_captions/<id>_<hash>.jpg"
PROMPT = "{text}"


def records(root):
    table = files_below(root, "captions.csv").get("captions.csv")
    patches = files_below(root, ".jpg", ".jpeg", ".png")
    if table is None or not patches:
        raise not_found(root, LOOKED_FOR)
    without_id, listed = [], []
    rows = read_table(table, ("id", "subtype", "text"), ("id",), without_id)
    captions = {row["id"]: described(text=row.get("text"), subtype=row.get("subtype")) for _, row in rows}
    for name, path in patches.items():
        slide = name.split("_")[0]
        if slide in captions:
            listed.append(Record(name, slide, path=path, **captions[slide]))
    notes = left_out_note(table, without_id, ("id",))
    if left_out := len(patches) - len(listed):
        notes.append(f"{left_out:,} of {len(patches):,} left out: their slide is not in {table.name}")
    return listed, notes
