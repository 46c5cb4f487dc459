"""PNG, JPEG, TIFF and the other formats that Pillow reads -> 8-bit images.

Pillow keeps only the high byte of 16-bit colour and of 16-bit grey with alpha, which leaves nothing of 12-bit greys.
``_deep_values`` therefore decodes such files twice, once for each byte.
"""

import io
import sys
import warnings

import numpy as np
from PIL import Image, ImageOps

from minildm.data.greys import DecodedImage, depth_in_use, to_8_bit
from minildm.errors import InputError

# Not EPS, which Pillow hands to another program, nor other formats that are no images of one size.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "WEBP")
MAX_PIXELS = 100_000_000  # larger images are refused; a large radiograph has 20 million
SUBFILE_TYPE, WHITE_IS_ZERO, PLANAR = 254, 262, 284  # TIFF tags
MAX_THUMBNAIL_DIFFERENCE = 12  # mean difference in grey levels between a page and a thumbnail of it
OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # Pillow's names of byte orders


def check_size(name, width, height):
    """Raise InputError for more pixels than any radiograph has."""
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: unpacks to {width} x {height} pixels, over {MAX_PIXELS:,}; scale it down first")


def open_image(data, name, formats=FORMATS):
    """The file's bytes -> Pillow image at the page that counts, not yet decoded.

    Raises: InputError for too many pixels, or more than one image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about size, which is checked here, and about odd metadata
        image = Image.open(io.BytesIO(data), formats=formats)
        check_size(name, image.width, image.height)
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":  # a camera's JPEG, whose other frames are previews
            image.seek(_main_page(Image.open(io.BytesIO(data), formats=formats), pages, name))
            check_size(name, image.width, image.height)
    return image


def _main_page(image, pages, name):
    """The page that is no thumbnail, mask or reduced copy of another one.

    TIFF 6.0 marks these in the bits of NewSubfileType (reduced copy 1, mask 4). Where a writer leaves the mark out, a
    smaller page that shows the same as the largest is a reduced copy.
    """
    whole, sizes = [], {}
    for page in range(pages if image.format == "TIFF" and pages <= 64 else 0):
        image.seek(page)
        if not image.tag_v2.get(SUBFILE_TYPE, 0) & (1 | 4):
            whole.append(page)
            sizes[page] = image.width * image.height
    if len(whole) > 1:
        main = max(whole, key=sizes.get)
        whole = [page for page in whole if page == main or not _is_reduced_copy(image, page, main, name)]
    if len(whole) != 1:
        raise InputError(f"{name}: holds {pages} images, expected one; split it into single files")
    return whole[0]


def _is_reduced_copy(image, page, main, name):
    def small_grey(page, size=None):
        image.seek(page)
        check_size(name, image.width, image.height)
        grey = image.convert("RGB").convert("L")
        return grey if size is None else grey.resize(size, Image.Resampling.BOX)

    copy, (width, height) = small_grey(page), (image.width, image.height)
    image.seek(main)
    if width >= image.width or height >= image.height:
        return False
    difference = np.asarray(copy, np.float32) - np.asarray(small_grey(main, (width, height)), np.float32)
    return bool(np.abs(difference).mean() <= MAX_THUMBNAIL_DIFFERENCE)


def deep_colour(image):
    """The raw mode of an image whose colours, or grey and alpha, have more than 8 bits, such as "RGB;16B"; else None.

    Args: image: from ``open_image``, not yet decoded. Grey images of more than 8 bits have modes of their own.
    """
    if image.mode[0] in "IF":
        return None
    for tile in image.tile:
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        raw_mode = str(arguments[0])
        if ";16" in raw_mode:
            return raw_mode
        if tile[0] in ("ppm", "ppm_plain") and arguments[-1] > 255:
            return f"{raw_mode} up to {arguments[-1]}"
    if image.format == "JPEG2000" and image.mode != "L" and (bits := _jpeg_2000_bits(image)) > 8:
        return f"{image.mode} {bits} bits"
    return None


def _jpeg_2000_bits(image):
    data = image.fp.getvalue()[:65536]
    start = data.find(b"\xff\x4f\xff\x51")  # start of codestream, size marker (ISO/IEC 15444-1, A.5.1)
    return (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 0


def decode_raster(data, name, greys, at_least=None):
    """The file's bytes -> DecodedImage. The arguments are those of ``reading.decode``."""
    image = open_image(data, name)
    raw_mode = deep_colour(image)
    if raw_mode is not None:
        return _deep_image(data, image, raw_mode, name, greys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if at_least is not None:  # libjpeg can scale by 1/2, 1/4 or 1/8; twice the size leaves detail for filtering
            image.draft(image.mode, (2 * at_least, 2 * at_least))
        white_is_zero = image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(WHITE_IS_ZERO) == 0
        image.load()
        image = ImageOps.exif_transpose(image)

    if image.mode.startswith("I") or image.mode == "F":
        bits = 16 if image.mode.startswith("I;16") else 32
        kind = "32-bit float grey" if image.mode == "F" else f"{bits}-bit grey"
        pixels, mapping = to_8_bit(np.asarray(image), name, greys)
        return DecodedImage(255 - pixels if white_is_zero else pixels, kind, mapping + ", inverted" * white_is_zero)

    kind = {"L": "8-bit grey", "1": "1-bit grey", "P": "palette", "LA": "grey + alpha"}.get(image.mode, image.mode)
    opaque_grey = image.mode in ("L", "1") and "transparency" not in image.info
    pixels = _grey_if_equal(np.asarray(image.convert("L") if opaque_grey else as_rgb(image)))
    if greys == "percentiles" and pixels.ndim == 2:
        pixels, mapping = to_8_bit(pixels, name, greys)
        return DecodedImage(pixels, kind, mapping)
    return DecodedImage(pixels, kind, "8 bits, as stored")


def as_rgb(image):
    """A Pillow image of 8 bits per channel as RGB, on black where it is transparent."""
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def _grey_if_equal(pixels):
    """(H, W, C) with equal channels -> (H, W), which is faster to resize; anything else unchanged."""
    red = pixels[..., :1]
    return np.ascontiguousarray(red[..., 0]) if pixels.ndim == 3 and (pixels == red).all() else pixels


# --- 16 bits per channel ----------------------------------------------------------------------------------------------
def _deep_image(data, image, raw_mode, name, greys):
    """The DecodedImage of a 16-bit colour, or grey and alpha, file. Its depth is that in use, as for grey."""
    values, alpha = _deep_values(data, image, raw_mode, name)
    if alpha is not None:  # on black; opaque is the largest value of alpha's own depth, 4095 in some 12-bit files
        opaque = (1 << depth_in_use(alpha)) - 1
        values = (values * (alpha[..., None] / np.float64(opaque))).round().astype(np.uint16)
    kind = {1: "16-bit grey + alpha", 3: "16-bit RGB" + "A" * (alpha is not None)}[values.shape[-1]]
    values = _grey_if_equal(values)
    pixels, mapping = to_8_bit(values, name, greys if values.ndim == 2 else "declared")
    return DecodedImage(pixels, kind, mapping)


def _deep_values(data, image, raw_mode, name):
    """(values uint16 (H, W, 1 or 3), alpha uint16 (H, W) or None), upright.

    A raw mode is how Pillow's decoders unpack a file's bytes: "RGB;16B" takes the first byte of each big-endian value,
    and "RGB;16L", meant for little-endian values, takes the second. "RGBA" takes the four bytes of grey and alpha.
    """
    channels, _, order = raw_mode.partition(";16")
    if order not in OTHER_BYTE or channels not in ("RGB", "RGBX", "RGBA", "RGBa", "LA") or _is_planar(image):
        raise InputError(f"{name}: {image.format} of more than 8 bits per colour ({raw_mode}); export it as 16-bit PNG")
    if channels == "LA":
        high_low = _unpacked(data, image, "RGBA", name).astype(np.uint16)  # grey high, grey low, alpha high, alpha low
        values = high_low[..., 0::2] << 8 | high_low[..., 1::2]
    else:
        stored = channels.replace("a", "A")  # RGBa would be divided by alpha
        high, low = (_unpacked(data, image, f"{stored};16{byte}", name) for byte in (order, OTHER_BYTE[order]))
        values = high.astype(np.uint16) << 8 | low
    if channels == "RGBa":  # colours already multiplied by alpha: on black they stay as they are
        return values[..., :3], None
    return values[..., : len(channels.rstrip("AX"))], values[..., -1] if channels.endswith("A") else None


def _is_planar(image):
    return getattr(image, "tag_v2", {}).get(PLANAR, 1) == 2


def _unpacked(data, image, raw_mode, name):
    """Decode the page ``image`` is at once more, with another raw mode: uint8 (H, W, channels), upright."""

    def changed(tile):
        arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
        return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)

    again = open_image(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.tile = [changed(tile) for tile in again.tile]
        again.load()
        return np.asarray(ImageOps.exif_transpose(again))
