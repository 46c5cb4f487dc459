"""A user's mistake is answered in one line: what came, what was expected, what to do."""

import sys
import warnings


class InputError(ValueError):
    """Something the user gave (a file, a flag, a prompt) cannot be used; the message says what to change."""


def exit_cleanly(main, *arguments):
    """Run a command's ``main``: exit code 2 and one line for a user's mistake, 130 for Ctrl-C; our own bugs keep
    their traceback. Warnings are one line as well."""
    warnings.showwarning = lambda message, *_: print(f"warning: {_one_line(message)}", file=sys.stderr)
    try:
        sys.exit(main(*arguments))
    except (InputError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        sys.exit(_fail(2, f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit(_fail(130, "stopped by Ctrl-C"))
    except BrokenPipeError:  # the reader (head, less) has gone
        sys.stderr.close()
        sys.exit(0)


def _fail(code, message):
    print(_one_line(message), file=sys.stderr)
    return code


def _one_line(message):
    return " ".join(str(message).split())
