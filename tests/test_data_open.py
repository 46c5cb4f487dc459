"""Data settings, the selection of records, and the errors for data sets that cannot be used."""

import re

import made_data
import pytest

from minildm.data.open import DataSettings, open_data_set
from minildm.data.reading import Transform
from minildm.data.records import BUILT_IN
from minildm.data.sets import DATA_SETS
from minildm.errors import InputError
from minildm.settings import Parser, add_flags, from_flags


def names(data_set):
    return [record.name for record in data_set.records]


# --- settings ---------------------------------------------------------------------------------------------------------
def parse(*flags):
    parser = Parser()
    add_flags(parser, DataSettings, "data")
    return from_flags(DataSettings, parser.parse_args(flags))


def test_every_setting_is_a_flag_and_no_flag_gives_the_defaults():
    assert parse() == DataSettings()
    words = "--views all --drop-pediatric --min-age 18 --limit 5 --balance finding --exclude flagged.txt --skip-bad"
    words += " --prompt-template plain --split 80/20 --size 224 --fit pad --greys percentiles"
    assert parse(*words.split()) == DataSettings(
        "all", True, 18, 5, "finding", "flagged.txt", True, "plain", "80/20", 224, "pad", "percentiles"
    )


def test_the_size_is_the_callers_default_unless_it_is_given():
    assert DataSettings(fit="pad").transform(64) == Transform(64, "pad", "declared")
    assert DataSettings(size=224, greys="percentiles").transform(64) == Transform(224, "crop", "percentiles")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"views": "lateral"}, r"--views must be one of frontal, all, got 'lateral'"),
        ({"split": "90/10"}, r"--split must be one of 80/16/4, 80/20, 98/2, 70/10/20, got '90/10'"),
        ({"limit": 0}, r"--limit must be a number at least 1, got 0"),
        ({"min_age": -1}, r"--min-age must be a number at least 0, got -1"),
        ({"size": 100}, r"size must be a multiple of 8 pixels, got 100"),
        ({"fit": "stretch"}, r"--fit must be one of crop, pad"),
    ],
)
def test_a_wrong_setting_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        DataSettings(**wrong)


# --- the choice of a data set -----------------------------------------------------------------------------------------
PUBLISHED = [name for name in DATA_SETS if name not in BUILT_IN]


def test_an_unknown_data_set_lists_the_known_ones():
    with pytest.raises(InputError, match=r"unknown data set 'padchst'; .* phantom, procedural, textures, folder"):
        open_data_set("padchst:/data")
    with pytest.raises(InputError, match=r"needs a path: padchest:/where/it/is"):
        open_data_set("padchest")


def test_a_bare_path_and_a_path_of_a_rendered_data_set_are_answered_with_the_right_form(tmp_path):
    with pytest.raises(InputError, match=rf"did you mean folder:{tmp_path}\?"):
        open_data_set(str(tmp_path))
    with pytest.raises(InputError, match=r"did you mean folder:no/such\?"):
        open_data_set("no/such")
    for spec in ("phantom:foo", f"procedural:{tmp_path}", "phantom:0", "phantom:1000001", "phantom:-1"):
        with pytest.raises(InputError, match=rf"takes no path, got '{spec}'"):
            open_data_set(spec)


def test_a_rendered_data_set_may_have_another_size_and_begins_as_the_usual_one():
    usual, larger = (open_data_set(spec, DataSettings(views="all")).records for spec in ("phantom", "phantom:2100"))
    assert len(larger) == 2100
    assert [record.recipe for record in larger[: len(usual)]] == [record.recipe for record in usual]
    assert len(open_data_set("phantom:7", DataSettings(views="all")).records) == 7


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_path_that_is_not_the_data_set_says_what_was_expected_and_what_is_there(tmp_path, name):
    (tmp_path / "notes.doc").touch()
    with pytest.raises(InputError, match=r"does not hold .*(csv|txt).*; it holds notes.doc"):
        open_data_set(f"{name}:{tmp_path}")
    with pytest.raises(InputError, match=r"is not a folder; .* expects the folder that holds"):
        open_data_set(f"{name}:{tmp_path / 'absent'}")


def test_every_data_set_has_what_the_docstring_of_sets_asks_for():
    for name, source in DATA_SETS.items():
        assert callable(source.records) and (hasattr(source, "PROMPT") or callable(source.default_prompt)), name
        assert hasattr(source, "LOOKED_FOR") == (name in PUBLISHED), name


# --- errors in tables -------------------------------------------------------------------------------------------------
def test_a_missing_column_is_named(tmp_path):
    table = made_data.write_csv(tmp_path / "PADCHEST_x.csv", ["ImageID", "PatientID"], [])
    with pytest.raises(InputError, match=r"PADCHEST_x.csv: no column PatientBirth, .*; its columns: ImageID, Pa"):
        open_data_set(f"padchest:{table.parent}")
    made_data.write_csv(tmp_path / "metadata.csv", ["scan", "text"], [["a.png", "b"]])
    with pytest.raises(InputError, match=r"no column file_name, file, image or path that names the image; .* scan"):
        open_data_set(f"folder:{tmp_path}")


@pytest.mark.parametrize("row", [b"b.png", b"b.png,x,y", b'b.png,"x', b"b.png,\xff\xfe"])
def test_an_unreadable_row_is_named(tmp_path, row):
    (tmp_path / "metadata.csv").write_bytes(b'file_name,text\na.png,"two\nlines"\n' + row + b"\n")
    with pytest.raises(InputError, match=r"metadata.csv, row 4: "):
        open_data_set(f"folder:{tmp_path}")


def test_the_row_of_a_value_that_cannot_be_parsed_is_named(tmp_path):
    table = next(made_data.padchest(tmp_path).glob("*.csv"))
    table.write_text(table.read_text().replace("['alveolar pattern', 'exclude']", "['alveolar"))
    with pytest.raises(InputError, match=r"row 4: cannot be parsed"):
        open_data_set(f"padchest:{tmp_path}")


def test_an_image_listed_twice_is_an_error(tmp_path):
    made_data.write_csv(tmp_path / "metadata.csv", ["file_name"], [["a.png"], ["a.png"]])
    with pytest.raises(InputError, match=r"row 3: a.png is listed twice"):
        open_data_set(f"folder:{tmp_path}")


# --- the selection of records -----------------------------------------------------------------------------------------
def test_missing_images_are_counted_and_the_first_five_named(tmp_path):
    made_data.folder(tmp_path, 12)
    for i in range(2, 9):
        (tmp_path / "images" / f"{i:03}.png").unlink()
    with pytest.raises(InputError, match=r"7 of 12 listed images are missing, such as .*/002.png, .*006.png; .*--skip"):
        open_data_set(f"folder:{tmp_path}")
    data_set = open_data_set(f"folder:{tmp_path}", DataSettings(skip_bad=True))
    assert len(data_set) == 5 and data_set.notes[0].startswith("7 of 12 left out: listed but missing, such as images/")


def test_a_data_set_without_usable_images_is_an_error_that_says_why(tmp_path):
    made_data.padchest(tmp_path)
    with pytest.raises(InputError, match=r"holds no usable image; 1 of 5 left out.*younger than 200"):
        open_data_set(f"padchest:{tmp_path}", DataSettings(min_age=200))


def test_limit_takes_a_seeded_sample_to_which_a_larger_limit_only_adds(tmp_path):
    spec = f"folder:{made_data.folder(tmp_path, 20)}"
    sample = names(open_data_set(spec, DataSettings(limit=5), seed=1))
    assert len(sample) == 5 and sample == names(open_data_set(spec, DataSettings(limit=5), seed=1))
    assert sample != names(open_data_set(spec, DataSettings(limit=5), seed=2))
    assert set(sample) < set(names(open_data_set(spec, DataSettings(limit=6), seed=1)))


def test_excluded_images_are_left_out(tmp_path):
    spec, listed = f"folder:{made_data.folder(tmp_path / 'data', 4)}", tmp_path / "flagged.txt"
    listed.write_text("images/002.png\tlow contrast\n")
    data_set = open_data_set(spec, DataSettings(exclude=str(listed)))
    assert names(data_set) == ["images/000.png", "images/001.png", "images/003.png"]
    listed.write_text("\ufeffimages/002.png \r\n\r\nimages/003.png\n", encoding="utf-8")
    assert names(open_data_set(spec, DataSettings(exclude=str(listed)))) == ["images/000.png", "images/001.png"]
    table = tmp_path / "views" / "metadata.csv"
    made_data.folder(tmp_path / "views", 2)
    table.write_text("file_name,text,view\nimages/000.png,a,PA\nimages/001.png,b,L\n")
    listed.write_text("images/001.png\n")
    assert names(open_data_set(f"folder:{tmp_path / 'views'}", DataSettings(exclude=str(listed)))) == ["images/000.png"]
    listed.write_text("elsewhere.png\n")
    with pytest.raises(InputError, match=r"none of the 1 names in .* is in the data set"):
        open_data_set(spec, DataSettings(exclude=str(listed)))


@pytest.mark.parametrize(
    "path, error, says",
    [
        ("nofile.txt", FileNotFoundError, "--exclude .*nofile.txt: no such file"),
        (".", IsADirectoryError, "--exclude .* is a folder, expected a file"),
        ("binary.txt", InputError, "--exclude .*binary.txt is not UTF-8"),
    ],
)
def test_a_list_of_excluded_images_that_cannot_be_read_is_named_with_its_flag(tmp_path, path, error, says):
    spec = f"folder:{made_data.folder(tmp_path / 'data', 4)}"
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(error, match=says):
        open_data_set(spec, DataSettings(exclude=str(tmp_path / path)))


def with_column(root, column, texts):
    """A folder with one image for each of the texts, which stand in the column."""
    for i in range(len(texts)):
        made_data.save(root / f"p{i:02}.png", seed=i)
    made_data.write_csv(
        root / "metadata.csv", ["file_name", "text", column], [[f"p{i:02}.png", "x", t] for i, t in enumerate(texts)]
    )
    return f"folder:{root}"


def test_only_known_frontal_views_are_frontal(tmp_path):
    """Real words for views; of those that are not frontal, 11 of 12 were kept while only lateral words were known."""
    others = "Lateral|LATERAL LEFT|Left Lateral|LLAT|LAT|LA|Lateral view|XTABLE LATERAL|RLD|RAO|Axial|Coronal"
    texts = [*others.split("|"), "PA", "AP Supine", "P.A.", "", "?", "Oblique", "AP_horizontal"]
    data_set = open_data_set(with_column(tmp_path, "view", texts))
    assert [record.fields["view"] for record in data_set.records] == ["PA", "AP Supine", "PA", "AP horizontal"]
    assert data_set.notes[1:] == (
        "12 of 19 left out: lateral and other views that are not frontal (--views all keeps them)",
        "3 of 7 left out: of unknown view: 2 blank, 'LA' (1) (--views all keeps them)",
    )
    whole = open_data_set(f"folder:{tmp_path}", DataSettings(views="all"))
    assert len(whole) == 19 and whole.records[5].unread == {"view": "LA"} and "view" not in whole.records[5].fields
    assert whole.notes[-1] == "view of 1 of 19 not understood, so it counts as missing: 'LA' (1)"


def test_where_no_view_is_known_the_user_is_asked_and_without_views_all_images_are_kept(tmp_path):
    with pytest.raises(InputError, match=r"2 of 2 images do not say whether they are frontal; .*--views all"):
        open_data_set(with_column(tmp_path / "a", "view", ["FLAIR", "T2"]))
    assert len(open_data_set(with_column(tmp_path / "b", "view", ["NA", ""]))) == 2
    assert len(open_data_set(with_column(tmp_path / "c", "colour", ["red", ""]))) == 2


@pytest.mark.parametrize(
    "column, texts, known, note",
    [
        (
            "age",
            "414|-1|1930|000Y|3M|16month|47",
            [None] * 4 + ["0", "1", "47"],
            "age of 4 of 7 .*'414' .1., '-1' .1.,",
        ),
        ("sex", "missing|Mujer|Multiple|O|M|female", [None] * 4 + ["male", "female"], "sex of 3 of 6 .*'Mujer' .1."),
    ],
)
def test_values_that_are_not_understood_are_missing_counted_and_told(tmp_path, column, texts, known, note):
    data_set = open_data_set(with_column(tmp_path, column, texts.split("|")))
    assert [record.fields.get(column) for record in data_set.records] == known
    assert re.match(note, data_set.notes[-1])


@pytest.mark.parametrize("kind", ["blank cell", "NaN", "blank .txt", "no .txt"])
def test_an_image_without_a_prompt_is_left_out_counted_and_named(tmp_path, kind):
    for i in range(12):
        path = made_data.save(tmp_path / f"p{i:02}.png", seed=i)
        if kind.endswith(".txt") and not (kind == "no .txt" and i == 5):
            path.with_suffix(".txt").write_text("" if i == 5 else f"chest x-ray {i}")
    if not kind.endswith(".txt"):
        blank = "" if kind == "blank cell" else "NaN"
        rows = [[f"p{i:02}.png", blank if i == 5 else f"chest x-ray {i}"] for i in range(12)]
        made_data.write_csv(tmp_path / "metadata.csv", ["file_name", "text"], rows)
    data_set = open_data_set(f"folder:{tmp_path}")
    assert len(data_set) == 11 and data_set.prompt == "{text}" and "p05.png" not in names(data_set)
    assert data_set.notes[-1] == "1 of 12 left out: without a prompt from '{text}', such as p05.png"
    assert len(open_data_set(f"folder:{tmp_path}", captioned=False)) == 12
    assert len(open_data_set(f"folder:{tmp_path}", DataSettings(prompt_template="chest x-ray"))) == 12


def test_a_missing_image_without_a_prompt_stops_nothing(tmp_path):
    made_data.folder(tmp_path, 4)
    table = tmp_path / "metadata.csv"
    table.write_text(table.read_text() + "gone.png,p9,40,M,PA,Edema,\n")
    assert len(open_data_set(f"folder:{tmp_path}")) == 4


@pytest.mark.parametrize("column", ["View", "VIEW", "ViewPosition", "View Position", "view_position", "projection"])
def test_the_view_is_read_under_its_usual_names(tmp_path, column):
    data_set = open_data_set(with_column(tmp_path, column, ["PA", "Lateral", "AP"]))
    name = "projection" if column == "projection" else "view"
    assert [record.fields[name] for record in data_set.records] == ["PA", "AP"]


def test_capitals_in_the_names_of_columns_make_no_difference(tmp_path):
    made_data.folder(tmp_path, 4)
    expected = open_data_set(f"folder:{tmp_path}")
    header, rest = (tmp_path / "metadata.csv").read_text().split("\n", 1)
    (tmp_path / "metadata.csv").write_text(header.upper() + "\n" + rest)
    assert open_data_set(f"folder:{tmp_path}") == expected
