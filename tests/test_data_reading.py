"""Image files -> 8-bit images: every depth and kind, real DICOM, and broken files."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import dicom, encoded, grey_image
from PIL import Image, ImageOps

from minildm.data.greys import to_8_bit
from minildm.data.reading import DecodedImage, Transform, decode, file_bytes, fit, read, to_tensor
from minildm.data.records import Record
from minildm.errors import InputError

pydicom = pytest.importorskip("pydicom", reason="needs the dicom extra")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_ramp_of_any_depth_stays_a_ramp(bits, kind):
    ramp = np.linspace(0, 2**bits - 1, 4096).astype(np.uint16).reshape(64, 64)
    read_back = decode(encoded(Image.fromarray(ramp), kind), "ramp")
    np.testing.assert_array_equal(read_back.pixels, np.round(ramp * (255 / (2**bits - 1))).astype(np.uint8))
    assert read_back.greys == f"{bits}-bit range 0..{2**bits - 1}" and read_back.kind == "16-bit grey"
    assert len(np.unique(read_back.pixels)) == 256  # Pillow's convert("L") would leave all but 256 values white


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 2**32 - 1))
def test_16_bit_greys_keep_their_order_and_use_the_declared_depth(low, high, seed):
    low, high = sorted((low, high))
    values = np.random.default_rng(seed).integers(low, high + 1, (8, 9), dtype=np.uint16)
    pixels = decode(encoded(Image.fromarray(values)), "values").pixels
    assert (np.diff(pixels.ravel()[np.argsort(values, axis=None)].astype(int)) >= 0).all()
    top = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits)
    assert np.abs(pixels / 255 - values / top).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_greys_go_from_minimum_to_maximum(dtype):
    values = np.linspace(-70_000, 130_000, 256).astype(dtype).reshape(16, 16)
    read_back = decode(encoded(Image.fromarray(values), "TIFF"), "values")
    np.testing.assert_allclose(read_back.pixels.ravel(), np.arange(256), atol=1)
    assert read_back.greys.startswith("range -70000..")


def test_8_bit_greys_are_left_alone():
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey_image())), "grey").pixels, grey_image())


def test_percentiles_ignore_a_few_extreme_pixels():
    values = np.full((100, 100), 1000, np.uint16) + np.arange(100, dtype=np.uint16)
    values[0, :10] = 65535
    read_back = decode(encoded(Image.fromarray(values)), "values", greys="percentiles")
    assert np.ptp(read_back.pixels[50]) == 255 and read_back.greys.startswith("percentiles 0.5-99.5: 1000..")


def test_a_white_is_zero_tiff_is_inverted():
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    black, white = (
        decode(encoded(Image.fromarray(values), "TIFF", tiffinfo={262: photometric}), "values")
        for photometric in (1, 0)
    )
    np.testing.assert_array_equal(white.pixels, 255 - black.pixels)
    assert white.greys.endswith("inverted")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_a_grey_image_reads_the_same(mode):
    grey = Image.fromarray(np.where(grey_image() > 128, 255, 0).astype(np.uint8))
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    pixels = decode(encoded(grey.convert("RGB").convert(mode), kind), "image").pixels
    np.testing.assert_allclose(pixels.astype(int), np.asarray(grey), atol=2)
    assert pixels.ndim == 2  # grey in three channels is grey


def test_colour_stays_colour_and_transparent_pixels_turn_black():
    colour = np.zeros((8, 8, 4), np.uint8)
    colour[..., 0], colour[:, 4:, 3] = 200, 255
    pixels = decode(encoded(Image.fromarray(colour)), "image").pixels
    assert pixels[0, 0].tolist() == [0, 0, 0] and pixels[0, 7].tolist() == [200, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = Image.fromarray(grey_image(side=48)).crop((0, 0, 48, 32))
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(data, "photo").pixels, upright)


@settings(max_examples=60, deadline=None)
@given(
    stored=st.integers(8, 16),
    signed=st.booleans(),
    slope=st.sampled_from([1, 2, 0.5]),
    intercept=st.sampled_from([0, -1024, 100]),
    window=st.sampled_from([None, (0.3, 0.5), (0.5, 1.0)]),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    seed=st.integers(0, 1000),
)
def test_dicom_greys_follow_the_window_and_monochrome1_is_the_negative(
    stored, signed, slope, intercept, window, function, seed
):
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1)) if signed else (0, 2**stored)
    values = np.random.default_rng(seed).integers(low, high, (16, 16)).astype(np.int16 if signed else np.uint16)
    elements = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    if window is not None:
        center, width = low + window[0] * 2**stored, window[1] * 2**stored
        elements |= {
            "WindowCenter": round(center * slope + intercept, 3),
            "WindowWidth": round(width * slope, 3),
            "VOILUTFunction": function,
        }
    positive, negative = (
        decode(dicom(values, stored, kind, **elements), "x.dcm").pixels for kind in ("MONOCHROME2", "MONOCHROME1")
    )
    np.testing.assert_array_equal(negative, 255 - positive)
    order = np.argsort(values, axis=None, kind="stable")
    assert (np.diff(positive.ravel()[order].astype(int)) >= 0).all()
    if window is not None:
        expected = pydicom.pixels.apply_windowing(
            pydicom.pixels.apply_modality_lut(values, pydicom.dcmread(io.BytesIO(dicom(values, stored, **elements)))),
            pydicom.dcmread(io.BytesIO(dicom(values, stored, **elements))),
        )
        span = (2**stored - 1) * slope  # pydicom maps to the range of the stored values
        floor = low * slope + intercept
        np.testing.assert_allclose(positive, (expected - floor) / span * 255, atol=1)


def test_dicom_without_a_window_uses_percentiles_unless_it_has_8_bits():
    deep = decode(dicom((grey_image().astype(np.uint16) + 500), 12), "deep.dcm")
    flat = decode(dicom(grey_image(), 8), "flat.dcm")
    assert deep.greys.startswith("percentiles") and np.ptp(deep.pixels) == 255
    np.testing.assert_array_equal(flat.pixels, grey_image())


def test_dicom_voi_lut_sequence_is_applied():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    lut = pydicom.Dataset()
    lut.LUTDescriptor = [256, 0, 16]
    lut.LUTData = (65535 - np.arange(256) * 257).astype("<u2").tobytes()
    read_back = decode(dicom(values, 12, VOILUTSequence=[lut]), "x.dcm")
    np.testing.assert_allclose(read_back.pixels, 255 - values, atol=1)
    assert read_back.greys.startswith("VOI LUT")


def test_real_dicom_pairs_agree(shared_data):
    def pixels(name):
        return decode(file_bytes(shared_data / name), shared_data / name).pixels.astype(int)

    normal = pixels("dicom/siim_cxr_monochrome2_jpeg.dcm")
    np.testing.assert_array_equal(pixels("dicom/siim_cxr_fake_monochrome1_jpeg.dcm"), 255 - normal)
    ours, made_by_hand = (
        pixels("dicom/RG1_cr_chest_monochrome1_15bit_512_uncompressed.dcm"),
        pixels("cxr/originals/RG1_cr_chest_16bit.png"),
    )
    assert np.abs(ours - made_by_hand).max() <= 2  # windowed and inverted by another program
    assert pixels("dicom/RG1_cr_chest_monochrome1_15bit_jpeg2000.dcm").shape == (1955, 1841)
    assert np.ptp(pixels("dicom/CT_small_monochrome2_16bit_signed.dcm")) == 255


def test_every_real_original_is_read_whole(shared_data):
    for path in sorted((shared_data / "cxr" / "originals").iterdir()):
        read_back = decode(path.read_bytes(), path)
        assert read_back.pixels.dtype == np.uint8 and np.ptp(read_back.pixels) > 200, path.name
    assert decode((shared_data / "cxr/originals/00005435_000.png").read_bytes(), "x").pixels.ndim == 2  # RGBA, but grey


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "PNG16", "JPEG", "TIFF", "DICOM"]), st.floats(0, 1), st.integers(0, 255), st.booleans())
def test_broken_bytes_give_one_line_that_names_the_file(kind, place, byte, cut):
    data = {
        "PNG16": lambda: encoded(Image.fromarray(grey_image().astype(np.uint16) * 200)),
        "DICOM": lambda: dicom(grey_image().astype(np.uint16), 12),
    }.get(kind, lambda: encoded(Image.fromarray(grey_image()), kind))()
    position = int(place * (len(data) - 1))
    data = data[:position] if cut else data[:position] + bytes([byte]) + data[position + 1 :]
    try:
        assert isinstance(decode(data, "broken.dcm" if kind == "DICOM" else "broken.png"), DecodedImage)
    except InputError as error:
        assert str(error).startswith("broken.") and "\n" not in str(error)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_truncated_file_is_an_error_not_a_half_black_image(kind):
    data = encoded(Image.fromarray(grey_image(side=256)), kind)
    with pytest.raises(InputError, match=r"half.img: cannot be decoded"):
        decode(data[: len(data) * 6 // 10], "half.img")


def test_empty_missing_oversized_and_multi_image_files_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"x.png: the file is empty \(0 bytes\)"):
        decode(b"", "x.png")
    with pytest.raises(InputError, match=r"cannot be decoded as an image"):
        decode(b"these are not pixels", "x.png")
    for side, words in ((12_000, "unpacks to 12000 x 12000 pixels, over 100,000,000"), (60_000, "decompression bomb")):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])  # a PNG that claims to be huge
        data = encoded(Image.fromarray(grey_image()))
        with pytest.raises(InputError, match=words):
            decode(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:], "bomb.png")
    with pytest.raises(InputError, match=r"holds 2 images"):
        decode(
            encoded(Image.fromarray(grey_image()), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]), "x"
        )
    with pytest.raises(InputError, match=r"holds 3 frames"):
        decode(dicom(grey_image(), 8, NumberOfFrames=3), "x.dcm")
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        file_bytes(tmp_path / "absent.png")
    with pytest.raises(InputError, match=r"NaN or infinite"):
        to_8_bit(np.array([[0.0, np.nan]]), "x.tif", "declared")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([8, 64, 224]),
    st.sampled_from(["crop", "pad"]),
    st.booleans(),
)
def test_an_image_of_any_shape_becomes_a_square(height, width, size, how, colour):
    pixels = np.full((height, width, 3) if colour else (height, width), 200, np.uint8)
    square = fit(pixels, Transform(size, how))
    assert square.shape == (size, size, 3) and square.dtype == np.uint8
    if how == "crop":
        assert (square == 200).all()
    else:
        assert square.max() == 200  # and black beside it


def test_crop_takes_the_centre_of_the_shortest_side_and_pad_keeps_all():
    pixels = np.zeros((100, 200), np.uint8)
    pixels[:, 100:] = 255
    cropped, padded = fit(pixels, Transform(96)), fit(pixels, Transform(96, "pad"))
    assert cropped[48, 40, 0] < 5 and cropped[48, 56, 0] > 250
    assert padded[10].max() == 0 and padded[48, 90, 0] == 255  # black above, the right half kept


def test_reduction_is_filtered():
    checks = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(fit(checks, Transform(64)).astype(int) - 127).max() <= 2  # unfiltered: 0 or 255


def test_large_jpegs_read_at_a_smaller_scale_look_the_same(tmp_path):
    path = tmp_path / "large.jpg"
    Image.fromarray(grey_image(3, 2048)).save(path, quality=95)
    record, transform = Record("large.jpg", "p", path=path), Transform(224)
    fast, whole = read(record, transform)[0], read(record, transform, whole=True)[0]
    assert np.abs(fast.astype(int) - whole).mean() < 0.5


def test_pixels_become_tensors_between_minus_one_and_one():
    tensor = to_tensor(np.array([[[[0, 127, 255]]]], np.uint8))
    assert tensor.shape == (1, 3, 1, 1) and tensor.flatten().tolist() == pytest.approx([-1, -1 / 255, 1], abs=1e-6)


@pytest.mark.parametrize("wrong", [{"size": 100}, {"size": 0}, {"fit": "stretch"}, {"greys": "auto"}])
def test_a_wrong_transform_is_refused(wrong):
    with pytest.raises(InputError, match=r"must be"):
        Transform(**wrong)
