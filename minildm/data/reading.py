"""Image files -> 8-bit images of one size. Reads what Pillow reads (rasters.py) and DICOM (dicom.py, extra ``dicom``).

How more than 8 bits of grey become 8 (greys.py) decides what the model sees. It is done here, never by Pillow's
``convert``, which clamps 16-bit grey at 255, and is recorded in ``DecodedImage.greys``:

- "declared" (default): what the file declares. DICOM: its VOI LUT or window. Otherwise the whole bit depth in use (the
  first of 255, 1023, 4095, 16383 and 65535 that holds the maximum), so that a ramp stays a ramp. Signed, 32-bit and
  float images: minimum to maximum. DICOM of more than 8 bits without a window: percentiles, because it fills little of
  its range.
- "percentiles": the 0.5th to the 99.5th percentile of each image, whatever the file declares.

MONOCHROME1 DICOM and white-is-zero TIFF, where 0 is white, are inverted. Not covered: files with several images.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from minildm.data.dicom import decode_dicom, is_dicom
from minildm.data.greys import DecodedImage
from minildm.data.rasters import decode_raster
from minildm.errors import InputError
from minildm.files import file_bytes, shown

READING = 2  # part of every cache key: raise it whenever a file would be read differently than before


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


def decode(data, name, greys="declared", at_least=None):
    """Decode the bytes of an image file.

    Args:
        name: for error messages; its suffix also identifies DICOM files that lack the preamble.
        at_least: pixels the shorter side must keep; a large JPEG is then decoded directly at a smaller scale.
    Returns: DecodedImage.
    Raises: InputError, in one line, for an empty, truncated, oversized or otherwise undecodable file.
    """
    name = shown(name)
    if not data:
        raise InputError(f"{name}: the file is empty (0 bytes)")
    try:
        return decode_dicom(data, name, greys) if is_dicom(data, name) else decode_raster(data, name, greys, at_least)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # broken bytes make decoders raise almost anything: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its text only names a BytesIO object
            reason = "unknown image format"
        raise InputError(f"{name}: cannot be decoded as an image ({reason[:200]})") from None


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
