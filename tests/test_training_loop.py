"""The loop: it learns, it grows, it stops and goes on, and it does not fall over."""

import dataclasses
import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from benchmarks.trace_calls import selora_training_step, trace
from made_runs import factors, same_bits, settings, short_run, small_model, training_config
from peers import assert_says, random_model, relative_error, single_file_config
from safetensors.torch import load_file, save_file
from torch import nn

import minildm
from minildm.adapters import METHODS, adapter_layers, merge_adapter, merge_file
from minildm.adapters.method import Method
from minildm.adapters.rank_map import rank_map
from minildm.errors import InputError
from minildm.files import written_beside
from minildm.training import finetune, loop
from minildm.training.finetune import summary
from minildm.training.run import Run
from minildm.training.state import State
from minildm.training.task import Task

ROOT = Path(__file__).resolve().parent.parent


def test_the_loss_falls_ranks_grow_and_all_is_logged(tmp_path):
    model, state, run, method = short_run(tmp_path / "run", steps=40, lr=3e-3, expand_threshold=1.3)
    entries = run.entries()
    validation = [entry["validation"] for entry in entries if "validation" in entry]
    assert min(validation) < 0.8 * validation[0]
    assert state.best[0] == min(validation)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 41))
    assert all({"lr", "grad_norm", "seconds", "memory_mb"} <= entry.keys() for entry in steps)
    tested = [entry for entry in steps if "fisher_ratios" in entry]
    assert [entry["step"] for entry in tested] == list(range(4, 41, 4))
    layers = adapter_layers(model)
    ranks = dict.fromkeys(layers, 1)
    for entry in tested:
        assert entry["fisher_ratios"].keys() == entry["ranks"].keys() == layers.keys()
        for path, ratio in entry["fisher_ratios"].items():
            grew = ratio is not None and ratio >= 1.3
            assert entry["ranks"][path] == ranks[path] + grew
        ranks = entry["ranks"]
    assert ranks == {path: layer.rank for path, layer in layers.items()}
    assert len(set(ranks.values())) > 1  # unevenly
    text = summary(state, method, run)
    assert "validation loss" in text
    assert rank_map(ranks) in text


def test_the_kept_adapter_is_the_best_on_validation(tmp_path, monkeypatch):
    """Validation is told to be best in the middle of the run: at 0, 6, 12 and 18 steps it gives 4, 2, 1 and 3."""
    changes = {"steps": 18, "lr": 0.5, "warmup": 18}
    losses = iter([4.0, 2.0, 1.0, 3.0])
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Finetuning, "validate", lambda task: next(losses))
        _, state, run, _ = short_run(tmp_path / "run", **changes)
    assert state.best == (1.0, 12)
    best = 12
    plain = small_model()
    about = merge_file(plain, run.result)
    assert about["kind"] == "selora" and about["settings"]["expand_interval"] == 4 and about["settings"]["lr"] == 0.5
    assert "chest" not in json.dumps(about)  # no captions in an adapter's file
    stopped, *_ = short_run(tmp_path / "stopped", **changes | {"steps": best, "validation": 0})
    merge_adapter(stopped)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, stopped.state_dict()[name]), name


@pytest.mark.parametrize("changes", [{"max_rank": 2}, {"max_parameters": 9000}])
def test_growth_is_capped(tmp_path, changes):
    model, *_ = short_run(tmp_path / "run", steps=12, expand_interval=2, expand_threshold=1.0, **changes)
    ranks = [layer.rank for layer in adapter_layers(model).values()]
    used = sum(tensor.numel() for tensor in factors(model))
    if "max_rank" in changes:
        assert set(ranks) == {2}
    else:
        assert 8000 < used <= 9000


def test_no_layer_grows_beyond_its_width(tmp_path):
    model, *_ = short_run(tmp_path / "run", steps=4, rank=30, expand_interval=1, expand_threshold=1.0, validation=0)
    ranks = [
        (layer.rank, min(layer.base.in_features, layer.base.out_features)) for layer in adapter_layers(model).values()
    ]
    assert all(rank == min(34, width) for rank, width in ranks)
    assert {width for _, width in ranks} > {32}


def assert_same_training(state, other, atol):
    assert list(state.trained) == list(other.trained)
    for name, parameter in state.trained.items():
        torch.testing.assert_close(parameter, other.trained[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 3])  # 3 does not divide the batch size of 4
@pytest.mark.parametrize("adapter", METHODS)
def test_micro_batches_of_any_cut_equal_the_whole_batch(tmp_path, adapter, micro_batch):
    lr = 1e-5 if adapter == "full" else 1e-3  # Adam makes a step of lr even of a gradient that is rounding
    _, whole, a, _ = short_run(tmp_path / "a", steps=4, adapter=adapter, lr=lr)
    _, parts, b, _ = short_run(tmp_path / "b", steps=4, adapter=adapter, lr=lr, micro_batch=micro_batch)
    assert_same_training(whole, parts, 2e-5)
    ratios = [[entry["fisher_ratios"] for entry in run.entries() if "fisher_ratios" in entry] for run in (a, b)]
    assert len(ratios[0]) == len(ratios[1]) == (adapter == "selora")
    for one, other in zip(*ratios):
        assert one == pytest.approx(other, rel=1e-4)
    losses = [[entry["loss"] for entry in run.entries() if "loss" in entry] for run in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_workers_change_nothing(tmp_path):
    model, *_ = short_run(tmp_path / "a", steps=3)
    other, *_ = short_run(tmp_path / "b", steps=3, workers=2)
    assert same_bits(model, other)


@pytest.mark.parametrize("kind", ["selora", "lora", "dylora"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, kind, monkeypatch):
    """Ctrl-C twice, at steps that are no save's; growth into a second block lies on the way."""
    changes = {"adapter": kind, "rank": 7, "steps": 16, "expand_interval": 3, "warmup": 4, "lr_schedule": "cosine"}
    model, state, run, _method = short_run(tmp_path / "whole", **changes)
    ordinary = loop.train_step

    def press_at(*steps):
        def step_with_signal(state, *arguments):
            if state.step in steps:
                signal.raise_signal(signal.SIGINT)
            return ordinary(state, *arguments)

        monkeypatch.setattr(loop, "train_step", step_with_signal)

    for resume, at in ((False, 3), (True, 8)):
        press_at(at)
        with pytest.raises(KeyboardInterrupt):
            short_run(tmp_path / "parts", resume=resume, **changes)
    monkeypatch.setattr(loop, "train_step", ordinary)
    other, resumed, parts, _ = short_run(tmp_path / "parts", resume=True, **changes)
    assert same_bits(model, other)
    assert (state.step, state.best) == (resumed.step, resumed.best)
    assert run.result.read_bytes() == parts.result.read_bytes()
    for a, b in zip(run.entries(), parts.entries(), strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "memory_mb")} == {
            k: v for k, v in b.items() if k not in ("seconds", "memory_mb")
        }
    if kind == "selora":
        assert max(layer.rank for layer in adapter_layers(model).values()) > 8


def test_a_run_that_died_before_its_first_save_begins_anew(tmp_path, monkeypatch):
    model, *_ = short_run(tmp_path / "whole", steps=4)

    def die(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(ZeroDivisionError):
        short_run(tmp_path / "run", steps=4)
    monkeypatch.undo()
    (tmp_path / "run" / "last" / "state.pt").unlink()
    other, _, run, _ = short_run(tmp_path / "run", resume=True, steps=4)
    assert same_bits(model, other)
    assert [entry["step"] for entry in run.entries() if "loss" in entry] == [1, 2, 3, 4]


# --- when things go wrong --------------------------------------------------------------------------------------------
def bad_at(monkeypatch, numbers):
    ordinary = finetune.denoising_losses

    def losses(*arguments):
        out = ordinary(*arguments)
        return out * float("nan") if calls.pop(0) in numbers else out

    calls = list(range(1000))
    monkeypatch.setattr(finetune, "denoising_losses", losses)


@pytest.mark.parametrize("adapter", METHODS)
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch, adapter):
    bad_at(monkeypatch, (3, 4, 8))  # call 0 is the forecast's
    _, state, run, _ = short_run(tmp_path / "run", adapter=adapter, steps=10, validation=0)
    assert (state.step, state.skipped, state.bad_steps) == (10, 3, 0)
    if adapter == "lora":
        assert set(state.optimizer.ages) == {7}
    assert all(parameter.isfinite().all() for parameter in state.trained.values())
    assert [entry["skipped"] for entry in run.entries() if "skipped" in entry] == [1, 2, 3]


def test_a_learning_rate_that_blows_up_stops_with_the_last_good_state_kept(tmp_path):
    with pytest.raises(InputError) as error:
        short_run(tmp_path / "run", steps=60, lr=1e30, max_bad_steps=5)
    assert_says(error, "not finite at 5 steps in a row", "learning rate", "1e+30", "last")
    run = Run(tmp_path / "run", {"seed": 0}, resume=True)
    saved = run.load_state()
    assert all(tensor.isfinite().all() for tensor in saved["trained"].values())
    assert saved["bad_steps"] == 0
    assert merge_file(small_model(), run.result)["kind"] == "selora"


def test_a_full_disk_leaves_the_older_state(tmp_path, monkeypatch):
    ordinary, saves = torch.save, []

    def save(state, path):
        ordinary(state, path)
        saves.append(state["step"])
        if len(saves) == 3:  # steps 0, 5, and now 10: the file beside is there, half written
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError) as error:
        short_run(tmp_path / "run", steps=12)
    assert_says(error, "No space left", "make room", "--resume")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "last").iterdir()] == ["state.pt"]
    assert torch.load(tmp_path / "run" / "last" / "state.pt", weights_only=True)["step"] == 5
    resumed, *_ = short_run(tmp_path / "run", resume=True, steps=12)
    whole, *_ = short_run(tmp_path / "whole", steps=12)
    assert same_bits(resumed, whole)


def test_out_of_memory_names_the_flags_that_help(tmp_path, monkeypatch):
    def losses(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "train_step", losses)
    with pytest.raises(InputError) as error:
        short_run(tmp_path / "run")
    assert_says(error, "out of memory", "--micro-batch 2", "--checkpointing", "--dtype bfloat16", "--size")


def test_a_batch_larger_than_the_data_is_said_and_works(tmp_path, capsys):
    _, state, *_ = short_run(tmp_path / "run", n=3, steps=3)
    assert state.step == 3
    assert_says(capsys.readouterr().out.splitlines()[0], "--batch-size 4", "3 training images", "repeat")


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no image to train on"):
        short_run(tmp_path / "run", n=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expand_threshold": 0.9}, "--expand-threshold must be a number at least 1"),
        ({"rank": 0}, "--rank must be a number at least 1"),
        ({"micro_batch": 0}, "--micro-batch"),
        ({"lr": float("nan")}, "--lr"),
        ({"batch_size": 0}, "--batch-size"),
        ({"epochs": 0}, "--epochs"),
        ({"alpha": float("inf")}, "--alpha"),
        ({"ema_decay": 1.0}, "--ema-decay must be a number at least 0 and below 1"),
        ({"targets": ("vae",)}, "unet, text_encoder"),
        ({"caption_dropout": 1.5}, "caption-dropout"),
        ({"layers": "all"}, "all-linear"),
        ({"expand_criterion": "x"}, "expected"),
        ({"warmup": -1}, "--warmup"),
    ],
)
def test_settings_out_of_range_are_named(changes, words):
    with pytest.raises(InputError, match=words) as error:
        settings(**changes)
    assert_says(error)


def test_a_rank_above_a_layers_width_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"rank must be in \[1, 32\]"):
        short_run(tmp_path / "run", rank=4000)


# --- precisions and targets ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapter", ["lora", "selora", "adalora", "dylora"])
@pytest.mark.parametrize("layers", ["all-linear", "paper"])
def test_the_loss_is_scaled_whenever_the_base_is_float16(adapter, layers):
    method_settings, config = settings(adapter, layers=layers)
    for dtype in (torch.float16, torch.bfloat16):
        method = METHODS[adapter](_cast(dtype), method_settings, 10, 0)
        assert (State(method, config).loss_scale > 1) == (dtype == torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_trains_a_float32_adapter(tmp_path, dtype):
    model = small_model()
    model.unet.to(dtype)
    model.text_encoder.to(dtype)
    model, state, run, _method = short_run(tmp_path / "run", model=model, steps=24, lr=3e-3)
    validation = [entry["validation"] for entry in run.entries() if "validation" in entry]
    assert min(validation) < validation[0]
    assert {tensor.dtype for tensor in factors(model)} == {torch.float32}
    assert (state.loss_scale > 1) == (dtype == torch.float16)
    full, *_ = short_run(tmp_path / "full", steps=1, lr=3e-3)
    half, *_ = short_run(tmp_path / "half", steps=1, lr=3e-3, model=_cast(dtype))
    # Adam's first step is the sign of the gradient: the precisions agree on most of them
    agreeing = [(a.sign() == b.sign()).float().mean().item() for a, b in zip(factors(full), factors(half))]
    assert sum(agreeing) / len(agreeing) > 0.95


def _cast(dtype):
    model = small_model()
    model.unet.to(dtype)
    model.text_encoder.to(dtype)
    return model


def test_a_frozen_text_encoder_runs_once_a_prompt(tmp_path):
    model, prompts = small_model(), []
    model.text_encoder.register_forward_hook(lambda network, inputs, output: prompts.extend(inputs[0]))
    model, *_ = short_run(tmp_path / "run", model=model, steps=6, targets=("unet",))
    assert len(prompts) == 13  # twelve images, four of them the validation's, too, and the empty prompt
    assert all(path.startswith("unet.") for path in adapter_layers(model))


@pytest.mark.parametrize("adapter", METHODS)
def test_checkpointing_changes_no_bit(tmp_path, adapter):
    _, state, *_ = short_run(tmp_path / "a", adapter=adapter, steps=5)
    _, again, *_ = short_run(tmp_path / "b", adapter=adapter, steps=5, checkpointing=True)
    assert_same_training(state, again, 0)


def test_sample_sheets_come_at_their_steps_and_change_nothing(tmp_path):
    model, *_ = short_run(tmp_path / "a", steps=6)
    other, _, run, _ = short_run(tmp_path / "b", steps=6, sample_interval=4, samples=2)
    assert sorted(path.name for path in (run.folder / "samples").iterdir()) == [
        "step-000000.png",
        "step-000004.png",
        "step-000006.png",
    ]
    assert same_bits(model, other)


class Regression(Task):
    """A task of its own: fit a matrix."""

    batch_size = 4

    def __init__(self, network, truth):
        self.network, self.truth = network, truth

    def batches(self, first_step, last_step):
        for step in range(first_step, last_step):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            yield {"id": torch.arange(4 * step, 4 * step + 4), "weight": torch.ones(4), "x": x}

    def losses(self, batch):
        return (self.network(batch["x"]) - batch["x"] @ self.truth.t()).square().mean(1)


class Whole(Method):
    """All parameters of a module."""

    def save(self, path, about):
        torch.save(self.model.state_dict(), path)


def new_run(folder, **options):
    run = Run(folder, {}, **options)
    run.begin()
    return run


def test_the_loop_trains_any_parameters_on_any_task(tmp_path):
    torch.manual_seed(0)
    network, truth = nn.Linear(3, 2), torch.randn(2, 3)
    run, config = new_run(tmp_path / "run"), training_config(lr=3e-2)
    state = loop.train(Whole(network, None, 400, 0), Regression(network, truth), config, run, 400)
    assert state.step == 400
    torch.testing.assert_close(network.weight.data, truth, rtol=0, atol=1e-2)
    assert run.result.exists()


def test_weights_scale_what_each_sample_contributes(tmp_path):
    class Weighted(Regression):
        def batches(self, first_step, last_step):
            for batch in super().batches(first_step, last_step):
                yield batch | {"weight": torch.tensor([0.0, 2.0, 1.0, 0.5])}

    torch.manual_seed(0)
    network, truth = nn.Linear(3, 2), torch.randn(2, 3)
    task = Weighted(network, truth)
    batch = next(task.batches(0, 1))
    expected = (batch["weight"] * task.losses(batch)).sum().item() / 4
    for micro_batch in (None, 3):
        run = new_run(tmp_path / f"run{micro_batch}")
        loop.train(Whole(network, None, 1, 0), task, training_config(lr=0, micro_batch=micro_batch), run, 1)
        assert run.entries()[-1]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_penalty_counts_once_per_step_and_not_per_micro_batch(tmp_path):
    class Shrinking(Whole):
        def penalty(self):
            return 10 * self.model.weight.square().sum()

    norms = []
    for micro_batch in (4, 1):
        torch.manual_seed(0)
        network, truth = nn.Linear(3, 2), torch.randn(2, 3)
        run = new_run(tmp_path / f"run{micro_batch}")
        config = training_config(lr=3e-3, micro_batch=micro_batch, clip=0)
        loop.train(Shrinking(network, None, 1, 0), Regression(network, truth), config, run, 1)
        entry = run.entries()[-1]
        assert entry["penalty"] > 0
        norms.append(entry["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_loop_names_no_method():
    text = (ROOT / "minildm" / "training" / "loop.py").read_text().lower()
    assert not [word for word in ("selora", "lora", "fisher", "rank") if word in text]


def test_a_selora_training_step_with_its_test_crosses_twelve_files_and_ten_nested_calls():
    files, depth, stack = trace(selora_training_step())
    assert len(files) <= 12, sorted(files)
    assert depth <= 10, stack


class BitFit(Method):
    """Only biases are trained (Ben Zaken et al. 2022, arXiv:2106.10199): a method in a few lines, for no other file."""

    result = "biases.safetensors"

    def __init__(self, model, settings, steps, seed):
        super().__init__(model, settings, steps, seed)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.startswith(("unet.", "text_encoder.")) and name.endswith(".bias"):
                parameter.requires_grad_(True)

    def save(self, path, about):
        with written_beside(path) as beside:
            save_file({name: parameter.data.contiguous() for name, parameter in self.trained().items()}, beside)


def test_a_sixth_method_takes_a_few_lines_and_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "bitfit", BitFit)
    base = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    model, state, run, _ = short_run(tmp_path / "run", adapter="bitfit", lr=3e-3)
    validation = [entry["validation"] for entry in run.entries() if "validation" in entry]
    assert min(validation) < validation[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed and all(name.endswith(".bias") for name in changed)
    assert load_file(run.result).keys() == state.trained.keys()


@pytest.mark.parametrize("adapter", [*METHODS, "bitfit"])
def test_every_method_stops_and_continues_bit_for_bit(tmp_path, adapter, monkeypatch):
    monkeypatch.setitem(METHODS, "bitfit", BitFit)
    changes = {"adapter": adapter, "steps": 9, "expand_interval": 2, "ema_decay": 0.9, "lr": 1e-3}
    changes |= {"prune_interval": 1, "final_share": 0.2}  # AdaLoRA stops while it prunes
    _, whole, *_ = short_run(tmp_path / "whole", **changes)
    ordinary = loop.train_step

    def step_with_signal(state, *arguments):
        if state.step == 6:
            signal.raise_signal(signal.SIGINT)
        return ordinary(state, *arguments)

    monkeypatch.setattr(loop, "train_step", step_with_signal)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "parts", **changes)
    monkeypatch.setattr(loop, "train_step", ordinary)
    _, parts, *_ = short_run(tmp_path / "parts", resume=True, **changes)
    assert whole.step == parts.step == 9 and whole.best == parts.best
    assert list(whole.trained) == list(parts.trained)
    for name, parameter in whole.trained.items():
        assert torch.equal(parameter, parts.trained[name]), name
        assert torch.equal(whole.average.values[name], parts.average.values[name]), name


def test_the_moving_average_of_a_grown_row_starts_at_its_value(tmp_path):
    """Within a block as well as in a new one: the average of the tested row K is K, not 0."""
    _model, state, _, method = short_run(
        tmp_path / "run", steps=4, rank=7, expand_interval=2, expand_threshold=1.0, ema_decay=0.99, lr=1e-6
    )
    for path, layer in method.layers.items():
        assert layer.rank == 9  # the eighth row is in the first block, the ninth in a new one
        for block, rows in ((0, 8), (1, 1)):
            live = layer.lora_A[block][:rows].detach()
            average = state.average.values[f"{path}.lora_A.{block}"][:rows]
            torch.testing.assert_close(average, live, rtol=1e-2, atol=1e-4)
            assert live.abs().amax(1).min() > 0


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_text_encoder_can_have_a_learning_rate_of_its_own(tmp_path, adapter):
    """Adam's first step is the learning rate times the gradient's sign, whatever the gradient's size."""
    targets = ("unet", "text_encoder")
    before = small_model()
    METHODS[adapter](before, settings(adapter, targets=targets)[0], 1, 0)
    before = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    changes = {"adapter": adapter, "targets": targets, "steps": 1, "lr": 1e-3, "text_encoder_rate": 0.1}
    _, state, *_ = short_run(tmp_path / "run", **changes)
    largest = {"unet": 0.0, "text_encoder": 0.0}
    for name, parameter in state.trained.items():
        network = name.split(".")[0]
        largest[network] = max(largest[network], (parameter - before[name]).abs().max().item())
    assert largest == {"unet": pytest.approx(1e-3, rel=0.01), "text_encoder": pytest.approx(1e-4, rel=0.01)}


def test_rank_stabilized_lora_divides_alpha_by_the_root_of_the_rank(tmp_path):
    *_, method = short_run(tmp_path / "run", adapter="lora", steps=1, rank=4, alpha=3.0, rank_stabilized=True)
    assert {layer.scale for layer in method.layers.values()} == {1.5}
    with pytest.raises(InputError, match="--rank-stabilized needs --alpha"):
        settings("lora", rank_stabilized=True)


def test_full_fine_tuning_writes_a_folder_that_loads(tmp_path):
    model, state, run, method = short_run(tmp_path / "run", adapter="full", targets=("unet", "text_encoder"))
    assert run.result.is_symlink() and json.loads((run.result / "minildm.json").read_text())["steps"] == 12
    loaded = minildm.load(run.result, device="cpu", dtype=torch.float32)
    assert loaded.config == model.config
    if state.best[1] == 12:
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    assert len([path for path in run.folder.iterdir() if path.name.startswith(".model")]) == 1
    assert "100.0 %" in "\n".join(method.describe())


def test_full_fine_tuning_can_write_a_single_file_too(tmp_path):
    model = random_model(single_file_config())
    _, _, run, _ = short_run(tmp_path / "run", model=model, adapter="full", steps=2, validation=0, single_file=True)
    folder, file = (
        minildm.load(path, device="cpu", dtype=torch.float32)
        for path in (run.result, run.result / "single_file.safetensors")
    )
    assert folder.config.unet == dataclasses.replace(file.config.unet, latent_size=folder.config.unet.latent_size)
    for name, tensor in folder.state_dict().items():
        assert torch.equal(tensor, file.state_dict()[name]), name


def test_a_model_whose_sizes_a_single_file_cannot_express_is_refused(tmp_path):
    with pytest.raises(InputError, match="a single file cannot express"):
        short_run(tmp_path / "run", adapter="full", steps=1, validation=0, single_file=True)
    assert not list((tmp_path / "run").glob("*model*"))


def test_a_disk_that_is_too_small_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError) as error:
        short_run(tmp_path / "run", adapter="full", targets=("unet", "text_encoder"), steps=1)
    assert_says(error, "0.0 GB free", "make room", "--out")
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("kind", ["lora", "selora"])
@pytest.mark.slow
def test_compiled_networks_give_the_same_gradients_and_can_be_measured(kind):
    def gradients(compiled):
        torch.compiler.reset()
        model = small_model()
        method_settings, _ = settings(kind, rank=2, expand_interval=1)
        method = METHODS[kind](model, method_settings, 10, seed=0)
        for i, layer in enumerate(method.layers.values()):
            for _, B in layer.blocks():
                torch.nn.init.normal_(B[:, :2], std=0.05, generator=torch.Generator().manual_seed(i))
        if compiled:  # traced as for the GPU, without the minutes that its kernels take
            model.unet.compile(backend="aot_eager")
            model.text_encoder.compile(backend="aot_eager")
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

        def backward():
            context = model.text_encoder(model.tokenize(["chest x-ray", "male"]))
            model.unet(latents, torch.tensor([5, 900]), context).square().mean().backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        plain = [gradient.clone() for gradient in backward()]
        model.zero_grad()
        with method.watch(0):
            backward()
        return plain, method.probe.scores() if kind == "selora" else {}

    (ours, scores), (compiled, compiled_scores) = gradients(False), gradients(True)
    assert len(scores) == (62 if kind == "selora" else 0)
    assert len(ours) == len(compiled) > 100
    assert max(relative_error(b, a) for a, b in zip(ours, compiled)) <= 1e-4
    assert list(scores) == list(compiled_scores)
    assert all(score == pytest.approx(compiled_scores[path]) and score[0] > 0 for path, score in scores.items())
