"""PatchGastricADC22: 262,777 patches (300 px, 20x) of 991 stomach biopsies with captions (Tsuneki & Kanavati 2022).

Layout of Zenodo record 6550925: ``captions.csv`` (id, subtype, text) and ``patches_captions/<id>_<hash>.jpg``. The id
before the first ``_`` names the slide. A slide counts as a patient, so its patches are never in different splits.
"""

from minildm.data.records import Record, files_below, known, not_found, read_table

LOOKED_FOR = "captions.csv and patches_captions/<id>_<hash>.jpg"
PROMPT = "{text}"


def records(root):
    table = next(iter(sorted(root.rglob("captions.csv"))), None)
    patches = files_below(root, ".jpg", ".jpeg", ".png")
    if table is None or not patches:
        raise not_found(root, LOOKED_FOR)
    captions = {row["id"]: row for _, row in read_table(table, ("id", "subtype", "text"))}
    listed = []
    for name, path in patches.items():
        slide = name.split("_")[0]
        if slide in captions:
            caption = captions[slide]
            fields = known(text=caption.get("text"), subtype=caption.get("subtype"))
            listed.append(Record(name, slide, fields, path))
    left_out = len(patches) - len(listed)
    notes = [f"{left_out:,} of {len(patches):,} left out: no caption for their slide in {table.name}"]
    return listed, notes if left_out else []
