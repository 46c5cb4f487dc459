"""Errors for users: one line that says what came, what was expected and what to do."""

import contextlib
import io
import sys
import warnings

LONGEST_LINE = 500  # characters


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
    warnings.showwarning = lambda message, *_: print(f"warning: {one_line(message)}", file=sys.stderr)
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
    print(one_line(message), file=sys.stderr)
    return code


def one_line(message):
    """The message on one line of at most 500 characters, its middle left out if need be: the end says what to do.
    Names in files may hold anything; what a terminal would obey or could not print is escaped."""
    words = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} [...] {line[-LONGEST_LINE // 2 + 7 :]}"
