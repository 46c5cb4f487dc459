"""Hundreds of kills and races, by hand and before a release: python -m pytest -m stress."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_data import folder
from made_runs import small_model
from peers import write_folder
from test_hardening import assert_that_no_image_is_lost, assert_that_no_row_is_lost, assert_that_one_begins_the_run
from test_training_runs import flags, kill_and_resume, weights

import train
from minildm.adapters import METHODS

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("MINILDM_KILLS", 100))  # in all, over the tests below
RACES = int(os.environ.get("MINILDM_RACES", 200))  # of each kind
pytestmark = pytest.mark.stress


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("stress")
    write_folder(small_model(), root / "base")
    folder(root / "data", 20)
    return root


def killed_at_random(arguments, kills, seconds, rng):
    """Run a command to its end after ``kills`` attempts that are killed. ``seconds``: of a whole one."""
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=-3, stderr=-3)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.kill()
        process.wait()
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def files(folder, *patterns):
    return {path.relative_to(folder): path.read_bytes() for pattern in patterns for path in folder.rglob(pattern)}


def nothing_left_behind(folder):
    """Leftovers of a killed process go with the next write into their folder."""
    return not list(folder.rglob(".minildm-*"))


@pytest.mark.parametrize("adapter", METHODS)
def test_kills_over_training_change_nothing(adapter, place):
    values = flags(place, adapter=adapter, save_interval=2)
    if adapter != "selora":
        at = values.index("--expand-interval")
        del values[at : at + 2]
    assert train.main([*values, "--out", str(place / adapter)]) == 0
    kills = max(KILLS // 8, 1)
    kill_and_resume(values, place / f"killed-{adapter}", kills=kills, seed=1)
    ours, theirs = weights(place / adapter), weights(place / f"killed-{adapter}")
    assert ours["step"] == theirs["step"] and list(ours["trained"]) == list(theirs["trained"])
    assert all(torch.equal(ours["trained"][name], theirs["trained"][name]) for name in ours["trained"])
    assert nothing_left_behind(place / f"killed-{adapter}")


def test_kills_over_sampling_change_nothing(place, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"chest x-ray {i}\n" for i in range(40)))
    words = f"sample.py --prompts {prompts} --base {place / 'base'} --device cpu --steps 2 --guidance 1 --batch-size 1"
    arguments = [*words.split(), "--out"]
    begun = time.perf_counter()
    killed_at_random([*arguments, str(tmp_path / "whole")], 0, 0, None)
    seconds = time.perf_counter() - begun
    killed_at_random([*arguments, str(tmp_path / "killed")], max(KILLS // 5, 1), seconds, random.Random(0))
    whole, killed = (files(tmp_path / name, "[0-9]*-seed*.png") for name in ("whole", "killed"))
    images = {name for name in whole if name.parent == Path(".")}  # the sheet is named by the first image of a call
    assert len(images) == 40 and all(whole[name] == killed[name] for name in images)
    assert nothing_left_behind(tmp_path / "killed")


def test_kills_over_pretraining_change_nothing(place, tmp_path):
    words = f"-m minildm pretrain --data folder:{place / 'data'} --size 32 --vae-steps 4 --text-steps 4 --steps 4"
    words += " --decoder-steps 4 --batch-size 2 --vae-batch-size 2 --text-batch-size 2 --decoder-batch-size 2"
    words += f" --warmup 1 --save-interval 1 --device cpu --cache {tmp_path / 'cache'} --split 70/10/20"
    arguments = words.split()
    begun = time.perf_counter()
    killed_at_random([*arguments, "--out", str(tmp_path / "whole")], 0, 0, None)
    seconds, rng, out = time.perf_counter() - begun, random.Random(0), tmp_path / "killed"
    for _ in range(max(KILLS // 5, 1)):
        begun = (out / "autoencoder" / "config.json").exists()
        given = ["-m", "minildm", "pretrain", "--resume", str(out)] if begun else [*arguments, "--out", str(out)]
        process = subprocess.Popen([sys.executable, *given], cwd=ROOT, stdout=-3, stderr=-3)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.kill()
        process.wait()
    killed_at_random(["-m", "minildm", "pretrain", "--resume", str(out)], 0, 0, None)
    assert files(tmp_path / "whole" / "model", "*.safetensors") == files(out / "model", "*.safetensors")
    assert nothing_left_behind(out)


def test_races_for_the_names_of_images(tmp_path):
    for i in range(RACES):
        assert_that_no_image_is_lost(tmp_path / str(i), 3)


def test_races_for_a_run(tmp_path):
    for i in range(RACES):
        assert_that_one_begins_the_run(tmp_path / str(i))
        shutil.rmtree(tmp_path / str(i))


def test_races_for_a_cache(tmp_path):
    for i in range(RACES):
        assert_that_no_row_is_lost(tmp_path / str(i), 3)
