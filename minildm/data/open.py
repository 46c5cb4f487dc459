"""Open a data set: ``--data name:path`` and the settings of the data flags -> DataSet."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from minildm.data.folders import outside
from minildm.data.prompts import TEMPLATES, render
from minildm.data.reading import Transform
from minildm.data.records import BUILT_IN, MOST_RENDERED, DataSet
from minildm.data.sets import DATA_SETS
from minildm.data.splits import SPLITS, order_key
from minildm.errors import InputError, naming
from minildm.files import input_file, shown
from minildm.settings import Settings, setting
from minildm.tables import read_lines


@dataclass(frozen=True)
class DataSettings(Settings):
    """The data flags of train.py, ``pretrain``, ``check`` and ``prompts``."""

    # frontal, as the SeLoRA paper (arXiv:2408.07196) trains
    views: str = setting("frontal", "chest X-ray views to use", choices=("frontal", "all"))
    drop_pediatric: bool = setting(False, "leave out images that PadChest flags as paediatric (no age test: --min-age)")
    min_age: int | None = setting(None, "leave out younger patients and unknown ages", at_least=0, metavar="YEARS")
    limit: int | None = setting(None, "use N images, sampled with --seed", at_least=1, metavar="N")
    balance: str | None = setting(None, "show each class of this caption field equally often", metavar="FIELD")
    exclude: str | None = setting(
        None, "leave out the record names in this file, one per line, such as flagged.txt from check", metavar="FILE"
    )
    skip_bad: bool = setting(False, "leave out images that are missing or cannot be decoded instead of stopping")
    prompt_template: str | None = setting(
        None,
        f'"chest x-ray, age {{age}} {{sex}}", or one of: {", ".join(TEMPLATES)} (default: the data set\'s own)',
        metavar="TEXT",
    )
    split: str = setting(
        "80/16/4",
        "shares of train/validation/test images, by patient (80/20: no validation, 98/2: no test)",
        choices=tuple(SPLITS),
    )
    size: int | None = setting(
        None, "pixels, a multiple of 8 (default: the model's own size, in check 512)", at_least=8, metavar="PIXELS"
    )
    fit: str = setting("crop", "how an image becomes a square: centre crop, or black padding", choices=("crop", "pad"))
    greys: str = setting(
        "declared",
        "how more than 8 bits of grey become 8: the range the file declares, or percentiles of the image",
        choices=("declared", "percentiles"),
    )
    outside_files: bool = setting(False, "use images that a table names outside its folder (absolute paths, ../)")

    def __post_init__(self):
        super().__post_init__()
        self.transform(default_size=512)  # raises InputError if size is not a multiple of 8

    def transform(self, default_size):
        """How images are read. ``default_size``: pixels, used if --size was not given."""
        return Transform(default_size if self.size is None else self.size, self.fit, self.greys)


def open_data_set(spec, settings=None, seed=0, captioned=True):
    """Read a data set's tables and select its records. No image is opened.

    Args:
        spec: "name:path", name one of DATA_SETS; the rendered ones, such as "phantom", take no path, but may
            have a number of images: "phantom:6000".
        settings: DataSettings; None = the defaults. Splits and image size are not applied here.
        seed: of ``settings.limit``.
        captioned: leave out records without a prompt.
    Returns: DataSet, its records sorted by name, its notes saying what was left out and what was not understood.
    Raises: InputError if the data set cannot be used as it is.
    """
    settings = DataSettings() if settings is None else settings
    source, root, records, notes = _read_tables(spec)
    prompt = source.PROMPT if hasattr(source, "PROMPT") else source.default_prompt(records)
    records = sorted(records, key=lambda record: record.name)
    if settings.views == "frontal":
        _require_known_views(records, source)
    template = prompt if settings.prompt_template is None else settings.prompt_template
    reasons = [_excluded, _not_frontal, _unknown_view, _pediatric, _too_young, _missing]
    if captioned and template is not None:
        reasons.insert(-1, lambda records, _: _promptless(records, template))
    if root is not None:
        reasons.insert(0, lambda records, settings: _outside(records, settings, root))
    for find in reasons:
        names, reason = find(records, settings)
        if names:
            notes.append(f"{len(names):,} of {len(records):,} left out: {reason}")
            records = [record for record in records if record.name not in names]
    if not records:
        raise InputError(f"{spec} holds no usable image; {'; '.join(notes) or 'expected ' + source.LOOKED_FOR}")
    if settings.limit is not None and settings.limit < len(records):
        notes.append(f"{settings.limit:,} of {len(records):,} sampled with seed {seed} (--limit)")
        sampled = sorted(records, key=lambda record: order_key(seed, record.name))[: settings.limit]
        records = sorted(sampled, key=lambda record: record.name)
    notes += _link_notes(records, root) + _unread_notes(records)
    return DataSet(shown(spec), tuple(records), prompt, tuple(notes))


def _read_tables(spec):
    """ "name:path" -> (the data set's file in sets/, its folder or None, its records, its notes)."""
    name, _, path = spec.partition(":")
    root = None if name in BUILT_IN else Path(path)
    if name not in DATA_SETS:
        is_path = os.sep in name or Path(spec).exists()
        wanted = f"did you mean folder:{spec}? Other names:" if is_path else "give --data name:path with name one of:"
        raise InputError(f"unknown data set {name!r}; {wanted} {', '.join(DATA_SETS)}")
    source = DATA_SETS[name]
    if name in BUILT_IN:
        if path and not (re.fullmatch("[0-9]{1,9}", path) and 1 <= int(path) <= MOST_RENDERED):
            raise InputError(f"{name} is rendered on demand and takes no path, got {spec!r}; give {name} alone, or "
                             f"with a number of images, up to {MOST_RENDERED:,}: {name}:6000")  # fmt: skip
        records, notes = source.records(int(path)) if path else source.records()
    elif not path:
        raise InputError(f"{name} needs a path: {name}:/where/it/is")
    elif not Path(path).is_dir():
        raise InputError(f"{path} is not a folder; {name}:PATH expects the folder that holds {source.LOOKED_FOR}")
    else:
        records, notes = source.records(root)
    return source, root, records, list(notes)


def _require_known_views(records, source):
    if records and all(record.frontal is None for record in records):
        raise InputError(
            f"{len(records):,} of {len(records):,} images do not say whether they are frontal; "
            f"{getattr(source, 'VIEW_HINT', 'complete the table')}, or give --views all"
        )


def _link_notes(records, root):
    """How many images are reached through links that lead out of the data set's folder."""
    if root is None:
        return []
    folders = Counter(record.path.parent for record in records if record.path is not None)
    inside = os.path.realpath(root)
    linked = sum(n for folder, n in folders.items() if not Path(os.path.realpath(folder)).is_relative_to(inside))
    return [f"{linked:,} of {len(records):,} images lie outside {root}, behind links in it"] if linked else []


def _unread_notes(records):
    """For each field with values that were given but not understood: how many there are, and the most frequent."""
    counts = count_unread(records)
    return [
        f"{name} of {values.total():,} of {len(records):,} not understood, so it counts as missing: {_examples(values)}"
        for name, values in counts.items()
    ]


def count_unread(records):
    """{field: Counter of the texts, up to 40 characters, that were given for it but not understood}"""
    counts = {}
    for record in records:
        for name, text in record.unread.items():
            counts.setdefault(name, Counter())[text[:40]] += 1
    return dict(sorted(counts.items()))


def _examples(values):
    """A Counter of texts -> "'414' (2), '-1' (1), ..." """
    shown = ", ".join(f"{text!r} ({count:,})" for text, count in values.most_common(5))
    return shown + (", ..." if len(values) > 5 else "")


def _some(names, n):
    """The first ``n`` names, each with at most its last 80 characters."""
    return ", ".join(name if len(name) <= 80 else f"...{name[-80:]}" for name in names[:n])


# --- what is left out -------------------------------------------------------------------------------------------------
# Each of these takes records and DataSettings and returns (names of the records to leave out, the reason).
def _outside(records, settings, root):
    """Records whose table names a file outside the data set's folder."""
    if settings.outside_files:
        return set(), ""
    paths = set(outside({record.path for record in records if record.path is not None}, root))
    names = {record.name for record in records if record.path in paths}
    examples = _some(sorted(names), 3)
    if names and not settings.skip_bad:
        raise InputError(
            f"{len(names):,} of {len(records):,} listed images are outside {root}, such as {examples}; allow that with "
            "--outside-files, or leave them out with --skip-bad"
        )
    return names, f"outside {root}, such as {examples}"


def _not_frontal(records, settings):
    names = {record.name for record in records if record.frontal is False} if settings.views == "frontal" else set()
    return names, "lateral and other views that are not frontal (--views all keeps them)"


def _unknown_view(records, settings):
    if settings.views != "frontal":
        return set(), ""
    unknown = [record for record in records if record.frontal is None]
    words = Counter(record.unread.get("projection", record.unread.get("view", ""))[:40] for record in unknown)
    blank = words.pop("", 0)
    parts = [f"{blank:,} blank"] * bool(blank) + [_examples(words)] * bool(words)
    return {record.name for record in unknown}, f"of unknown view: {', '.join(parts)} (--views all keeps them)"


def _promptless(records, template):
    """Records whose fields give no prompt. Where none gives one, or the template is wrong, all stay: `prompts_for`
    then says what is wrong."""
    empty = [record.name for record in records if not render(template, record.fields).strip()]
    if len(empty) == len(records):
        return set(), ""
    return set(empty), f"without a prompt from {TEMPLATES.get(template, template)!r}, such as {_some(empty, 3)}"


def _pediatric(records, settings):
    if settings.drop_pediatric and not any("pediatric" in {*record.fields, *record.unread} for record in records):
        raise InputError("--drop-pediatric: no record says whether it is paediatric; leave it out, or give --min-age")
    names = {record.name for record in records if record.fields.get("pediatric") == "yes"}
    return names if settings.drop_pediatric else set(), "flagged as paediatric (--drop-pediatric)"


def _too_young(records, settings):
    if settings.min_age is None:
        return set(), ""
    names = {record.name for record in records if int(record.fields.get("age", -1)) < settings.min_age}
    return names, f"younger than {settings.min_age} or of unknown age (--min-age)"


def _excluded(records, settings):
    if settings.exclude is None:
        return set(), ""
    with naming("--exclude"):
        lines = read_lines(input_file(settings.exclude, "--exclude"))
    listed = {line.split("\t")[0].strip() for line in lines}  # after a tab: the reason
    names = listed & {record.name for record in records}
    if listed and not names:
        raise InputError(
            f"none of the {len(listed)} names in {settings.exclude} is in the data set; "
            "give --exclude a file that check wrote for this data set"
        )
    return names, f"named in {settings.exclude} (--exclude)"


def _missing(records, settings):
    """Records whose image file does not exist. Lists each folder once: 160,000 single queries would be slow."""
    file_names = {}  # folder -> names of its files
    names = set()
    for record in records:
        if record.path is None:
            continue
        folder = record.path.parent
        if folder not in file_names:
            file_names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if record.path.name not in file_names[folder]:
            names.add(record.name)
    examples = _some(sorted(names), 5)
    if names and not settings.skip_bad:
        raise InputError(
            f"{len(names):,} of {len(records):,} listed images are missing, such as {examples}; "
            "restore them, or leave them out with --skip-bad"
        )
    return names, f"listed but missing, such as {examples}"
