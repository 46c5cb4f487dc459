"""PNG files with their text, and contact sheets."""

import time

import pytest
from PIL import Image

from minildm.errors import InputError
from minildm.images import contact_sheet, parameters_text, read_parameters, save_png, sheet_by_prompt, split_parameters


def test_parameters_are_prompt_negative_prompt_and_pairs():
    assert parameters_text("a, b", "c", Steps=20, Model="x") == "a, b\nNegative prompt: c\nSteps: 20, Model: x"
    assert parameters_text("a", Steps=20, Size="8x8", Seed=0) == "a\nSteps: 20, Size: 8x8, Seed: 0"


@pytest.mark.parametrize(
    "value, written",
    [
        ("a, b", r'"a\u002c b"'),
        ("a: b", r'"a\u003a b"'),
        ("a\nb", r'"a\nb"'),
        ("a\u2028b\x85c", r'"a\u2028b\u0085c"'),
        ("é 胸部", "é 胸部"),
        ('say "x", y', r'"say \"x\"\u002c y"'),
        ('say "x" now', 'say "x" now'),
        ('"x"', r'"\"x\""'),
        ("back\\slash", "back\\slash"),
        (" edges ", '" edges "'),
        ("v1.5.final", "v1.5.final"),
        ("\udcff", "?"),  # a file's name that is not UTF-8
        (7.5, "7.5"),
    ],
)
def test_values_that_would_break_the_line_are_quoted_as_json(value, written):
    assert parameters_text("p", Model=value).splitlines()[1] == f"Model: {written}"


ODD_NAMES = [
    "v1.5, final: (a)",
    'say "x"',
    '"',
    "back\\slash",
    "a\nb",
    "  x ",
    "Seed: 9, Steps: 5",
    "胸部.X線 🫁",
    "a\u2028b",
    "",
    "{x}",
]


@pytest.mark.parametrize("prompt", ["a, b", "two\nlines", "Steps: 5, Sampler: Euler a, Seed: 3", "", "a: b"])
@pytest.mark.parametrize("negative", ["", 'blurry: "x"', "a\nSteps: 3"])
def test_the_parameters_text_splits_into_what_it_was_made_of(prompt, negative):
    pairs = {"Steps": "20", **{f"Model {i}": name for i, name in enumerate(ODD_NAMES)}, "Seed": "3"}
    assert split_parameters(parameters_text(prompt, negative, **pairs)) == (prompt, negative, pairs)


@pytest.mark.parametrize(
    "line", ["a" * 10**6, "a, " * 10**6, 'a: "' * 10**6, 'a: "\\", ' * 10**6, ": " * 10**6, '"' * 10**6]
)
def test_splitting_takes_no_longer_than_reading(line):
    start = time.perf_counter()
    split_parameters(line)
    assert time.perf_counter() - start < 5


def test_viewers_that_split_at_every_comma_and_colon_still_find_the_settings():
    """The whole line with the naive rules of popular viewers: quotes mean nothing to them."""
    for name in ODD_NAMES:
        line = parameters_text("a", Steps=20, Seed=3, Model=name, Adapter=name, Size="8x8").split("\n")[1]
        items = [item.partition(":") for item in line.split(",")]
        assert [key.strip() for key, _, _ in items] == ["Steps", "Seed", "Model", "Adapter", "Size"]
        assert {key.strip(): value.strip() for key, _, value in items}["Seed"] == "3"
        assert line.count(":") == 5


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


# --- sheets of several prompts ---------------------------------------------------------------------------------------
def coloured(n, size=(64, 32)):
    return [Image.new("RGB", size, (10 * i + 5, 200, 255 - 10 * i)) for i in range(n)]


def test_each_prompt_of_several_images_has_its_own_row_under_its_text():
    images, prompts = coloured(24), [prompt for prompt in "abcd" for _ in range(6)]
    sheet = sheet_by_prompt(prompts, images)
    assert sheet.width == 6 * 68 - 4
    head = (sheet.height + 4) // 4 - 36
    for i, image in enumerate(images):
        left, top = i % 6 * 68, i // 6 * (head + 36) + head
        assert sheet.crop((left, top, left + 64, top + 32)).getcolors() == [(64 * 32, image.getpixel((0, 0)))]
    for row in range(4):
        text = sheet.crop((0, row * (head + 36), sheet.width, row * (head + 36) + head))
        assert min(text.convert("L").getextrema()) < 100  # something is written there


@pytest.mark.parametrize("n_prompts, columns", [(2, 2), (4, 2), (5, 3), (9, 3)])
def test_prompts_with_one_image_each_form_a_grid_with_a_text_above_each(n_prompts, columns):
    images = coloured(n_prompts)
    sheet = sheet_by_prompt([f"prompt {i}" for i in range(n_prompts)], images)
    assert sheet.width == columns * 68 - 4
    rows = -(-n_prompts // columns)
    head = (sheet.height + 4) // rows - 36
    for i, image in enumerate(images):
        left, top = i % columns * 68, i // columns * (head + 36) + head
        assert sheet.getpixel((left + 1, top + 1)) == image.getpixel((0, 0))


def test_a_sheet_of_one_prompt_is_a_plain_grid():
    images = coloured(5)
    assert sheet_by_prompt(["a"] * 5, images).tobytes() == contact_sheet(images).tobytes()


def test_rows_of_a_sheet_differ_in_length_and_are_at_most_ten_images_long():
    sheet = sheet_by_prompt(["a"] * 23 + ["b"] * 2, coloured(25))
    assert sheet.width == 10 * 68 - 4
    assert sheet.height > 4 * 36


@pytest.mark.parametrize(
    "prompt",
    ["w" * 300, "word " * 100, "", " ", "\n", "\u043f\u043d\u0435\u0432\u043c\u043e\u043d\u0438\u044f \U0001fac1"],
)
def test_any_prompt_can_be_a_label_and_stays_within_its_image(prompt):
    sheet = sheet_by_prompt([prompt, "b"], coloured(2))
    assert sheet.width == 2 * 68 - 4
    gap = sheet.crop((64, 0, 68, sheet.height))
    assert gap.getcolors() == [(4 * sheet.height, (255, 255, 255))]
