"""The loop: it learns, it grows, it stops and goes on, and it does not fall over."""

import errno
import json
import signal

import pytest
import torch
from made_runs import factors, largest_difference, pictures, same_bits, settings, short_run, small_model
from peers import assert_says, relative_error
from torch import nn

from minildm.adapters import adapter_layers, add_adapter, merge_file
from minildm.errors import InputError
from minildm.training import finetune as adapt_module
from minildm.training import loop
from minildm.training.finetune import rank_map, summary
from minildm.training.loop import measured
from minildm.training.run import Run


def test_the_loss_falls_ranks_grow_and_all_is_logged(tmp_path):
    model, state, run = short_run(tmp_path / "run", steps=40, lr=3e-3, expand_threshold=1.3)
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
    text = summary(model, state, run)
    assert "validation loss" in text
    assert rank_map(ranks) in text


def test_the_kept_adapter_is_the_best_on_validation(tmp_path):
    model, state, run = short_run(tmp_path / "run", steps=18)
    plain = small_model()
    about = merge_file(plain, run.adapter)
    assert about["kind"] == "selora"
    assert state.best[1] in (0, 6, 12, 18)
    assert "chest" not in json.dumps(about)  # no captions in an adapter's file
    if state.best[1] == 18:
        assert about["ranks"] == {path: layer.rank for path, layer in adapter_layers(model).items()}


@pytest.mark.parametrize("changes", [{"max_rank": 2}, {"max_parameters": 9000}])
def test_growth_is_capped(tmp_path, changes):
    model, _, _ = short_run(tmp_path / "run", steps=12, expand_interval=2, expand_threshold=1.0, **changes)
    layers = adapter_layers(model).values()
    assert max(layer.rank for layer in layers) == 2 if "max_rank" in changes else True
    used = sum(tensor.numel() for tensor in factors(model))
    assert "max_parameters" not in changes or 8000 < used <= 9000


def test_no_layer_grows_beyond_its_width(tmp_path):
    model, _, _ = short_run(tmp_path / "run", steps=4, rank=30, expand_interval=1, expand_threshold=1.0, validation=0)
    ranks = [
        (layer.rank, min(layer.base.in_features, layer.base.out_features)) for layer in adapter_layers(model).values()
    ]
    assert all(rank == min(34, width) for rank, width in ranks)
    assert {width for _, width in ranks} > {32}


def test_accumulation_equals_the_big_batch(tmp_path):
    whole, _, a = short_run(tmp_path / "a", steps=4, adapter="lora")
    parts, _, b = short_run(tmp_path / "b", steps=4, adapter="lora", micro_batch=1)
    assert largest_difference(whole, parts) < 2e-5
    losses = [[entry["loss"] for entry in run.entries() if "loss" in entry] for run in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_workers_change_nothing(tmp_path):
    model, _, _ = short_run(tmp_path / "a", steps=3)
    other, _, _ = short_run(tmp_path / "b", steps=3, workers=2)
    assert same_bits(model, other)


@pytest.mark.parametrize("kind", ["selora", "lora"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, kind, monkeypatch):
    """Ctrl-C twice, at steps that are no save's; growth into a second block lies on the way."""
    changes = {"adapter": kind, "rank": 7, "steps": 16, "expand_interval": 3, "warmup": 4, "lr_schedule": "cosine"}
    model, state, run = short_run(tmp_path / "whole", **changes)
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
    other, resumed, parts = short_run(tmp_path / "parts", resume=True, **changes)
    assert same_bits(model, other)
    assert (state.step, state.best) == (resumed.step, resumed.best)
    assert run.adapter.read_bytes() == parts.adapter.read_bytes()
    for a, b in zip(run.entries(), parts.entries(), strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "memory_mb")} == {
            k: v for k, v in b.items() if k not in ("seconds", "memory_mb")
        }
    if kind == "selora":
        assert max(layer.rank for layer in adapter_layers(model).values()) > 8


def test_a_run_that_died_before_its_first_save_begins_anew(tmp_path, monkeypatch):
    model, _, _ = short_run(tmp_path / "whole", steps=4)

    def die(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(ZeroDivisionError):
        short_run(tmp_path / "run", steps=4)
    monkeypatch.undo()
    (tmp_path / "run" / "last" / "state.pt").unlink()
    other, _, run = short_run(tmp_path / "run", resume=True, steps=4)
    assert same_bits(model, other)
    assert [entry["step"] for entry in run.entries() if "loss" in entry] == [1, 2, 3, 4]


# --- when things go wrong --------------------------------------------------------------------------------------------
def bad_at(monkeypatch, numbers):
    ordinary = adapt_module.sample_losses

    def losses(model, batch, draws, captions, config):
        out = ordinary(model, batch, draws, captions, config)
        return out * float("nan") if calls.pop(0) in numbers else out

    calls = list(range(1000))
    monkeypatch.setattr(adapt_module, "sample_losses", losses)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    bad_at(monkeypatch, (3, 4, 8))  # call 0 is the forecast's
    model, state, run = short_run(tmp_path / "run", steps=10, validation=0)
    assert (state.step, state.skipped, state.bad_steps) == (10, 3, 0)
    assert state.optimizer.count == 7
    assert all(tensor.isfinite().all() for tensor in factors(model))
    assert [entry["skipped"] for entry in run.entries() if "skipped" in entry] == [1, 2, 3]


def test_a_learning_rate_that_blows_up_stops_with_the_last_good_state_kept(tmp_path):
    with pytest.raises(InputError) as error:
        short_run(tmp_path / "run", steps=60, lr=1e30, max_bad_steps=5)
    assert_says(error, "not finite at 5 steps in a row", "learning rate", "1e+30", "last")
    run = Run(tmp_path / "run", {"seed": 0}, resume=True)
    saved = run.load_state()
    assert all(tensor.isfinite().all() for tensor in saved["trained"].values())
    assert saved["bad_steps"] == 0
    assert merge_file(small_model(), run.adapter)["kind"] == "selora"


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
    resumed, _, _ = short_run(tmp_path / "run", resume=True, steps=12)
    whole, _, _ = short_run(tmp_path / "whole", steps=12)
    assert same_bits(resumed, whole)


def test_out_of_memory_names_the_flags_that_help(tmp_path, monkeypatch):
    def losses(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "train_step", losses)
    with pytest.raises(InputError) as error:
        short_run(tmp_path / "run")
    assert_says(error, "out of memory", "--micro-batch 2", "--checkpointing", "--dtype bfloat16", "--size")


def test_a_batch_larger_than_the_data_is_said_and_works(tmp_path, capsys):
    _, state, _ = short_run(tmp_path / "run", n=3, steps=3)
    assert state.step == 3
    assert_says(capsys.readouterr().out.splitlines()[0], "--batch-size 4", "3 training pictures", "more than once")


def test_no_pictures_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no picture to train on"):
        short_run(tmp_path / "run", n=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expand_threshold": 0.9}, "lambda"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"micro_batch": 3}, "divide"),
        ({"lr": float("nan")}, "--lr"),
        ({"batch_size": 0}, "--batch-size"),
        ({"epochs": 0}, "--epochs"),
        ({"adapter": "loha"}, "selora"),
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_trains_a_float32_adapter(tmp_path, dtype):
    model = small_model()
    model.unet.to(dtype)
    model.text_encoder.to(dtype)
    model, state, run = short_run(tmp_path / "run", model=model, steps=24, lr=3e-3)
    validation = [entry["validation"] for entry in run.entries() if "validation" in entry]
    assert min(validation) < validation[0]
    assert {tensor.dtype for tensor in factors(model)} == {torch.float32}
    assert (state.loss_scale > 1) == (dtype == torch.float16)
    full, _, _ = short_run(tmp_path / "full", steps=1, lr=3e-3)
    half, _, _ = short_run(tmp_path / "half", steps=1, lr=3e-3, model=_cast(dtype))
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
    model, _, _ = short_run(tmp_path / "run", model=model, steps=6, targets=("unet",))
    assert len(prompts) == 13  # of the twelve pictures, four of them the validation's too, and the empty one
    assert all(path.startswith("unet.") for path in adapter_layers(model))


def test_checkpointing_changes_no_bit(tmp_path):
    model, _, _ = short_run(tmp_path / "a", steps=5)
    again, _, _ = short_run(tmp_path / "b", steps=5, checkpointing=True)
    assert same_bits(model, again)


def test_sample_sheets_come_at_their_steps_and_change_nothing(tmp_path):
    model, _, _ = short_run(tmp_path / "a", steps=6)
    other, _, run = short_run(tmp_path / "b", steps=6, sample_interval=4, samples=2)
    assert sorted(path.name for path in (run.folder / "samples").iterdir()) == [
        "step-000000.png",
        "step-000004.png",
        "step-000006.png",
    ]
    assert same_bits(model, other)


def test_the_loop_trains_any_parameters(tmp_path):
    """What pretraining needs: a network of its own, a loss of its own, no adapter."""
    torch.manual_seed(0)
    network, truth = nn.Linear(3, 2), torch.randn(2, 3)
    run = Run(tmp_path / "run", {})
    run.begin()

    def batches(first, last):
        return ({"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(step))} for step in range(first, last))

    def losses(batch, numbers):
        return (network(batch["x"]) - batch["x"] @ truth.t()).square().mean(1)

    state = loop.train(
        network, losses, batches, 400, settings(lr=3e-2), run, keep=lambda path: torch.save(network.state_dict(), path)
    )
    assert state.step == 400
    torch.testing.assert_close(network.weight.data, truth, rtol=0, atol=1e-2)
    assert run.adapter.exists()
    assert len(pictures(2).records) == 2


@pytest.mark.parametrize("kind", ["lora", "selora"])
def test_compiled_networks_give_the_same_gradients_and_can_be_measured(kind):
    def gradients(compiled):
        torch.compiler.reset()
        model = small_model()
        layers = add_adapter(model, kind, rank=2)
        for i, layer in enumerate(layers.values()):
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
        with measured(model, settings(adapter=kind), 0) as probe:
            backward()
        return plain, probe.scores()

    (ours, scores), (compiled, compiled_scores) = gradients(False), gradients(True)
    assert len(ours) == len(compiled) > 100
    assert max(relative_error(b, a) for a, b in zip(ours, compiled)) <= 1e-4
    assert list(scores) == list(compiled_scores)
    assert all(score == pytest.approx(compiled_scores[path]) and score[0] > 0 for path, score in scores.items())
