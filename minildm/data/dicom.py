"""DICOM -> 8-bit images (extra ``dicom``), in the standard's order (DICOM PS3.3): stored values -> padding set aside ->
Modality LUT (C.11.1) -> VOI LUT or window (C.11.2) -> MONOCHROME1 inverted -> padding black.

Real headers hold attributes that are empty or make no sense. Such an attribute is treated as absent, as the standard
prescribes; ``DecodedImage.greys`` says what was used. Not covered: several frames, palettes.
"""

import contextlib
import io
import math
import warnings
import zlib

import numpy as np

from minildm.data.greys import DecodedImage, depth_in_use, scale, to_8_bit
from minildm.data.rasters import MAX_PIXELS, check_size
from minildm.errors import InputError

SUFFIXES = (".dcm", ".dicom")
DEFLATED = b"1.2.840.10008.1.2.1.99"  # transfer syntax: the data set is compressed like a zip file
MAX_UNPACKED = 4 * MAX_PIXELS  # bytes


def is_dicom(data, name):
    """Whether these are a DICOM file's bytes: by its preamble, or by the name of a file that lacks it."""
    return data[128:132] == b"DICM" or str(name).lower().endswith(SUFFIXES)


def decode_dicom(data, name, greys):
    """The file's bytes -> DecodedImage. The arguments are those of ``reading.decode``."""
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{name}: DICOM needs pydicom; pip install 'minildm[dicom]'") from None
    _check_deflated(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")  # older files have no preamble
        if "PixelData" not in header:
            raise InputError(f"{name}: a DICOM file without pixels ({str(header.get('SOPClassUID'))[:64]!r})")
        if "TransferSyntaxUID" not in header.file_meta:  # as without preamble: as the elements turned out to be coded
            header.file_meta.TransferSyntaxUID = {
                (True, True): pydicom.uid.ImplicitVRLittleEndian,
                (False, True): pydicom.uid.ExplicitVRLittleEndian,
                (False, False): pydicom.uid.ExplicitVRBigEndian,
            }[header.original_encoding]
        check_size(name, int(header.Columns), int(header.Rows))
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise InputError(f"{name}: holds {header.NumberOfFrames} frames, expected one; split it into single files")
        if header.file_meta.TransferSyntaxUID.is_encapsulated:
            _check_frames(header, name)
        values = header.pixel_array  # (H, W), or (H, W, 3) already converted to RGB
        if values.shape[:2] != (header.Rows, header.Columns):  # (frames, H, W), whatever NumberOfFrames says
            raise InputError(f"{name}: holds pixels of shape {values.shape}, expected one frame of "
                             f"{header.Rows} x {header.Columns}; split it into single files")  # fmt: skip
        photometric = str(header.PhotometricInterpretation)
        kind = f"DICOM {header.BitsStored}-bit {photometric}"
        if photometric in ("MONOCHROME1", "MONOCHROME2"):
            pixels, mapping = _grey(values, header, name, greys)
            return DecodedImage(pixels, kind, mapping)
    if values.ndim != 3 or values.dtype != np.uint8:
        raise InputError(f"{name}: {kind} is not supported; export it as RGB PNG")
    return DecodedImage(values, kind, "8 bits, as stored")


def _grey(stored, header, name, greys):
    """Stored values of a monochrome image -> (uint8 pixels, the mapping in words)."""
    padding = _padding(stored, header)
    values, span = _modality(stored, header)
    shown = values if padding is None or padding.all() else values[~padding]
    pixels, mapping = None, ""
    if greys == "declared":
        pixels, mapping = _voi_lut(values, shown, header) or _window(values, shown, header) or (None, "")
        if pixels is None and header.BitsStored <= 8:
            pixels, mapping = scale(values, *span), "8 bits, as stored"
    if pixels is None:  # 12 bits and more fill little of their range
        pixels, mapping = to_8_bit(values, name, "percentiles", padding)
    if header.PhotometricInterpretation == "MONOCHROME1":  # its lowest value is white
        pixels, mapping = 255 - pixels, mapping + ", inverted"
    if padding is not None:
        pixels, mapping = np.where(padding, np.uint8(0), pixels), mapping + ", padding black"
    return pixels, mapping


def _padding(stored, header):
    """Which pixels are padding, bool (H, W), or None: PS3.3 C.7.5.1.1.2.

    Padding is a stored value, or all values from PixelPaddingValue to PixelPaddingRangeLimit, in either order. It is
    not part of the image and takes no part in the grey scale.
    """
    value = _number(header, "PixelPaddingValue")
    if value is None:
        return None
    limit = _number(header, "PixelPaddingRangeLimit")
    ends = [_as_stored(end, header) for end in (value, value if limit is None else limit)]
    padding = (stored >= min(ends)) & (stored <= max(ends))
    return padding if padding.any() else None


def _as_stored(number, header):
    """Some writers give a value of signed pixels as unsigned, or the reverse: the same 16 bits, read as the pixels."""
    bits = 1 << header.BitsAllocated
    low = -bits // 2 if header.PixelRepresentation else 0
    return number if low <= number < low + bits else (number - low) % bits + low


def _modality(stored, header):
    """Stored values -> the modality's units, such as Hounsfield's. PS3.3 C.11.1.

    Returns: (values, (lowest, highest) that the stored bits can have).
    """
    for item in header.get("ModalityLUTSequence") or ():
        if (table := _lookup_table(item, header, stored)) is not None:
            first, entries = table
            return _looked_up(stored, first, entries), (0, (1 << depth_in_use(entries)) - 1)
    slope, intercept = _number(header, "RescaleSlope"), _number(header, "RescaleIntercept")
    slope, intercept = slope or 1.0, intercept or 0.0  # a slope of 0 would leave nothing of the image
    low = -(1 << header.BitsStored - 1) if header.PixelRepresentation else 0
    high = low + (1 << header.BitsStored) - 1
    if (slope, intercept) == (1, 0):
        return stored, (low, high)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return stored * slope + intercept, ends  # C.11.1.1.2: output = m * SV + b


def _voi_lut(values, shown, header):
    """Apply the first usable VOI LUT: PS3.3 C.11.2.1.1. Returns: (pixels, mapping), or None without one.

    The output is scaled by the range of the table, never of the image, so that exposures stay comparable.
    """
    for item in header.get("VOILUTSequence") or ():
        if (table := _lookup_table(item, header, values)) is not None:
            first, entries = table
            bits = _entry_bits(item, entries)
            pixels = scale(_looked_up(values, first, entries), 0, (1 << bits) - 1)
            if np.ptp(_looked_up(shown, first, entries)) or not np.ptp(shown):
                return pixels, f"VOI LUT, {bits}-bit range 0..{(1 << bits) - 1}"
    return None


def _entry_bits(item, entries):
    """The bits of a table's entries. 10 to 15 are believed (PS3.3 C.8.11.3.1.5). C.11.2.1.1 allows only 8 and 16, so
    that 16 is also written for fewer; then it is the depth that the table uses."""
    declared = int(item.LUTDescriptor[2])
    return declared if 10 <= declared <= 15 and entries.max() < 1 << declared else depth_in_use(entries)


def _lookup_table(item, header, values):
    """(first mapped value, entries uint16) of a LUT item (PS3.3 C.11.1.1.1), None if it has no whole table."""
    with contextlib.suppress(AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError):
        count, first, bits = (int(number) for number in item.LUTDescriptor)
        count = count or 65536
        data = item.LUTData
        if isinstance(data, bytes):
            little = header.original_encoding[1]
            # C.11.1.1.1: 8-bit entries may be packed, or each have 16 bits
            packed = bits <= 8 and len(data) in (count, count + count % 2)
            entries = np.frombuffer(data, np.uint8 if packed else "<u2" if little else ">u2")[:count]
        else:
            entries = np.asarray(data).astype(np.int64)[:count] & 0xFFFF
        if first > 32767 and values.min() < 0:  # a negative number in an unsigned element
            first -= 65536
        if len(entries) == count:
            return first, entries.astype(np.uint16)
    return None


def _looked_up(values, first, entries):
    """Values below the first mapped one get the first entry, values beyond the table the last."""
    return entries[(np.rint(values).astype(np.int64) - first).clip(0, len(entries) - 1)]


def _window(values, shown, header):
    """Apply the first usable window. Returns: (pixels, mapping), or None without one.

    Not usable: without a centre, with a width of 0 or less, or one that makes the whole image black or white.
    """
    centers, widths = _numbers(header, "WindowCenter"), _numbers(header, "WindowWidth")
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    for center, width in zip(centers, widths):
        if center is None or width is None or width <= 0:
            continue
        if np.ptp(windowed(shown, center, width, function)) or not np.ptp(shown):
            return windowed(values, center, width, function), f"window {center:g}/{width:g} {function}"
    return None


def windowed(values, center, width, function):
    """Values -> uint8 through a window: DICOM PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2
    (LINEAR_EXACT). LINEAR is defined from a width of 1, where it is a threshold; narrower ones are read as exact."""
    x = values.astype(np.float64) - center
    if function == "SIGMOID":
        y = 1 / (1 + np.exp((-4 * x / width).clip(-700, 700)))
    elif function == "LINEAR_EXACT" or width < 1:
        y = x / width + 0.5
    elif width == 1:
        y = x > -0.5
    else:
        y = (x + 0.5) / (width - 1) + 0.5
    return (np.clip(y, 0, 1) * 255).round().astype(np.uint8)


def _numbers(header, keyword):
    """The element's values as finite floats, each None where it is empty or no number; [] without the element."""
    try:
        value = header.get(keyword)
    except (ValueError, TypeError, OverflowError):  # text where a number belongs
        return []
    if value is None or isinstance(value, str | int | float):
        value = [value]

    def finite(number):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return float(number) if math.isfinite(float(number)) else None

    return [finite(number) for number in value]


def _number(header, keyword):
    """The element's first value, None if it is absent, empty or no number."""
    return next(iter(_numbers(header, keyword)), None)


# --- before any decoder sees the bytes --------------------------------------------------------------------------------
def _check_deflated(data, name):
    """Refuse a deflated data set that unpacks to more than the largest image: 1 MB can become 1 GB."""
    if data[128:132] == b"DICM" and DEFLATED in data[132:2048]:
        start = 144 + int.from_bytes(data[140:144], "little")  # the file meta group says its length first
        stream, unpacked, packed = zlib.decompressobj(-zlib.MAX_WBITS), 0, data[start:]
        while packed and unpacked < MAX_UNPACKED:  # piece by piece, none of which is kept
            unpacked += len(stream.decompress(packed, 1 << 20))
            packed = stream.unconsumed_tail
        if unpacked >= MAX_UNPACKED:
            raise InputError(f"{name}: unpacks to more than {MAX_UNPACKED / 1e6:.0f} MB; is it an image?")


def _check_frames(header, name):
    """Refuse a compressed frame whose own header would keep a decoder busy for ever or fill the memory."""
    from pydicom.encaps import generate_frames

    expected = int(header.Columns), int(header.Rows)
    frames = list(generate_frames(header.PixelData, number_of_frames=1))
    if len(frames) > 1:
        raise InputError(f"{name}: holds {len(frames)} frames, expected one; split it into single files")
    for frame in frames:
        size = _jpeg_2000_size(frame, name) if frame[4:8] == b"jP  " or frame[:2] == b"\xff\x4f" else _jpeg_size(frame)
        if size is not None and size != expected:
            raise InputError(f"{name}: its compressed pixels are {size[0]} x {size[1]}, its header says "
                             f"{expected[0]} x {expected[1]}; export it again")  # fmt: skip


def _jpeg_2000_size(frame, name):
    """(width, height) of a JPEG 2000 frame: ISO/IEC 15444-1, annex I (boxes) and A.5.1 (size marker).

    A box of length 0 lasts to the end of the data, and 1 announces a length of 8 bytes. Other lengths below 8 would
    send a reader back to where it came from.
    """
    at = 0
    if frame[4:8] == b"jP  ":
        while frame[at + 4 : at + 8] != b"jp2c":
            length, header = int.from_bytes(frame[at : at + 4], "big"), 8
            if length == 1:
                length, header = int.from_bytes(frame[at + 8 : at + 16], "big"), 16
            if length < header or at + length >= len(frame):
                raise InputError(f"{name}: damaged JPEG 2000 (a box of {length} bytes at byte {at}); export it again")
            at += length
        at += 16 if frame[at : at + 4] == b"\0\0\0\1" else 8
    if frame[at : at + 4] != b"\xff\x4f\xff\x51":
        raise InputError(f"{name}: damaged JPEG 2000 (no codestream at byte {at}); export it again")
    right, bottom, left, top = (int.from_bytes(frame[at + 8 + k : at + 12 + k], "big") for k in (0, 4, 8, 12))
    return right - left, bottom - top


def _jpeg_size(frame):
    """(width, height) from a JPEG or JPEG-LS frame's header (ISO/IEC 10918-1, B.2.2), None if there is none."""
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(frame[at + k : at + k + 2], "big") for k in (5, 7))
            return width, height
        at += 1 if marker == 0xFF else 2 + max(length, 2)  # a run of 0xFF is fill
    return None
