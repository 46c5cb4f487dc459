"""Image files -> 8-bit images of one size. Reads what Pillow reads (PNG, TIFF, JPEG, ...) and DICOM (extra ``dicom``).

How more than 8 bits of grey become 8 decides what the model sees. It is done here, never by Pillow's ``convert``
(which clamps 16-bit grey at 255), and is recorded in ``DecodedImage.greys``:

- "declared" (default): what the file declares. DICOM: its VOI LUT or window. Otherwise the whole bit depth in use (the
  first of 255, 1023, 4095, 16383 and 65535 that holds the maximum), so that a ramp stays a ramp. Signed, 32-bit and
  float images: minimum to maximum. DICOM of more than 8 bits without a window: percentiles, because it fills little of
  its range.
- "percentiles": the 0.5th to the 99.5th percentile of each image, whatever the file declares.

MONOCHROME1 DICOM and white-is-zero TIFF, where 0 is white, are inverted. Not covered: DICOM with several frames.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minildm.errors import InputError

READING = 1  # part of every cache key: raise it whenever a file would be read differently than before
MAX_PIXELS = 100_000_000  # larger images are refused; a large radiograph has 20 million
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of grey detectors
PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class DecodedImage:
    """A decoded file. ``pixels`` is uint8, (H, W) for grey or (H, W, 3) for colour, upright, bones white."""

    pixels: np.ndarray
    kind: str  # what the file held: "8-bit grey", "RGB", "DICOM 15-bit MONOCHROME1", ...
    greys: str  # how its greys became 8 bits


@dataclass(frozen=True)
class Transform:
    """How a file becomes the model's square image. Its text is part of the latent cache's key."""

    size: int = 512  # pixels, a multiple of 8
    fit: str = "crop"  # "crop": scale the shorter side to ``size``, cut out the centre; "pad": longer side, add black
    greys: str = "declared"  # or "percentiles": see the module's docstring

    def __post_init__(self):
        if self.size < 8 or self.size % 8:
            raise InputError(f"--size must be a multiple of 8 pixels, got {self.size}; 224, 256, 384 and 512 are usual")
        if self.fit not in ("crop", "pad"):
            raise InputError(f"fit must be crop or pad, got {self.fit!r}")
        if self.greys not in ("declared", "percentiles"):
            raise InputError(f"greys must be declared or percentiles, got {self.greys!r}")

    def __str__(self):
        return f"reading {READING}, {self.size} px, {self.fit}, greys {self.greys}"


def read(record, transform, whole=False):
    """Read a record's image.

    Args: whole: decode large JPEGs at full size, to measure them; otherwise they are decoded at a reduced scale.
    Returns: (pixels uint8 (size, size, 3), DecodedImage before fitting, SHA-256 of the file's bytes: 32 bytes).
    Raises: InputError naming the file if it cannot be read.
    """
    if record.render is not None:
        pixels = record.render(transform.size)
        key = hashlib.sha256(pixels.tobytes()).digest()
        decoded = DecodedImage(pixels, "rendered", "8 bits, as rendered")
    else:
        data = file_bytes(record.path)
        key = hashlib.sha256(data).digest()
        decoded = decode(data, record.path, transform.greys, at_least=None if whole else transform.size)
    return fit(decoded.pixels, transform), decoded, key


def file_bytes(path):
    """The file's bytes. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def decode(data, name, greys="declared", at_least=None):
    """Decode the bytes of an image file.

    Args:
        name: for error messages; its suffix also identifies DICOM files that lack the preamble.
        at_least: pixels the shorter side must keep; a large JPEG is then decoded directly at a smaller scale.
    Returns: DecodedImage.
    Raises: InputError, in one line, for an empty, truncated, oversized or otherwise undecodable file.
    """
    if not data:
        raise InputError(f"{name}: the file is empty (0 bytes)")
    is_dicom = data[128:132] == b"DICM" or str(name).lower().endswith((".dcm", ".dicom"))
    try:
        return _decode_dicom(data, name, greys) if is_dicom else _decode_with_pillow(data, name, greys, at_least)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # broken bytes make decoders raise almost anything: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its text only names a BytesIO object
            reason = "unknown image format"
        raise InputError(f"{name}: cannot be decoded as an image ({reason[:200]})") from None


def _decode_with_pillow(data, name, greys, at_least):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about size, which is checked here, and about odd metadata
        image = Image.open(io.BytesIO(data))
        _check_size(name, image.width, image.height)
        if getattr(image, "n_frames", 1) > 1:
            raise InputError(f"{name}: holds {image.n_frames} images, expected one; split it into single files")
        if at_least is not None:  # libjpeg can scale by 1/2, 1/4 or 1/8; twice the size leaves detail for filtering
            image.draft(image.mode, (2 * at_least, 2 * at_least))
        white_is_zero = image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(262) == 0
        image.load()
        image = ImageOps.exif_transpose(image)

    if image.mode.startswith("I") or image.mode == "F":
        bits = 16 if image.mode.startswith("I;16") else 32
        kind = "32-bit float grey" if image.mode == "F" else f"{bits}-bit grey"
        pixels, mapping = to_8_bit(np.asarray(image), name, greys)
        return DecodedImage(255 - pixels if white_is_zero else pixels, kind, mapping + ", inverted" * white_is_zero)

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
        pixels = np.ascontiguousarray(pixels[..., 0])  # grey stored in three channels: one is faster to resize
    if greys == "percentiles" and pixels.ndim == 2:
        pixels, mapping = to_8_bit(pixels, name, greys)
        return DecodedImage(pixels, kind, mapping)
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
        values = header.pixel_array  # (H, W), or (H, W, 3) already converted to RGB
        stored, photometric = int(header.BitsStored), header.PhotometricInterpretation
        kind = f"DICOM {stored}-bit {photometric}"
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            if values.ndim != 3 or values.dtype != np.uint8:
                raise InputError(f"{name}: {kind} is not supported; export it as RGB PNG")
            return DecodedImage(values, kind, "8 bits, as stored")
        values = apply_modality_lut(values, header)  # stored values -> detector or Hounsfield units
        if greys == "declared" and "VOILUTSequence" in header:
            pixels, mapping = to_8_bit(apply_voi(values, header), name, "declared")
            mapping = f"VOI LUT, {mapping}"
        elif greys == "declared" and header.get("WindowWidth") is not None:
            pixels, mapping = _windowed(values, header)
        elif greys == "declared" and stored == 8:
            pixels, mapping = to_8_bit(values, name, "declared")
        else:
            padding = header.get("PixelPaddingValue")
            pixels, mapping = to_8_bit(values, name, "percentiles", ignored=padding)
    if photometric == "MONOCHROME1":  # its lowest value is white
        pixels, mapping = 255 - pixels, mapping + ", inverted"
    return DecodedImage(pixels, kind, mapping)


def _windowed(values, header):
    """Apply the file's first window: DICOM PS3.3 C.11.2.1.2 (linear), C.11.2.1.3.1 (sigmoid), C.11.2.1.3.2 (exact)."""
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
    """Map grey values of any depth to 8 bits, linearly.

    Args:
        name: for error messages.
        greys: "declared" (the whole depth or range in use) or "percentiles".
        ignored: a value left out of the percentiles, such as DICOM padding.
    Returns: (uint8 of the same shape, the mapping in words).
    Raises: InputError for values that are NaN or infinite.
    """
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise InputError(f"{name}: holds {np.count_nonzero(~np.isfinite(values))} pixels that are NaN or infinite")
    if greys == "percentiles":
        counted = values if ignored is None else values[values != ignored]
        low, high = np.percentile(counted if counted.size else values, PERCENTILES)
        mapping = f"percentiles {PERCENTILES[0]}-{PERCENTILES[1]}: {low:g}..{high:g}"
    else:
        low, high = values.min(), values.max()
        if np.issubdtype(values.dtype, np.integer) and low >= 0 and high < 65536:
            bits = next(bits for bits in BIT_DEPTHS if high < 1 << bits)
            low, high = 0, (1 << bits) - 1
            mapping = f"{bits}-bit range 0..{high}"
        else:
            mapping = f"range {low:g}..{high:g}"
    low, high = float(low), float(high)
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values, mapping
    span = high - low if high > low else 1.0  # a constant image becomes black
    if values.dtype in (np.uint8, np.uint16):  # a table of 65,536 entries is several times faster than arithmetic
        table = (np.arange(np.iinfo(values.dtype).max + 1) - low) / span
        return (table.clip(0, 1) * 255).round().astype(np.uint8)[values], mapping
    return (((values.astype(np.float64) - low) / span).clip(0, 1) * 255).round().astype(np.uint8), mapping


def _check_size(name, width, height):
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: unpacks to {width} x {height} pixels, over {MAX_PIXELS:,}; scale it down first")


def fit(pixels, transform):
    """uint8 (H, W) or (H, W, 3) of any size -> uint8 (size, size, 3). Lanczos filter, aspect ratio kept."""
    size, image = transform.size, Image.fromarray(pixels)
    width, height = image.size
    if transform.fit == "crop":
        return crop(pixels, size, size)
    scaled = [max(1, round(length * size / max(width, height))) for length in (width, height)]
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (size - scaled[0]) // 2, (size - scaled[1]) // 2
    image = image.crop((-left, -top, size - left, size - top))  # a crop beyond the edges is black there
    return np.array(image.convert("RGB"))


def crop(pixels, height, width):
    """uint8 (H, W) or (H, W, 3) -> uint8 (height, width, 3): the largest centred part of that shape, Lanczos filter."""
    image = Image.fromarray(pixels)
    box_width = min(image.width, image.height * width / height)
    box_height = min(image.height, image.width * height / width)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box).convert("RGB"))


def to_tensor(pixels):
    """uint8 (..., H, W, 3) -> float32 torch tensor (..., 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3).float() / 127.5 - 1
