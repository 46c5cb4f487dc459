"""Data settings, the selection of records, and the errors for data sets that cannot be used."""

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
    with pytest.raises(InputError, match=r"unknown data set 'padchst'; .* phantom, procedural, folder, iu-xray"):
        open_data_set("padchst:/data")
    with pytest.raises(InputError, match=r"needs a path: padchest:/where/it/is"):
        open_data_set("padchest")


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
    listed.write_text("elsewhere.png\n")
    with pytest.raises(InputError, match=r"none of the 1 names in .* is in the data set"):
        open_data_set(spec, DataSettings(exclude=str(listed)))
