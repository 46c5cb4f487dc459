"""A run's folder: what it was asked for, what happened, and the state that continues it.

    config.json          the flags, and what was found: base, splits and a fingerprint of the data; a resumed run
                         must share both
    log.jsonl            one JSON object a step, a validation, a test of the ranks
    adapter.safetensors  the best on validation
    last/state.pt        everything that an exact continuation needs
    samples/             sheets of sample pictures

Files are whole or absent, and written by one process only.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from minildm.errors import InputError
from minildm.files import writable_folder, written_beside

LOCKED = {}  # {(inode, device): open file} of the config.json of this process' runs


class Run:
    """Open a new folder, or with ``resume`` one that holds a run of the same settings; `begin` is the first to write.

    Args: flags: settings, a flat dict that JSON can hold. free: names of those that a resumed run may change.
    continue_with: the command that resumes it, for what is told to users.
    Raises: InputError where the folder holds another run, or where a setting differs, naming it.
    """

    def __init__(self, folder, flags, resume=False, free=(), continue_with=None):
        self.continue_with = continue_with or f"python train.py --resume {folder}"
        self.folder, self.resume, self.log_bytes = Path(folder), resume, 0
        self.settings = {"flags": json.loads(json.dumps(flags))}  # tuples become lists, as they come back
        if resume:
            self._compare(read_settings(self.folder)["flags"], self.settings["flags"], free)
        elif (self.folder / "log.jsonl").exists():  # without a log nothing was trained: a mistake that can be repaired
            raise InputError(
                f"{folder} holds a run already; continue it with: {self.continue_with}, or give another --out"
            )
        writable_folder(self.folder)

    def begin(self, **found):
        """Write config.json; or, resuming, check that what was found (fingerprints of base and data) is what it was."""
        if (self.folder / "config.json").exists():
            self._lock()
        for name in ("last", "samples"):
            writable_folder(self.folder / name)
        self.settings["found"] = json.loads(json.dumps(found))
        if self.resume:
            self._compare(read_settings(self.folder)["found"], self.settings["found"])
        else:
            with written_beside(self.folder / "config.json") as path:
                path.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
            self._lock()

    def _lock(self):
        """One process a run: two would write one log. The lock on config.json ends with the process, however that
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
                raise InputError(
                    f"{self.folder} was begun with {name} = {then.get(name)!r}, not {now.get(name)!r}; "
                    "leave it as it was, or begin a new run with another --out"
                )

    @property
    def adapter(self):
        return self.folder / "adapter.safetensors"

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
                kept = f"the best adapter so far is in {self.adapter}, " if self.adapter.exists() else ""
                raise InputError(
                    f"{self.state} is damaged ({_first_line(error)}); {kept}begin a new run with another --out"
                ) from None
        self.log_bytes = state["log_bytes"] if state else 0
        if (self.folder / "log.jsonl").exists():
            with open(self.folder / "log.jsonl", "r+b") as file:
                file.truncate(self.log_bytes)
        return state

    def _guarded(self, write, what):
        try:
            write(what)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"could not write to {self.folder} ({_first_line(error)}); what was saved before is "
                f"whole: make room, then continue with: {self.continue_with}"
            ) from None

    def save_adapter(self, write):
        """``write(path)`` puts the best adapter there."""
        self._guarded(write, self.adapter)


def fingerprint(records, prompts, contents):
    """Names, prompts and contents (bytes, each picture's hash) in one: captions themselves are not written down."""
    digest = hashlib.sha256()
    for record, prompt, content in zip(records, prompts, contents, strict=True):
        digest.update(f"{record.name}\n{prompt}\n".encode() + content)
    return f"{len(records)} pictures, {digest.hexdigest()[:16]}"


def read_settings(folder):
    """What config.json holds: {"flags": ..., "found": ...}. Raises FileNotFoundError where there is no run."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume (no config.json)")
    return json.loads(path.read_text(encoding="utf-8"))


def _first_line(error):
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
