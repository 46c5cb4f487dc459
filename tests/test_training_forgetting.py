"""The forgetting probe: its drift, its image, and what a resumed run does with it."""

import itertools
import signal

import pytest
import torch
from made_runs import short_run
from PIL import Image

import minildm
from minildm.adapters import METHODS
from minildm.errors import InputError
from minildm.images import read_parameters
from minildm.loading import EMBEDDED
from minildm.metrics.sources import list_images
from minildm.training import forgetting, loop
from minildm.training.finetune import summary
from minildm.training.forgetting import ForgettingProbe, forgetting_line, unrelated_distance
from minildm.training.run import Run


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(forgetting, "STEPS", 4)


def drift_entries(run):
    return [entry for entry in run.entries() if "drift" in entry]


@pytest.mark.parametrize("adapter", METHODS)
def test_drift_is_0_if_nothing_was_trained_and_above_0_otherwise(tmp_path, adapter):
    changes = {"adapter": adapter, "steps": 3, "forgetting_probe": True}
    _, state, run, method = short_run(tmp_path / "still", lr=0.0, **changes)
    (entry,) = drift_entries(run)
    assert entry["drift"] == 0 and entry["step"] == 3 and entry["prompts"] == 4
    _, state, run, method = short_run(tmp_path / "moved", lr=3e-3, **changes)
    (entry,) = drift_entries(run)
    assert entry["drift"] > 0.001
    assert f"drift of the latents {entry['drift']:.3f}" in summary(state, method, run)


def test_the_probe_changes_nothing_about_the_training(tmp_path):
    _, plain, *_ = short_run(tmp_path / "a", steps=3)
    _, probed, *_ = short_run(tmp_path / "b", steps=3, forgetting_probe=True)
    assert all(torch.equal(plain.trained[name], probed.trained[name]) for name in plain.trained)


def test_the_image_shows_every_prompt_twice_and_is_no_sample_for_the_metrics(tmp_path):
    _, _, run, _ = short_run(tmp_path / "run", steps=1, forgetting_probe=True)
    path = run.folder / "samples" / "forgetting.png"
    with Image.open(path) as image:
        assert image.width > 4 * 2 * 64 and image.height > 64
    assert read_parameters(path).startswith("contact sheet, before and after 1 steps")
    with pytest.raises(InputError, match="only the contact sheets"):
        list_images(run.folder)


def test_a_resumed_run_compares_with_the_images_from_before_training(tmp_path, monkeypatch):
    """The stored latents are used, not sampled again; a run that had ended measures again and logs once."""
    changes = {"steps": 6, "forgetting_probe": True, "lr": 3e-3}
    _, _, whole, _ = short_run(tmp_path / "whole", **changes)
    ordinary, ordinary_sample, sampled = loop.train_step, ForgettingProbe._sample, []

    def step_with_signal(state, *arguments):
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)
        return ordinary(state, *arguments)

    def sample(probe, when):
        sampled.append(when)
        return ordinary_sample(probe, when)

    monkeypatch.setattr(ForgettingProbe, "_sample", sample)
    monkeypatch.setattr(loop, "train_step", step_with_signal)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "parts", **changes)
    monkeypatch.setattr(loop, "train_step", ordinary)
    for _ in range(2):
        _, _, parts, _ = short_run(tmp_path / "parts", resume=True, **changes)
        assert drift_entries(parts) == drift_entries(whole)
    assert sampled == ["before", "after", "after"]


def test_the_average_is_measured_where_there_is_one(tmp_path):
    _, _, run, _ = short_run(tmp_path / "a", steps=3, lr=3e-3, ema_decay=0.999, forgetting_probe=True)
    _, _, plain, _ = short_run(tmp_path / "b", steps=3, lr=3e-3, forgetting_probe=True)
    assert drift_entries(run)[0]["drift"] < drift_entries(plain)[0]["drift"]


def test_the_unrelated_distance_is_the_root_mean_square_over_all_pairs():
    latents = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    pairs = [(latents[i] - latents[j]).square().mean() for i, j in itertools.combinations(range(5), 2)]
    assert unrelated_distance(latents) == pytest.approx(torch.stack(pairs).mean().sqrt().item(), rel=1e-5)


def test_the_embedded_base_is_asked_for_shapes_and_they_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "STEPS", 12)
    monkeypatch.setattr(forgetting, "N_SHAPES", 2)
    run = Run(tmp_path / "run", {})
    run.begin()
    model = minildm.load(EMBEDDED, device="cpu")
    probe = ForgettingProbe(model, run, 128)
    assert probe.prompts[0] == "a black circle right of a yellow star"
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(0.5)  # "training" that spoils the base
    probe.measure(7)
    (entry,) = drift_entries(run)
    assert entry["right_before"] == 2 and entry["right_after"] == 0 and entry["drift"] > 0.3
    assert "correct shapes: 2 of 2 before, 0 of 2 after" in forgetting_line(entry)
