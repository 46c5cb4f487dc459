"""One file from a web server to its place: resumed where an earlier attempt ended, checked by hash, then named.

`huggingface_hub`'s own download does neither: version 2.4 deletes an interrupted file and compares no more than sizes.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from minildm import __version__
from minildm.errors import InputError
from minildm.progress import Progress

CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte, after which a connection counts as lost
ATTEMPTS = 5  # connections in a row that bring nothing, before giving up
PAUSE = 1.0  # seconds before the second attempt; doubled before each further one


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, and what its content must be."""

    url: str
    size: int  # bytes
    digest: str  # 64 hex digits: SHA-256; 40: the SHA-1 that git names a file by
    name: str  # where it goes, relative to the folder of weights


def partial_path(file, folder):
    """Where the bytes of an unfinished download are. Named by content, so that any source of it can be continued."""
    return Path(folder) / f"{Path(file.name).name}.{file.digest[:12]}.part"


def bytes_present(file, folder):
    """How many bytes of the RemoteFile an earlier attempt left in ``folder``."""
    part = partial_path(file, folder)
    return min(part.stat().st_size, file.size) if part.is_file() else 0


def download(file, destination, folder, headers=None):
    """Download a RemoteFile to the path ``destination``, which appears only once its content has been checked.

    Args:
        folder: for the partial file, on the same disk. It stays there if the download is interrupted.
        headers: of the request. "Authorization" is not sent to other servers, should the address redirect to one.
    Raises: InputError: refused, connection lost, disk full, another content than announced, or another process at it.
    """
    part = partial_path(file, folder)
    with open(part, "ab", buffering=0) as output:
        _lock(output, part)
        if output.seek(0, os.SEEK_END) > file.size:
            output.truncate(0)
        try:
            _receive(file, output, headers or {})
        except KeyboardInterrupt:
            print(f"{_kept(output, file)}; the same command continues", file=sys.stderr)
            raise
        os.fsync(output.fileno())  # on disk before it gets its name, in case of a power cut
        if (found := content_digest(part, file.digest, file.name)) != file.digest:
            part.unlink()
            raise InputError(
                f"{file.name} was received damaged: hash {found[:16]}, expected {file.digest[:16]} ({file.url}); it "
                "was deleted; run the same command again"
            )
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, destination)


def content_digest(path, like, name=None):
    """The SHA-256 or git SHA-1 of a file's content, whichever kind ``like`` is; a progress bar if it takes long."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % size)
    bar = Progress(f"checking {name or Path(path).name}", "B", size, leave=False)
    with open(path, "rb") as file, bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _lock(output, part):
    """One process per partial file; the lock ends with the process, however that ends."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is downloading {part}; wait for it to end") from None
    except OSError:
        pass  # a file system without locks


def _receive(file, output, headers):
    """Append to ``output`` what it lacks of the RemoteFile, with as many connections as that takes."""
    failures, answered, furthest = 0, False, output.seek(0, os.SEEK_END)
    with Progress(Path(file.name).name, "B", file.size, initial=furthest) as bar:
        while (have := output.seek(0, os.SEEK_END)) < file.size:
            gained = False
            try:
                with _open(file.url, have, headers) as response:
                    answered = True
                    if response.status != 206 and have:  # the server sends the file from its beginning
                        output.truncate(0)
                        bar.reset()
                        have = 0
                    while have < file.size and (chunk := response.read1(min(CHUNK, file.size - have))):
                        _write(output, chunk, file)
                        bar.update(len(chunk))
                        have += len(chunk)
                        if have > furthest:
                            furthest, gained = have, True
                reason = "the server closed the connection"
            except urllib.error.HTTPError as error:
                answered, reason = True, f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):  # asking again would not help
                    raise InputError(f"{urlsplit(error.url).netloc} refuses {file.name}: {reason}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = reason_of(error)
            if have < file.size:
                failures = 0 if gained else failures + 1
                if failures == ATTEMPTS or not answered:
                    raise InputError(
                        f"no connection to {urlsplit(file.url).netloc} ({reason}); "
                        f"{_kept(output, file)}; the same command continues"
                    )
                time.sleep(PAUSE * 2 ** max(failures - 1, 0))


def refusal(url):
    """Why a server does not give the file at ``url``, in a few words; None if it does. Reads nothing of it."""
    try:
        _open(url, 0, {}).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return f"no connection to {urlsplit(url).netloc} ({reason_of(error)})"


def _open(url, start, headers):
    """The server's response with the bytes from ``start`` on."""
    request = urllib.request.Request(url, headers={"User-Agent": f"minildm/{__version__}"} | headers)
    request.add_header("Accept-Encoding", "identity")
    if start:
        request.add_header("Range", f"bytes={start}-")
    response = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise InputError(f"{url}: asked for the bytes from {start} on, got {response.headers.get('Content-Range')!r}")
    return response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects as usual, but a token is only for the server it was meant for."""

    def redirect_request(self, request, *answer):
        redirected = super().redirect_request(request, *answer)
        if redirected is not None and urlsplit(redirected.full_url)[:2] != urlsplit(request.full_url)[:2]:
            redirected.remove_header("Authorization")
        return redirected


def _write(output, chunk, file):
    view = memoryview(chunk)
    try:
        while view:  # an unbuffered file may take a part
            view = view[output.write(view) :]
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "see what is wrong with the disk"
        raise InputError(
            f"cannot write {file.name} ({error.strerror}); {_kept(output, file)}; {advice} and run the command again"
        ) from None


def _kept(output, file):
    return f"{human(output.seek(0, os.SEEK_END))} of {human(file.size)} are kept in {output.name}"


def reason_of(error):
    """A network error in a few words: the system's own, without the library's wrapping."""
    while getattr(error, "reason", None) is not None and isinstance(error.reason, BaseException):
        error = error.reason
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def human(size):
    """A number of bytes in decimal units: 4265146304 -> "4.27 GB"."""
    if size < 1000:
        return f"{size} bytes"
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.2f} {' kMGT'[power]}B"
