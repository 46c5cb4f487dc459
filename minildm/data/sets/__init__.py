"""The data sets that ``--data name:path`` knows.

To add a data set, write one file here with

    LOOKED_FOR = "images.csv and png/*.png"     # what its folder must hold, for error messages
    PROMPT = "full"                             # default prompt: a template with fields, or a name in prompts.TEMPLATES
    def records(root): ...                      # folder -> (list of Record, list of notes on what was left out)

and add a line to ``DATA_SETS`` below (with its import). ``patch_gastric.py`` is a short example, and
``minildm/tables.py`` reads tables, and ``data/records.py`` has helpers for files and fields: `described` spells ages,
sexes and views and keeps what it does not understand for the notes. ``data/open.py`` handles views, ages, limits,
missing image files and records without a prompt for all data sets.

If all records may have ``frontal=None``, also define VIEW_HINT, which says how to supply the views. Instead of PROMPT a
file may define ``default_prompt(records)``. A data set rendered on demand has ``records(n=...)`` without ``root`` and
no LOOKED_FOR, and is also listed in ``records.BUILT_IN``.
"""

from minildm.data.sets import (
    folder,
    iu_xray,
    mimic_cxr,
    montgomery,
    padchest,
    patch_gastric,
    phantom,
    procedural,
    textures,
)

DATA_SETS = {  # the name in --data: its file
    "phantom": phantom,
    "procedural": procedural,
    "textures": textures,
    "folder": folder,
    "iu-xray": iu_xray,
    "montgomery": montgomery,
    "padchest": padchest,
    "patch-gastric": patch_gastric,
    "mimic-cxr": mimic_cxr,
}
