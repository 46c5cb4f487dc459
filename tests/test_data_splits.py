"""Splits by patient, the order of training, balanced sampling."""

import collections
import random
import subprocess
import sys

import made_data
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minildm.data import loader
from minildm.data.loader import StepBatches, TrainingPairs, epoch_order, training_batches
from minildm.data.prompts import prompts_for
from minildm.data.reading import Transform
from minildm.data.records import Record, open_data_set
from minildm.data.splits import SPLITS, classes_of, split_by_patient
from minildm.errors import InputError


def records(pictures_of):
    return [Record(f"{patient}-{k}", str(patient)) for patient, count in enumerate(pictures_of) for k in range(count)]


@given(st.lists(st.integers(1, 9), min_size=60, max_size=120), st.sampled_from(sorted(SPLITS)), st.integers(0, 99))
def test_no_patient_is_in_two_splits_and_the_shares_are_met(pictures_of, preset, seed):
    made = records(pictures_of)
    splits = split_by_patient(made, preset, seed)
    assert sorted(i for members in splits.values() for i in members) == list(range(len(made)))
    patients = [{made[i].patient for i in members} for members in splits.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))
    for name, share in SPLITS[preset].items():
        assert abs(len(splits[name]) - share * len(made)) <= 2 * max(pictures_of)


def test_a_split_depends_on_seed_and_patients_not_on_the_order_of_records():
    made = records([1, 2, 3] * 30)
    shuffled = random.Random(0).sample(made, len(made))
    ours, theirs = (
        {name: {rows[i].name for i in members} for name, members in split_by_patient(rows, seed=3).items()}
        for rows in (made, shuffled)
    )
    assert ours == theirs
    assert split_by_patient(made, seed=3) != split_by_patient(made, seed=4)


def test_the_papers_ratios_give_the_papers_test_sets():
    assert len(split_by_patient(records([1] * 3307), "80/16/4")["test"]) == 132
    assert len(split_by_patient(records([1] * 138), "80/20")["test"]) == 28


def test_two_hundredths_of_a_large_set_validate_and_one_picture_of_a_small_one():
    assert {name: len(part) for name, part in split_by_patient(records([1] * 40_000), "98/2").items()} == {
        "train": 39_200,
        "validation": 800,
    }
    assert len(split_by_patient(records([1] * 40), "98/2")["validation"]) == 1
    with pytest.raises(InputError, match="the validation split is empty: 20 pictures"):
        split_by_patient(records([1] * 20), "98/2")


def test_an_empty_split_is_an_error():
    with pytest.raises(InputError, match=r"the test split is empty: 10 pictures of 10 patients are too few for"):
        split_by_patient(records([1] * 10), "80/16/4")
    with pytest.raises(InputError, match=r"unknown split '90/10'; one of: 80/16/4, 80/20, 98/2, 70/10/20"):
        split_by_patient(records([1] * 10), "90/10")


def test_an_epochs_order_is_a_function_of_seed_and_epoch():
    assert torch.equal(epoch_order(50, 0, 3), epoch_order(50, 0, 3))
    assert sorted(epoch_order(50, 0, 3).tolist()) == list(range(50))
    assert len({tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}) == 9
    # the same in another process, at any time: a resumed run sees what the interrupted one would have seen
    code = "from minildm.data.loader import epoch_order; print(epoch_order(20, 7, 2).tolist())"
    assert eval(subprocess.check_output([sys.executable, "-c", code], text=True)) == epoch_order(20, 7, 2).tolist()


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 30))
def test_a_resumed_run_continues_the_very_batches(n, batch_size, first):
    whole = list(StepBatches(n, batch_size, 5, 0, 40))
    assert list(StepBatches(n, batch_size, 5, first, 40)) == whole[first:]
    seen = [i for batch in whole for i in batch]
    assert all(sorted(seen[k : k + n]) == list(range(n)) for k in range(0, len(seen) - n, n))  # whole epochs, in turn


def test_workers_change_nothing(tmp_path):
    data_set = open_data_set(f"folder:{made_data.folder(tmp_path, 7)}")
    pairs = TrainingPairs(data_set.records, prompts_for(data_set), Transform(32))
    alone, helped = (list(training_batches(pairs, 3, 1, 2, 6, workers)) for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a["images"], b["images"]) and a["prompt"] == b["prompt"]
    assert alone[0]["images"].shape == (3, 3, 32, 32) and alone[0]["index"].dtype == torch.int64
    assert alone[0]["images"].abs().max() <= 1


def test_a_file_is_decoded_once_as_long_as_there_is_room(tmp_path, monkeypatch):
    data_set = open_data_set(f"folder:{made_data.folder(tmp_path, 3)}")
    read, decoded = loader.read, []
    monkeypatch.setattr(loader, "read", lambda record, size: decoded.append(record.name) or read(record, size))
    monkeypatch.setattr(loader, "KEPT_BYTES", 2 * 32 * 32 * 3)  # room for two
    pairs = TrainingPairs(data_set.records, prompts_for(data_set), Transform(32))
    first, second = ([pairs[i]["images"] for i in range(3)] for _ in range(2))
    names = [record.name for record in data_set.records]
    assert decoded == [*names, names[2]]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_balanced_sampling_shows_every_class_equally_often():
    made = [Record(str(i), str(i), {"finding": "rare|odd" if i == 0 else "common"}) for i in range(90)]
    made.append(Record("unknown", "u"))
    classes = classes_of(made, "finding")
    assert classes[0] == ("rare", "odd") and classes[-1] == ()
    order = epoch_order(len(made), 0, 0, classes).tolist()
    assert len(order) == 91 and 90 not in order
    counts = collections.Counter(order)
    assert counts[0] in (60, 61)  # two of three classes
    assert max(count for i, count in counts.items() if i) == 1  # the third takes turns
    assert order != epoch_order(len(made), 0, 1, classes).tolist()


def test_balancing_by_an_unknown_field_lists_the_known_ones():
    with pytest.raises(InputError, match=r"no record has a field 'findng' to balance by; known: finding"):
        classes_of([Record("a", "a", {"finding": "x"})], "findng")
