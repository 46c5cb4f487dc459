"""All that a report knows about a run, from the files of its folder alone.

What a file would have told but does not is `Missing`, with the reason: a report shows it as missing, never as zero or
blank. Nothing here reads an image or a caption.
"""

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minildm.adapters.rank_map import is_layer
from minildm.data.records import BUILT_IN
from minildm.errors import InputError
from minildm.files import parse_json, read_json, sha256

# Results of the metrics' commands, wherever in the run's folder they are.
RESULTS = ("metrics.json", "fid.json", "clip_score.json", "audit.json", "adherence.json")


@dataclass(frozen=True)
class Missing:
    """What a run's folder does not hold, and why."""

    reason: str

    def __bool__(self):
        return False


@functools.cache
def embedded_hash():
    """What runs record as the hash of the embedded model (`LatentDiffusion.base_hash`); no hash where it is absent."""
    from minildm.loading import EMBEDDED

    unet = EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors"
    return sha256(unet) if unet.is_file() else "absent"


@dataclass(frozen=True)
class RunFiles:
    """What the folder of a run holds."""

    folder: Path
    name: str  # by which a report calls the run
    version: str  # of minildm
    settings: dict
    found: dict  # base, data, splits
    entries: tuple  # of log.jsonl, dicts
    sessions: tuple  # of sessions.jsonl, dicts
    summary: dict | Missing  # summary.json
    adapter: dict | Missing  # what adapter.safetensors says of itself: scale, ranks, ...
    results: dict  # {path below the folder: content} of the files in RESULTS
    notes: tuple  # what was odd about the files

    @property
    def shows_no_patient(self):
        """Whether the run's images can show no patient: its data is procedural, and so is what the embedded base, on
        which it must build, was trained on."""
        builds_on_embedded = self.found.get("base") == embedded_hash() and not self.settings.get("on_top_of")
        return str(self.settings.get("data")).partition(":")[0] in BUILT_IN and builds_on_embedded

    def series(self, key):
        """The numbers of the log's entry ``key``: (steps, values), two lists of equal length."""
        return self._series(key, is_number)

    def layers(self, key):
        """The same for an entry that has a number, or null, for each layer: values are {module path: number}."""
        return self._series(key, is_of_layers)

    def _series(self, key, fits):
        pairs = [(entry["step"], entry[key]) for entry in self.entries if fits(entry.get(key))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def split_sizes(self):
        """{split: number of images}."""
        splits = self.found.get("splits")
        splits = splits if isinstance(splits, dict) else {}
        return {name: len(names) for name, names in splits.items() if isinstance(names, list)}

    def ranks(self):
        """[(step, {module path: rank})]: over the run where they change, else of the adapter; Missing without one."""
        steps, ranks = self.layers("ranks")
        if steps:
            changes = list(zip(steps, ranks))
            return [*changes, (self.last_step, ranks[-1])] if self.last_step > steps[-1] else changes
        if not self.adapter:
            return self.adapter
        return [(0, self.adapter["ranks"]), (self.last_step, self.adapter["ranks"])]

    @property
    def last_step(self):
        return max((entry["step"] for entry in self.entries), default=0)

    def best(self):
        """(validation loss, step), the lowest that is finite; Missing without a validation."""
        steps, losses = self.series("validation")
        finite = [(loss, step) for loss, step in zip(losses, steps) if math.isfinite(loss)]
        return min(finite) if finite else Missing("no validation in the log")

    def result(self, part):
        """A part of metrics.json, what a comparison measured; Missing with the reason."""
        if "metrics.json" not in self.results:
            return Missing("not evaluated yet")
        found = self.results["metrics.json"].get(part, {"missing": "not measured"})
        return Missing(str(found["missing"])) if isinstance(found, dict) and "missing" in found else found

    def images(self, pattern):
        """Sorted paths of images below the folder."""
        return sorted(self.folder.glob(pattern))


def read_run(folder, name=None):
    """The RunFiles of a folder.

    Args: name: by which a report calls the run; None = the folder's.
    Raises: FileNotFoundError for a folder that holds no run; InputError for files that cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.json); give the folder of a run of train.py")
    record = read_json(folder / "config.json")
    if not isinstance(record.get("settings"), dict):
        raise InputError(f"{folder}/config.json has no settings; it was written by minildm 0.1, or is no run's")
    entries, notes = _json_lines(folder / "log.jsonl")
    entries = [entry for entry in entries if is_number(entry.get("step")) and entry["step"] >= 0]
    sessions, more = _json_lines(folder / "sessions.jsonl")
    results = {}
    for path in sorted(path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(f"{pattern}.json")):
        if path.name in RESULTS:
            results[path.relative_to(folder).as_posix()] = read_json(path)
    found = record.get("found")
    return RunFiles(
        folder=folder,
        name="".join(c if c.isprintable() else "?" for c in (folder.absolute().name if name is None else name)),
        version=str(record.get("minildm", "unknown")),
        settings=record["settings"],
        found=found if isinstance(found, dict) else {},
        entries=tuple(entries),
        sessions=tuple(sessions),
        summary=_summary(folder),
        adapter=_adapter(folder),
        results=results,
        notes=tuple(notes + more),
    )


def read_runs(folders):
    """The RunFiles of several folders, under names that differ: as much of each path as that takes."""
    folders = [Path(folder).absolute() for folder in folders]
    if len(set(folders)) < len(folders):
        raise InputError("a run is named twice; give each folder once")
    depth = next(d for d in range(1, 1000) if len({folder.parts[-d:] for folder in folders}) == len(folders))
    return [read_run(folder, "/".join(folder.parts[-depth:])) for folder in folders]


def _json_lines(path):
    """(the JSON objects of a file's lines, notes on lines that are none). A killed process may leave half a line."""
    if not path.is_file():
        return [], []
    good, bad = [], 0
    for line in path.read_bytes().splitlines():
        try:
            good.append(parse_json(line, path))
        except InputError:
            bad += 1
    return good, [f"{bad} of {bad + len(good)} lines of {path.name} cannot be read and are left out"] if bad else []


def _summary(folder):
    path = folder / "summary.json"
    if not path.is_file():
        return Missing("the run has not ended (no summary.json); train.py --resume continues it")
    summary = read_json(path)
    counts = summary.get("parameters")
    rows = list(counts.values()) if isinstance(counts, dict) else [None]
    whole = all(isinstance(row, list) and len(row) == 3 and all(map(is_number, row)) for row in rows)
    if not whole or not is_number(summary.get("seconds")):
        return Missing("summary.json has another form than this version writes")
    return summary if is_number(summary.get("steps")) and summary["steps"] > 0 else Missing("the run took no step")


def _adapter(folder):
    path = folder / "adapter.safetensors"
    if not path.is_file():
        full = (folder / "model").is_dir()
        return Missing("full fine-tuning: no adapter" if full else "no adapter.safetensors in the run's folder")
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get("minildm", "{}")
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:100]}); restore it") from None
    about = parse_json(text, f"{path}: metadata minildm")
    if not is_of_layers(about.get("ranks")) or not is_number(about.get("scale")):
        return Missing(f"{path.name} does not state its ranks: another tool's format")
    return about


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_of_layers(value):
    """Whether a value is {module path: number or None}, of layers that a rank map knows."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(is_layer(path) and (number is None or is_number(number)) for path, number in value.items())
    )


def step_of(path):
    """The step of a sheet of sample images, "step-000500.png"; None for another file."""
    match = re.fullmatch(r"step-(\d+)\.png", path.name)
    return int(match[1]) if match else None
