"""Writing files so that none is ever left half-written: to a temporary name, then renamed. Reading regular ones, and
JSON."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
import warnings
from pathlib import Path

from minildm.errors import WHEN_FAILED, InputError

MAX_FILE_BYTES = 1 << 30  # larger files are not read whole; the largest radiographs have 100 MB
MAX_JSON_BYTES = 16 << 20  # a document takes up to fifty times its size in memory
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
MADE = set()  # folders that `writable_folder` has made in this process


def _machine():
    """8 hex digits that name the system whose process numbers `os.getpid` returns: this computer since it was started,
    or this container on it."""
    facts = [os.uname().nodename]
    with contextlib.suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("".join(facts).encode()).hexdigest()[:8]


MACHINE = _machine()
TEMPORARY = re.compile(r"\.minildm-([0-9a-f]{8})-([0-9]+)-")  # a temporary name: machine, process, then what it is for
ABANDONED_SECONDS = 24 * 3600  # without a change, after which another machine's file counts as left behind
TIDIED = set()  # folders whose leftovers this process has removed


def temporary_path(path):
    """A hidden path in the folder of ``path``, of the same suffix, for what becomes ``path`` once it is whole.

    Its name says which process writes it, so that what a killed process leaves is recognised and removed here.
    """
    path = Path(path)
    _remove_leftovers(path.parent)
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]  # the whole name may be as long as names can be
    return path.with_name(f".minildm-{MACHINE}-{os.getpid()}-{name}{path.suffix}")


def _remove_leftovers(folder):
    """Remove the temporary files and folders whose process is gone, once for each folder."""
    folder = folder.absolute()
    if folder in TIDIED or not folder.is_dir():
        return
    TIDIED.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # what cannot be listed or removed stays
        for entry in entries:
            if (match := TEMPORARY.match(entry.name)) and not _in_use(entry, match[1], int(match[2])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _in_use(entry, machine, process):
    if machine != MACHINE:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime < ABANDONED_SECONDS
    try:
        os.kill(process, 0)  # sends nothing: asks whether it exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def written_beside(path, replace=True):
    """Yield a temporary path in the folder of ``path``. It is renamed to ``path`` if the block succeeds, else deleted.

    The temporary name has the same suffix, which decides the format for some writers (Pillow, NumPy).
    Args: replace: False: raise FileExistsError if ``path`` exists by then, also if another process has just made it.
    Raises: OSError with the name of ``path`` if the disk is full or fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # another command that used it, too, may have failed and removed it
    beside = temporary_path(path)
    try:
        try:
            yield beside
            with contextlib.suppress(OSError):  # network mounts and buckets may refuse it
                beside.chmod(0o666 & ~UMASK)  # some writers create files that only their owner can read
            _flush(beside)
            if replace:
                os.replace(beside, path)
            else:
                _rename_to_new(beside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
    except Exception as error:
        if code := _system_error(error, beside):
            raise OSError(code, os.strerror(code), str(path)) from None  # FileExistsError and the like, by the code
        raise


def _flush(path):
    """On disk before it gets its name, in case of a power cut."""
    with open(path, "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system without it
                raise


def _rename_to_new(path, new):
    """Rename the file; FileExistsError if the new name is taken. `os.rename` would replace what is there."""
    try:
        os.link(path, new)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name with an empty file, then replace that
        os.close(os.open(new, os.O_CREAT | os.O_EXCL))
        os.replace(path, new)


def _system_error(error, path):
    """The errno of a failure to write ``path``; None for other errors. Libraries in Rust put it into words."""
    if isinstance(error, OSError):
        return error.errno if error.filename in (None, str(path)) or error.errno == errno.EEXIST else None
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def locked(path, wait=False):
    """Open the file ``path`` and lock it, for this process alone, until it is closed or the process ends in any way.

    Returns: the open file; None if another process has the lock and ``wait`` is False. Where the file system has no
    locks, a warning says so, and the caller goes on.
    """
    file = open(path, "a")  # noqa: SIM115 (held open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
            file.close()
            raise
        warnings.warn(
            f"the file system of {shown(Path(path).parent)} has no locks; start only one process at a time on it",
            stacklevel=2,
        )
    return file


def writable_folder(path, flag="--out"):
    """Create the folder ``path`` if needed and check that files can be written to it, before any work is done.

    Raises PermissionError or NotADirectoryError, naming ``flag``, the flag that gave the path.
    """
    path = Path(path)
    try:
        _undo_if_unused(path)
        path.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(path / "write-test")
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise NotADirectoryError(f"{path} is a file, expected a folder for the results; give another {flag}") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"a parent of {path} is a file, not a folder; give another {flag}") from None
    except OSError as error:
        raise PermissionError(f"cannot write into {path} ({error.strerror}); give another {flag}") from None
    return path


def read_json(path, kind=dict):
    """The JSON document in the file ``path``, of type ``kind`` (dict or list).

    Raises: FileNotFoundError; InputError, naming the file, for whatever else may be wrong with it: not text, no JSON,
    nested too deeply, numbers too long, larger than 16 MB, or of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing" if not path.exists() else f"{path} is not a regular file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, more than any JSON file read here; get it again")
    return parse_json(path.read_bytes(), path, kind)


def parse_json(text, name, kind=dict):
    """The JSON document ``text``, str or UTF-8 bytes, of type ``kind``. Raises: InputError, beginning with ``name``."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text  # with or without a byte order mark
        document = json.loads(text)
    except RecursionError:
        raise InputError(f"{name} is not valid JSON for this purpose (nested too deeply); get it again") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of more than 4,300 digits
        reason = str(error).partition(";")[0][:200]
        raise InputError(f"{name} is not valid JSON ({reason}); get it again") from None
    if not isinstance(document, kind):
        wanted = {dict: "object", list: "array"}[kind]
        raise InputError(f"{name} holds a {type(document).__name__}, expected a JSON {wanted}; get it again")
    return document


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
