"""PNG, TIFF, JPEG with more than 8 bits per colour, with several pages, and of impossible sizes."""

import struct
import zlib

import numpy as np
import pytest
from made_data import encoded, grey_image, png_16_bit
from PIL import Image

from minildm.data.reading import decode
from minildm.errors import InputError

GREY_12 = grey_image().astype(np.uint16) * 16  # 12-bit greys
ALPHA_16, ALPHA_12 = np.full_like(GREY_12, 65535), np.full_like(GREY_12, 4095)


def tiff(values, order="<", **tags):
    """An uncompressed 16-bit TIFF of one strip, written by hand. values: (H, W, C) uint16; tags: by number, t338=2."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    entries = {256: [width], 257: [height], 258: [16] * channels, 259: [1], 262: [2 if channels >= 3 else 1],
               273: [8], 277: [channels], 278: [height], 279: [len(pixels)]}  # fmt: skip
    entries |= {int(name[1:]): value for name, value in tags.items()}
    start = 8 + len(pixels)
    after, directory = start + 2 + 12 * len(entries) + 4, b""
    extra = b""
    for tag, numbers in sorted(entries.items()):
        kind, code = (4, "I") if tag in (273, 279) else (3, "H")
        data = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(data) > 4:
            field, extra = struct.pack(f"{order}I", after + len(extra)), extra + data
        else:
            field = data.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + field
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return (
        mark + struct.pack(f"{order}I", start) + pixels + struct.pack(f"{order}H", len(entries)) + directory
        + bytes(4) + extra
    )  # fmt: skip


# --- 16 bits per colour -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_a_16_bit_png_of_any_kind_reads_as_grey_alone_does(colour_type, top):
    ramp = np.linspace(0, top, 4096).astype(np.uint16).reshape(64, 64)
    planes = {0: [ramp], 2: [ramp] * 3, 4: [ramp, ALPHA_16], 6: [ramp] * 3 + [ALPHA_16]}[colour_type]
    read_back = decode(png_16_bit(np.stack(planes, -1), colour_type), "x.png")
    np.testing.assert_array_equal(read_back.pixels, np.round(ramp * (255 / top)).astype(np.uint8))
    assert read_back.greys == f"{top.bit_length()}-bit range 0..{top}"
    assert (
        read_back.kind == {0: "16-bit grey", 2: "16-bit RGB", 4: "16-bit grey + alpha", 6: "16-bit RGBA"}[colour_type]
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels, tags", [(3, {}), (4, {"t338": [2]}), (4, {"t338": [1]}), (4, {"t338": [0]})])
def test_a_16_bit_tiff_reads_as_grey_alone_does(channels, tags, order):
    values = np.stack([GREY_12] * 3 + [ALPHA_16] * (channels - 3), -1)
    read_back = decode(tiff(values, order, **tags), "x.tif")
    np.testing.assert_array_equal(read_back.pixels, np.round(GREY_12 * (255 / 4095)).astype(np.uint8))


def test_16_bit_colours_keep_their_ratios():
    values = np.zeros((8, 8, 3), np.uint16)
    values[..., 0], values[..., 1], values[..., 2] = 4095, 2048, 819
    assert decode(png_16_bit(values, 2), "x.png").pixels[3, 3].tolist() == [255, 128, 51]


@pytest.mark.parametrize("opaque", [ALPHA_16, ALPHA_12])
def test_transparent_pixels_of_16_bit_images_are_black_and_opaque_ones_unchanged(opaque):
    alpha = opaque.copy()
    alpha[:, :32] = 0
    for planes, colour_type in (([GREY_12, alpha], 4), ([GREY_12] * 3 + [alpha], 6)):
        pixels = decode(png_16_bit(np.stack(planes, -1), colour_type), "x.png").pixels
        assert pixels[:, :32].max() == 0
        np.testing.assert_array_equal(pixels[:, 32:], np.round(GREY_12[:, 32:] * (255 / 4095)).astype(np.uint8))


def test_16_bit_colour_is_turned_upright():
    exif = Image.Exif()
    exif[274] = 6
    data = png_16_bit(np.stack([GREY_12] * 3, -1), 2, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    np.testing.assert_array_equal(
        decode(data, "x.png").pixels, np.rot90(np.round(GREY_12 * (255 / 4095)), -1).astype(np.uint8)
    )


def test_a_marker_at_65535_does_not_darken_a_12_bit_image():
    marked = GREY_12.copy()
    marked[2:8, 2:12] = 65535  # 1.5 % of the area
    for data in (
        png_16_bit(marked[..., None], 0),
        png_16_bit(np.stack([marked] * 3, -1), 2),
        encoded(Image.fromarray(marked), "TIFF"),
    ):
        pixels = decode(data, "x").pixels
        expected = np.round(GREY_12.clip(0, 4095) * (255 / 4095)).astype(np.uint8)
        expected[2:8, 2:12] = 255
        np.testing.assert_array_equal(pixels, expected)


def test_an_ordinary_16_bit_image_with_saturated_pixels_keeps_its_16_bits():
    values = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    values[:4] = 65535
    np.testing.assert_array_equal(
        decode(png_16_bit(values[..., None], 0), "x").pixels, np.round(values / 257).astype(np.uint8)
    )


# --- several pages ----------------------------------------------------------------------------------------------------
def pages(*images, **options):
    first, *others = images
    return encoded(first, "TIFF", save_all=True, append_images=others, **options)


def test_a_camera_jpeg_with_a_preview_is_its_first_image():
    image, preview = Image.fromarray(grey_image(side=128)).convert("RGB"), Image.new("RGB", (24, 24), "red")
    data = encoded(image, "MPO", save_all=True, append_images=[preview], quality=95)
    np.testing.assert_array_equal(decode(data, "x.jpg").pixels, decode(encoded(image, "JPEG", quality=95), "x").pixels)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_tiff_with_a_thumbnail_page_is_its_image(marked, first):
    image = Image.fromarray(grey_image(side=128))
    thumbnail = image.resize((32, 32), Image.Resampling.BOX)
    if marked:
        thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    data = pages(*((thumbnail, image) if first else (image, thumbnail)))
    np.testing.assert_array_equal(decode(data, "x.tif").pixels, grey_image(side=128))


def test_a_tiff_of_two_exposures_is_refused():
    exposures = [Image.fromarray(grey_image(seed, 64)) for seed in (0, 1)]
    smaller = exposures[1].resize((48, 48))
    for pair in (exposures, [exposures[0], smaller], [exposures[0], exposures[0]]):
        with pytest.raises(InputError, match=r"x.tif: holds 2 images, expected one"):
            decode(pages(*pair), "x.tif")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_animations_are_refused(kind):
    frames = [Image.fromarray(grey_image(seed)) for seed in (0, 1, 2)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"holds 3 images"):
        decode(data, "x")


# --- what is not opened -----------------------------------------------------------------------------------------------
def test_programs_and_drawings_are_no_images():
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        with pytest.raises(InputError, match=r"unknown image format"):
            decode(data, "x.png")


def test_a_page_larger_than_any_image_is_refused_before_it_is_unpacked():
    data = pages(Image.fromarray(grey_image()), Image.new("1", (3000, 3000)))
    for tag in (256, 257):  # width and height
        old, new = (struct.pack("<HHII", tag, 4, 1, side) for side in (3000, 60_000))
        assert old in data
        data = data.replace(old, new)
    with pytest.raises(InputError, match=r"unpacks to 60000 x 60000|decompression bomb"):
        decode(data, "x.tif")


def test_packed_text_in_a_png_is_not_unpacked_without_bounds():
    text = b"parameters\0\0" + zlib.compress(bytes(1 << 28))
    with pytest.raises(InputError, match=r"x.png: cannot be decoded"):
        decode(png_16_bit(GREY_12[..., None], 0, (b"zTXt", text)), "x.png")
