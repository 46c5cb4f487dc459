"""A run's folder: what it was asked for, what happened, and the state that continues it.

    config.json          the settings, and what was found: base, splits, a fingerprint of the data; a resumed run must
                         share both
    log.jsonl            one JSON object per step, validation and change of ranks
    adapter.safetensors  the best on validation (full fine-tuning: model/, a checkpoint folder)
    last/state.pt        everything that an exact continuation needs
    samples/             sheets of sample images

Files are whole or absent (the log is appended to), and written by one process only.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from minildm import __version__
from minildm.errors import InputError
from minildm.files import writable_folder, written_beside

LOCKED = {}  # {(inode, device): open file} of the config.json of this process' runs


class Run:
    """Open a new folder, or with ``resume`` one that holds a run of the same settings; `begin` is the first to write.

    Args:
        settings: a flat dict that JSON can hold. free: names of those that a resumed run may change.
        result: name of the file or folder that the best weights are written to.
        continue_with: the command that resumes the run, for messages.
    Raises: InputError where the folder holds another run, or where a setting differs, naming it.
    """

    def __init__(self, folder, settings, resume=False, free=(), result="adapter.safetensors", continue_with=None):
        self.continue_with = continue_with or f"python train.py --resume {folder}"
        self.folder, self.resume, self.log_bytes = Path(folder), resume, 0
        self.result = self.folder / result
        self.record = {"minildm": __version__, "settings": _as_json(settings)}
        self.settings_before = None  # of a resumed run
        if resume:
            self.settings_before = read_record(self.folder)["settings"]
            self._compare(self.settings_before, self.record["settings"], free)
        elif (self.folder / "log.jsonl").exists():  # without a log nothing was trained: a mistake that can be repaired
            raise InputError(
                f"{folder} holds a run already; continue it with: {self.continue_with}, or give another --out"
            )
        writable_folder(self.folder)

    def expect(self, **found):
        """Resuming, check a part of what `begin` will check, before the work that finds the rest."""
        if self.resume:
            then = read_record(self.folder)["found"]
            self._compare(*({name: facts[name] for name in found if name in then} for facts in (then, _as_json(found))))

    def begin(self, **found):
        """Write config.json; or, resuming, check that base and data are what they were (``found``: fingerprints)."""
        if (self.folder / "config.json").exists():
            self._lock()
        for name in ("last", "samples"):
            writable_folder(self.folder / name)
        self.record["found"] = _as_json(found)
        if self.resume:
            self._compare(read_record(self.folder)["found"], self.record["found"])
        else:
            self._write_record()

    def adopt_settings(self):
        """Resuming, write the settings that differ from those of the begin into config.json: the next session's
        defaults."""
        if self.resume and self.settings_before != self.record["settings"]:
            self._write_record()

    def _write_record(self):
        with written_beside(self.folder / "config.json") as path:
            path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        self._lock()

    def _lock(self):
        """One process per run: two would write one log. The lock on config.json ends with the process, however that
        ends; the process itself may open its run again."""
        file = open(self.folder / "config.json", "r+")  # noqa: SIM115 (held open)
        inode = os.fstat(file.fileno())[1:3]
        if inode in LOCKED:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is writing {self.folder}; wait for it to end, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        LOCKED[inode] = file

    def _compare(self, then, now, free=()):
        for name in sorted({*then, *now} - {*free}):
            if then.get(name) != now.get(name):
                path = self.settings_before.get(name) if then is not self.settings_before else None
                where = f" ({path} at that time)" if path else ""
                raise InputError(
                    f"{self.folder} was begun with {name} = {then.get(name)!r}{where}, not {now.get(name)!r}; leave "
                    "it as it was, or begin a new run with another --out"
                )

    @property
    def state(self):
        return self.folder / "last" / "state.pt"

    def log(self, **entry):
        """Append a line to log.jsonl."""
        line = (json.dumps(entry) + "\n").encode()
        self._guarded(self._append, line)
        self.log_bytes += len(line)

    def _append(self, line):
        with open(self.folder / "log.jsonl", "ab") as file:
            file.write(line)

    def entries(self):
        """The log so far, a list of dicts."""
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

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
        state = None
        if self.state.exists():
            try:
                state = torch.load(self.state, map_location="cpu", weights_only=True)
            except Exception as error:
                best = f"the best weights so far are in {self.result}, " if self.result.exists() else ""
                raise InputError(
                    f"{self.state} is damaged ({_first_line(error)}); {best}begin a new run with another --out"
                ) from None
        self.log_bytes = state["log_bytes"] if state else 0
        if (self.folder / "log.jsonl").exists():
            with open(self.folder / "log.jsonl", "r+b") as file:
                file.truncate(self.log_bytes)
        return state

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
        """``write(what)``, with an InputError for a full or failing disk, which torch reports as RuntimeError."""
        try:
            write(what)
        except torch.OutOfMemoryError:
            raise
        except errors as error:
            raise InputError(
                f"could not write to {self.folder} ({_first_line(error)}); everything saved so far is intact; make "
                f"room, then continue with: {self.continue_with}"
            ) from None


def _as_json(facts):
    return json.loads(json.dumps(facts))  # tuples become lists


def data_fingerprint(records, prompts, contents):
    """A hash of names, prompts and contents (each image's hash, bytes): captions themselves are not written down."""
    digest = hashlib.sha256()
    for record, prompt, content in zip(records, prompts, contents, strict=True):
        digest.update(f"{record.name}\n{prompt}\n".encode() + content)
    return f"{len(records)} images, {digest.hexdigest()[:16]}"


def read_record(folder):
    """What config.json holds: {"minildm": version, "settings": ..., "found": ...}.

    Raises: FileNotFoundError where there is no run; InputError for a run of minildm 0.1.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        if (Path(folder) / "autoencoder" / "config.json").is_file():
            raise InputError(f"{folder} is a run of pretraining, with a config.json for each stage; python -m minildm "
                             f"pretrain --resume {folder} continues it")  # fmt: skip
        raise FileNotFoundError(f"{folder} holds no run to resume (no config.json)")
    record = json.loads(path.read_text(encoding="utf-8"))
    if "settings" not in record:
        raise InputError(
            f"{folder} was begun with minildm 0.1, and minildm {__version__} cannot continue it (its adapter loads); "
            "continue it with version 0.1, or begin a new run with another --out"
        )
    return record


def _first_line(error):
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
