"""--read-captions: the text encoder's adapter learns from captions alone, before the denoising."""

import pytest
import torch
from made_runs import same_bits, settings, short_run, small_model
from peers import assert_says, random_model

from minildm.adapters import METHODS, adapter_layers
from minildm.config import ModelConfig
from minildm.data.cache import CachedLatents
from minildm.data.records import Record
from minildm.errors import InputError
from minildm.training import finetune, loss, reading
from minildm.training.command_line import parse
from minildm.training.finetune import Finetuning, Samples

READING = {"read_captions": 12, "steps": 6}


STRONG, WEAK = 3.0, 1.0  # how images of all kinds differ, and what one word adds


def chests(n, seed):
    """Samples whose codes differ strongly in four directions that no caption tells, and weakly with a word."""
    directions = torch.linalg.qr(torch.randn(256, 5, generator=torch.Generator().manual_seed(9)))[0].t()  # (5, 256)
    generator = torch.Generator().manual_seed(seed)
    words = ["normal", "pacemaker"] * (n // 2)
    has = torch.tensor([word == "pacemaker" for word in words])
    codes = 8 * STRONG * torch.randn(n, 4, generator=generator) @ directions[:4]
    codes = codes + WEAK * has[:, None] * directions[4] * 4 + 0.1 * torch.randn(n, 256, generator=generator)
    means = codes.view(n, 4, 8, 8)
    rows = {bytes([i]): torch.cat([mean, torch.full((4, 8, 8), -6.0)]) for i, mean in enumerate(means)}
    records = tuple(Record(f"{i:03}.png", f"p{i}") for i in range(n))
    prompts = tuple(f"chest x-ray, {word}" for word in words)
    return Samples(records, prompts, CachedLatents(rows, records, list(rows))), 4 * WEAK * directions[4]


def read(kind, monkeypatch, steps, n=64, validation=32):
    """Read `chests`. Returns: the share of the word's effect on the code that was learned."""
    changes = {"read_captions": steps, "batch_size": 16, "caption_dropout": 0.0}
    method_settings, config = settings(kind, targets=("unet", "text_encoder"), **changes)
    (training, effect), (held_out, _) = chests(n, 0), chests(validation, 1)
    task = Finetuning(small_model(), training, held_out, config)
    method = METHODS[kind](task.model, method_settings, config.steps, 0)
    made, ordinary = {}, (reading.MeanReader, reading.Whitening)
    monkeypatch.setattr(reading, "MeanReader", lambda *a, **k: made.setdefault("reader", ordinary[0](*a, **k)))
    monkeypatch.setattr(reading, "Whitening", lambda *a: made.setdefault("whiten", ordinary[1](*a)))
    reading.read_captions(task, method, steps)
    with torch.no_grad():
        contexts = task.model.encode_prompt(["chest x-ray, normal", "chest x-ray, pacemaker"])
        predicted = made["reader"](contexts).diff(dim=0)[0]
        true = effect * task.model.config.vae.scaling_factor @ made["whiten"].matrix
    return (predicted @ true / true.square().sum()).item()


@pytest.mark.parametrize("kind", ["full", "selora", "lora", "adalora"])
def test_a_word_is_learned_although_its_image_hardly_differs(monkeypatch, capsys, kind):
    share = read(kind, monkeypatch, 150)
    assert "captions read: they explain" in capsys.readouterr().out
    assert share > 0.7


def test_without_whitening_it_would_not_be_learned(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", lambda S: (torch.full((len(S),), S.trace() / len(S)), torch.eye(len(S))))
    assert read("selora", monkeypatch, 150) < 0.4


def test_whitened_codes_have_the_variance_of_the_formula():
    codes = torch.randn(500, 6) * torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.0]) + 5
    variances = torch.linalg.eigvalsh(torch.cov(codes.t()))
    z = reading.Whitening(codes)(codes)
    expected = variances / (variances + variances.mean())
    torch.testing.assert_close(z.var(0), expected / expected.mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.cov(z.t()), torch.diag(z.var(0)), rtol=1e-3, atol=1e-5)
    assert reading.Whitening(torch.ones(3, 6))(torch.ones(3, 6)).eq(0).all()


def test_whitening_leaves_out_directions_that_no_code_shows():
    few, others = torch.randn(4, 50), torch.randn(1000, 50)
    z = reading.Whitening(few)(others)
    assert z.square().mean() < 2 and (z.square().mean(0) > 0).sum() == 3


def test_captions_that_predict_nothing_leave_the_text_encoder_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "_held_out_error", lambda *arguments: 1.0)
    model, *_ = short_run(tmp_path / "run", **(READING | {"text_encoder_rate": 0.0, "expand_interval": 100}))
    assert "the captions predict nothing about held-out images" in capsys.readouterr().out
    layers = [layer for path, layer in adapter_layers(model).items() if path.startswith("text_encoder.")]
    assert layers and all(B.eq(0).all() for layer in layers for _, B in layer.blocks())


@pytest.mark.parametrize("rate", [1.0, 0.0])
def test_a_run_that_stops_while_reading_or_later_is_the_same_in_the_end(tmp_path, monkeypatch, rate):
    settings = READING | {"text_encoder_rate": rate, "save_interval": 2}
    model, _, run, _ = short_run(tmp_path / "whole", **settings)
    read, steps = reading._read, []

    def interrupted(*arguments):
        read(*arguments)
        raise KeyboardInterrupt

    def stopping_at(state, *arguments):
        steps.append(state.step)
        if state.step == 3:
            raise RuntimeError("stopped")
        return ordinary(state, *arguments)

    monkeypatch.setattr(reading, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "parts", **settings)
    monkeypatch.setattr(reading, "_read", read)
    ordinary = finetune.train.__globals__["train_step"]
    monkeypatch.setitem(finetune.train.__globals__, "train_step", stopping_at)
    with pytest.raises(RuntimeError, match="stopped"):
        short_run(tmp_path / "parts", resume=True, **settings)
    monkeypatch.setitem(finetune.train.__globals__, "train_step", ordinary)
    monkeypatch.setattr(reading, "_read", None)  # a saved state holds what was read
    other, *_, parts, _ = short_run(tmp_path / "parts", resume=True, **settings)
    assert same_bits(model, other) and run.result.read_bytes() == parts.result.read_bytes()


def test_nothing_is_read_where_all_captions_are_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "read_captions", None)
    monkeypatch.setattr(loss, "set", lambda prompts: {prompts[0]}, raising=False)
    short_run(tmp_path / "run", **READING)
    assert "all captions are the same" in capsys.readouterr().out


def test_nothing_is_read_where_the_text_encoder_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "read_captions", None)
    model, *_ = short_run(tmp_path / "run", adapter="lora", targets=("unet",), **READING)
    assert all(path.startswith("unet.") for path in adapter_layers(model))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--adapter", "lora", "--targets", "unet"], "--read-captions would change nothing"),
        (["--adapter", "dylora"], "--read-captions does not suit --adapter dylora"),
        (["--adapter", "lora", "--instance-prompt", "a chest"], "--read-captions learns from what captions tell apart"),
        (["--adapter", "lora", "--read-captions", "-1"], "--read-captions must be a number at least 0"),
    ],
)
def test_reading_that_makes_no_sense_is_refused(words, message):
    with pytest.raises(InputError) as error:
        parse(["--read-captions", "5", *words])
    assert_says(error.value, message)


def test_only_dylora_does_not_read():
    assert [name for name, method in METHODS.items() if not method.reads_captions] == ["dylora"]


def test_a_rising_held_out_error_brings_back_the_best_weights(tmp_path, monkeypatch, capsys):
    errors, kept, read = iter([5.0, 3.0, 1.0, 2.0, 4.0]), {}, reading._read

    def held_out_error(task, reader, whiten):
        kept[len(kept)] = [parameter.detach().clone() for parameter in found]
        return next(errors)

    def recording(task, trained, *arguments):
        found.extend(trained)
        read(task, trained, *arguments)
        kept["end"] = [parameter.detach().clone() for parameter in trained]

    found = []
    monkeypatch.setattr(reading, "VALIDATIONS", 4)
    monkeypatch.setattr(reading, "_held_out_error", held_out_error)
    monkeypatch.setattr(reading, "_read", recording)
    short_run(tmp_path / "run", **READING)
    assert "explain 80.0 % of the variance of held-out whitened codes, most after 6 of 12" in capsys.readouterr().out
    assert all(map(torch.equal, kept["end"], kept[2])) and not all(map(torch.equal, kept["end"], kept[4]))


# --- afterwards, at --text-encoder-rate 0 ----------------------------------------------------------------------------
FROZEN = READING | {"text_encoder_rate": 0.0, "expand_interval": 2}


def test_the_text_encoder_that_only_reads_stays_out_of_the_steps(tmp_path, monkeypatch):
    kept, freeze = [], loss.Captions.freeze

    def remember(captions, *most):
        freeze(captions, *most)
        kept.append(captions)

    monkeypatch.setattr(loss.Captions, "freeze", remember)
    model, *_ = short_run(tmp_path / "frozen", **FROZEN)
    ranks = {path: layer.rank for path, layer in adapter_layers(model).items()}
    assert {rank for path, rank in ranks.items() if path.startswith("text_encoder.")} == {1}  # nothing to test there
    assert max(ranks.values()) > 1
    assert len(kept) == 2 and all(captions.kept for captions in kept)  # of training and validation
    with torch.no_grad():
        for captions in kept:
            for row, context in captions.kept.items():
                alone = model.text_encoder(captions.token_ids[row][None])[0]
                torch.testing.assert_close(context, alone, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(METHODS["selora"], "can_freeze_text_encoder", False)
    other, *_ = short_run(tmp_path / "run along", **(FROZEN | {"expand_interval": 100}))
    monkeypatch.setattr(METHODS["selora"], "can_freeze_text_encoder", True)
    model, *_ = short_run(tmp_path / "frozen again", **(FROZEN | {"expand_interval": 100}))
    for path, layer in adapter_layers(model).items():
        for ours, theirs in zip(layer.factors(), adapter_layers(other)[path].factors()):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_contexts_beyond_the_memory_for_them_are_computed_again(monkeypatch):
    model = random_model(ModelConfig.tiny())
    captions = loss.Captions(model, ["a", "b", "c"])
    rows, batch = torch.tensor([2, 0, -1, 2]), {"index": torch.tensor([2, 0, 1, 2])}
    with torch.no_grad():
        expected = captions(batch, rows)
    monkeypatch.setattr(loss, "KEPT", 2 * expected[0].nbytes)
    captions.freeze()
    for _ in range(2):
        torch.testing.assert_close(captions(batch, rows), expected, rtol=1e-5, atol=1e-5)
        assert list(captions.kept) == [-1, 0]


@pytest.mark.parametrize("kind", ["adalora", "dylora"])
def test_methods_that_change_the_text_encoders_ranks_run_it_at_every_step(tmp_path, monkeypatch, kind):
    frozen = []
    monkeypatch.setattr(loss.Captions, "freeze", frozen.append)
    short_run(tmp_path / "run", adapter=kind, steps=3, text_encoder_rate=0.0)
    assert not frozen
