"""Pretraining: whole runs of the command on the tiny shape, the average of the weights, and the stages' mathematics."""

import dataclasses
import functools
import itertools
import json
import math
import shlex
import shutil
import signal

import numpy as np
import peers
import pytest
import torch
from made_data import folder
from made_runs import training_config
from peers import assert_says, relative_error
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence

import minildm
from minildm import __main__ as command_line
from minildm import config as configs
from minildm import kernels
from minildm.checkpoint import NETWORKS, config_json
from minildm.config import ModelConfig
from minildm.data.cache import CachedLatents
from minildm.data.reading import Transform
from minildm.data.records import Record
from minildm.errors import InputError
from minildm.files import sha256
from minildm.images import FROM_DATA, SYNTHETIC
from minildm.pretraining import autoencoder, command
from minildm.pretraining import stage as stages
from minildm.pretraining.autoencoder import autoencoder_losses, psnr, random_crops, unit_scale, whiten_codes
from minildm.pretraining.command import FREE, image_pairs, parse, rebuild_command
from minildm.pretraining.models import SHAPES, WORD, new_model
from minildm.pretraining.stage import STAGES, Networks, run_stage, stage_config
from minildm.pretraining.text_encoder import CaptionReader, CaptionReading
from minildm.teaching import shapes
from minildm.training import loop
from minildm.training.finetune import Samples
from minildm.training.run import Run, read_record
from minildm.training.state import State
from minildm.training.task import Task
from minildm.unet import UNet
from minildm.vae import VAE, Gaussian


@pytest.fixture(scope="module", autouse=True)
def few_held_out():
    """With 256 pairs, validation would take most of the time of a run of four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "HELD_OUT", 8)
        patch.setattr(command, "HELD_OUT", 8)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("pretraining")


def flags(place, **changes):
    values = {
        "data": "phantom",
        "limit": 40,
        "size": 64,
        "vae_steps": 4,
        "text_steps": 4,
        "steps": 4,
        "decoder_steps": 4,
        "vae_batch_size": 4,
        "vae_crop": 32,
        "text_batch_size": 4,
        "batch_size": 4,
        "decoder_batch_size": 4,
        "warmup": 1,
        "sample_interval": 0,
        "device": "cpu",
        "cache": place / "cache",
    } | changes
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def whole(place):
    """The uninterrupted run that others are compared with."""
    assert command.main([*flags(place), "--out", str(place / "whole")]) == 0
    return place / "whole"


@functools.cache
def initial_model():
    """The initial model of the runs with seed 0; no test may change it."""
    return new_model(SHAPES["tiny"], 0, "cpu")


def saved_state(run, stage):
    return torch.load(run / stage / "last" / "state.pt", weights_only=True)


def tensors(run, network):
    (path,) = (run / "model" / network).glob("*.safetensors")
    return load_file(path)


def files(run):
    """{name: bytes} of the model, without the card, which states how long training took."""
    return {
        path.relative_to(run / "model").as_posix(): path.read_bytes()
        for path in sorted((run / "model").rglob("*"))
        if path.is_file() and path.name != "README.md"
    }


def assert_same_run(run, other):
    assert files(run) == files(other)
    for stage in STAGES:
        ours, theirs = saved_state(run, stage), saved_state(other, stage)
        for part in ("trained", "average"):
            assert list(ours[part]) == list(theirs[part])
            assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
        logs = [
            [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
            for folder in (run, other)
        ]
        for a, b in zip(*logs, strict=True):
            assert {k: v for k, v in a.items() if k not in ("seconds", "memory_mb")} == {
                k: v for k, v in b.items() if k not in ("seconds", "memory_mb")
            }


# --- the result of a run ---------------------------------------------------------------------------------------------
def test_a_run_makes_a_model_that_loads_and_samples(whole):
    assert set(files(whole)) == {
        "scheduler/scheduler_config.json",
        "tokenizer/special_tokens_map.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    model = minildm.load(whole / "model", device="cpu")
    for network in NETWORKS:
        assert getattr(model, network).state_dict().keys() == tensors(whole, network).keys()
    shape = SHAPES["tiny"]
    assert model.config == dataclasses.replace(
        shape,
        unet=dataclasses.replace(shape.unet, latent_size=8),
        vae=dataclasses.replace(shape.vae, scaling_factor=model.config.vae.scaling_factor),
    )
    assert model.config.vae.scaling_factor != configs.VAEConfig().scaling_factor  # measured, not Stable Diffusion's
    images = model.sample(["chest x-ray", "a red circle"], steps=2, sampler="dpm++", seed=3, output="tensor")
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()
    assert images.std() > 0.01 and not torch.equal(images[0], images[1])


def test_weights_are_trained_in_float32_and_saved_in_float16(whole):
    for path in (whole / "model").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert all(
        tensor.dtype == torch.float32 for stage in STAGES for tensor in saved_state(whole, stage)["trained"].values()
    )


def test_only_the_stages_that_read_captions_keep_their_best_weights(whole):
    kept = [stage for stage in STAGES if (whole / stage / Networks.result).exists()]
    assert kept == ["text_encoder", "diffusion"] == [name for name, stage in STAGES.items() if stage.reads_captions]


def card(run):
    return (run / "model" / "README.md").read_text(encoding="utf-8")


def rows(text, after):
    """The rows, as lists of cells, of the card's table whose header begins with ``after``."""
    lines = text.partition(f"| {after}")[2].splitlines()[2:]
    table = lines[: lines.index("")] if "" in lines else lines
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


def test_the_card_states_the_hashes_of_the_files(whole):
    listed = {name: (size, digest) for name, size, digest in rows(card(whole), "file")}
    paths = {path.relative_to(whole / "model").as_posix(): path for path in (whole / "model").rglob("*.safetensors")}
    assert listed == {name: (f"{path.stat().st_size:,}", sha256(path)) for name, path in paths.items()}
    assert len(listed) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_the_card_states_the_losses_of_the_log(whole, stage):
    entries = [json.loads(line) for line in (whole / stage / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    first, last = (entry["validation"] for entry in entries if "validation" in entry)
    assert len(losses) == 4
    assert rows(card(whole), f"{stage}: step") == [
        ["0", "", f"{first:.4f}"],
        ["4", f"{sum(losses) / 4:.4f}", f"{last:.4f}"],
    ]


def test_the_card_states_seed_size_precision_quality_and_the_warning(whole):
    for words in (
        f"phantom, 64 px; seed 0; products in {parse(flags(whole)).goal.dtype}",
        "4 steps of 4 images",
        "dB on held-out images",
        "decoder alone",
        "# whole: a latent diffusion model",
        "Not for clinical use.",
    ):
        assert words in card(whole), words


def command_of(text):
    """The arguments of the command that the card states."""
    words = shlex.split(text.partition("Made by `")[2].partition("`")[0])
    assert words[:4] == ["python", "-m", "minildm", "pretrain"]
    return words[4:]


def lasting(plan):
    """The settings that a resumed run may not change."""
    return {name: value for name, value in plan.record.items() if name not in FREE}


def test_the_cards_command_makes_this_model(place, whole):
    assert lasting(parse(command_of(card(whole)))) == lasting(parse(flags(place)))


@pytest.mark.parametrize(
    "given",
    [
        ["--ema-decay", "0.9"],
        ["--drop-pediatric"],
        ["--prompt-template", "chest x-ray, age {age}"],
        ["--vae-crop", "64", "--decoder-lr", "1e-5", "--dtype", "float32"],
    ],
)
def test_the_cards_command_can_be_typed_whatever_the_flags(given):
    plan = parse([*given, "--device", "cpu"])
    words = shlex.split(rebuild_command(plan))
    assert set(given) <= {*words, "1e-5"}  # which is written 1e-05
    assert lasting(parse(words[4:])) == lasting(plan)


# --- what changes the result, and what does not ----------------------------------------------------------------------
def test_the_same_seed_and_command_give_the_same_files(place, whole):
    arguments = [*flags(place, cache=place / "another cache"), "--out", str(place / "again")]
    assert command_line.main(["pretrain", *arguments]) == 0
    assert_same_run(whole, place / "again")


def test_another_seed_gives_other_weights(place, whole):
    assert command.main([*flags(place, seed=1), "--out", str(place / "other")]) == 0
    for network in NETWORKS:
        ours, theirs = tensors(whole, network), tensors(place / "other", network)
        assert ours.keys() == theirs.keys()
        assert not any(torch.equal(ours[name], theirs[name]) for name in ours if ours[name].dim() > 1)


def test_each_networks_weights_depend_on_seed_and_name_alone():
    before = torch.get_rng_state()
    config = ModelConfig.tiny()
    model = new_model(config, 5, "cpu")
    wider = new_model(dataclasses.replace(config, vae=configs.VAEConfig.tiny(widths=(32, 32, 32, 64))), 5, "cpu")
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    for network in ("unet", "text_encoder"):
        ours, theirs = getattr(model, network).state_dict(), getattr(wider, network).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def with_sheets(place):
    assert command.main([*flags(place, sample_interval=3, save_interval=2), "--out", str(place / "sheets")]) == 0
    return place / "sheets"


def test_sample_sheets_come_at_their_steps_and_change_nothing(whole, with_sheets):
    for stage in STAGES:
        assert sorted(path.name for path in (with_sheets / stage / "samples").iterdir()) == [
            "step-000000.png",
            "step-000003.png",
            "step-000004.png",
        ]
    assert_same_run(whole, with_sheets)


def test_sheets_of_the_data_set_do_not_call_themselves_synthetic(with_sheets):
    for stage in STAGES:
        for path in (with_sheets / stage / "samples").iterdir():
            with Image.open(path) as image:
                assert image.info["Description"] == (SYNTHETIC if stage == "diffusion" else FROM_DATA)


def logged_losses(run, stage):
    return [
        entry["loss"]
        for entry in map(json.loads, (run / stage / "log.jsonl").read_text().splitlines())
        if "loss" in entry
    ]


@pytest.mark.slow
def test_an_uneven_micro_batch_changes_nothing_but_rounding(place):
    runs = [place / "float32", place / "micro"]
    for path, changes in zip(runs, ({}, {"micro_batch": 3})):  # batches of 4: cut into 3 and 1
        assert command.main([*flags(place, dtype="float32", **changes), "--out", str(path)]) == 0
    for stage in STAGES:
        whole, cut = (logged_losses(path, stage) for path in runs)
        assert cut == pytest.approx(whole, rel=1e-4), stage
        if stage == "autoencoder":  # the others begin with what the stages before trained, whose rounding has added up
            assert cut[0] == pytest.approx(whole[0], rel=1e-5), stage


@pytest.mark.slow
def test_checkpointing_and_workers_change_nothing(place, whole):
    assert command.main([*flags(place, workers=1), "--checkpointing", "--out", str(place / "lean")]) == 0
    assert_same_run(whole, place / "lean")


class Shrinking(Task):
    """Train a layer's output towards 0, through validations that give the listed losses."""

    batch_size, validation_interval = 4, 1

    def __init__(self, layer, validation_losses):
        self.layer, self.config = layer, training_config(lr=0.1, steps=len(validation_losses) - 1)
        self.validation_losses, self.seen = iter(validation_losses), []

    def batches(self, first_step, last_step):
        for step in range(first_step, last_step):
            yield {"id": torch.arange(4 * step, 4 * step + 4), "weight": torch.ones(4), "x": torch.ones(4, 3)}

    def losses(self, batch):
        return self.layer(batch["x"]).square().mean(1)

    def validate(self):
        self.seen.append(self.layer.weight.detach().clone())
        return next(self.validation_losses)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [((1.0, 0.5, 0.6), 1), ((1.0, 0.5, 0.505), 2), ((1.0, 0.5, 0.4), 2), ((1.0, 0.5, math.nan), 1)],
)
@pytest.mark.parametrize("back_to_best", [True, False])
def test_a_stage_returns_to_its_best_weights_if_the_held_out_loss_rose(tmp_path, losses, chosen, back_to_best, capsys):
    layer = linear()
    task, run = Shrinking(layer, losses), Run(tmp_path / "run", {}, result=Networks.result)
    run.begin()
    run_stage(layer, task, run, back_to_best)
    assert torch.equal(layer.weight, task.seen[chosen if back_to_best else 2])
    assert not torch.equal(task.seen[1], task.seen[2])
    assert not layer.weight.requires_grad
    assert ("rose from 0.5000 at step 1" in capsys.readouterr().out) == (back_to_best and chosen == 1)


def test_a_micro_batch_larger_than_a_stages_batch_is_that_batch(place):
    plan = parse([*flags(place, vae_batch_size=8, batch_size=32, micro_batch=16)])
    configs = [stage_config(stage, plan.stages[stage], plan.shared) for stage in ("autoencoder", "diffusion")]
    assert [config.micro_batch for config in configs] == [8, 16]


def test_captions_are_dropped_in_the_stages_that_read_them(place, whole):
    assert command.main([*flags(place, caption_dropout=1), "--out", str(place / "dropped")]) == 0
    first = {stage: (logged_losses(place / "dropped", stage)[0], logged_losses(whole, stage)[0]) for stage in STAGES}
    assert [stage for stage, (a, b) in first.items() if a != b] == ["text_encoder", "diffusion"]


# --- interrupted and resumed -----------------------------------------------------------------------------------------
def break_at(monkeypatch, network, step, interrupt):
    """Call ``interrupt`` when the stage that trains this class of network is at this step."""
    ordinary = loop.train_step

    def train_step(state, *arguments):
        if isinstance(state.method.model, network) and state.step == step:
            interrupt()
        return ordinary(state, *arguments)

    monkeypatch.setattr(loop, "train_step", train_step)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def crash():
    raise ZeroDivisionError


def test_interrupted_in_its_stages_and_resumed_equals_uninterrupted(place, whole, monkeypatch, capsys):
    """Ctrl-C in the first stage, at a step without a save; a crash in the second and third, a step after a save."""
    parts = place / "parts"
    break_at(monkeypatch, VAE, 2, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        command.main([*flags(place), "--out", str(parts)])
    monkeypatch.undo()
    assert f"Continue with: python -m minildm pretrain --resume {parts}" in capsys.readouterr().out
    assert saved_state(parts, "autoencoder")["step"] == 3
    assert not (parts / "model").exists()

    for stage, network in (("text_encoder", nn.ModuleDict), ("diffusion", UNet)):
        break_at(monkeypatch, network, 3, crash)
        with pytest.raises(ZeroDivisionError):  # here with all flags; the test below resumes without them
            command.main([*flags(place, save_interval=2), "--resume", str(parts)])
        monkeypatch.undo()
        assert saved_state(parts, stage)["step"] == 2

    assert command.main(["--resume", str(parts)]) == 0
    assert_same_run(whole, parts)


def test_a_run_stopped_in_the_first_stage_resumes_with_all_its_flags(place, whole):
    stopped = place / "stopped"
    shutil.copytree(whole / "autoencoder", stopped / "autoencoder")
    assert parse(["--resume", str(stopped)]).record == parse(flags(place)).record


def test_a_resumed_run_keeps_its_precision_on_a_machine_with_another_default(whole, monkeypatch):
    recorded = json.loads((whole / "autoencoder" / "config.json").read_text())["settings"]["dtype"]
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda device: recorded == "float32")
    assert parse(["--resume", str(whole)]).goal.dtype == recorded
    assert parse([]).goal.dtype != recorded


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--vae-lr", "0.5"], "vae_lr = 0.001, not 0.5"),
        (["--size", "32"], "size = 64, not 32"),
        (["--lr", "0.5"], "lr = 0.001, not 0.5"),
        (["--ema-decay", "0"], "ema_decay = 0.999, not 0.0"),
        (["--seed", "1"], "seed = 0, not 1"),
    ],
)
def test_resuming_with_another_setting_names_it(whole, given, words):
    before = files(whole)
    with pytest.raises(InputError) as error:
        command.main(["--resume", str(whole), *given])
    assert_says(error, words, "begun with", "--out")
    assert files(whole) == before


def test_resuming_what_is_no_run_says_so(whole, tmp_path):
    for path in (tmp_path, whole / "decoder"):
        with pytest.raises(FileNotFoundError) as error:
            command.main(["--resume", str(path)])
        assert_says(error, f"{path} holds no pretraining run to resume")


@pytest.mark.parametrize("other", ["other", "runs/pretrain"])  # the second is the default
def test_resuming_into_another_folder_is_refused(whole, tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        command.main(["--resume", str(whole), "--out", other])
    assert_says(error, "its own folder", f"leave --out {other} out")
    assert not list(tmp_path.iterdir())


def test_a_run_of_version_0_1_is_refused_in_one_line(whole, tmp_path):
    shutil.copytree(whole / "autoencoder", tmp_path / "old" / "autoencoder")
    path = tmp_path / "old" / "autoencoder" / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({"flags": record["settings"], "found": record["found"]}))
    with pytest.raises(InputError) as error:
        command.main(["--resume", str(tmp_path / "old")])
    assert_says(error, "minildm 0.1", "begin a new run with another --out")


def test_a_folder_that_holds_a_run_is_refused(place, whole):
    before = files(whole)
    with pytest.raises(InputError) as error:
        command.main([*flags(place), "--out", str(whole)])
    assert_says(error, "holds a run already", "--out")
    assert files(whole) == before


def test_the_refusal_names_a_folder_that_can_be_resumed(place, whole):
    with pytest.raises(InputError) as error:
        command.main([*flags(place), "--out", str(whole)])
    parse(["--resume", str(error.value).partition("--resume ")[2].partition(",")[0]])


# --- the average of the weights --------------------------------------------------------------------------------------
def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


class Regression(Task):
    """Fit a linear layer, and note the weights that each callback sees in ``seen``, {(callback, step): weights}."""

    batch_size, validation_interval = 4, 20

    def __init__(self, layer, stop_before=None):
        self.layer, self.stop_before, self.seen = layer, stop_before, {}
        self.truth = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))

    def note(self, callback, step):
        self.seen[callback, step] = self.layer.weight.detach().clone()

    def batches(self, first_step, last_step):
        for step in range(first_step, last_step):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            yield {"id": torch.arange(4 * step, 4 * step + 4), "weight": torch.ones(4), "x": x}

    def losses(self, batch):
        step = int(batch["id"][0]) // 4
        self.note("losses", step)
        if step == self.stop_before:
            press_ctrl_c()
        return (self.layer(batch["x"]) - batch["x"] @ self.truth.t()).square().mean(1)

    def validate(self):
        step = 20 * sum(callback == "validate" for callback, _ in self.seen)
        self.note("validate", step)
        return 1 / (step + 1)  # better each time, so the last weights are the best

    def sample_sheet(self, path):
        self.note("sample_sheet", int(path.stem.removeprefix("step-")))


def regress(folder, layer, steps=120, resume=False, stop_before=None, **changes):
    """Returns: (State, Run, the weights that the callbacks saw)."""
    task, run = Regression(layer, stop_before), Run(folder, {}, resume=resume, result=Networks.result)
    run.begin()
    config = training_config(**{"lr": 3e-2, "sample_interval": 50, "ema_decay": 0.9, "steps": steps} | changes)
    state = loop.train(Networks(layer, steps, seed=0, keep_best=True), task, config, run, steps)
    task.note("losses", steps)
    return state, run, task.seen


def averages(seen, steps, decay):
    """The average after each step, by definition: w0, then d a + (1 - d) w with d = min(decay, t / (t + 9))."""
    out = [seen["losses", 0].double()]
    for t in range(1, steps + 1):
        d = min(decay, t / (t + 9))
        out.append(d * out[-1] + (1 - d) * seen["losses", t].double())
    return out


def test_the_average_equals_a_brute_force_one(tmp_path):
    state, _, seen = regress(tmp_path / "run", linear())  # d reaches 0.9 at step 81
    expected, average = averages(seen, 120, 0.9), state.average.values
    torch.testing.assert_close(average["weight"].double(), expected[-1], rtol=0, atol=1e-6)
    assert (average["weight"] - state.trained["weight"]).abs().max() > 1e-4  # so the tolerance bites
    assert average.keys() == state.trained.keys() == {"weight", "bias"}


def test_validation_sheets_and_the_saved_file_see_the_average_and_training_does_not(tmp_path):
    _, run, seen = regress(tmp_path / "run", linear())
    expected = averages(seen, 120, 0.9)
    for callback, steps in (("validate", range(0, 121, 20)), ("sample_sheet", (0, 50, 100, 120))):
        assert [step for name, step in seen if name == callback] == list(steps)
        for step in steps:
            torch.testing.assert_close(seen[callback, step].double(), expected[step], rtol=0, atol=1e-6)
    assert torch.equal(load_file(run.result)["weight"], seen["validate", 120])
    _, _, plain = regress(tmp_path / "plain", linear(), ema_decay=0.0)
    assert all(torch.equal(seen["losses", step], plain["losses", step]) for step in range(121))


def test_without_a_decay_no_copy_is_kept(tmp_path):
    layer = linear()
    state, run, _ = regress(tmp_path / "run", layer, ema_decay=0.0, steps=8)
    assert state.average.values == {}
    assert torch.load(run.state, weights_only=True)["average"] == {}
    before = layer.weight.clone()
    with state.averaged():
        assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)


def test_averaged_swaps_and_swaps_back_exactly_even_when_something_fails(tmp_path):
    layer = linear()
    state, *_ = regress(tmp_path / "run", layer, steps=8)
    parameter, trained, average = layer.weight, layer.weight.detach().clone(), state.average.values["weight"].clone()
    for fails in (False, True):
        try:
            with state.averaged():
                assert torch.equal(layer.weight, average) and not torch.equal(average, trained)
                if fails:
                    crash()
        except ZeroDivisionError:
            pass
        assert torch.equal(layer.weight, trained) and torch.equal(state.average.values["weight"], average)
        assert layer.weight is parameter is state.optimizer.parameters[0]  # the one that the optimizer updates


def test_resuming_keeps_the_average(tmp_path):
    whole, *_ = regress(tmp_path / "whole", linear(), steps=30)
    with pytest.raises(KeyboardInterrupt):
        regress(tmp_path / "parts", linear(), steps=30, stop_before=12)
    saved = torch.load(tmp_path / "parts" / "last" / "state.pt", weights_only=True)
    assert saved["step"] == 13 and not torch.equal(saved["average"]["weight"], saved["trained"]["weight"])
    resumed, *_ = regress(tmp_path / "parts", linear(seed=9), steps=30, resume=True)
    for name in ("weight", "bias"):
        assert torch.equal(whole.average.values[name], resumed.average.values[name])
        assert torch.equal(whole.trained[name], resumed.trained[name])


def test_an_update_moves_the_average_by_its_share_and_the_weights_not_at_all():
    layer = linear()
    state = State(Networks(layer, steps=1, seed=0, keep_best=True), training_config(ema_decay=0.5))
    with torch.no_grad():
        layer.weight.add_(1)
    before = layer.weight.detach().clone()
    state.average.update(1, state.trained)
    torch.testing.assert_close(state.average.values["weight"], before - 0.1, rtol=0, atol=1e-6)  # d = 1 / (1 + 9)
    assert torch.equal(layer.weight, before)


def test_the_files_hold_the_average(whole):
    average, trained = {}, {}
    for stage in STAGES:  # the decoder's own stage comes last
        average |= saved_state(whole, stage)["average"]
        trained |= saved_state(whole, stage)["trained"]
    for network, prefix in (("vae", ""), ("unet", ""), ("text_encoder", "text_encoder.")):
        for name, values in tensors(whole, network).items():
            if name.endswith("token_embedding.weight") or name.startswith("quant_conv."):
                continue  # not trained; whitened after training
            assert torch.equal(values, average[prefix + name].half()), name
        assert any(
            not torch.equal(values, trained[prefix + name].half())
            for name, values in tensors(whole, network).items()
            if prefix + name in trained
        )


# --- what is trained, and what stays ---------------------------------------------------------------------------------
def test_word_vectors_keep_their_initial_values_while_positions_and_the_unet_move(whole):
    embeddings = initial_model().text_encoder.text_model.embeddings
    made = tensors(whole, "text_encoder")
    words, positions = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
    assert torch.equal(made[words], embeddings.token_embedding.weight.half())
    trained = saved_state(whole, "text_encoder")["trained"]
    for name, values in initial_model().text_encoder.state_dict().items():
        assert name == words or not torch.equal(trained[f"text_encoder.{name}"], values), name
    assert not torch.equal(made[positions], embeddings.position_embedding.weight.half())
    assert {name for name in trained if not name.startswith("reader.")} == {
        f"text_encoder.{name}" for name in made if name != words
    }
    trained = saved_state(whole, "diffusion")["trained"]
    for name, values in initial_model().unet.state_dict().items():
        assert not torch.equal(trained[name], values), name
    assert trained.keys() == tensors(whole, "unet").keys()


def test_words_never_seen_stay_as_distinct_as_those_of_the_captions(whole):
    model = minildm.load(whole / "model", device="cpu")
    words = model.text_encoder.text_model.embeddings.token_embedding.weight
    seen = model.tokenize(
        [
            "chest x-ray, age 45 female, view PA, projection AP, modality DX, diagnosis pleural "
            "effusion, loc left upper lobe, male cardiomegaly pneumothorax"
        ]
    ).unique()
    unseen = torch.tensor(sorted(set(range(0, 49408, 100)) - set(seen.tolist())))
    distances = [torch.pdist(words[ids]) for ids in (seen, unseen)]
    typical = WORD * math.sqrt(2 * words.shape[1])  # between two random vectors
    for each in distances:
        assert each.mean().item() == pytest.approx(typical, rel=0.03)
        assert each.min() > 0.5 * typical


def test_later_stages_leave_the_encoder_alone(whole):
    average = saved_state(whole, "autoencoder")["average"]
    made = tensors(whole, "vae")
    assert made.keys() == average.keys() == initial_model().vae.state_dict().keys()
    decoder = saved_state(whole, "decoder")["trained"].keys()
    assert decoder == {name for name in made if name.startswith(("decoder.", "post_quant_conv."))}
    whitened = {"quant_conv.weight", "quant_conv.bias"}
    assert all(torch.equal(made[name], average[name].half()) for name in made.keys() - decoder - whitened)
    assert all(not torch.equal(made[name], average[name].half()) for name in decoder if made[name].dim() > 1)


# --- the text encoder's stage ----------------------------------------------------------------------------------------
def test_the_reader_predicts_a_code_for_any_image_size():
    context = torch.randn(2, 77, 16)
    for side in range(1, 65):
        reader = CaptionReader(16, 2, side)
        code = reader(context)
        assert code.shape == (2, 4, side, side) and len(reader.queries) <= 64
        assert not torch.equal(code[0], code[1])


def relation_samples():
    """Samples of two 4 x 4 patches, captioned 'red above blue', or below, left of, right of."""
    colours = dict(zip(("red", "green", "blue", "white"), 2 * torch.eye(4)))
    rows = {}  # by prompt
    for (a, first), (b, second) in itertools.permutations(colours.items(), 2):
        for relation, (dx, dy) in shapes.RELATIONS.items():
            code = torch.zeros(4, 8, 8)
            for sign, patch in ((1, first), (-1, second)):
                x, y = 2 + 2 * sign * dx, 2 + 2 * sign * dy
                code[:, y : y + 4, x : x + 4] = patch[:, None, None]
            rows[f"{a} {relation} {b}"] = torch.cat([code, torch.full((4, 8, 8), -20.0)])
    records, keys = tuple(Record(prompt, prompt) for prompt in rows), [prompt.encode() for prompt in rows]
    return Samples(records, tuple(rows), CachedLatents(dict(zip(keys, rows.values())), records, keys))


@pytest.mark.slow
def test_the_text_encoder_learns_from_captions_what_is_where(tmp_path):
    samples = relation_samples()
    held_out = range(3, len(samples.records), 7)  # captions that training never sees
    training = samples.subset([i for i in range(len(samples.records)) if i not in held_out])
    plan = parse(flags(tmp_path, text_steps=150, text_batch_size=16, text_lr=2e-3, warmup=30, ema_decay=0.9))
    run = Run(tmp_path / "text_encoder", {}, result=Networks.result)
    run.begin()
    model = new_model(SHAPES["tiny"], 0, "cpu")
    model.config = dataclasses.replace(model.config, vae=dataclasses.replace(model.config.vae, scaling_factor=1.0))
    config = stage_config("text_encoder", plan.stages["text_encoder"], plan.shared)
    task = CaptionReading(model, training, samples.subset(held_out), config, getattr(torch, plan.goal.dtype))
    run_stage(task.networks, task, run, back_to_best=True)
    losses = [entry["validation"] for entry in run.entries() if "validation" in entry]
    difference = 2 * torch.tensor([1.0, -1, 0, 0])  # of two codes
    # The error of a reader that knows both colours, but not which is where: two patches of 16 positions among 64.
    blind = (difference / 2).square().mean().item() * 32 / 64
    assert losses[0] > blind > 4 * losses[-1]
    assert not any(p.requires_grad for p in model.text_encoder.parameters())


# --- the autoencoder's loss ------------------------------------------------------------------------------------------
def standard_code(n=2):
    return Gaussian(torch.zeros(n, 4, 2, 2), torch.zeros(n, 4, 2, 2))


def test_a_perfect_reconstruction_from_a_standard_normal_code_costs_nothing():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(autoencoder_losses(images, images, standard_code()), torch.zeros(2))


def test_the_reconstruction_error_is_the_sum_of_its_three_means():
    generator = torch.Generator().manual_seed(0)
    images, reconstructions = (torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))
    d = (reconstructions - images).double().numpy()
    expected = [
        np.abs(x).mean() + (x**2).mean() + (np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean()) / 2
        for x in d
    ]
    losses = autoencoder_losses(images, reconstructions, standard_code())
    torch.testing.assert_close(losses.double(), torch.tensor(expected), rtol=1e-6, atol=0)


def test_blur_costs_more_than_a_shift_of_grey_of_equal_size():
    images = torch.ones(1, 3, 16, 16)
    images[..., 8:] = -1  # an edge
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    size = (blurred - images).abs().mean()
    shifted = images + size
    code = standard_code(1)

    def edges(reconstructions):
        d = reconstructions - images
        return (autoencoder_losses(images, reconstructions, code) - d.abs().mean() - d.square().mean()).item()

    assert edges(shifted) == pytest.approx(0, abs=1e-6)
    # d is -2/3 and 2/3 in the columns beside the edge: steps of 2/3, 4/3, 2/3 among 15, none downwards
    assert edges(blurred) == pytest.approx((8 / 3) / 15 / 2, rel=1e-5)
    assert autoencoder_losses(images, blurred, code) > 1.5 * autoencoder_losses(images, shifted, code)


def test_the_codes_term_equals_torchs_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(2))
    images = torch.zeros(3, 3, 40, 40)
    theirs = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0, 1)).mean((1, 2, 3))
    ours = autoencoder_losses(images, images, Gaussian(mean, logvar))
    torch.testing.assert_close(ours, autoencoder.KL * theirs, rtol=1e-5, atol=0)


def test_a_runs_codes_are_those_of_the_first_stage_whitened(whole):
    vae, made = initial_model().vae.state_dict(), minildm.load(whole / "model", device="cpu").vae
    unwhitened = VAE(made.config).requires_grad_(False)
    unwhitened.load_state_dict(vae | saved_state(whole, "autoencoder")["average"])
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images *= torch.linspace(0, 1, 8)[:, None, None, None]
    old, new = (each.encode(images).mean.detach().double().movedim(1, -1).flatten(0, 2) for each in (unwhitened, made))
    old, new = old - old.mean(0), new - new.mean(0)
    A = torch.linalg.lstsq(new, old).solution.T
    assert relative_error(new @ A.T, old) < 0.01  # the file has half precision
    e = (A.T @ A).diag()  # A = V diag(e)^1/2: its columns are perpendicular
    assert ((A.T @ A - e.diag()).abs() < 0.01 * torch.outer(e, e).sqrt()).all()
    assert relative_error(old, new) > 0.1


def test_crops_are_windows_whose_positions_depend_on_the_sample_ids():
    images = torch.arange(6 * 20 * 24).reshape(6, 1, 20, 24).expand(6, 3, 20, 24).float()
    crops = random_crops(images, 16, seed=3, ids=range(6))
    assert crops.shape == (6, 3, 16, 16)
    places = set()
    for i, (image, crop) in enumerate(zip(images, crops)):
        top, left = divmod(int(crop[0, 0, 0]) - i * 480, 24)
        assert torch.equal(crop, image[:, top : top + 16, left : left + 16])
        places.add((top, left))
    assert len(places) > 2
    assert torch.equal(random_crops(images[2:4], 16, seed=3, ids=range(2, 4)), crops[2:4])
    many = random_crops(torch.arange(24.0).expand(400, 3, 20, 24), 16, 0, range(400))
    assert set(many[:, 0, 0, 0].tolist()) == set(range(9))  # every position is reached


def test_whitened_codes_are_uncorrelated_and_decode_to_the_same_images():
    torch.manual_seed(0)
    vae = VAE(configs.VAEConfig.tiny()).requires_grad_(False)
    with torch.no_grad():  # channels as similar and as uneven as training leaves them
        vae.quant_conv.weight[:4] *= torch.tensor([0.1, 1.0, 4.0, 20.0])[:, None, None, None]
        vae.quant_conv.weight[1] += vae.quant_conv.weight[3]
        vae.quant_conv.bias[:4] += torch.tensor([3.0, 0.0, -1.0, 7.0])
        vae.quant_conv.bias[4:] += torch.tensor([-9.0, -5.0, -3.0, -5.0])
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    images *= torch.linspace(0, 1, 24)[:, None, None, None]
    before = vae.encode(images)
    expected = vae.decode(before.mean)
    whiten_codes(vae, [{"images": image} for image in images], "cpu")
    after = vae.encode(images)
    torch.testing.assert_close(vae.decode(after.mean), expected, rtol=0, atol=1e-4)
    old, new = (code.mean.double().movedim(1, -1).flatten(0, 2) for code in (before, after))  # (N, 4)
    covariance, noise = torch.cov(new.T, correction=0), after.logvar.exp().mean((0, 2, 3)).double()
    assert new.mean(0).abs().max() < 0.01
    torch.testing.assert_close(covariance.diag() + noise, torch.ones(4).double(), rtol=0.01, atol=0)
    # The noise is the old one in the new coordinates. A of z = A z' + m, by least squares:
    A = torch.linalg.lstsq(new, old - old.mean(0)).solution.T
    rotated = A.inverse() @ before.logvar.exp().double().mean((0, 2, 3)).diag() @ A.inverse().T
    torch.testing.assert_close(noise, rotated.diag(), rtol=0.01, atol=0)
    torch.testing.assert_close(covariance + rotated, torch.eye(4).double(), rtol=0, atol=0.01)
    assert after.logvar.std((0, 2, 3)).max() < 1e-5 and (rotated - rotated.diag().diag()).abs().max() > 0.02


# --- measures --------------------------------------------------------------------------------------------------------
def test_scaled_latents_have_unit_deviation():
    generator = torch.Generator().manual_seed(0)
    moments = {
        bytes([i]): torch.cat(
            [0.7 + 3 * torch.randn(4, 16, 16, generator=generator), torch.randn(4, 16, 16, generator=generator)]
        )
        for i in range(40)
    }
    records = tuple(Record(f"{i}", f"{i}") for i in range(40))
    latents = CachedLatents(moments, records, list(moments))
    sampled = torch.stack(
        [
            mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
            for mean, logvar in map(latents.moments, range(40))
        ]
    )
    scale = unit_scale(latents)
    assert (scale * sampled).std().item() == pytest.approx(1, rel=0.01)
    assert float(f"{scale:.5g}") == scale  # the value in config.json is the one that training used
    assert unit_scale(latents, most=10) == pytest.approx(scale, rel=0.1)


def test_psnr_matches_its_formula():
    """With an autoencoder that always answers mid-grey (0), the errors are the squares of the images."""
    torch.manual_seed(0)
    vae = VAE(configs.VAEConfig.tiny()).requires_grad_(False)
    vae.decoder.conv_out.weight.zero_()
    vae.decoder.conv_out.bias.zero_()
    greys = (255, 191, 0, 255)
    records = [
        Record(str(i), str(i), render=lambda size, grey=grey: np.full((size, size), grey, np.uint8))
        for i, grey in enumerate(greys)
    ]
    decibels = psnr(vae, image_pairs(records, [1, 2], Transform(16)), "cpu")
    errors = (191 / 127.5 - 1) ** 2, 1.0
    assert decibels == pytest.approx(sum(10 * math.log10(2**2 / e) for e in errors) / 2, rel=1e-5)
    assert decibels == pytest.approx((12.07 + 6.02) / 2, abs=0.01)


def test_the_large_shapes_are_the_published_ones():
    for name, unet, text, prediction in (
        ("sd15", peers.SD15_UNET, peers.SD15_TEXT, "epsilon"),
        ("sd21", peers.SD21_UNET, peers.SD21_TEXT, "v"),
    ):
        shape, published = SHAPES[name], config_json.unet_from_json(unet)
        assert shape.unet == dataclasses.replace(published, latent_size=shape.unet.latent_size)  # it follows --size
        assert shape.text_encoder == config_json.text_encoder_from_json(text)
        assert shape.vae == config_json.vae_from_json(peers.SD15_VAE)
        assert shape.schedule.prediction == prediction


# --- the decoder alone -----------------------------------------------------------------------------------------------
def decoder_flags(place, whole, **changes):
    values = {
        "decoder_of": whole / "model",
        "data": "textures:40",
        "size": 64,
        "decoder_steps": 4,
        "decoder_batch_size": 4,
        "warmup": 1,
        "sample_interval": 0,
        "device": "cpu",
    } | changes
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_the_decoder_of_a_model_trains_alone(place, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sharper"
    break_at(monkeypatch, VAE, 2, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        command.main([*decoder_flags(place, whole), "--out", str(out)])
    monkeypatch.undo()
    assert command.main(["--resume", str(out)]) == 0
    assert command.main([*decoder_flags(place, whole), "--out", str(tmp_path / "again")]) == 0
    assert files(out) == files(tmp_path / "again")
    ours, theirs = files(out), files(whole)
    assert [name for name in theirs if ours[name] != theirs[name]] == ["vae/diffusion_pytorch_model.safetensors"]
    new, old = tensors(out, "vae"), tensors(whole, "vae")
    changed = {name for name in old if not torch.equal(new[name], old[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    card = (out / "model" / "README.md").read_text()
    assert f"those of {whole / 'model'}" in card and "--data textures:40" in card and "| decoder: step" in card
    shown = capsys.readouterr().out
    with pytest.raises(InputError, match=f"pretrain --resume {out} continues it"):
        read_record(out)
    assert f"--base {whole / 'model'} --vae {out / 'model'}" in shown
    assert "stage 4 of 4, decoder alone: 4 steps of 4" in shown and "textures:40: 39 train" in shown


def test_the_decoder_of_a_model_that_has_changed_is_not_continued(place, whole, tmp_path):
    shutil.copytree(whole / "model", tmp_path / "model")
    out = tmp_path / "run"
    assert command.main([*decoder_flags(place, whole, decoder_of=tmp_path / "model"), "--out", str(out)]) == 0
    shutil.copytree(out / "model" / "vae", tmp_path / "model" / "vae", dirs_exist_ok=True)
    with pytest.raises(InputError, match="vae"):
        command.main(["--resume", str(out)])
    shutil.copytree(whole / "model", tmp_path / "moved")
    assert command.main(["--resume", str(out), "--decoder-of", str(tmp_path / "moved")]) == 0


def test_a_decoder_needs_no_captions_and_no_field_to_balance_its_own_data_by(place, whole, tmp_path):
    folder(tmp_path / "images", 40)
    for path in (tmp_path / "images").glob("metadata.*"):
        path.unlink()
    words = decoder_flags(place, whole, data=f"folder:{tmp_path / 'images'}", views="all")
    assert command.main([*words, "--out", str(tmp_path / "run")]) == 0
    changes = {"decoder_data": "textures:40", "balance": "sex", "prompt_template": "{sex}"}
    assert command.main([*flags(place, **changes), "--out", str(tmp_path / "other")]) == 0


def test_the_last_stage_can_have_data_of_its_own(place, whole, tmp_path):
    assert command.main([*flags(place, decoder_data="textures:40"), "--out", str(tmp_path / "run")]) == 0
    ours, theirs = files(tmp_path / "run"), files(whole)
    assert [name for name in theirs if ours[name] != theirs[name]] == ["vae/diffusion_pytorch_model.safetensors"]
    with pytest.raises(InputError, match="unknown data set 'texture'"):  # before the first stage
        command.main([*flags(place, decoder_data="texture"), "--out", str(tmp_path / "other")])
    assert not list((tmp_path / "other").rglob("log.jsonl"))


@pytest.mark.parametrize(("name", "value"), [("shape", "sd15"), ("vae_steps", 5), ("text_lr", 1), ("steps", 5)])
def test_settings_of_other_stages_are_refused_beside_decoder_of(place, whole, tmp_path, name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} would change nothing: --decoder-of"):
        command.main([*decoder_flags(place, whole, **{name: value}), "--out", str(tmp_path / "run")])


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "80/20"}, ("--split 80/20", "validate", "98/2")),
        ({"micro_batch": 0}, ("--micro-batch must be a number at least 1, got 0",)),
        ({"ema_decay": 1}, ("--ema-decay must be a number at least 0 and below 1, got 1.0",)),
        ({"size": 60}, ("multiple of 8", "60")),
        ({"data": "phantm"}, ("unknown data set 'phantm'", "procedural")),
        ({"limit": 1}, ("split is empty",)),
        ({"vae_steps": 0}, ("--vae-steps must be a number at least 1, got 0",)),
        ({"vae_crop": 4}, ("--vae-crop must be a number at least 8, got 4",)),
        ({"vae_crop": 20}, ("--vae-crop must be a multiple of 8", "got 20")),
        ({"vae_crop": 72}, ("--vae-crop", "--size 64", "got 72")),
        ({"balance": "nonsense"}, ("no record has a field",)),
    ],
)
def test_bad_flags_give_one_line_and_no_run(place, tmp_path, changes, words):
    with pytest.raises(InputError) as error:
        command.main([*flags(place, **changes), "--out", str(tmp_path / "run")])
    assert_says(error, *words)
    assert not list(tmp_path.rglob("log.jsonl"))
    Run(tmp_path / "run" / "autoencoder", {})  # the folder stays free for the right flags


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--shape", "huge"], "tiny"),
        (["--split", "90/10"], "98/2"),
        (["--dtype", "float16"], "bfloat16"),
        (["--steps", "many"], "--steps"),
        (["--vae-step", "4"], "unrecognized arguments: --vae-step 4"),  # flags are not abbreviated
        (["--compile"], "unrecognized arguments: --compile"),  # of train.py
    ],
)
def test_flags_that_argparse_refuses_exit_with_2_and_name_what_is_allowed(place, tmp_path, given, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main([*flags(place), *given, "--out", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1}, "--lr must be a number at least 0, got -1.0"),
        ({"steps": 0}, "--steps must be a number at least 1, got 0"),
        ({"text_steps": 0}, "--text-steps must be a number at least 1, got 0"),
        ({"decoder_lr": -1}, "--decoder-lr must be a number at least 0, got -1.0"),
        ({"decoder_batch_size": 0}, "--decoder-batch-size must be a number at least 1, got 0"),
    ],
)
def test_bad_flags_of_a_later_stage_are_found_before_the_first_begins(place, tmp_path, changes, words):
    with pytest.raises(InputError) as error:
        command.main([*flags(place, vae_steps=1, **changes), "--out", str(tmp_path / "run")])
    assert_says(error, words)
    assert not list(tmp_path.rglob("log.jsonl"))


def test_the_help_shows_the_defaults_that_a_run_has(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--size PIXELS of the images in pixels, a multiple of 8 (default: 128)",
        "(default: 98/2)",
        "--vae-steps N optimizer steps (default: 6000)",
        "--steps N optimizer steps (default: 10000)",
        "--warmup N steps in which the learning rate rises from 0 (default: 200)",
    ):
        assert words in text, words


def test_a_device_that_is_not_there_is_one_line(place, tmp_path):
    with pytest.raises(InputError) as error:
        command.main([*flags(place), "--device", "nowhere", "--out", str(tmp_path / "run")])
    assert_says(error, "nowhere")


def test_a_broken_file_is_found_before_training_and_can_be_left_out(place, tmp_path, capsys):
    folder(tmp_path / "data", 30)
    broken = sorted((tmp_path / "data").rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:200])
    given = flags(
        place,
        data=f"folder:{tmp_path / 'data'}",
        split="70/10/20",
        limit=30,
        vae_steps=1,
        text_steps=1,
        steps=1,
        decoder_steps=1,
    )
    with pytest.raises(InputError) as error:
        command.main([*given, "--out", str(tmp_path / "run")])
    assert_says(error, "1 of 30 images", broken.name, "--skip-bad")
    assert not list(tmp_path.rglob("log.jsonl"))
    assert command.main([*given, "--skip-bad", "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "decoder" / "config.json").read_text())["found"]["data"]
    assert found.startswith("29 images")
    table = tmp_path / "data" / "metadata.csv"
    table.write_text(table.read_text().replace("number 5", "number 500"))
    with pytest.raises(InputError) as error:
        command.main(["--resume", str(tmp_path / "run")])
    assert_says(error, "begun with data")
