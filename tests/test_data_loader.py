"""Training batches: the order of the samples, their ids, resuming, workers, balanced sampling."""

import collections
import json
import subprocess
import sys

import made_data
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minildm.data import loader
from minildm.data.loader import TrainingPairs, epoch_order, training_batches
from minildm.data.open import open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.reading import Transform
from minildm.data.records import Record
from minildm.data.splits import classes_of


@pytest.fixture
def pairs(tmp_path):
    """Seven images of 32 x 32 pixels with prompts."""
    data_set = open_data_set(f"folder:{made_data.folder(tmp_path, 7)}")
    return TrainingPairs(data_set.records, prompts_for(data_set), Transform(32))


def shown(n, batch_size, seed, first_step, last_step, workers=0):
    """[(record indices, sample ids)] of each batch of a data set with n items."""
    dataset = [{"index": i} for i in range(n)]
    batches = training_batches(dataset, batch_size, seed, first_step, last_step, workers)
    return [(batch["index"].tolist(), batch["id"].tolist()) for batch in batches]


# --- order ------------------------------------------------------------------------------------------------------------
def test_the_order_of_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    assert torch.equal(epoch_order(50, 0, 3), epoch_order(50, 0, 3))
    assert sorted(epoch_order(50, 0, 3).tolist()) == list(range(50))
    assert len({tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_of_an_epoch_is_the_same_in_another_process():
    code = "from minildm.data.loader import epoch_order; print(epoch_order(20, 7, 2).tolist())"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert json.loads(printed) == epoch_order(20, 7, 2).tolist()


def test_the_order_of_an_epoch_never_changes_between_versions():
    assert epoch_order(8, 0, 0).tolist() == [4, 2, 6, 0, 3, 5, 1, 7]
    assert epoch_order(8, 7, 2).tolist() == [1, 5, 0, 7, 3, 6, 2, 4]
    assert epoch_order(8, 0, 0, [("a",)] * 6 + [("b",)] * 2).tolist() == [4, 7, 7, 0, 2, 6, 1, 6]


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 30))
def test_a_resumed_run_continues_with_exactly_the_remaining_batches(n, batch_size, first_step):
    whole = shown(n, batch_size, 5, 0, 40)
    assert shown(n, batch_size, 5, first_step, 40) == whole[first_step:]
    indices = [i for batch, _ in whole for i in batch]
    assert len(indices) == 40 * batch_size  # every batch is full
    for epoch, start in enumerate(range(0, len(indices) - n, n)):
        assert indices[start : start + n] == epoch_order(n, 5, epoch).tolist()


# --- samples ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first_step", [0, 5])
def test_ids_are_consecutive_over_steps_after_a_resume_and_with_workers(first_step, workers):
    batches = shown(7, 3, 1, first_step, 9, workers)
    assert [ids for _, ids in batches] == [[3 * step, 3 * step + 1, 3 * step + 2] for step in range(first_step, 9)]


def test_a_batch_holds_ids_and_unit_weights_beside_the_images(pairs):
    batch = next(iter(training_batches(pairs, 3, 1, 2, 6)))
    assert batch.keys() == {"index", "prompt", "images", "id", "weight"}
    assert batch["images"].shape == (3, 3, 32, 32) and batch["images"].abs().max() <= 1
    assert batch["index"].dtype == batch["id"].dtype == torch.int64 and batch["id"].tolist() == [6, 7, 8]
    assert batch["weight"].dtype == torch.float32 and batch["weight"].tolist() == [1, 1, 1]
    assert batch["prompt"] == [pairs.prompts[i] for i in batch["index"]]


def test_workers_change_nothing(pairs):
    alone, helped = (list(training_batches(pairs, 3, 1, 2, 6, workers)) for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert a["prompt"] == b["prompt"] and a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in ("index", "images", "id", "weight"))


def test_a_file_is_decoded_once_while_memory_allows(pairs, monkeypatch):
    read, decoded = loader.read, []
    monkeypatch.setattr(loader, "read", lambda record, size: decoded.append(record.name) or read(record, size))
    monkeypatch.setattr(loader, "PIXEL_CACHE_BYTES", 2 * 32 * 32 * 3)  # room for two images
    pairs = TrainingPairs(pairs.records[:3], pairs.prompts[:3], pairs.transform)
    first, second = ([pairs[i]["images"] for i in range(3)] for _ in range(2))
    names = [record.name for record in pairs.records]
    assert decoded == [*names, names[2]]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# --- balanced sampling ------------------------------------------------------------------------------------------------
def test_balanced_sampling_shows_every_class_equally_often():
    made = [Record(str(i), str(i), {"finding": "common"}) for i in range(1, 90)]
    made = [Record("0", "0", {"finding": "rare|odd"}), *made, Record("unknown", "u")]
    classes = classes_of(made, "finding")
    assert classes[0] == ("rare", "odd") and classes[-1] == ()
    order = epoch_order(len(made), 0, 0, classes).tolist()
    assert len(order) == 91 and 90 not in order
    counts = collections.Counter(order)
    assert counts[0] in (60, 61)  # two of three classes
    assert max(count for i, count in counts.items() if i) == 1  # the members of the third take turns
    assert order != epoch_order(len(made), 0, 1, classes).tolist()
