"""DICOM headers as they come: holes, padding, look-up tables, windows, files without preamble, and hostile frames."""

import io
import time
import zlib

import numpy as np
import pytest
from made_data import dicom, grey_image
from PIL import Image

from minildm.data.dicom import windowed
from minildm.data.reading import decode
from minildm.errors import InputError

pydicom = pytest.importorskip("pydicom", reason="needs the dicom extra")

VALUES = grey_image().astype(np.uint16) * 12 + 300  # 12 bits, 780 ... 3060
WINDOW = {"WindowCenter": "1500", "WindowWidth": "2600"}
INNER = (slice(16, -16),) * 2


def framed(values, padding, width=16):
    """The values inside a frame of padding."""
    out = np.full_like(values, padding)
    out[width:-width, width:-width] = values[width:-width, width:-width]
    return out


def table(entries, first=0, bits=16, count=None):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries) if count is None else count, first, bits]
    item.LUTData = np.asarray(entries, "<u2").tobytes()
    return item


def without_preamble(data, **options):
    buffer = io.BytesIO()
    header = pydicom.dcmread(io.BytesIO(data))
    bare = pydicom.Dataset()
    bare.update({element.tag: element for element in header})
    pydicom.dcmwrite(buffer, bare, enforce_file_format=False, **options)
    assert buffer.getvalue()[128:132] != b"DICM"
    return buffer.getvalue()


# --- attributes that are there but empty or senseless -----------------------------------------------------------------
@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"RescaleSlope": None},
        {"RescaleSlope": "1", "RescaleIntercept": ""},
        {"RescaleSlope": "0", "RescaleIntercept": "0"},
        {"ModalityLUTSequence": []},
        {"VOILUTSequence": []},
        {"VOILUTSequence": [pydicom.Dataset()]},
        {"VOILUTFunction": ""},
        {"VOILUTFunction": None},
    ],
    ids=str,
)
def test_an_empty_attribute_counts_as_absent_beside_a_good_window(elements):
    expected = decode(dicom(VALUES, 12, **WINDOW), "x.dcm")
    read_back = decode(dicom(VALUES, 12, **WINDOW, **elements), "x.dcm")
    np.testing.assert_array_equal(read_back.pixels, expected.pixels)
    assert read_back.greys == "window 1500/2600 LINEAR"


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": "0", "WindowWidth": "0"},
        {"WindowCenter": "1500", "WindowWidth": "-2600"},
        {"WindowWidth": "2600"},
        {"WindowCenter": "1500"},
        {"WindowCenter": "", "WindowWidth": "2600"},
        {"WindowCenter": "-90000", "WindowWidth": "100"},  # all of the image would be white
        {"VOILUTSequence": [table(range(4096), count=0)]},  # 65,536 entries announced, 4,096 there
        {"VOILUTSequence": [table(np.zeros(4096))]},  # all of the image would be black
    ],
    ids=lambda elements: " ".join(map(str, elements)),
)
def test_an_image_without_a_usable_window_is_read_by_percentiles(elements):
    expected = decode(dicom(VALUES, 12), "x.dcm")
    read_back = decode(dicom(VALUES, 12, **elements), "x.dcm")
    np.testing.assert_array_equal(read_back.pixels, expected.pixels)
    assert read_back.greys.startswith("percentiles") and len(np.unique(read_back.pixels)) > 100


def test_the_first_usable_of_several_windows_is_applied():
    both = decode(dicom(VALUES, 12, WindowCenter=["0", "1500"], WindowWidth=["0", "2600"]), "x.dcm")
    np.testing.assert_array_equal(both.pixels, decode(dicom(VALUES, 12, **WINDOW), "x.dcm").pixels)


def test_window_formulas_at_their_ends():
    """PS3.3 C.11.2.1.2.1: black up to c - 0.5 - (w - 1) / 2, white above c - 0.5 + (w - 1) / 2."""
    x = np.array([0, 99, 100, 101, 200, 300, 301])
    np.testing.assert_array_equal(windowed(x, 200.5, 201, "LINEAR"), [0, 0, 0, 1, 128, 255, 255])
    np.testing.assert_array_equal(windowed(x, 200, 200, "LINEAR_EXACT"), [0, 0, 0, 1, 128, 255, 255])
    np.testing.assert_array_equal(windowed(x, 200, 200, "SIGMOID"), (255 / (1 + np.exp(-4 * (x - 200) / 200))).round())
    np.testing.assert_array_equal(windowed(x, 100.5, 1, "LINEAR"), [0, 0, 0, 255, 255, 255, 255])
    assert np.isfinite(windowed(np.array([-1e30, 1e30]), 0, 1e-3, "SIGMOID")).all()


# --- padding, PS3.3 C.7.5.1.1.2 ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("intercept", ["0", "-1024", "37.5"])
@pytest.mark.parametrize("slope", ["1", "2", "-1"])
def test_padding_is_a_stored_value_and_takes_no_part_in_the_greys(slope, intercept):
    elements = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    values = framed(VALUES.astype(np.int16), -2000)
    read_back = decode(dicom(values, 16, PixelPaddingValue=-2000, **elements), "x.dcm").pixels
    inner = decode(dicom(np.ascontiguousarray(values[INNER]), 16, **elements), "x.dcm").pixels
    np.testing.assert_array_equal(read_back[INNER], inner)
    assert read_back[0].max() == 0


@pytest.mark.parametrize("ends", [(0, 10), (10, 0), (5, 5)])
def test_a_padding_range_is_read_in_either_order(ends):
    values = framed(VALUES, 5)
    elements = dict(zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), ends))
    read_back = decode(dicom(values, 12, **elements), "x.dcm").pixels
    inner = decode(dicom(np.ascontiguousarray(values[INNER]), 12), "x.dcm").pixels
    np.testing.assert_array_equal(read_back[INNER], inner)


@pytest.mark.parametrize("window", [{}, WINDOW, {"VOILUTSequence": [table(range(4096), bits=12)]}])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [0, 4095])
def test_padding_is_black_however_the_greys_are_mapped(padding, photometric, window):
    read_back = decode(dicom(framed(VALUES, padding), 12, photometric, PixelPaddingValue=padding, **window), "x.dcm")
    assert read_back.pixels[0].max() == 0 and np.ptp(read_back.pixels[INNER]) > 100
    assert read_back.greys.endswith("padding black")


def test_an_image_of_nothing_but_padding_is_black():
    assert decode(dicom(np.full((8, 8), 7, np.uint16), 12, PixelPaddingValue=7), "x.dcm").pixels.max() == 0


# --- look-up tables, PS3.3 C.11.1.1.1 and C.11.2.1.1 ------------------------------------------------------------------
def test_a_voi_lut_is_scaled_by_its_table_so_that_exposures_stay_comparable():
    elements = {"VOILUTSequence": [table(np.arange(4096), bits=12)]}
    light, dark = (decode(dicom(values, 12, **elements), "x.dcm").pixels for values in (VALUES, VALUES // 3))
    np.testing.assert_array_equal(light, (VALUES * (255 / 4095)).round())
    np.testing.assert_array_equal(dark, ((VALUES // 3) * (255 / 4095)).round())


def test_a_voi_lut_begins_at_its_first_mapped_value():
    elements = {"VOILUTSequence": [table(np.arange(1000) * 65, first=1000)]}
    read_back = decode(dicom(VALUES, 12, **elements), "x.dcm").pixels
    np.testing.assert_array_equal(read_back, ((VALUES.astype(int) - 1000).clip(0, 999) * 65 * (255 / 65535)).round())


def test_a_modality_lut_comes_before_the_window():
    negated = table(4095 - np.arange(4096), bits=12)
    read_back = decode(dicom(VALUES, 12, ModalityLUTSequence=[negated], **WINDOW), "x.dcm")
    np.testing.assert_array_equal(read_back.pixels, decode(dicom(4095 - VALUES, 12, **WINDOW), "x.dcm").pixels)


def test_8_bit_images_with_a_rescale_use_the_range_of_their_stored_values():
    read_back = decode(dicom(grey_image(), 8, RescaleSlope="2", RescaleIntercept="-100"), "x.dcm")
    np.testing.assert_array_equal(read_back.pixels, grey_image())


# --- files without preamble -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implicit, little", [(True, True), (False, True), (False, False)])
def test_files_without_preamble_are_read(implicit, little):
    values = VALUES if little else VALUES.byteswap()  # the writer swaps no pixels
    data = without_preamble(dicom(values, 12, **WINDOW), implicit_vr=implicit, little_endian=little)
    np.testing.assert_array_equal(decode(data, "x.dcm").pixels, decode(dicom(VALUES, 12, **WINDOW), "x.dcm").pixels)
    with pytest.raises(InputError, match=r"x.png: cannot be decoded as an image"):
        decode(data, "x.png")


# --- hostile files ----------------------------------------------------------------------------------------------------
def compressed(frame, syntax, side=64, frames=1):
    header = pydicom.dcmread(io.BytesIO(dicom(np.zeros((side, side), np.uint8), 8)))
    header.PixelData = pydicom.encaps.encapsulate([frame] * frames)
    header["PixelData"].VR = "OB"
    header.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def jp2(side=64):
    buffer = io.BytesIO()
    Image.fromarray(grey_image(side=side)).save(buffer, "JPEG2000")
    return buffer.getvalue()


@pytest.mark.parametrize("length", [0, 1, 2, 7, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("box", ["jP", "ftyp", "jp2h"])
def test_jpeg_2000_boxes_of_impossible_lengths_end_at_once(length, box):
    frame = jp2()
    at = {"jP": 0, "ftyp": frame.find(b"ftyp") - 4, "jp2h": frame.find(b"jp2h") - 4}[box]
    frame = frame[:at] + length.to_bytes(4, "big") + frame[at + 4 :]
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"damaged JPEG 2000"):
        decode(compressed(frame, pydicom.uid.JPEG2000Lossless), "x.dcm")
    assert time.perf_counter() - start < 2


def test_a_frame_of_another_size_than_the_header_says_is_refused():
    image = io.BytesIO()
    Image.new("L", (8000, 8000)).save(image, "JPEG")
    for frame, syntax in ((image.getvalue(), pydicom.uid.JPEGBaseline8Bit), (jp2(256), pydicom.uid.JPEG2000Lossless)):
        with pytest.raises(InputError, match=r"its compressed pixels are .* its header says 64 x 64"):
            decode(compressed(frame, syntax), "x.dcm")


def test_whole_jpeg_2000_frames_are_read():
    frame = jp2()
    for each in (frame, frame[frame.find(b"\xff\x4f\xff\x51") :]):
        np.testing.assert_array_equal(
            decode(compressed(each, pydicom.uid.JPEG2000Lossless), "x.dcm").pixels, grey_image()
        )


def test_two_frames_without_their_number_are_refused():
    data = dicom(VALUES, 12)
    header = pydicom.dcmread(io.BytesIO(data))
    header.PixelData = VALUES.tobytes() * 2
    buffer = io.BytesIO()
    header.save_as(buffer)
    for many in (buffer.getvalue(), compressed(jp2(), pydicom.uid.JPEG2000Lossless, frames=2)):
        with pytest.raises(InputError, match=r"frame"):
            decode(many, "x.dcm")


def test_a_deflated_bomb_is_refused_and_a_deflated_image_read():
    header = pydicom.dcmread(io.BytesIO(dicom(VALUES, 12, **WINDOW)))
    header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    np.testing.assert_array_equal(decode(data, "x.dcm").pixels, decode(dicom(VALUES, 12, **WINDOW), "x.dcm").pixels)
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(25)) + packer.flush()
    start = 144 + int.from_bytes(data[140:144], "little")
    with pytest.raises(InputError, match=r"unpacks to more than 400 MB"):
        decode(data[:start] + bomb, "x.dcm")


def test_a_file_without_pixels_is_named_by_its_class_in_few_words():
    header = pydicom.Dataset()
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"  # a report
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header, implicit_vr=True, little_endian=True, enforce_file_format=False)
    with pytest.raises(InputError, match=r"x.dcm: a DICOM file without pixels \('1.2.840.10008.5.1.4.1.1.88.11'\)"):
        decode(buffer.getvalue(), "x.dcm")
