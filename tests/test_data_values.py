"""Sex, age and view: only known words and possible values count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minildm.data.values import is_frontal, sex, view, years, yes_or_no


@pytest.mark.parametrize(
    "texts, spelling, frontal",
    [
        (
            ["PA", "pa", "P.A.", "p-a", "Posteroanterior", "postero-anterior", "POSTERIOR ANTERIOR", "Chest PA"],
            "PA",
            True,
        ),
        (["AP", "A/P", "ANTEROPOSTERIOR", "antéro-postérieure", "Anterior-posterior view"], "AP", True),
        (["L", "LATERAL", "LL", "RL", "LLD", "Left Lateral", "LATERAL LEFT", "LAT.", "LLAT", "seitlich"], "L", False),
        (["AP Supine"], "AP Supine", True),
        (["AP_horizontal"], "AP horizontal", True),
        (["PA erect"], "PA erect", True),
        (["XTABLE LATERAL"], "XTABLE LATERAL", False),
        (["AP AXIAL"], "AP AXIAL", False),
        (["PA LLD"], "PA LLD", False),
        (["COSTAL"], "COSTAL", False),
        (["LA", "UNK", "EXCLUDE", "non-frontal", "not PA", "portable", "erect", "正位", "x", "", None], None, None),
    ],
)
def test_views_are_spelled_one_way_and_frontal_only_if_all_words_are_known(texts, spelling, frontal):
    for text in texts:
        assert (view(text), is_frontal(text)) == (spelling, frontal), text


@pytest.mark.parametrize(
    "text", ["RLD", "RAO", "LPO", "Oblique", "oblicua", "Decubitus", "Axial", "Coronal", "Sagittal"]
)
def test_other_views_are_known_and_not_frontal(text):
    assert view(text) == text and is_frontal(text) is False


def test_sexes_are_whole_words():
    assert [sex(text) for text in ("M", " male ", "Man", "F", "FEMALE", "woman")] == ["male"] * 3 + ["female"] * 3
    for text in ("missing", "Mujer", "Multiple", "Unknown", "O", "m/f", "H", "V", "", None, "fluid", "-"):
        assert sex(text) is None, text


@pytest.mark.parametrize(
    "text, age",
    [
        ("47", "47"),
        ("047Y", "47"),
        ("47.0", "47"),
        ("45yrs", "45"),
        ("42 years old", "42"),
        ("44 Jahre", "44"),
        ("0", "0"),
        ("013M", "1"),
        ("3M", "0"),
        ("16month", "1"),
        ("64days", "0"),
        ("006W", "0"),
        ("0.5 years", "0"),
        ("120", "120"),
    ],
)
def test_ages_are_whole_years(text, age):
    assert years(text) == age


@pytest.mark.parametrize(
    "text",
    ["414", "-1", "1930", "000Y", "0M", "121", "inf", "nan", "1e2", ">89", "40-49", "4 7", "adult", "9" * 5000, ""],
)
def test_impossible_ages_are_unknown(text):
    assert years(text) is None


def test_flags_are_yes_or_no():
    assert [yes_or_no(text) for text in ("PED", "Yes", "1", "TRUE")] == ["yes"] * 4
    assert [yes_or_no(text) for text in ("No", "0", "false")] == ["no"] * 3
    assert [yes_or_no(text) for text in ("child", "2", "", None)] == [None] * 4


@given(st.text())
def test_any_text_is_a_known_value_or_none(text):
    assert sex(text) in ("male", "female", None)
    assert years(text) is None or 0 <= int(years(text)) <= 120
    assert (view(text) is None) == (is_frontal(text) is None)
