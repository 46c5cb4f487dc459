"""Errors for users: one line that says what came, what was expected and what to do."""

import contextlib
import io
import sys
import warnings

WHEN_FAILED = []  # functions to call before a command that has failed exits


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
    """Run a command's ``main`` and exit: code 2 and one line for a user's mistake, 130 for Ctrl-C, a traceback for our
    own bugs. Warnings are printed as one line, too."""
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8, and consoles that lack a character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: print(f"warning: {_one_line(message)}", file=sys.stderr)
    try:
        sys.exit(main(*arguments))
    except (InputError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        sys.exit(_fail(2, f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit(_fail(130, "interrupted"))
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        sys.stderr.close()
        sys.exit(0)


def _fail(code, message):
    for undo in WHEN_FAILED:
        undo()
    print(_one_line(message), file=sys.stderr)
    return code


def _one_line(message):
    return " ".join(str(message).split())
