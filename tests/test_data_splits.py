"""Splits by patient, and the classes that balanced sampling uses."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minildm.data.records import Record
from minildm.data.splits import SPLITS, classes_of, split_by_patient
from minildm.errors import InputError


def records(image_counts):
    """Records of patients with these numbers of images."""
    return [Record(f"{patient}-{k}", str(patient)) for patient, count in enumerate(image_counts) for k in range(count)]


@given(st.lists(st.integers(1, 9), min_size=60, max_size=120), st.sampled_from(sorted(SPLITS)), st.integers(0, 99))
def test_no_patient_is_in_two_splits_and_the_shares_are_met(image_counts, preset, seed):
    made = records(image_counts)
    splits = split_by_patient(made, preset, seed)
    assert sorted(i for members in splits.values() for i in members) == list(range(len(made)))
    patients = [{made[i].patient for i in members} for members in splits.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))
    for name, share in SPLITS[preset].items():
        assert abs(len(splits[name]) - share * len(made)) <= 2 * max(image_counts)


def test_a_split_depends_on_seed_and_patients_not_on_the_order_of_records():
    made = records([1, 2, 3] * 30)
    shuffled = random.Random(0).sample(made, len(made))
    ours, theirs = (
        {name: {rows[i].name for i in members} for name, members in split_by_patient(rows, seed=3).items()}
        for rows in (made, shuffled)
    )
    assert ours == theirs
    assert split_by_patient(made, seed=3) != split_by_patient(made, seed=4)


def test_the_papers_shares_give_the_papers_test_sets():
    assert len(split_by_patient(records([1] * 3307), "80/16/4")["test"]) == 132
    assert len(split_by_patient(records([1] * 138), "80/20")["test"]) == 28


def test_98_2_validates_on_two_percent_and_on_at_least_one_image():
    assert {name: len(part) for name, part in split_by_patient(records([1] * 40_000), "98/2").items()} == {
        "train": 39_200,
        "validation": 800,
    }
    assert len(split_by_patient(records([1] * 40), "98/2")["validation"]) == 1
    with pytest.raises(InputError, match="the validation split is empty: 20 images"):
        split_by_patient(records([1] * 20), "98/2")


def test_an_empty_split_is_an_error():
    with pytest.raises(InputError, match=r"the test split is empty: 10 images of 10 patients are too few for"):
        split_by_patient(records([1] * 10), "80/16/4")
    with pytest.raises(InputError, match=r"unknown split '90/10'; one of: 80/16/4, 80/20, 98/2, 70/10/20"):
        split_by_patient(records([1] * 10), "90/10")


def test_a_field_with_several_values_gives_several_classes():
    fields = ["rare|odd", "COVID-19, ARDS", "rare, rare|", None]
    made = [Record(str(i), str(i), {} if text is None else {"finding": text}) for i, text in enumerate(fields)]
    assert classes_of(made, "finding") == [("rare", "odd"), ("COVID-19", "ARDS"), ("rare",), ()]


def test_balancing_by_an_unknown_field_lists_the_known_ones():
    with pytest.raises(InputError, match=r"no record has a field 'findng' to balance by; known: finding"):
        classes_of([Record("a", "a", {"finding": "x"})], "findng")
