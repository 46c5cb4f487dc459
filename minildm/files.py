"""Writing files so that none is ever left half-written: to a temporary name, then renamed. Reading regular ones."""

import contextlib
import hashlib
import os
import re
import shutil
import stat
from pathlib import Path

from minildm.errors import WHEN_FAILED, InputError

MAX_FILE_BYTES = 1 << 30  # larger files are not read whole; the largest radiographs have 100 MB
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
MADE = set()  # folders that `writable_folder` has made in this process


@contextlib.contextmanager
def written_beside(path):
    """Yield a temporary path in the folder of ``path``. It is renamed to ``path`` if the block succeeds, else deleted.

    The temporary name has the same suffix, which decides the format for some writers (Pillow, NumPy).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # another command that used it, too, may have failed and removed it
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        beside.chmod(0o666 & ~UMASK)  # some writers create files that only their owner can read
        with open(beside, "rb") as file:
            os.fsync(file.fileno())  # on disk before it gets its name, in case of a power cut
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def writable_folder(path, flag="--out"):
    """Create the folder ``path`` if needed and check that files can be written to it, before any work is done.

    Raises PermissionError or NotADirectoryError, naming ``flag``, the flag that gave the path.
    """
    path = Path(path)
    try:
        _undo_if_unused(path)
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".minildm-write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise NotADirectoryError(f"{path} is a file, expected a folder for the results; give another {flag}") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"a parent of {path} is a file, not a folder; give another {flag}") from None
    except OSError as error:
        raise PermissionError(f"cannot write into {path} ({error.strerror}); give another {flag}") from None
    return path


def _undo_if_unused(path):
    """Let a command that fails remove the folders that are about to be made for ``path``, unless they hold a file."""
    path = path.absolute()
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    if not missing or MADE & {*missing[-1].parents}:
        return  # what lies in a folder made before goes with that one
    outermost = missing[-1]
    MADE.add(outermost)

    def undo():
        if not any(files for _, _, files in os.walk(outermost)):
            shutil.rmtree(outermost, ignore_errors=True)

    WHEN_FAILED.append(undo)


def shown(path):
    """A path as text that can be printed and written to a file: bytes that are not UTF-8 become \\xNN."""

    def escaped(match):
        code = ord(match[0])  # os.fsdecode makes 0xDC00 + byte of such a byte
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

    return re.sub("[\ud800-\udfff]", escaped, str(path))


def writable_file(path, flag="--out"):
    """Check that the file ``path`` can be written, before any work is done; its folder is created if needed.

    Raises: as writable_folder; IsADirectoryError if ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{flag} {path} is a folder, expected a file; give a file name in it")
    writable_folder(path.parent, flag)
    return path


def input_file(path, flag):
    """``path``, checked to be a file that exists. Raises: FileNotFoundError or IsADirectoryError, naming ``flag``."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{flag} {path} is a folder, expected a file")
    if not path.exists():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path} is not a regular file")
    return path


def file_bytes(path):
    """The bytes of a regular file, or of a link to one.

    Raises: InputError if it cannot be read. Devices, pipes and sockets are refused without waiting for them, and so are
    files that would fill the memory.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{shown(path)}: a folder, expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{shown(path)}: a device or pipe, expected a regular file; remove it from the data")
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(f"{shown(path)}: has {status.st_size / 1e9:.1f} GB, over 1 GiB: no image is so large")
        with open(path, "rb") as file:
            return file.read(status.st_size)  # at most: what /proc makes up while it is read has size 0
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    except ValueError:  # a NUL, or half of a pair of surrogates
        raise InputError(f"{shown(path)}: cannot be read (not a file name)") from None


def sha256(path, chunk_bytes=1 << 20):
    """SHA-256 of a file's bytes, 64 hex digits; in constant memory."""
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
    versions = {}
    for folder in path.parent.glob(f".{path.name}-*"):
        if match := re.fullmatch(rf"\.{re.escape(path.name)}-(\d+)", folder.name):
            versions[folder] = int(match[1])
    new = path.with_name(f".{path.name}-{max(versions.values(), default=0) + 1}")
    new.mkdir(parents=True)
    link = path.with_name(f".{path.name}.link")
    try:
        yield new
        link.unlink(missing_ok=True)  # a killed process may have left one
        link.symlink_to(new.name)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    os.replace(link, path)  # from here on ``new`` is the version in use
    for old in versions:  # the version before, and what killed processes left
        shutil.rmtree(old, ignore_errors=True)
