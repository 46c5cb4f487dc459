"""Errors for users: one line that says what came, what was expected and what to do."""

import contextlib
import errno
import io
import os
import sys
import warnings

LONGEST_LINE = 500  # characters
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "could not create a memory object")
FULL = "what was there before is intact; make room, then run the command again"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "what was there before is intact; files of this size are not allowed here: see ulimit -f",
    errno.EROFS: "the file system is read-only; write to another one",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOMEM: "memory is full; close other programs",
    errno.EMFILE: "too many files are open; see ulimit -n",
    errno.EIO: "the disk or network fails; what was there before is intact",
}
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
WHEN_FAILED = []  # functions to call before a command that has failed exits
REPORT = []  # at most one function: an error message -> what to print of it, or None (torchrun.py)


class InputError(ValueError):
    """A user's input (a file, a flag, a prompt) cannot be used; the message says what to change."""


@contextlib.contextmanager
def naming(flag):
    """InputErrors of the block, which begin with a file's name, begin with the flag that gave the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag} {error}") from None


def exit_cleanly(main, *arguments):
    """Run a command's ``main`` and exit: code 2 and one line for a user's mistake or the machine's limits (disk full,
    out of memory), 130 for Ctrl-C, a traceback for our own bugs. Warnings are printed as one line, too."""
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8, and consoles that lack a character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: print(f"warning: {one_line(message)}", file=sys.stderr)
    try:
        code = main(*arguments)
        sys.stdout.flush()  # it may be a file on a full disk
        sys.exit(code)
    except InputError as error:
        sys.exit(_fail(2, f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit(_fail(130, "interrupted"))
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        code = _fail(2, f"error: {system_message(error)}")
        _discard_output()
        sys.exit(code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "lower --batch-size or the size of the images, or close other programs"
        sys.exit(_fail(2, f"error: out of memory; {advice}"))


def system_message(error):
    """An OSError in words: what could not be written or used, why, and what to do. Our own are words already."""
    if error.errno is None:
        return str(error)
    name = "a file" if error.filename is None else error.filename
    done = "write" if error.errno in WRITING else "use"
    return f"could not {done} {name} ({error.strerror}); {ADVICE.get(error.errno, 'check its name and permissions')}"


def is_out_of_memory(error):
    """Whether memory ran out, which torch says in different words for each place: GPU, CPU, oneDNN."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _discard_output():
    """What is still to be printed cannot be written where the disk is full: it is not tried again at the exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(code, message):
    for undo in WHEN_FAILED:
        undo()
    if (message := reported(message)) is not None:
        print(one_line(message), file=sys.stderr)
    return code


def reported(message):
    """What to print of an error message; None if another process has printed the same."""
    for report in REPORT:
        message = report(message)
    return message


def one_line(message):
    """The message on one line of at most 500 characters, its middle left out if need be: the end says what to do.
    Names in files may hold anything; what a terminal would obey or could not print is escaped."""
    words = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} [...] {line[-LONGEST_LINE // 2 + 7 :]}"
