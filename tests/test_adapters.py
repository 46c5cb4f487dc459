"""LoRA and SeLoRA: what goes where, what it changes, and the Fisher information against brute force."""

import contextlib
import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from made_runs import small_model
from peers import random_model, relative_error
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from minildm import kernels
from minildm.adapters import (
    adapter_layers,
    add_adapter,
    fisher_probe,
    layers_to_grow,
    merge_adapter,
    merge_file,
    parameter_counts,
    save_adapter,
    target_paths,
)
from minildm.adapters.fisher import LayerProbe
from minildm.adapters.lora import LoRALinear, kaiming_rows
from minildm.checkpoint import build_networks
from minildm.config import ModelConfig, UNetConfig
from minildm.errors import InputError
from minildm.latent_diffusion import LatentDiffusion
from minildm.loading import parse_adapter


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def batch(model):
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([10, 400, 900]), model.tokenize(["a chest x-ray", "male", "view PA, age 47"])


def losses(model, latents, noise, timesteps, token_ids):
    """Each sample's own loss, (B,)."""
    noisy = model.schedule.add_noise(latents, noise, timesteps)
    prediction = model.unet(noisy, timesteps, model.text_encoder(token_ids))
    return F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))


def grow(layer, rows):
    """Let a SeLoRA layer grow by rows (n, in). Returns: the places in their blocks."""
    return [layer.grow(row)[2] for row in rows]


def disturb(model, seed=3):
    """Leave the adapter's start, where lora_B = 0 hides half of the formulas."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for i, (_, B) in enumerate(layer.blocks()):
            used = min(layer.rank - 8 * i, B.shape[1])
            B.data[:, :used] = 0.05 * torch.randn(len(B), used, generator=generator)


# --- where -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layers", "unet", "text"),
    [
        ("all-linear", (184, 426_496), (72, 165_888)),
        ("paper", (134, 310_016), (72, 165_888)),
        ("attention", (128, None), (48, None)),
    ],
)
def test_layer_sets_of_sd15_have_the_published_counts(layers, unet, text):
    model = LatentDiffusion(ModelConfig(), **build_networks(ModelConfig()))
    for network, (count, per_rank) in (("unet", unet), ("text_encoder", text)):
        paths = target_paths(model, (network,), layers)
        assert len(paths) == count
        sizes = [model.get_submodule(path) for path in paths]
        assert per_rank is None or sum(layer.in_features + layer.out_features for layer in sizes) == per_rank


def test_lora_of_rank_4_on_sd15_trains_the_published_percentages():
    model = LatentDiffusion(ModelConfig(), **build_networks(ModelConfig()))
    add_adapter(model, "lora", rank=4)
    counts = parameter_counts(model)
    assert counts["unet"][:2] == (4 * 426_496, 859_520_964 + 4 * 426_496)
    assert counts["text_encoder"][:2] == (4 * 165_888, 123_060_480 + 4 * 165_888)
    assert [round(counts[network][2], 4) for network in ("unet", "text_encoder")] == [0.1981, 0.5363]


def test_a_new_adapter_changes_nothing(model, batch):
    before = losses(model, *batch)
    layers = add_adapter(model, "lora", rank=3)
    assert torch.equal(losses(model, *batch), before)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == [f"{path}.lora_{factor}" for path in layers for factor in "AB"]


def test_base_weights_stay_when_the_adapter_trains(model, batch):
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, "lora", rank=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        losses(model, *batch).mean().backward()
        optimizer.step()
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert base.keys() == after.keys()
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert all(layer.lora_B.abs().max() > 0 for layer in adapter_layers(model).values())


@pytest.mark.parametrize("kind", ["lora", "selora"])
def test_merged_gives_the_same_and_leaves_plain_layers(model, batch, kind):
    plain = set(model.state_dict())
    add_adapter(model, kind, rank=2, alpha=3.0)
    disturb(model)
    before = losses(model, *batch)
    merge_adapter(model)
    torch.testing.assert_close(losses(model, *batch), before, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == plain
    merge_adapter(model)  # nothing live: nothing happens
    torch.testing.assert_close(losses(model, *batch), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("lora", 2), ("selora", 2), ("selora", 11)])
def test_the_fused_function_equals_the_plain_formula(model, batch, kind, rank):
    """fused.py against the three lines of lora.py: outputs, and gradients of the adapter and of the input."""
    add_adapter(model, kind, rank=rank, alpha=3.0)
    disturb(model)
    results = []
    for mode in (contextlib.nullcontext, kernels.plain):
        model.zero_grad()
        latents = batch[0].clone().requires_grad_(True)
        with mode():
            loss = losses(model, latents, *batch[1:])
            loss.mean().backward()
        results.append([loss.detach(), latents.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) > 100
    for fused, plain in zip(*results):
        assert relative_error(fused, plain) < 1e-5


def test_the_fused_function_keeps_less_for_the_backward(model, batch):
    add_adapter(model, "lora", rank=2)
    kept = []
    for mode in (contextlib.nullcontext, kernels.plain):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with mode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = losses(model, *batch)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
        del loss
    assert kept[0] < kept[1]


def test_percentages_count_what_is_in_use(model):
    add_adapter(model, "selora", rank=1)
    trained, total, percent = parameter_counts(model)["unet"]
    layers = {path: layer for path, layer in adapter_layers(model).items() if path.startswith("unet.")}
    assert trained == sum(layer.base.in_features + layer.base.out_features for layer in layers.values())
    assert total == trained + sum(p.numel() for n, p in model.unet.named_parameters() if "lora_" not in n)
    layer = next(iter(layers.values()))
    grow(layer, torch.ones(9, layer.base.in_features))  # ten rows in two blocks of eight
    added = 9 * (layer.base.in_features + layer.base.out_features)
    assert parameter_counts(model)["unet"][:2] == (trained + added, total + added)
    assert percent == pytest.approx(100 * trained / total)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "loha"}, "selora, lora"),
        ({"rank": 0}, r"\[1, "),
        ({"rank": 10_000}, r"\[1, "),
        ({"layers": "all"}, "all-linear"),
        ({"targets": ("vae",)}, "text_encoder"),
    ],
)
def test_wrong_settings_are_named(model, arguments, words):
    with pytest.raises(InputError, match=words):
        add_adapter(model, **{"kind": "lora", **arguments})


def test_a_second_live_adapter_is_refused(model):
    add_adapter(model, "lora")
    with pytest.raises(InputError, match="merge_adapter"):
        add_adapter(model, "selora")


# --- Fisher information ----------------------------------------------------------------------------------------------
def brute_force(model, batch, expansions):
    """{path: (original, expanded)}: one backward a sample, through layers that really have the extra row and column."""
    model = copy.deepcopy(model)
    layers = adapter_layers(model)
    for path, layer in layers.items():
        A, B = layer.factors()
        layer.whole_A = torch.nn.Parameter(torch.cat([A, expansions[path].t()]))
        layer.whole_B = torch.nn.Parameter(torch.cat([B, torch.zeros(len(B), expansions[path].shape[1])], dim=1))
        layer.forward = lambda x, layer=layer: layer.base(x) + layer.scale * (x @ layer.whole_A.t()) @ layer.whole_B.t()
    own_losses = losses(model, *batch)
    squares = {path: torch.zeros(2, dtype=torch.float64) for path in layers}
    for i in range(len(own_losses)):
        model.zero_grad()
        own_losses[i].backward(retain_graph=True)
        for path, layer in layers.items():
            rank = layer.rank
            a, b = layer.whole_A.grad.double().square(), layer.whole_B.grad.double().square()
            squares[path] += torch.stack([a[:rank].sum() + b[:, :rank].sum(), a.sum() + b.sum()])
    return {path: (total / len(own_losses)).tolist() for path, total in squares.items()}


def assert_scores_close(ours, theirs, tolerance=1e-4):
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path] == pytest.approx(theirs[path], rel=tolerance, abs=1e-30), path


@pytest.mark.parametrize(
    ("v2", "rank", "start"), [(False, 1, "at the start"), (False, 2, "in training"), (True, 11, "in training")]
)  # 11 rows: two blocks
def test_scores_equal_one_backward_a_sample(v2, rank, start):
    model = small_model(v2)
    generator = torch.Generator().manual_seed(1)
    batch = (
        torch.randn(3, 4, 8, 8, generator=generator),
        torch.randn(3, 4, 8, 8, generator=generator),
        torch.tensor([10, 400, 900]),
        model.tokenize(["a chest x-ray", "male", "view PA"]),
    )
    add_adapter(model, "selora", rank=rank, alpha=3.0)
    if start == "in training":
        disturb(model)
    with fisher_probe(model) as probe:
        losses(model, *batch).mean().backward()
    scores = probe.scores()
    assert_scores_close(scores, brute_force(model, batch, {path: probe.expansion(path) for path in scores}))
    assert all(expanded > original > 0 for original, expanded in scores.values())


def test_the_gradients_are_the_same_with_the_probe_open(model, batch):
    add_adapter(model, "selora", rank=2)
    disturb(model)
    gradients = []
    for opened in (False, True):
        model.zero_grad()
        if opened:
            with fisher_probe(model):
                losses(model, *batch).mean().backward()
        else:
            losses(model, *batch).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for without, with_probe in zip(*gradients):
        assert relative_error(with_probe, without) < 1e-5


def test_scores_add_up_over_micro_batches(model, batch):
    """Two micro-batches of different sizes, weighted as the loop does it, give what one batch gives."""
    add_adapter(model, "selora", rank=1)
    disturb(model)
    with fisher_probe(model) as whole:
        losses(model, *batch).mean().backward()
    with fisher_probe(model, batch_size=3) as parts:
        for part in (slice(0, 1), slice(1, 3)):
            (losses(model, *(tensor[part] for tensor in batch)).sum() / 3).backward()
    assert_scores_close(parts.scores(), whole.scores())


def test_scores_are_the_same_with_gradient_checkpointing(model, batch):
    add_adapter(model, "selora", rank=1)
    disturb(model)
    with fisher_probe(model) as plain:
        losses(model, *batch).mean().backward()
    with fisher_probe(model) as recomputed:
        checkpoint(losses, model, *batch, use_reentrant=False).mean().backward()
    assert_scores_close(recomputed.scores(), plain.scores(), 1e-6)


def test_scores_under_bfloat16_autocast_are_near(model, batch):
    add_adapter(model, "selora", rank=1)
    disturb(model)
    with fisher_probe(model) as exact:
        losses(model, *batch).mean().backward()
    with fisher_probe(model) as rounded, torch.autocast("cpu", torch.bfloat16):
        losses(model, *batch).mean().backward()
    for path, (original, expanded) in exact.scores().items():
        assert rounded.scores()[path] == pytest.approx((original, expanded), rel=0.2), path


def test_the_expected_criterion_is_the_mean_over_rows(model, batch):
    """v ||G||_F^2 against the average over many sampled rows, in a wide layer, a narrow one and one of the text's."""
    add_adapter(model, "selora", rank=1)
    disturb(model)
    with fisher_probe(model, expected=True) as expected:
        losses(model, *batch).mean().backward()
    added = dict.fromkeys(expected.scores(), 0.0)
    tries = 80
    generator = torch.Generator().manual_seed(0)
    for _ in range(tries):
        with fisher_probe(model, generator) as sampled:
            losses(model, *batch).mean().backward()
        for path, (original, more) in sampled.scores().items():
            added[path] += (more - original) / tries
    close = [added[path] / (more - original) for path, (original, more) in expected.scores().items()]
    assert sum(close) / len(close) == pytest.approx(1, abs=0.05)
    assert min(close) > 0.4
    assert max(close) < 2


def probed(layer, expansion, x, dy, expected=False):
    """(original, expanded) of a layer after one backward: means over the samples."""
    probe = LayerProbe(layer, expansion, torch.zeros(3, dtype=torch.float64), expected, batch_size=None)
    probe.add(x, dy)
    original, added, count = probe.sums.tolist()
    return original / count, (original + added) / count


@pytest.mark.parametrize("expected", [False, True])
def test_the_ratio_at_the_start_is_2_on_average(expected):
    """r = 1 and B = 0: what one more row would learn is, on average over A, what the first one learns."""
    torch.manual_seed(0)
    x, dy = torch.randn(4, 5, 24), torch.randn(4, 5, 16)
    generator = torch.Generator().manual_seed(0)
    originals, added = 0.0, 0.0
    for _ in range(1000):
        layer = LoRALinear(torch.nn.Linear(24, 16), 1, 1.0, generator)
        original, expanded = probed(layer, kaiming_rows(1, 24, generator).t(), x, dy, expected)
        originals, added = originals + original, added + expanded - original
    assert 1 + added / originals == pytest.approx(2, abs=0.1)


def test_equal_information_in_every_row_gives_r_plus_1_over_r():
    torch.manual_seed(0)
    rank, d_in = 4, 64
    layer = LoRALinear(torch.nn.Linear(d_in, 8), rank, 1.0, torch.Generator().manual_seed(0))
    row = layer.lora_A.data[:1].clone()
    layer.lora_A.data[:] = row  # all rows, and the tested one, are the same row
    original, expanded = probed(layer, row.t(), torch.randn(2, 3, d_in), torch.randn(2, 3, 8))
    assert expanded / original == pytest.approx((rank + 1) / rank, rel=1e-5)


def test_a_layer_without_gradient_has_no_score_and_does_not_grow(model, batch):
    add_adapter(model, "selora", rank=1)
    with fisher_probe(model) as probe:
        (losses(model, *batch).mean() * 0).backward()
    scores = probe.scores()
    assert set(itertools.chain(*scores.values())) == {0.0}
    assert layers_to_grow(scores, dict.fromkeys(scores, 1), dict.fromkeys(scores, (5, 5)), threshold=1.0) == []


# --- growth ----------------------------------------------------------------------------------------------------------
def test_growth_does_not_change_the_output_by_a_bit(model, batch):
    add_adapter(model, "selora", rank=1)
    disturb(model)
    before = losses(model, *batch)
    generator = torch.Generator().manual_seed(7)
    for rank in (2, 7, 8, 9, 20):  # within a block, to its end, into the next ones
        for layer in adapter_layers(model).values():
            grow(layer, kaiming_rows(rank - layer.rank, layer.base.in_features, generator))
            assert [factor.shape for factor in layer.factors()] == [
                (rank, layer.base.in_features),
                (layer.base.out_features, rank),
            ]
        assert torch.equal(losses(model, *batch), before)


def test_growth_keeps_old_rows_and_inserts_the_tested_one(model):
    layers = add_adapter(model, "selora", rank=3)
    disturb(model)
    with fisher_probe(model) as probe:
        pass
    for path, layer in layers.items():
        A, B = (factor.clone() for factor in layer.factors())
        assert grow(layer, probe.expansion(path).t()) == [3]
        grown_A, grown_B = layer.factors()
        assert torch.equal(grown_A, torch.cat([A, probe.expansion(path).t()]))
        assert torch.equal(grown_B, torch.cat([B, torch.zeros(len(B), 1)], dim=1))
        assert grow(layer, torch.ones(5, layer.base.in_features)) == [4, 5, 6, 7, 0]  # 0: a new block
        shapes = [(8, layer.base.in_features), (layer.base.out_features, 8)]
        assert [tuple(parameter.shape) for parameter in layer.blocks()[-1]] == shapes


def test_rows_that_are_not_in_use_stay_zero_under_adam(model, batch):
    layers = add_adapter(model, "selora", rank=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        losses(model, *batch).mean().backward()
        optimizer.step()
    for layer in layers.values():
        ((A, B),) = layer.blocks()
        assert A[3:].abs().max() == B[:, 3:].abs().max() == 0
        assert B[:, :3].abs().amax(0).min() > 0


def test_the_global_cap_takes_the_highest_ratios_first():
    scores = {"a": (1.0, 1.3), "b": (1.0, 1.9), "c": (1.0, 1.05), "d": (1.0, 1.5), "e": (0.0, 0.0)}
    ranks, costs = dict.fromkeys(scores, 1), dict.fromkeys(scores, (5, 5))
    assert layers_to_grow(scores, ranks, costs, 1.1) == ["b", "d", "a"]
    assert layers_to_grow(scores, ranks, costs, 1.1, max_parameters=70) == ["b", "d"]
    assert layers_to_grow(scores, ranks | {"b": 4}, costs, 1.1, max_rank=4) == ["d", "a"]
    assert layers_to_grow(scores, ranks, costs, 2.0) == []


# --- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["lora", "selora"])
def test_a_saved_adapter_merges_to_the_same_model(model, batch, tmp_path, kind):
    plain = copy.deepcopy(model)
    layers = add_adapter(model, kind, rank=3, alpha=2.0)
    if kind == "selora":
        next(iter(layers.values())).grow(torch.ones(next(iter(layers.values())).base.in_features))
    disturb(model)
    save_adapter(model, tmp_path / "adapter.safetensors", settings={"steps": 10})
    about = merge_file(plain, tmp_path / "adapter.safetensors")
    assert about["kind"] == kind
    assert about["settings"] == {"steps": 10}
    assert about["ranks"] == {path: layer.rank for path, layer in layers.items()}
    torch.testing.assert_close(losses(plain, *batch), losses(model, *batch), rtol=1e-4, atol=1e-5)
    merge_adapter(model)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_multiplier_scales_and_adapters_stack(model, tmp_path):
    adapted = copy.deepcopy(model)
    add_adapter(adapted, "lora", rank=2)
    disturb(adapted)
    save_adapter(adapted, tmp_path / "a.safetensors")
    twice, at_once = copy.deepcopy(model), copy.deepcopy(model)
    for multiplier in (0.5, 0.25):
        merge_file(twice, tmp_path / "a.safetensors", multiplier)
    merge_file(at_once, tmp_path / "a.safetensors", 0.75)
    for name, tensor in at_once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert parse_adapter("runs/a:0.6") == (Path("runs/a"), 0.6, None)
    assert parse_adapter(tmp_path) == (tmp_path / "adapter.safetensors", 1.0, None)


def test_files_that_do_not_fit_are_refused_and_change_nothing(model, tmp_path):
    other = random_model(dataclasses.replace(model.config, unet=UNetConfig.tiny(widths=(32, 96), n_heads=(4, 4))))
    add_adapter(other, "lora", rank=2)
    disturb(other)
    save_adapter(other, tmp_path / "other.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "no.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:5000])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, words in (("other", "another base: unet"), ("no", "minildm's format"), ("cut", "not a whole")):
        with pytest.raises(InputError, match=words) as error:
            merge_file(model, tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        merge_file(model, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no live adapter"):
        save_adapter(model, tmp_path / "x.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
