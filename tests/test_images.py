"""PNG files with their text, and contact sheets."""

import pytest
from PIL import Image

from minildm.errors import InputError
from minildm.images import contact_sheet, parameters_text, read_parameters, save_png


def test_parameters_are_prompt_negative_prompt_and_pairs():
    assert parameters_text("a, b", "c", Steps=20, Model="x") == "a, b\nNegative prompt: c\nSteps: 20, Model: x"
    assert parameters_text("a", Steps=20, Size="8x8", Seed=0) == "a\nSteps: 20, Size: 8x8, Seed: 0"


@pytest.mark.parametrize(
    "value, written",
    [
        ("a, b", '"a, b"'),
        ("a: b", '"a: b"'),
        ("a\nb", '"a\\nb"'),
        ("é", "é"),
        ('say "x", y', '"say \\"x\\", y"'),
        (7.5, "7.5"),
    ],
)
def test_values_that_would_break_the_line_are_quoted_as_json(value, written):
    assert parameters_text("p", Model=value).splitlines()[1] == f"Model: {written}"


@pytest.mark.parametrize("text", ["plain", "two\nlines", "naïve — 胸部", "x" * 5000])
def test_the_parameters_of_a_png_can_be_read_back(text, tmp_path):
    save_png(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", text)
    assert read_parameters(tmp_path / "a.png") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((3, 3)) == (255, 0, 0)


def test_a_png_that_was_cut_short_is_refused(tmp_path):
    save_png(Image.effect_noise((64, 64), 50), tmp_path / "a.png", "x")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="delete it"):
        read_parameters(tmp_path / "a.png")


def test_a_png_without_parameters_gives_none(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png") is None


@pytest.mark.parametrize("n, size", [(1, (10, 6)), (4, (24, 16)), (5, (38, 16))])
def test_a_contact_sheet_is_a_nearly_square_grid(n, size):
    colours = [(i, 2 * i, 255 - i) for i in range(n)]
    sheet = contact_sheet([Image.new("RGB", (10, 6), colour) for colour in colours])
    assert sheet.size == size
    per_row = (size[0] + 4) // 14
    for i, colour in enumerate(colours):
        assert sheet.getpixel((i % per_row * 14 + 5, i // per_row * 10 + 3)) == colour
