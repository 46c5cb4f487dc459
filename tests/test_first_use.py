"""What somebody meets who tries the commands for the first time, mistakes included."""

import os

import numpy as np
import pytest
from PIL import Image

import sample
import train
from minildm import sampling
from minildm.__main__ import main
from minildm.config import ModelConfig, SamplingSettings
from minildm.errors import InputError, exit_cleanly
from minildm.files import writable_folder, written_beside
from minildm.metrics.mmd import kid, suits_kid
from minildm.training.run import Run, read_record

GB = 10**9


def fails(command, *arguments, capsys):
    """The one line that a command prints before it exits with code 2."""
    with pytest.raises(SystemExit) as end:
        exit_cleanly(command, list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        (sample.main, ["chest", "x-ray"], 'Give one, in quotes: "chest x-ray"'),
        (sample.main, ["chest", "x-ray,", "age", "47", "-n", "4"], 'in quotes: "chest x-ray, age 47"'),
        (sample.main, ["chest", "x-ray", "--stepz", "4"], "unrecognized arguments: x-ray --stepz 4"),
        (sample.main, ["--prompts", "folder"], "--prompts folder is a folder, expected a file"),
        (sample.main, ["--prompts", "no.txt"], "--prompts no.txt: no such file"),
        (sample.main, ["--prompts", "semicolons.csv"], "separated by semicolons, expected commas"),
        (main, ["check", "phantom:foo"], "phantom is rendered on demand and takes no path"),
        (main, ["check", "phantom", "--exclude", "no.txt"], "--exclude no.txt: no such file"),
        (main, ["clip-score", "images", "--prompts", "no.csv"], "--prompts no.csv: no such file"),
        (main, ["fid", "images", "images", "--dims", "64", "--save-stats", "folder"], "--save-stats folder is not the"),
        (
            main,
            ["fid", "images", "images", "--save-stats", "a.npz"],
            "--save-stats writes one depth, and --dims gives 3",
        ),
        (main, ["pretrain", "--resume", "run"], "run is a run of train.py; python train.py --resume run continues it"),
        (train.main, ["--resume", "stages"], "stages is a run of pretraining"),
        (train.main, ["--resume", "folder"], "folder holds no run"),
        (train.main, ["--data", os.sep + "path"], "did you mean folder:/path?"),
    ],
)
def test_messages_name_the_flag_and_the_cause(command, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "images", "stages/autoencoder"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "semicolons.csv").write_text("file;prompt\na;b\n")
    for path in ("run/config.json", "stages/autoencoder/config.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text('{"settings": {"adapter": "lora"}, "found": {}}')
    for i in range(2):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    before = sorted(path for path in tmp_path.rglob("*"))
    line = fails(command, *arguments, capsys=capsys)
    assert line.startswith("error: ") and words in line
    assert sorted(path for path in tmp_path.rglob("*")) == before  # nothing is left behind


@pytest.mark.parametrize(
    "command, arguments",
    [
        (main, ["check", "folder:absent", "--out", "new/er/check"]),
        (train.main, ["--data", "folder:absent", "--out", "new/run"]),
        (sample.main, ["x", "--adapter", "absent", "--out", "new/samples"]),
        (main, ["fid", "absent", "absent", "--out", "new/f.json", "--features", "random"]),
    ],
)
def test_a_command_that_fails_leaves_no_empty_folder(command, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(command, *arguments, capsys=capsys)
    assert not (tmp_path / "new").exists()


def test_a_command_that_fails_leaves_folders_that_hold_files_or_were_there(tmp_path, capsys):
    (tmp_path / "old").mkdir()

    def command(_):
        for name in ("old", "empty/er", "full/er"):
            writable_folder(tmp_path / name)
        (tmp_path / "full" / "file").write_text("x")
        run = Run(tmp_path / "run", {})
        run.begin()
        raise InputError("something")

    fails(command, capsys=capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "old", "run"]
    assert (tmp_path / "run" / "samples").is_dir() and read_record(tmp_path / "run")


def test_a_result_is_written_even_if_another_command_has_removed_the_folder(tmp_path):
    folder = writable_folder(tmp_path / "samples")
    folder.rmdir()
    with written_beside(folder / "a.txt") as path:
        path.write_text("x")
    assert (folder / "a.txt").read_text() == "x"


# --- sizes -----------------------------------------------------------------------------------------------------------
def test_an_image_that_cannot_fit_into_memory_is_refused_before_it_is_sampled():
    settings = SamplingSettings(height=10_000, width=100_000)
    with pytest.raises(
        InputError, match=r"100000 x 10000 px at 4 .* need about \d.* GB .* 16.0 GB are free; lower --wid"
    ):
        sampling.check_size(settings, ModelConfig.tiny(), 4, 4, 16 * GB)
    usual = SamplingSettings(height=512, width=512)
    sampling.check_size(usual, ModelConfig(), 4, 4, 8 * GB)
    with pytest.raises(InputError, match=r"about 5\.4 GB"):
        sampling.check_size(usual, ModelConfig(), 4, 4, 5 * GB)
    sampling.check_size(usual, ModelConfig(), 4, 2, 5 * GB)  # half precision
    sampling.check_size(usual, ModelConfig(), 4, 4, None)


def test_a_size_far_from_the_models_is_warned_of():
    config = ModelConfig()
    with pytest.warns(UserWarning, match="4096 x 512 px is far from the 512 px"):
        sampling.check_size(SamplingSettings(height=512, width=4096), config, 1, 4, None)


# --- KID -------------------------------------------------------------------------------------------------------------
def test_kid_is_given_for_features_of_the_size_its_kernel_is_made_for():
    rng = np.random.default_rng(0)
    a, b = rng.gamma(1.0, 0.4, (20, 64)), rng.gamma(1.0, 0.4, (20, 64))  # like Inception's
    assert suits_kid(a) and suits_kid(b) and abs(kid(a, b).value) < 0.1
    assert not suits_kid(30 * a) and abs(kid(30 * a, 30 * b).value) > 100
