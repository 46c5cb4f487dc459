"""A config.json as a dictionary whose values are checked as they are taken: types here, ranges in the settings."""

import math
import warnings

from minildm.errors import InputError

REQUIRED = object()


class Document:
    """The values of a config.json, checked as they are taken. Errors name the file and the key."""

    def __init__(self, values, file):
        self.values, self.file, self.taken = values, file, set()

    def refuse(self, key, wanted):
        raise InputError(f"{self.file}: {key} is {brief(self.values.get(key))}, expected {wanted}")

    def take(self, key, default=REQUIRED):
        self.taken.add(key)
        if key not in self.values and default is REQUIRED:
            raise InputError(f"{self.file} has no {key!r}, which every published one has; get it again")
        return self.values.get(key, default)

    def integer(self, key, default=REQUIRED):
        """A whole number; a list of equal ones counts as one."""
        value = _as_integer(same_or_list(self.take(key, default)))
        return self.refuse(key, "a whole number") if value is None else value

    def integers(self, key, default=REQUIRED):
        """A tuple of whole numbers, from a list."""
        value = self.take(key, default)
        numbers = [_as_integer(n) for n in value] if isinstance(value, (list, tuple)) else []
        return self.refuse(key, "a list of whole numbers") if not numbers or None in numbers else tuple(numbers)

    def number(self, key, default):
        value = self.take(key, default)
        if type(value) not in (int, float) or not -1e9 < value < 1e9:  # NaN fails, too
            self.refuse(key, "a number")
        return float(value)

    def choice(self, key, default, choices):
        value = self.take(key, default)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            self.refuse(key, f"one of {', '.join(map(str, choices))}")
        return value

    def require(self, fixed):
        """Raise InputError unless each key of ``fixed`` has its value there, or is absent."""
        for key, wanted in fixed.items():
            value = same_or_list(self.take(key, wanted))
            if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
                raise InputError(
                    f"{self.file}: {key} is {brief(value)}, but Stable Diffusion v1.x / v2.x has {wanted!r}"
                )

    def warn_of_the_rest(self, harmless):
        """Name the keys that nobody took, unless they are empty."""
        rest = [key for key in self.values if key not in self.taken and key not in harmless and key[:1] != "_"]
        if rest := [f"{key} = {brief(self.values[key])}" for key in rest if self.values[key] not in (None, False)]:
            warnings.warn(
                f"{self.file} states what minildm does not know and leaves out: {', '.join(rest[:3])}"
                f"{', ...' * (len(rest) > 3)}; if it changes the network, images will differ",
                stacklevel=4,
            )


def brief(value):
    """A value for a message, however large it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; lists in lists
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def same_or_list(value):
    """The one value of a list that repeats it, as newer files state one for each level; else ``value``."""
    repeats = isinstance(value, list) and value and all(one == value[0] for one in value)
    return value[0] if repeats else value


def _as_integer(value):
    """``value`` as int if it is a whole number of moderate size; else None."""
    if type(value) is float and math.isfinite(value) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 1 << 40 else None
