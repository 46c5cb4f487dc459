"""Image files -> 8-bit pictures of one size. PNG, TIFF, JPEG (whatever Pillow reads) and DICOM (extra ``dicom``).

How the greys of a deep picture become 8 bits decides what the model sees, so it is done here, never by Pillow's
``convert`` (which clamps 16-bit grey at 255), and is recorded in ``DecodedImage.greys``:

- "declared" (default): what the file says. DICOM: its VOI LUT or window. Otherwise the real range: the whole bit depth
  in use (255, 1023, 4095, 16383 or 65535, the first that holds the maximum), so that a ramp stays a ramp; minimum to
  maximum where there is no such depth (signed, 32-bit, float). Deep DICOM without a window fills little of its range:
  percentiles there.
- "percentiles": the 0.5th to the 99.5th percentile of each picture, whatever the file says.

MONOCHROME1 DICOM and white-is-zero TIFF (0 = white) are inverted. Not covered: DICOM with several frames.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minildm.errors import InputError

READING = 1  # raise it when a file would be read differently than before: it is part of every cache key
MOST_PIXELS = 100_000_000  # a 20-megapixel radiograph is large; a file that unpacks to more than this is refused
DEPTHS = (8, 10, 12, 14, 16)  # bits a grey detector is built with
LOW, HIGH = 0.5, 99.5  # percentiles


@dataclass(frozen=True)
class DecodedImage:
    """A decoded file. ``pixels`` is uint8, (H, W) for grey or (H, W, 3) for colour, upright, bones white."""

    pixels: np.ndarray
    kind: str  # what the file held: "8-bit grey", "RGB", "DICOM 15-bit MONOCHROME1", ...
    greys: str  # how its greys became 8 bits


@dataclass(frozen=True)
class Transform:
    """From a file to the model's square: one description for reading, for the cache's key and for the run's record."""

    size: int = 512  # pixels, a multiple of 8
    fit: str = "crop"  # the shortest side to ``size``, then its centre | "pad": the longest side, then black
    greys: str = "declared"  # or "percentiles"; see the module's docstring

    def __post_init__(self):
        if self.size < 8 or self.size % 8:
            raise InputError(f"size must be a multiple of 8 pixels, got {self.size}; 224, 256, 384 and 512 are usual")
        if self.fit not in ("crop", "pad"):
            raise InputError(f"fit must be crop or pad, got {self.fit!r}")
        if self.greys not in ("declared", "percentiles"):
            raise InputError(f"greys must be declared or percentiles, got {self.greys!r}")

    def __str__(self):
        return f"reading {READING}, {self.size} px, {self.fit}, greys {self.greys}"


def read(record, transform, whole=False):
    """Read one record's picture.

    Args: whole: decode large JPEGs at their full size, for measuring, where a run takes a shortcut.
    Returns: (pixels uint8 (size, size, 3), DecodedImage as decoded, SHA-256 of the file's bytes: 32 bytes).
    Raises: InputError naming the file when it cannot be read.
    """
    if record.render is not None:
        pixels = record.render(transform.size)
        key = hashlib.sha256(pixels.tobytes()).digest()
        picture = DecodedImage(pixels, "drawn", "8 bits, as drawn")
    else:
        data = file_bytes(record.path)
        key = hashlib.sha256(data).digest()
        picture = decode(data, record.path, transform.greys, at_least=None if whole else transform.size)
    return fit(picture.pixels, transform), picture, key


def file_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def decode(data, name, greys="declared", at_least=None):
    """A file's bytes -> DecodedImage.

    Args:
        name: used in messages, and its suffix tells DICOM files that lack the preamble.
        at_least: pixels the shortest side must keep; a large JPEG is then decoded straight to a smaller scale.
    Raises: InputError, one line, for an empty, truncated, oversized or otherwise undecodable file.
    """
    if not data:
        raise InputError(f"{name}: the file is empty (0 bytes)")
    is_dicom = data[128:132] == b"DICM" or str(name).lower().endswith((".dcm", ".dicom"))
    try:
        return _decode_dicom(data, name, greys) if is_dicom else _decode_with_pillow(data, name, greys, at_least)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on broken bytes the decoders raise almost anything: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its words name an object in memory
            reason = "no known picture format"
        raise InputError(f"{name}: cannot be decoded as a picture ({reason[:200]})") from None


def _decode_with_pillow(data, name, greys, at_least):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of size (checked here) and of odd metadata
        image = Image.open(io.BytesIO(data))
        _check_size(name, image.width, image.height)
        if getattr(image, "n_frames", 1) > 1:
            raise InputError(f"{name}: holds {image.n_frames} pictures, expected one; split it into single files")
        if at_least is not None:  # libjpeg scales by 1/2, 1/4, 1/8 while decoding; twice the size leaves room to filter
            image.draft(image.mode, (2 * at_least, 2 * at_least))
        white_is_zero = image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(262) == 0
        image.load()
        image = ImageOps.exif_transpose(image)

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        bits = 16 if image.mode.startswith("I;16") else 32
        kind = "32-bit float grey" if image.mode == "F" else f"{bits}-bit grey"
        pixels, how = to_8_bit(values, name, greys)
        return DecodedImage(255 - pixels if white_is_zero else pixels, kind, how + ", inverted" * white_is_zero)

    kind = {"L": "8-bit grey", "1": "1-bit grey", "P": "palette", "LA": "grey + alpha"}.get(image.mode, image.mode)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("L" if image.mode in ("L", "1") else "RGB")
    pixels = np.asarray(image)
    if (
        pixels.ndim == 3
        and np.array_equal(pixels[..., 0], pixels[..., 1])
        and np.array_equal(pixels[..., 0], pixels[..., 2])
    ):
        pixels = np.ascontiguousarray(pixels[..., 0])  # grey in three channels: resizing one of them is enough
    if greys == "percentiles" and pixels.ndim == 2:
        pixels, how = to_8_bit(pixels, name, greys)
        return DecodedImage(pixels, kind, how)
    return DecodedImage(pixels, kind, "8 bits, as stored")


def _decode_dicom(data, name, greys):
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi
    except ImportError:
        raise InputError(f"{name}: DICOM needs pydicom; pip install 'minildm[dicom]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(io.BytesIO(data))
        if "PixelData" not in header:
            raise InputError(f"{name}: a DICOM file without pixels ({header.get('SOPClassUID', 'no class')})")
        _check_size(name, int(header.Columns), int(header.Rows))
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise InputError(f"{name}: holds {header.NumberOfFrames} frames, expected one; split it into single files")
        values = header.pixel_array  # (H, W), or (H, W, 3) already as RGB
        stored, photometric = int(header.BitsStored), header.PhotometricInterpretation
        kind = f"DICOM {stored}-bit {photometric}"
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            if values.ndim != 3 or values.dtype != np.uint8:
                raise InputError(f"{name}: {kind} is not read; export it as RGB PNG")
            return DecodedImage(values, kind, "8 bits, as stored")
        values = apply_modality_lut(values, header)  # stored values -> detector or Hounsfield units
        if greys == "declared" and "VOILUTSequence" in header:
            pixels, how = to_8_bit(apply_voi(values, header), name, "declared")
            how = f"VOI LUT, {how}"
        elif greys == "declared" and header.get("WindowWidth") is not None:
            pixels, how = _windowed(values, header)
        elif greys == "declared" and stored == 8:
            pixels, how = to_8_bit(values, name, "declared")
        else:
            padding = header.get("PixelPaddingValue")
            pixels, how = to_8_bit(values, name, "percentiles", ignored=padding)
    if photometric == "MONOCHROME1":  # its lowest value is white
        pixels, how = 255 - pixels, how + ", inverted"
    return DecodedImage(pixels, kind, how)


def _windowed(values, header):
    """The first window of the file: DICOM PS3.3 C.11.2.1.2 (linear), C.11.2.1.3.1 (sigmoid), C.11.2.1.3.2 (exact)."""
    center, width = (float(np.atleast_1d(header[tag].value)[0]) for tag in ("WindowCenter", "WindowWidth"))
    function = header.get("VOILUTFunction", "LINEAR")
    x = values.astype(np.float32) - center
    if function == "SIGMOID":
        y = 1 / (1 + np.exp(-4 * x / width))
    elif function == "LINEAR_EXACT" or width <= 1:  # a width of 1 is a threshold: the linear form would divide by 0
        y = x / max(width, 1e-6) + 0.5
    else:
        y = (x + 0.5) / (width - 1) + 0.5
    pixels = (y.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels, f"window {center:g}/{width:g} {function}"


def to_8_bit(values, name, greys, ignored=None):
    """Grey values of any depth -> (uint8 of the same shape, in words how).

    Args:
        greys: "declared" (the whole depth or range in use) or "percentiles".
        ignored: a value that is not picture (DICOM padding), left out of the percentiles.
    """
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise InputError(f"{name}: holds {np.count_nonzero(~np.isfinite(values))} pixels that are NaN or infinite")
    if greys == "percentiles":
        counted = values if ignored is None else values[values != ignored]
        low, high = np.percentile(counted if counted.size else values, (LOW, HIGH))
        how = f"percentiles {LOW}-{HIGH}: {low:g}..{high:g}"
    else:
        low, high = values.min(), values.max()
        if np.issubdtype(values.dtype, np.integer) and low >= 0 and high < 65536:
            bits = next(bits for bits in DEPTHS if high < 1 << bits)
            low, high = 0, (1 << bits) - 1
            how = f"{bits}-bit range 0..{high}"
        else:
            how = f"range {low:g}..{high:g}"
    low, high = float(low), float(high)
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values, how
    span = high - low if high > low else 1.0  # a constant picture becomes black
    if values.dtype in (np.uint8, np.uint16):  # a table of 65,536 entries is several times faster than arithmetic
        table = (np.arange(np.iinfo(values.dtype).max + 1) - low) / span
        return (table.clip(0, 1) * 255).round().astype(np.uint8)[values], how
    return (((values.astype(np.float64) - low) / span).clip(0, 1) * 255).round().astype(np.uint8), how


def _check_size(name, width, height):
    if width * height > MOST_PIXELS:
        raise InputError(f"{name}: unpacks to {width} x {height} pixels, over {MOST_PIXELS:,}; scale it down first")


def fit(pixels, transform):
    """uint8 (H, W) or (H, W, 3) of any size -> uint8 (size, size, 3), filtered (Lanczos), aspect ratio kept."""
    size, image = transform.size, Image.fromarray(pixels)
    width, height = image.size
    if transform.fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    else:
        scaled = [max(1, round(length * size / max(width, height))) for length in (width, height)]
        image = image.resize(scaled, Image.Resampling.LANCZOS)
        left, top = (size - scaled[0]) // 2, (size - scaled[1]) // 2
        image = image.crop((-left, -top, size - left, size - top))  # beyond the picture's edge: black
    return np.array(image.convert("RGB"))


def to_tensor(pixels):
    """uint8 (..., H, W, 3) -> float32 torch tensor (..., 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3).float() / 127.5 - 1
