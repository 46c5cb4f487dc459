"""The data sets that ``--data name:path`` knows.

To add a data set, write one file here with

    LOOKED_FOR = "images.csv and png/*.png"     # what its folder must hold, for error messages
    PROMPT = "full"                             # default prompt: a template with fields, or a name in prompts.TEMPLATES
    def records(root): ...                      # folder -> (list of Record, list of notes on what was left out)

and add a line to ``DATA_SETS`` below (with its import). ``patch_gastric.py`` is a short example, and
``data/records.py`` has helpers for tables, files and fields. ``data/open.py`` handles views, ages, limits and missing
image files for all data sets.

If records may have ``frontal=None``, also define VIEW_HINT, which says how to supply the views. Instead of PROMPT a
file may define ``default_prompt(records)``. A data set rendered on demand has ``records()`` without ``root`` and no
LOOKED_FOR, and is also listed in ``records.BUILT_IN``.
"""

from minildm.data.sets import folder, iu_xray, mimic_cxr, montgomery, padchest, patch_gastric, phantom, procedural

DATA_SETS = {  # the name in --data: its file
    "phantom": phantom,
    "procedural": procedural,
    "folder": folder,
    "iu-xray": iu_xray,
    "montgomery": montgomery,
    "padchest": padchest,
    "patch-gastric": patch_gastric,
    "mimic-cxr": mimic_cxr,
}
