"""Files that are whole or absent: everything is written beside its place and then renamed."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)


@contextlib.contextmanager
def written_beside(path):
    """Yield a temporary path next to ``path``; rename it there when the block ends well, delete it when it does not.

    The temporary name keeps the suffix, so writers that look at it (Pillow, numpy) behave the same.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        beside.chmod(0o666 & ~UMASK)  # some writers make files that only their owner may read
        with open(beside, "rb") as file:
            os.fsync(file.fileno())  # on the disk before the name points to it: survives a power cut
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def writable_folder(path, flag="--out"):
    """Make ``path`` a folder and prove that files can be written there. Raises PermissionError / NotADirectoryError
    in words before any work is done, not after. ``flag``: the one that named it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".minildm-write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise NotADirectoryError(
            f"{path} is a file, but a folder for the results was expected; give another {flag}"
        ) from None
    except NotADirectoryError:
        raise NotADirectoryError(f"a parent of {path} is a file, not a folder; give another {flag}") from None
    except OSError as error:
        raise PermissionError(f"cannot write into {path} ({error.strerror}); give another {flag}") from None
    return path


def sha256(path, chunk_bytes=1 << 20):
    """SHA-256 of a file's bytes, as 64 hex digits; constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def replaced_folder(path):
    """Yield a new folder next to ``path``, which becomes a link to it when the block ends well: the folder is whole or
    the one before. ``path`` must be absent or such a link."""
    path = Path(path)
    if path.exists() and not path.is_symlink():
        raise FileExistsError(f"{path} is in the way: a link to the newest version is expected there; move it away")
    versions = [int(p.name.rpartition("-")[2]) for p in path.parent.glob(f".{path.name}-*") if p.name[-1].isdigit()]
    new = path.with_name(f".{path.name}-{max(versions, default=0) + 1}")
    new.mkdir(parents=True)
    try:
        yield new
        link = path.with_name(f".{path.name}.{os.getpid()}")
        link.unlink(missing_ok=True)
        link.symlink_to(new.name)
        os.replace(link, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for old in path.parent.glob(f".{path.name}-*"):  # the version before, and what a killed process left
        if old != new:
            shutil.rmtree(old, ignore_errors=True)
