"""Settings: a frozen dataclass is the one home of a flag, its help text, its default and its check.

    @dataclass(frozen=True)
    class Optimization(Settings):
        lr: float = setting(1e-4, "learning rate", above=0)
        schedule: str = setting("constant", "after the warm-up", choices=("constant", "cosine"))

`add_flags` turns the fields into command-line flags (``--lr``), `from_flags` turns parsed flags back into it,
and constructing it checks limits and choices, whether a value came from a flag, a file or Python.
"""

import argparse
import dataclasses
import json
import math
import numbers
import types
import typing
from pathlib import Path

from minildm.errors import InputError, reported


def setting(default, help, choices=None, at_least=None, above=None, at_most=None, below=None, metavar=None):
    """A dataclass field with its help text (say the unit) and its limits. None is allowed where it is the default.

    Args: choices: of the value, or of each element of a tuple; at_least, above, at_most, below: limits of a number.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, **limits})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the settings dataclasses: checks every field when an object is made."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            check_type(field, getattr(self, field.name), hints[field.name])
            check(field, getattr(self, field.name))

    def as_json(self):
        """The fields in a form JSON can hold: paths become text, tuples lists."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def flag(name):
    """The flag of a field: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


def check_type(field, value, hint):
    """Raise InputError, naming the flag, if ``value`` is not of its type: files hold anything."""
    if value is None and field.default is None:
        return
    kind, members = _without_none(hint), (value,)
    if typing.get_origin(kind) is tuple:
        members = value if isinstance(value, (tuple, list)) else (object(),)
        kind = typing.get_args(kind)[0]
    kinds = {int: numbers.Integral, float: numbers.Real, Path: (Path, str), str: (str, Path)}.get(kind, kind)
    if not all(isinstance(member, kinds) and (kind is bool or not isinstance(member, bool)) for member in members):
        raise InputError(f"{flag(field.name)} must be of type {kind.__name__}, got {value!r}")


def check(field, value):
    """Raise InputError, naming the flag, if ``value`` is not one that ``field`` allows."""
    rules = field.metadata
    if value is None and field.default is None:
        return
    if rules["choices"] is not None:
        for choice in value if isinstance(value, (tuple, list)) else (value,):
            if choice not in rules["choices"]:
                raise InputError(f"{flag(field.name)} must be one of {', '.join(rules['choices'])}, got {choice!r}")
    tests = {
        "at_least": ("at least", lambda v, limit: v >= limit),
        "above": ("above", lambda v, limit: v > limit),
        "at_most": ("at most", lambda v, limit: v <= limit),
        "below": ("below", lambda v, limit: v < limit),
    }
    limits = {rule: rules[rule] for rule in tests if rules[rule] is not None}
    if not limits:
        return
    if not is_finite_number(value) or not all(tests[rule][1](value, limit) for rule, limit in limits.items()):
        wanted = " and ".join(f"{tests[rule][0]} {limit:g}" for rule, limit in limits.items())
        raise InputError(f"{flag(field.name)} must be a number {wanted}, got {value}")


def is_finite_number(value):
    """Whether ``value`` is a number, also NumPy's, that a float can hold: no bool, no NaN, no 10**400."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


# --- the command line ------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviated flags, with each flag's default in its help, and one-line errors."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)

    def format_help(self):
        needed = [usage_of(action) for action in self._actions if action.required or not action.option_strings]
        self.usage = " ".join([self.prog, *needed, "[options]"])  # argparse's own lists every flag
        return super().format_help()

    def given(self, arguments):
        """{name: value} of what is on the command line ``arguments``, without defaults."""
        defaults, self._defaults = self._defaults, {}
        of_actions = [action.default for action in self._actions]
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            found = vars(self.parse_known_args(arguments)[0])
        finally:
            self._defaults = defaults
            for action, default in zip(self._actions, of_actions):
                action.default = default
        return {name: value for name, value in found.items() if not name.startswith("_")}

    def error(self, message):
        message = reported(f"error: {message}; {self.prog} --help lists the flags")
        self.exit(2, None if message is None else f"{message}\n")


def usage_of(action):
    """One argument in a usage line: "--train DATA", "real" or, where it can be left out, "[prompt]"."""
    value = action.metavar or action.dest
    text = f"{action.option_strings[0]} {value}" if action.option_strings else value
    return text if action.required else f"[{text}]"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False or action.default in ("", (), [])
        if no_default or "(default" in (action.help or ""):
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def add_flags(parser, settings, title, skip=(), prefix=""):
    """Add a flag for each field of the dataclass ``settings``, in a group called ``title``.

    Args: skip: names of fields without a flag. prefix: "vae_" turns the field ``steps`` into --vae-steps.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.name in skip:
            continue
        options = {"help": field.metadata["help"], "default": field.default, "dest": prefix + field.name}
        kind = _without_none(hints[field.name])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "action": Several, "metavar": field.metadata["metavar"]}
        else:
            letter = {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
            options |= {"type": Number(kind) if kind in (int, float) else kind}
            options["metavar"] = field.metadata["metavar"] or letter
        if field.metadata["choices"] is not None:
            options |= {"choices": field.metadata["choices"], "metavar": None}
        group.add_argument(flag(prefix + field.name), **options)


def from_flags(settings, arguments, prefix="", **changes):
    """An object of the dataclass ``settings`` from parsed flags; ``changes`` override them."""
    names = [field.name for field in dataclasses.fields(settings)]
    values = {name: getattr(arguments, prefix + name) for name in names if hasattr(arguments, prefix + name)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return settings(**(values | changes))


class Several(argparse.Action):
    """Values of a flag given once or repeatedly: the first replaces the default, later ones are appended."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, f"_{self.dest}_given", ())
        setattr(namespace, f"_{self.dest}_given", (*given, *values))
        setattr(namespace, self.dest, (*given, *values))


class Number:
    """An argparse type for whole numbers or floats, which names itself in argparse's own messages."""

    def __init__(self, kind):
        self.kind, self.__name__ = kind, "whole number" if kind is int else "number"

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a {self.__name__}, got {text!r}") from None
        if not -(2**63) <= value < 2**63:  # beyond what torch and JSON readers hold; NaN fails too
            wanted = "whole number of at most 64 bits" if self.kind is int else "finite number"
            raise argparse.ArgumentTypeError(f"must be a {wanted}, got {text}")
        return value


def at_least(least):
    """An argparse type: whole numbers from ``least`` on."""

    def number(text):
        value = int(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2^63, got {text}")
        return value

    number.__name__ = "whole number"  # argparse names it where int() fails
    return number


def _without_none(hint):
    """int | None -> int."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint
