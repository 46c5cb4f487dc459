"""DreamBooth: the samples of a batch and their weights, class images, resuming, and flags that are refused."""

import copy
import dataclasses
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from made_data import save
from made_runs import same_bits, samples, settings, small_model, training_config
from peers import assert_says, write_folder

import train
from minildm.adapters import METHODS, adapter_layers, add_adapter, fisher_probe
from minildm.errors import InputError
from minildm.images import read_parameters
from minildm.training import loop
from minildm.training.command_line import parse
from minildm.training.dreambooth import DreamBooth, DreamBoothSettings, sample_class_images, split_instances
from minildm.training.finetune import contexts_folder, finetune
from minildm.training.loss import sample_randomness
from minildm.training.machine import Machine
from minildm.training.run import Run

INSTANCE, CLASS = "a photo of sks chest x-ray", "a chest x-ray"


def prompted(n, prompt, seed=0):
    data = samples(n, seed)
    return dataclasses.replace(data, prompts=(prompt,) * n)


def task_for(model, config, n=5, n_class=7, validation=0, prior_weight=0.5, **options):
    class_images = prompted(n_class, CLASS, seed=2) if n_class else None
    data = prompted(n, INSTANCE), prompted(validation, INSTANCE, seed=1)
    return DreamBooth(model, *data, config, class_images, prior_weight, **options)


def dreambooth_run(folder, adapter="lora", resume=False, n=5, n_class=7, validation=0, prior_weight=0.5, **changes):
    """Train a small model. Returns: (model, State, Run)."""
    method_settings, config = settings(adapter, **changes)
    model, machine = small_model(), Machine(cache=folder.parent / "cache")
    run = Run(folder, {"seed": config.seed}, resume=resume, result=METHODS[adapter].result)
    run.begin()
    contexts = contexts_folder(method_settings, machine.cache)
    task = task_for(model, config, n, n_class, validation, prior_weight, contexts=contexts)
    state, _ = finetune(task, METHODS[adapter], method_settings, run, machine)
    return model, state, run


# --- batches ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("batch_size", "n_instance"), [(2, 1), (4, 2), (5, 3)])
def test_a_batch_holds_instance_then_class_samples_with_their_weights_and_ids(batch_size, n_instance):
    task = task_for(small_model(), training_config(batch_size=batch_size), prior_weight=0.7)
    for step, batch in enumerate(task.batches(0, 3)):
        n_class = batch_size - n_instance
        assert batch["id"].tolist() == list(range(step * batch_size, (step + 1) * batch_size))
        assert batch["prompt"] == [INSTANCE] * n_instance + [CLASS] * n_class
        expected = [batch_size / n_instance] * n_instance + [0.7 * batch_size / n_class] * n_class
        assert batch["weight"].tolist() == pytest.approx(expected)


def test_each_image_comes_equally_often_and_the_order_depends_on_seed_and_id_alone():
    task = task_for(small_model(), training_config(batch_size=4), n=4, n_class=6)
    batches = list(task.batches(0, 12))  # 24 samples of each kind: 6 epochs of 4 instances, 4 epochs of 6 class images
    seen = [[batch["mean"][part].flatten(1)[:, 0] for batch in batches] for part in (slice(0, 2), slice(2, 4))]
    for values, n in zip(seen, (4, 6)):
        _, counts = torch.cat(values).unique(return_counts=True)
        assert counts.tolist() == [24 // n] * n
        epochs = torch.cat(values).view(-1, n)
        assert not torch.equal(epochs[0], epochs[1])
    for late, again in zip(batches[7:], task.batches(7, 12), strict=True):
        assert all(torch.equal(late[name], again[name]) for name in ("id", "index", "mean", "weight"))


@pytest.mark.parametrize(("n_class", "prior_weight"), [(0, 1.0), (0, 0.0)])
def test_without_class_images_every_sample_is_an_instance_of_weight_1(n_class, prior_weight):
    task = task_for(small_model(), training_config(), n_class=n_class, prior_weight=prior_weight)
    (batch,) = task.batches(0, 1)
    assert batch["prompt"] == [INSTANCE] * 4 and batch["weight"].tolist() == [1.0] * 4


def test_epochs_are_passes_over_the_instance_images():
    config = training_config(steps=None, epochs=6, validation_interval=None)  # batches of 4
    assert task_for(small_model(), config, n=6).steps == 18  # two instance samples in each
    assert task_for(small_model(), config, n=6, n_class=0).steps == 9
    assert task_for(small_model(), config, n=6, validation=2).validation_interval == 42  # 14 epochs of 3 steps


def test_sheets_show_the_instance_and_the_class():
    task = task_for(small_model(), training_config(samples=3))
    assert task.sheet_prompts == [INSTANCE, CLASS, INSTANCE]
    assert task_for(small_model(), training_config(samples=2), n_class=0).sheet_prompts == [INSTANCE, INSTANCE]


# --- the loss --------------------------------------------------------------------------------------------------------
def loss_by_hand(model, n_instance, prior_weight, batch):
    """The mean squared error of each prediction; the mean over instances + prior_weight * that over class images."""
    randomness = sample_randomness(0, "sample", batch["id"], (4, 8, 8), 1000)
    latents = 0.18215 * (batch["mean"] + batch["logvar"].exp().sqrt() * randomness.latent_noise)
    alpha_bar = model.schedule.alphas_cumprod[randomness.timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * randomness.noise
    with torch.no_grad():
        prediction = model.unet(noisy, randomness.timesteps, model.encode_prompt(list(batch["prompt"])))
    losses = F.mse_loss(prediction, randomness.noise, reduction="none").mean((1, 2, 3))
    return (losses[:n_instance].mean() + prior_weight * losses[n_instance:].mean()).item()


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3])
@pytest.mark.parametrize(
    ("adapter", "targets"), [("lora", ("unet",)), ("selora", ("unet", "text_encoder")), ("full", ("unet",))]
)
def test_the_loss_is_the_instance_mean_plus_the_weighted_class_mean(tmp_path, adapter, targets, micro_batch):
    changes = {"batch_size": 5, "caption_dropout": 0.0, "micro_batch": micro_batch, "targets": targets}
    _, _, run = dreambooth_run(tmp_path / "run", adapter, steps=2, lr=0.0, **changes)
    logged = [entry["loss"] for entry in run.entries() if "loss" in entry]
    model = small_model()
    batches = task_for(model, training_config(batch_size=5)).batches(0, 2)
    expected = [loss_by_hand(model, 3, 0.5, batch) for batch in batches]
    assert logged == pytest.approx(expected, rel=1e-4 if adapter == "selora" else 2e-3)  # cached contexts: float16


def test_seloras_fisher_scores_are_those_of_weighted_samples():
    """Against one backward a sample through layers that really have the tested row, with unequal weights."""
    model = small_model()
    add_adapter(model, "selora", rank=2)
    for i, layer in enumerate(adapter_layers(model).values()):
        torch.nn.init.normal_(layer.lora_B[0][:, :2], std=0.05, generator=torch.Generator().manual_seed(i))
    task = task_for(model, training_config(batch_size=5, caption_dropout=0.0), prior_weight=3.0)
    (batch,) = task.batches(0, 1)
    assert len(batch["weight"].unique()) == 2
    with fisher_probe(model, batch_size=5) as probe:
        for part in (slice(0, 2), slice(2, 5)):  # cut across the two kinds
            piece = {name: values[part] for name, values in batch.items()}
            ((piece["weight"] * task.losses(piece)).sum() / 5).backward()
    scores = probe.scores()

    expanded = copy.deepcopy(model)
    layers = adapter_layers(expanded)
    for path, layer in layers.items():
        A, B = layer.factors()
        layer.A = torch.nn.Parameter(torch.cat([A, probe.expansion(path).t()]))  # (3, in)
        layer.B = torch.nn.Parameter(torch.cat([B, torch.zeros(len(B), 1)], dim=1))  # (out, 3)
        layer.forward = lambda x, layer=layer: layer.base(x) + x @ layer.A.t() @ layer.B.t()
    task = task_for(expanded, task.config, prior_weight=3.0)
    squares = {path: torch.zeros(2, dtype=torch.float64) for path in layers}
    for i in range(5):
        expanded.zero_grad()
        sample = {name: values[i : i + 1] for name, values in batch.items()}
        (sample["weight"] * task.losses(sample)).sum().backward()
        for path, layer in layers.items():
            a, b = layer.A.grad.double().square(), layer.B.grad.double().square()
            squares[path] += torch.stack([a[:2].sum() + b[:, :2].sum(), a.sum() + b.sum()]) / 5
    for path, score in scores.items():
        assert score == pytest.approx(squares[path].tolist(), rel=1e-4, abs=1e-30), path


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapter", METHODS)
def test_every_method_learns_stops_and_continues_bit_for_bit(tmp_path, adapter, monkeypatch):
    lr = 3e-2 if adapter == "adalora" else 3e-3  # while lora_E is small, its dW moves less per step
    changes = {"steps": 12, "lr": lr, "expand_threshold": 1.0, "n": 3, "validation": 2}
    _, whole, run = dreambooth_run(tmp_path / "whole", adapter, **changes)
    validation = [entry["validation"] for entry in run.entries() if "validation" in entry]
    assert min(validation) < validation[0]
    ordinary = loop.train_step

    def step_with_signal(state, *arguments):
        if state.step == 7:
            signal.raise_signal(signal.SIGINT)
        return ordinary(state, *arguments)

    monkeypatch.setattr(loop, "train_step", step_with_signal)
    with pytest.raises(KeyboardInterrupt):
        dreambooth_run(tmp_path / "parts", adapter, **changes)
    monkeypatch.setattr(loop, "train_step", ordinary)
    _, parts, resumed = dreambooth_run(tmp_path / "parts", adapter, resume=True, **changes)
    assert whole.best == parts.best and list(whole.trained) == list(parts.trained)
    assert all(torch.equal(whole.trained[name], parts.trained[name]) for name in whole.trained)
    losses = [[entry.get("loss") for entry in each.entries()] for each in (run, resumed)]
    assert losses[0] == losses[1]


def test_workers_change_nothing(tmp_path):
    task = task_for(small_model(), training_config())
    reading_ahead = task_for(small_model(), training_config(), workers=2)
    for a, b in zip(task.batches(0, 3), reading_ahead.batches(0, 3), strict=True):
        assert a["prompt"] == b["prompt"] and all(torch.equal(a[name], b[name]) for name in ("id", "mean", "weight"))


def test_prior_weight_0_trains_like_no_class_images_at_all(tmp_path):
    """The settings then ask for none, so the whole batch is instance images."""
    assert DreamBoothSettings(INSTANCE, CLASS, prior_weight=0.0).n_class_images == 0
    model, *_ = dreambooth_run(tmp_path / "a", n_class=0, prior_weight=0.0, steps=3)
    other, *_ = dreambooth_run(tmp_path / "b", n_class=0, prior_weight=1.0, steps=3)
    assert same_bits(model, other)


# --- class images ----------------------------------------------------------------------------------------------------
def class_images(model, cache, n=6, prompt=CLASS, size=64, seed=0):
    wanted = DreamBoothSettings(INSTANCE, prompt, n)
    return sample_class_images(model, wanted, size, seed, cache)


@pytest.fixture
def counted(monkeypatch):
    """A small model that counts its calls of `sample`; with ``fails_at`` it is interrupted at that call."""
    model = small_model()
    ordinary, model.calls, model.fails_at = model.sample, [], None

    def sample(prompts, **options):
        model.calls.append((options["seed"], len(prompts)))
        if len(model.calls) == model.fails_at:
            raise KeyboardInterrupt
        return ordinary(prompts, **options | {"steps": 3})

    monkeypatch.setattr(model, "sample", sample)
    return model


def test_class_images_are_sampled_once_and_reused(counted, tmp_path):
    made = class_images(counted, tmp_path)
    assert [n for _, n in counted.calls] == [4, 2]
    assert len(made.records) == 6 and set(made.prompts) == {CLASS}
    assert len({record.path.read_bytes() for record in made.records}) == 6  # all differ
    assert read_parameters(made.records[5].path).startswith(f"{CLASS}\nSteps: 25, Sampler: DPM++ 2M, CFG scale: 3.0")
    again = class_images(counted, tmp_path)
    assert len(counted.calls) == 2 and again.fingerprint == made.fingerprint
    assert made.latents.moments(0)[0].shape == (4, 8, 8)


def test_class_images_continue_after_an_interruption_with_the_same_bytes(counted, tmp_path):
    whole = class_images(counted, tmp_path / "whole")
    counted.calls.clear()
    counted.fails_at = 2
    with pytest.raises(KeyboardInterrupt):
        class_images(counted, tmp_path / "parts")
    (folder,) = (tmp_path / "parts").glob("class-images-*")
    assert len(list(folder.glob("*.png"))) == 4
    (folder / "00002.png").unlink()  # as if it had been interrupted within a batch
    counted.fails_at = None
    parts = class_images(counted, tmp_path / "parts")
    assert [n for _, n in counted.calls] == [4, 2, 4, 2]
    for a, b in zip(whole.records, parts.records, strict=True):
        assert a.path.read_bytes() == b.path.read_bytes()


def test_class_images_of_another_prompt_seed_number_size_or_base_are_others(counted, tmp_path):
    folders = set()
    other_base = small_model(seed=3)
    other_base.sample = lambda prompts, **options: type(counted).sample(other_base, prompts, **options | {"steps": 3})
    scaled = small_model()
    vae = dataclasses.replace(scaled.config.vae, scaling_factor=0.5)
    scaled.config = dataclasses.replace(scaled.config, vae=vae)
    scaled.sample = lambda prompts, **options: type(counted).sample(scaled, prompts, **options | {"steps": 3})
    for model, changes in (
        (counted, {}),
        (counted, {"prompt": "a hand"}),
        (counted, {"seed": 1}),
        (counted, {"n": 5}),
        (counted, {"size": 72}),
        (other_base, {}),
        (scaled, {}),
    ):
        folders.add(class_images(model, tmp_path, **changes).records[0].path.parent)
    assert len(folders) == 7
    first, second = (class_images(counted, tmp_path, seed=seed).records for seed in (0, 1))
    assert not {record.path.read_bytes() for record in first} & {record.path.read_bytes() for record in second}


def test_without_a_class_prompt_or_with_prior_weight_0_no_image_is_sampled(counted, tmp_path):
    for wanted in (DreamBoothSettings(INSTANCE), DreamBoothSettings(INSTANCE, CLASS, prior_weight=0.0)):
        assert sample_class_images(counted, wanted, 64, 0, tmp_path) is None
    assert not counted.calls


# --- settings and splits ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--class-prompt", CLASS], ("--class-prompt needs --instance-prompt",)),
        (["--instance-prompt", INSTANCE, "--class-images", "9"], ("--class-images needs --class-prompt",)),
        (["--instance-prompt", INSTANCE, "--prior-weight", "2"], ("--prior-weight needs --class-prompt",)),
        (["--prior-weight", "0"], ("--prior-weight needs --instance-prompt",)),
        (["--instance-prompt", INSTANCE, "--prompt-template", "full"], ("--instance-prompt", "--prompt-template")),
        (["--instance-prompt", " "], ("--instance-prompt is empty",)),
        (["--instance-prompt", INSTANCE, "--class-prompt", ""], ("--class-prompt is empty",)),
        (["--instance-prompt", CLASS, "--class-prompt", CLASS], ("are the same", CLASS, "rare word")),
        (["--instance-prompt", INSTANCE, "--class-prompt", CLASS, "--prior-weight", "-1"], ("--prior-weight",)),
        (["--instance-prompt", INSTANCE, "--class-prompt", CLASS, "--class-images", "0"], ("--class-images",)),
        (["--instance-prompt", INSTANCE, "--class-prompt", CLASS, "--batch-size", "1"], ("--batch-size 1", "2")),
    ],
)
def test_flags_that_make_no_sense_together_are_refused_by_name(given, words):
    with pytest.raises(InputError) as error:
        parse(given)
    assert_says(error, *words)


@pytest.mark.parametrize(
    "given",
    [
        ["--instance-prompt", INSTANCE, "--caption-dropout", "0"],
        ["--instance-prompt", INSTANCE, "--prior-weight", "0"],
        ["--instance-prompt", INSTANCE, "--class-prompt", CLASS, "--class-images", "9", "--prior-weight", "0"],
        ["--instance-prompt", INSTANCE, "--preset", "selora-iu"],  # the preset's template gives way
    ],
)
def test_other_flags_are_accepted_together(given):
    assert parse(given).dreambooth.instance_prompt == INSTANCE


def test_the_defaults_are_200_class_images_of_weight_1_and_the_record_says_what_was_given():
    plan = parse(["--instance-prompt", INSTANCE, "--class-prompt", CLASS])
    assert (plan.dreambooth.n_class_images, plan.dreambooth.weight) == (200, 1.0)
    assert plan.settings["class_prompt"] == CLASS and plan.settings["class_images"] is None
    assert parse([]).dreambooth == DreamBoothSettings()


@pytest.mark.parametrize("preset", ["80/16/4", "98/2"])
def test_images_too_few_for_a_split_are_all_trained_on_and_the_user_is_told(preset, capsys):
    assert split_instances(samples(5).records, preset, 0) == {"train": [0, 1, 2, 3, 4]}
    assert_says(capsys.readouterr().out.strip(), "5 images are too few", preset, "without validation")


def test_enough_images_are_split_as_in_fine_tuning():
    sizes = {name: len(part) for name, part in split_instances(samples(25).records, "80/16/4", 0).items()}
    assert sizes == {"train": 20, "validation": 4, "test": 1}
    assert {name: len(part) for name, part in split_instances(samples(5).records, "80/20", 0).items()} == {
        "train": 4,
        "test": 1,
    }


# --- train.py --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and images without captions: a few and many."""
    root = tmp_path_factory.mktemp("dreambooth")
    write_folder(small_model(), root / "base")
    for name, n in (("few", 5), ("many", 25)):
        for i in range(n):
            save(root / name / f"{i}.png", seed=i)
    return root


def flags(place, data="few", class_images="3"):
    return [
        *("--base", str(place / "base"), "--data", f"folder:{place / data}", "--cache", str(place / "cache")),
        *("--steps", "4", "--batch-size", "4", "--save-interval", "2", "--device", "cpu", "--adapter", "lora"),
        *("--instance-prompt", INSTANCE, "--class-prompt", CLASS, "--class-images", class_images),
    ]


def test_five_images_without_captions_train_and_the_run_can_be_resumed(place, tmp_path, capsys, monkeypatch):
    assert train.main([*flags(place), "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    for words in (
        "5 images are too few for --split 80/16/4",
        f"class images: 3 of {CLASS!r}",
        "5 train images; 4 steps of 4",
        "no validation split: adapter.safetensors holds the weights of the last step",
        f"next: python sample.py '{INSTANCE}'",
    ):
        assert words in said, words
    found = json.loads((tmp_path / "whole" / "config.json").read_text())["found"]
    assert found["class_images"].startswith("3 images, ") and len(found["splits"]["train"]) == 5
    ordinary = loop.train_step

    def step_with_signal(state, *arguments):
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)
        return ordinary(state, *arguments)

    monkeypatch.setattr(loop, "train_step", step_with_signal)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags(place), "--out", str(tmp_path / "parts")])
    monkeypatch.setattr(loop, "train_step", ordinary)
    assert train.main(["--resume", str(tmp_path / "parts")]) == 0
    whole, parts = (tmp_path / name / "adapter.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    with pytest.raises(InputError) as error:
        train.main(["--resume", str(tmp_path / "parts"), "--class-images", "2"])
    assert_says(error, "class_images = 3, not 2")


def test_held_out_instance_images_are_validated_on(place, tmp_path, capsys):
    assert train.main([*flags(place, "many"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "20 train, 4 validation, 1 test images" in said and "validation loss: " in said
