"""PatchGastricADC22: 262,777 patches (300 px, 20x) of 991 stomach biopsies with captions (Tsuneki & Kanavati 2022).

Layout of Zenodo record 6550925: ``captions.csv`` (id, subtype, text) and ``patches_captions/<id>_<hash>.jpg``; the
slide stands before the first ``_``. A slide counts as a patient: patches of one slide never part in a split.
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
    found = [(name.split("_")[0], name, path) for name, path in patches.items()]
    unnamed = sum(slide not in captions for slide, _, _ in found)
    notes = [f"{unnamed:,} of {len(found):,} left out: no caption for their slide in {table.name}"] if unnamed else []
    return [
        Record(name, slide, known(text=captions[slide].get("text"), subtype=captions[slide].get("subtype")), path)
        for slide, name, path in found
        if slide in captions
    ], notes
