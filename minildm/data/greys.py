"""Grey values of any depth -> 8 bits, linearly. How this is done decides what the model sees."""

from dataclasses import dataclass

import numpy as np

from minildm.errors import InputError

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of grey detectors
PERCENTILES = (0.5, 99.5)
MARKER = 65535  # the grey of letters that were burnt into an image of fewer bits
MARKER_SHARE = 0.05  # of the area that such letters cover at most


@dataclass(frozen=True)
class DecodedImage:
    """A decoded file. ``pixels`` is uint8, (H, W) for grey or (H, W, 3) for colour, upright, bones white."""

    pixels: np.ndarray
    kind: str  # what the file held: "8-bit grey", "RGB", "DICOM 15-bit MONOCHROME1", ...
    greys: str  # how its greys became 8 bits


def to_8_bit(values, name, greys, ignored=None):
    """Map values of any depth to 8 bits.

    Args:
        values: (H, W) or (H, W, 3), integers or floats.
        name: for error messages.
        greys: "declared" (the whole depth or range in use) or "percentiles".
        ignored: bool, like ``values``: pixels that do not count for the percentiles, such as DICOM's padding.
    Returns: (uint8 of the same shape, the mapping in words).
    Raises: InputError for values that are NaN or infinite.
    """
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise InputError(f"{name}: holds {np.count_nonzero(~np.isfinite(values))} pixels that are NaN or infinite")
    low, high = values.min(), values.max()
    unsigned = np.issubdtype(values.dtype, np.integer) and low >= 0 and high <= MARKER
    top = (1 << depth_in_use(values)) - 1 if unsigned else high
    marker = ", brighter markers white" if top < high else ""
    if greys == "percentiles":
        counted = values if ignored is None else values[~ignored]
        counted = counted[counted <= top] if marker else counted
        low, high = np.percentile(counted if counted.size else values, PERCENTILES)
        mapping = f"percentiles {PERCENTILES[0]}-{PERCENTILES[1]}: {low:g}..{high:g}"
    elif unsigned:
        low, high = 0, top
        mapping = f"{int(top).bit_length()}-bit range 0..{top}{marker}"
    else:
        mapping = f"range {low:g}..{high:g}"
    return scale(values, low, high), mapping


def depth_in_use(values):
    """The bits that the values need: the first of BIT_DEPTHS that holds the maximum.

    Letters burnt in at 65535 do not count: if at most MARKER_SHARE of the pixels are beyond a smaller depth, and at
    least half of these are 65535 (the others are the letters' soft edges), it is that smaller depth.

    Args: values: integers in [0, 65535].
    """
    high = int(values.max())
    if high == MARKER:
        counts = np.bincount(values.ravel(), minlength=MARKER + 1)
        for bits in BIT_DEPTHS[:-1]:
            beyond = counts[1 << bits :].sum()
            if beyond <= MARKER_SHARE * values.size and 2 * counts[MARKER] >= beyond:
                return bits
    return next(bits for bits in BIT_DEPTHS if high < 1 << bits)


def scale(values, low, high):
    """Values from ``low`` to ``high`` -> 0 to 255, uint8; what lies beyond is clipped."""
    low, high = float(low), float(high)
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    span = high - low if high > low else 1.0  # a constant image becomes black
    if values.dtype in (np.uint8, np.uint16):  # a table of 65,536 entries is several times faster than arithmetic
        table = (np.arange(np.iinfo(values.dtype).max + 1) - low) / span
        return (table.clip(0, 1) * 255).round().astype(np.uint8)[values]
    return (((values.astype(np.float64) - low) / span).clip(0, 1) * 255).round().astype(np.uint8)
