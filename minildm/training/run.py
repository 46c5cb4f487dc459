"""A run's folder: what it was asked for, what happened, and the state that continues it.

    config.json          the settings, and what was found: base, splits, a fingerprint of the data; a resumed run must
                         share both
    log.jsonl            one JSON object per step, validation and change of ranks
    sessions.jsonl       one JSON object per process that trained: when, where, by which command
    summary.json         the final numbers; written when the run ends
    adapter.safetensors  the best on validation (full fine-tuning: model/, a checkpoint folder)
    last/state.pt        everything that an exact continuation needs
    samples/             sheets of sample images

Files are whole or absent (the log is appended to), and written by one process only: `.lock` is locked while it runs.
Of several processes that train together (distributed.py), the first reads and writes the folder; the others are told.
"""

import errno
import hashlib
import json
import math
import os
import re
import time
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from minildm import __version__
from minildm.distributed import from_first, is_first
from minildm.errors import InputError, is_out_of_memory, one_line
from minildm.files import locked, parse_json, read_json, writable_folder, written_beside
from minildm.torchrun import launch, launched, launcher

LOCKED = {}  # {(inode, device): open file} of the locks of this process' runs


class Run:
    """Open a new folder, or with ``resume`` one that holds a run of the same settings; `begin` is the first to write.

    Args:
        settings: a flat dict that JSON can hold. free: names of those that a resumed run may change.
        result: name of the file or folder that the best weights are written to.
        continue_with: the command that resumes the run, for messages.
    Raises: InputError where the folder holds another run, or where a setting differs, naming it.
    """

    def __init__(self, folder, settings, resume=False, free=(), result="adapter.safetensors", continue_with=None):
        self.continue_with = continue_with or f"{launcher()} train.py --resume {folder}"
        self.folder, self.resume, self.log_bytes = Path(folder), resume, 0
        self.result = self.folder / result
        self.record = {"minildm": __version__, "settings": _as_json(settings)}
        self.settings_before = None  # of a resumed run, and what it had found
        self.settings_before, self.found_before = from_first(lambda: self._open(free))

    def _open(self, free):
        """Check the folder. Returns: of a resumed run, the settings and what was found, before."""
        found = {}
        if self.resume:
            before = read_record(self.folder)
            self.settings_before, found = before["settings"], before["found"]
            self._compare(self.settings_before, self.record["settings"], free)
        else:
            self._refuse_another_run()
        writable_folder(self.folder)
        return self.settings_before, found

    def expect(self, **found):
        """Resuming, check a part of what `begin` will check, before the work that finds the rest."""
        if self.resume:
            then, now = self.found_before, _as_json(found)
            self._compare(*({name: facts[name] for name in found if name in then} for facts in (then, now)))

    def begin(self, **found):
        """Write config.json; or, resuming, check that base and data are what they were (``found``: fingerprints)."""
        self.found_before = from_first(self._claim)
        self.record["found"] = _as_json(found)
        self._compare_processes()
        if self.resume:
            self._compare(self.found_before, self.record["found"])
        else:
            self._write_record()

    def _claim(self):
        """Lock the folder, and make those in it. Returns: of a resumed run, what was found before."""
        self._lock()
        if not self.resume:
            self._refuse_another_run()  # one that began and ended since this process looked
        for name in ("last", "samples"):
            writable_folder(self.folder / name)
        return read_record(self.folder)["found"] if self.resume else {}

    def _compare_processes(self):
        """Raise InputError if this process has found other files than the first one, which may run on another host."""
        theirs, ours = from_first(lambda: self.record["found"]), self.record["found"]
        if different := [name for name in ours if ours[name] != theirs[name]]:
            raise InputError(f"this process found {different[0]} = {ours[different[0]]!r}, the first one "
                             f"{theirs[different[0]]!r}; give all hosts the same files and precision")  # fmt: skip

    def _refuse_another_run(self):
        if (self.folder / "log.jsonl").exists():  # without a log nothing was trained: a mistake that can be repaired
            raise InputError(
                f"{self.folder} holds a run already; continue it with: {self.continue_with}, or give another --out"
            )

    def adopt_settings(self):
        """When a resumed run has other settings, rewrite config.json, so that the next session starts from them."""
        if self.resume and self.settings_before != self.record["settings"]:
            self._write_record()

    def _write_record(self):
        if not is_first():
            return
        with written_beside(self.folder / "config.json") as path:
            path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def _lock(self):
        """One process per run: two would write one log. The process itself may open its run again. The file is there
        for its lock alone: it is never renamed or removed, so all processes lock the same one."""
        path = self.folder / ".lock"
        if path.exists() and os.stat(path)[1:3] in LOCKED:
            return
        end = time.monotonic() + (10 if launched() and self.resume else 0)  # readers of a killed process may linger
        while (file := locked(path)) is None and time.monotonic() < end:
            time.sleep(0.1)
        if file is None:
            raise InputError(f"another process is writing {self.folder}; wait for it to end, or give another --out")
        LOCKED[os.fstat(file.fileno())[1:3]] = file

    def _compare(self, then, now, free=()):
        for name in sorted({*then, *now} - {*free}):
            if then.get(name) != now.get(name):
                path = self.settings_before.get(name) if then is not self.settings_before else None
                where = f" ({path} at that time)" if path else ""
                raise InputError(
                    f"{self.folder} was begun with {name} = {then.get(name)!r}{where}, not {now.get(name)!r}; leave "
                    "it as it was, or begin a new run with another --out"
                )

    def found(self, name):
        """What `begin` recorded as ``name`` when a resumed run was begun; None in a new run."""
        return self.found_before.get(name)

    def start_session(self, **facts):
        """Append a line to sessions.jsonl: when and where this process trains, by which command."""
        self._guarded(lambda line: _append(self.folder / "sessions.jsonl", line), json.dumps(facts) + "\n")

    def save_summary(self, summary):
        """Write summary.json, a dict of what the end of the run says of it."""
        if not is_first():
            return
        with written_beside(self.folder / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    @property
    def state(self):
        return self.folder / "last" / "state.pt"

    def log(self, **entry):
        """Append a line to log.jsonl."""
        line = json.dumps(entry) + "\n"
        self._guarded(lambda line: _append(self.folder / "log.jsonl", line), line)
        self.log_bytes += len(line)  # json writes ASCII only

    def entries(self):
        """The log so far, a list of dicts, without lines that cannot be read, of which a warning tells."""
        path = self.folder / "log.jsonl"
        entries, damaged = [], []
        for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
            try:
                entries.append(parse_json(line, f"{path}, line {number}"))
            except InputError as error:
                damaged.append(str(error))
        if damaged:
            warnings.warn(
                f"{len(damaged)} damaged lines of the log are left out, the first: {damaged[0]}", stacklevel=2
            )
        return entries

    def save_state(self, state):
        """Replace last/state.pt; if that fails, the older one is still there."""
        self._guarded(self._write_state, state | {"log_bytes": self.log_bytes})

    def _write_state(self, state):
        with open(self.folder / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())  # the log must not be shorter than the state says, even after a power cut
        with written_beside(self.state) as path:
            torch.save(state, path)

    def load_state(self):
        """The saved state, or None; the log loses what was written after it."""
        return from_first(self._load_state)

    def _load_state(self):
        state = None
        if self.state.exists():
            try:
                _check_archive(self.state)
                state = torch.load(self.state, map_location="cpu", weights_only=True)
                if not all(type(state[name]) is int and state[name] >= 0 for name in ("log_bytes", "step")):
                    raise ValueError("it says no step")
            except Exception as error:  # of a dozen types
                raise self.damaged_state(error) from None
        self._shorten_log(state)
        return state

    def damaged_state(self, reason):
        """The InputError for a saved state that cannot be read or does not fit the run."""
        best = f"the best weights so far are in {self.result}, " if self.result.exists() else ""
        return InputError(f"{self.state} is damaged ({_first_line(reason)}); {best}begin a new run with another --out")

    def _shorten_log(self, state):
        """Cut the log where it ended when ``state`` was saved. A log that was not so long then, or whose entries after
        that place belong to steps before, is another one: it is kept as it is."""
        path, self.log_bytes = self.folder / "log.jsonl", state["log_bytes"] if state else 0
        log = path.read_bytes() if path.exists() else b""
        kept, after = log[: self.log_bytes], log[self.log_bytes :]
        whole = len(kept) == self.log_bytes and kept[-1:] in (b"", b"\n")
        if state and not (whole and _first_step(after) >= state.get("step", 0)):
            warnings.warn(
                f"{path} is not the log that the state was saved with ({len(log):,} bytes, expected "
                f"{self.log_bytes:,}): it is kept as it is, and lines may be missing or come twice",
                stacklevel=2,
            )
            kept = log if log[-1:] in (b"", b"\n") else log + b"\n"
        if kept != log:
            with open(path, "r+b") as file:
                file.truncate(len(kept))
                file.seek(min(len(kept), len(log)))
                file.write(kept[len(log) :])
        self.log_bytes = len(kept)

    def save_file(self, name, write):
        """``write(path)`` makes the file ``name`` of the run's folder."""
        self._guarded(write, self.folder / name)

    def save_result(self, write):
        """``write(path)`` puts the best weights at ``result``."""
        self._guarded(write, self.result)

    def save_sheet(self, step, write):
        """``write(path)`` makes the sheet of sample images of this step."""
        self._guarded(write, self.folder / "samples" / f"step-{step:06}.png", OSError)

    def _guarded(self, write, what, errors=(OSError, RuntimeError, SafetensorError)):
        """``write(what)``, with an InputError for a full or failing disk, which torch reports as RuntimeError. Only
        the first of several processes writes."""
        if not is_first():
            return
        try:
            write(what)
        except errors as error:
            if is_out_of_memory(error):
                raise
            reason = _first_line(error)
            full = getattr(error, "errno", None) in (errno.EDQUOT, errno.EFBIG) or "No space left" in reason
            if "inline_container" in reason:  # torch.save's words; it says why only where a file cannot be opened
                why = re.search(r"strerror: (.+)", reason)
                reason = why[1] if why else "the disk is full, or the file too large"
                full = why is None or "No space left" in reason
            elif isinstance(error, RuntimeError):
                raise  # not of the disk
            raise InputError(
                f"could not write to {self.folder} ({reason}); everything saved so far is intact; "
                f"{'make room' if full else 'repair that'}, then continue with: {self.continue_with}"
            ) from None


def begun_by_this_launch(folder):
    """Whether this start of torchrun has begun the run in ``folder``: a process failed, and all were started again."""
    path = Path(folder) / "sessions.jsonl"
    if not launched() or not (Path(folder) / "log.jsonl").exists() or not path.exists():
        return False
    own = f'"launch": {json.dumps(launch())}'.encode()
    return any(own in line for line in path.read_bytes().splitlines())


def _as_json(facts):
    return json.loads(json.dumps(facts))  # tuples become lists


def _append(path, line):
    with open(path, "ab") as file:
        file.write(line.encode())


def data_fingerprint(records, prompts, contents):
    """A hash of names, prompts and contents (each image's hash, bytes): captions themselves are not written down."""
    digest = hashlib.sha256()
    for record, prompt, content in zip(records, prompts, contents, strict=True):
        digest.update(f"{record.name}\n{prompt}\n".encode() + content)
    return f"{len(records)} images, {digest.hexdigest()[:16]}"


def read_record(folder):
    """What config.json holds: {"minildm": version, "settings": ..., "found": ...}.

    Raises: FileNotFoundError where there is no run; InputError for a damaged one, or one of minildm 0.1.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        if any((Path(folder) / stage / "config.json").is_file() for stage in ("autoencoder", "decoder")):
            raise InputError(f"{folder} is a run of pretraining, with a config.json for each stage; python -m minildm "
                             f"pretrain --resume {folder} continues it")  # fmt: skip
        raise FileNotFoundError(f"{folder} holds no run to resume (no config.json)")
    record = read_json(path)
    if "settings" not in record:
        raise InputError(
            f"{folder} was begun with minildm 0.1, and minildm {__version__} cannot continue it (its adapter loads); "
            "continue it with version 0.1, or begin a new run with another --out"
        )
    for part in ("settings", "found"):  # before the run begins to train, there is no "found"
        if not isinstance(record.setdefault(part, {}), dict):
            raise InputError(f"{path} is damaged: {part} is {one_line(record[part])[:40]}, expected an object")
    return record


def _check_archive(path):
    """Raise ValueError for an archive that would unpack to more than the file holds."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                raise ValueError("it is compressed, and torch never compresses")
            if entry.filename.endswith(".pkl") and b"bytearray" in archive.read(entry):
                raise ValueError("it asks for memory")


def _first_step(lines):
    """The step of the first line of a log, bytes; infinite where it says none, as a torn line does not."""
    try:
        step = parse_json(lines.partition(b"\n")[0], "log").get("step")
    except InputError:
        return math.inf
    return step if type(step) is int else math.inf


def _first_line(error):
    return one_line(str(error).splitlines()[0])[:100] if str(error) else type(error).__name__
