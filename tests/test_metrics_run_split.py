"""run:FOLDER:SPLIT, the images of a training run's own splits, for audit and fid."""

import json
import shutil

import numpy as np
import pytest
from made_data import folder
from PIL import Image

from minildm.__main__ import main
from minildm.data.open import DataSettings, open_data_set
from minildm.data.splits import split_by_patient
from minildm.errors import InputError
from minildm.metrics import audit, fid_score
from minildm.metrics.run_split import open_run_split, settings_for
from minildm.metrics.sources import list_as_training, list_images

N = 40


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's record of 40 images, split with seed 3, and generated images."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data", N)
    settings = DataSettings(split="70/10/20", greys="percentiles", fit="pad", size=64).as_json()
    settings |= {"data": "folder:data", "seed": 3, "instance_prompt": None}
    records = open_data_set("folder:data").records
    splits = {
        name: [records[i].name for i in members] for name, members in split_by_patient(records, "70/10/20", 3).items()
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"settings": settings, "found": {"splits": splits}}))
    (tmp_path / "fake").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (64, 64), np.uint8)
        Image.fromarray(noise).save(tmp_path / "fake" / f"{i}.png")
    return splits


def test_a_split_is_the_one_that_the_run_stored(run):
    for name in ("train", "validation", "test"):
        split = open_run_split(f"run:run:{name}")
        assert [record.name for record in split.records] == sorted(run[name])
        assert (split.settings.fit, split.settings.greys, split.settings.size) == ("pad", "percentiles", None)
        assert list_images(f"run:run:{name}") == list_as_training(f"run:run:{name}", None) == list(split.records)
    held_out = {record.name for record in open_run_split("run:run:held-out").records}
    assert held_out == {*run["validation"], *run["test"]} and len(held_out) + len(run["train"]) == N


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("run:run:tset", "run:run:tset: expected run:FOLDER:SPLIT with SPLIT one of train, validation, test, held-out"),
        ("run:run", "expected run:FOLDER:SPLIT"),
        ("run:run:", "expected run:FOLDER:SPLIT"),
        ("run:absent:test", "absent holds no run"),
        ("run:fake:test", "fake holds no run"),
    ],
)
def test_other_names_are_refused_in_words(run, source, words):
    with pytest.raises((InputError, FileNotFoundError), match=words):
        open_run_split(source)


def test_images_that_are_gone_are_named(run, tmp_path):
    table = tmp_path / "data" / "metadata.csv"
    gone = next(line for line in table.read_text().splitlines() if run["test"][0].split("/")[-1] in line)
    table.write_text(table.read_text().replace(f"{gone}\n", ""))
    with pytest.raises(InputError, match=f"1 of the {len(run['test'])} images of run:run:test are no longer in"):
        open_run_split("run:run:test")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(InputError, match="data is not a folder"):
        open_run_split("run:run:train")


def test_the_runs_settings_count_and_flags_beside_them_are_refused():
    plain = DataSettings()
    assert settings_for(("a", "folder:b"), plain, {"views": "all"}) is plain


def test_reading_follows_the_run(run):
    both = ("run:run:train", "run:run:test")
    settings = settings_for(both, DataSettings(size=96), {"size": 96, "train": "x"})
    assert (settings.fit, settings.greys, settings.size) == ("pad", "percentiles", 96)
    with pytest.raises(InputError, match="--views: the settings of run:run:train are used"):
        settings_for(both, DataSettings(views="all"), {"views": "all"})
    mixed = ("run:run:train", "folder:data")
    assert settings_for(mixed, DataSettings(views="all"), {"views": "all"}).views == "all"
    with pytest.raises(InputError, match="--greys"):
        settings_for(mixed, DataSettings(), {"greys": "declared"})


def test_the_privacy_check_of_a_run_is_one_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "open_extractor", lambda *_, **__: grid_extractor())
    flags = ["--train", "run:run:train", "--holdout", "run:run:held-out", "--features", "random"]
    assert main(["audit", "fake", *flags]) == 0
    n_train = len(run["train"])
    assert f"4 generated, {n_train} training, {N - n_train} held-out images" in capsys.readouterr().out
    result = json.loads((tmp_path / "fake" / "audit" / "audit.json").read_text())
    assert "pad, greys percentiles" in result["transform"] and result["holdout"] == "run:run:held-out"


def test_fid_takes_a_runs_split_and_opens_both_sides_before_it_reads_any_image(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fid_score, "open_extractor", lambda *_, **__: grid_extractor())
    read = []
    ordinary = fid_score.read_as_training
    monkeypatch.setattr(fid_score, "read_as_training", lambda *given: read.append(given) or ordinary(*given))
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        main(["fid", "run:run:train", "absent", "--out", "f.json"])
    (tmp_path / "one").mkdir()
    shutil.copy("fake/0.png", "one/0.png")
    with pytest.raises(InputError, match="only image"):
        main(["fid", "run:run:train", "one"])
    assert not read
    assert main(["fid", "run:run:train", "fake", "--replicates", "2"]) == 0
    assert {record.name for record, _ in read} == {*run["train"]}
    assert {transform.greys for _, transform in read} == {"percentiles"}


def grid_extractor():
    """Features for tests: means of an 8 x 8 grid, no network."""
    from torch.nn import functional as F

    from minildm.metrics.extractors import Extractor
    from minildm.metrics.sources import as_tensor

    def prepare(image):
        return as_tensor(image)[None].float().mean(1, keepdim=True)[0] / 255

    return Extractor("FD-grid", (64,), prepare, lambda x: {64: F.adaptive_avg_pool2d(x, 8).flatten(1)})
