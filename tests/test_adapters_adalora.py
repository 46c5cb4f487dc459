"""AdaLoRA: parity with PEFT step by step, the budget, and what other implementations got wrong."""

import contextlib
import itertools
import types
import warnings

import pytest
import torch
from made_runs import factors, settings, short_run, small_model
from peers import assert_says, relative_error
from torch import nn

from minildm import kernels
from minildm.adapters import adapter_layers, add_adapter, merge_adapter, merge_file, parameter_counts, save_adapter
from minildm.adapters.adalora import AdaLoRA, AdaLoRASettings, Importance, highest, rank_budget
from minildm.checkpoint import build_networks
from minildm.config import ModelConfig
from minildm.errors import InputError
from minildm.latent_diffusion import LatentDiffusion
from minildm.optimizer import AdamW
from minildm.training import finetune


class Toy(nn.Module):
    """Linear layers of different sizes under the names of our networks. The output has a ``loss``, as PEFT wants it."""

    def __init__(self):
        super().__init__()
        self.text_encoder = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9))
        self.unet = nn.Sequential(nn.Linear(9, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x, target):
        y = self.unet(self.text_encoder(x))
        return types.SimpleNamespace(output=y, loss=(y - target).square().mean())


def toy_batch(step):
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn(16, 12, generator=generator), torch.randn(16, 8, generator=generator)
    return x.double(), target.double()


def toy(steps, **changes):
    """(model, method) of AdaLoRA on a new Toy, in float64, so that rounding decides nothing."""
    torch.manual_seed(0)
    model = Toy()
    method = AdaLoRA(model, AdaLoRASettings(**changes), steps, seed=0)
    model.double()
    method.importance = Importance(method.layers.values())
    return model, method


def train_toy(model, method, steps, first=0, lr=1e-2, optimizer=None):
    """Steps as the loop makes them. Yields: (step, what `update` returned)."""
    optimizer = AdamW(list(method.trained().values())) if optimizer is None else optimizer
    for step in range(first, steps):
        (model(*toy_batch(step)).loss + method.penalty()).backward()
        optimizer.step(lr)
        yield step, method.update(step, optimizer)
        model.zero_grad()


def kept(layer):
    """The triplets that act, a list of bool."""
    return (layer.mask * layer.lora_E).flatten().ne(0).tolist()


# --- parity ----------------------------------------------------------------------------------------------------------
def peft_twin(model, **config):
    """PEFT's AdaLoRA with the weights of an adapted Toy."""
    from peft import AdaLoraConfig, AdaLoraModel

    torch.manual_seed(0)
    base = Toy()
    targets = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = AdaLoraModel(base, AdaLoraConfig(target_modules=targets, **config), "default").double()
    for path, layer in adapter_layers(model).items():
        other = twin.model.get_submodule(path)
        other.ranknum["default"].data -= 1e-5  # which PEFT adds to the rank
        for name in ("lora_A", "lora_B", "lora_E"):
            getattr(other, name)["default"].data.copy_(getattr(layer, name).data)
    return twin


@pytest.mark.parametrize(("interval", "weight"), [(3, 0.5), (1, 0.0)])
def test_adalora_matches_peft_over_60_steps(interval, weight, monkeypatch):
    """Forward, penalty, importance, scores, budget, masks, ranks and weights, at every step."""
    from peft.tuners.adalora.layer import RankAllocator

    changes = {"init_rank": 6, "target_rank": 3, "alpha": 8.0, "prune_interval": interval}
    changes |= {"initial_share": 0.1, "final_share": 0.4, "orthogonality_weight": weight}
    model, method = toy(60, **changes)
    config = {"init_r": 6, "target_r": 3, "lora_alpha": 8, "deltaT": interval, "orth_reg_weight": weight}
    twin = peft_twin(model, **config, tinit=6, tfinal=24, total_step=60)
    allocator, their_scores, combine = twin.rankallocator, [], RankAllocator._combine_ipt
    monkeypatch.setattr(
        RankAllocator, "_combine_ipt", lambda *args: their_scores.append(combine(*args)) or their_scores[-1]
    )
    optimizer, theirs = AdamW(list(method.trained().values())), torch.optim.Adam(twin.parameters(), lr=1e-2)
    pruned = []
    for step in range(60):
        ours, other = model(*toy_batch(step)), twin(*toy_batch(step))
        assert relative_error(ours.output, other.output) < 1e-5
        loss = ours.loss + method.penalty()
        assert loss.item() == pytest.approx(other.loss.item(), rel=1e-6)  # PEFT has added its penalty to its loss
        loss.backward()
        other.loss.backward()
        optimizer.step(1e-2)
        theirs.step()

        importance, log = method.importance, method.update(step, optimizer)
        twin.update_and_allocate(step + 1)
        model.zero_grad()
        theirs.zero_grad()

        budget, _ = allocator.budget_schedule(step + 1)
        assert budget == rank_budget(step + 1, method.t_start, method.t_end, 30, 15)
        if log:
            pruned.append(step + 1)
            torch.testing.assert_close(importance.scores(), torch.stack(their_scores), rtol=1e-5, atol=0)
            pattern = twin.peft_config["default"].rank_pattern
            masks = [pattern[f"{path}.lora_E.default"] for path in method.layers]
            assert [kept(layer) for layer in method.layers.values()] == masks
            assert list(log["ranks"].values()) == [sum(mask) for mask in masks]
            assert log["budget"] == budget == sum(log["ranks"].values())
        their_scores.clear()
        assert_same_state(method, twin)
    assert pruned == [t for t in range(7, 36) if t % interval == 0] + [36]
    assert method.frozen and len({layer.rank for layer in method.layers.values()}) > 1


def assert_same_state(method, twin):
    """Weights and, until the mask is frozen, smoothed sensitivities and uncertainties."""
    means = [] if method.frozen else list(zip(method.importance.sensitivity, method.importance.uncertainty))
    for i, (path, layer) in enumerate(method.layers.items()):
        weights = {"E": layer.mask * layer.lora_E, "A": layer.lora_A, "B": layer.lora_B}
        for name, weight in weights.items():
            other = getattr(twin.model.get_submodule(path), f"lora_{name}")["default"]
            torch.testing.assert_close(weight, other.data, rtol=1e-5, atol=1e-9)
        for name, (sensitivity, uncertainty) in zip("EAB", means[3 * i : 3 * i + 3]):
            key = f"{path}.lora_{name}.default"
            torch.testing.assert_close(sensitivity, twin.rankallocator.exp_avg_ipt[key], rtol=1e-5, atol=1e-12)
            torch.testing.assert_close(uncertainty, twin.rankallocator.exp_avg_unc[key], rtol=1e-5, atol=1e-12)


def test_the_forward_matches_peft_as_it_is_installed():
    """With PEFT's own divisor, init_r + 1e-5."""
    model, method = toy(10, alpha=3.0)
    for layer in method.layers.values():
        nn.init.normal_(layer.lora_E)
    twin = peft_twin(model, init_r=6, lora_alpha=3, total_step=10)
    for path in method.layers:
        twin.model.get_submodule(path).ranknum["default"].data.fill_(6)
    assert relative_error(model(*toy_batch(0)).output, twin(*toy_batch(0)).output) < 1e-5


# --- the budget ------------------------------------------------------------------------------------------------------
def test_the_budget_at_chosen_steps():
    """600 triplets until step 10, 400 from step 70 on; 200 (1 - (t - 10) / 60)^3 + 400 between them, rounded down."""
    steps = {0: 600, 10: 600, 11: 590, 20: 515, 25: 484, 40: 425, 55: 403, 69: 400, 70: 400, 100: 400}
    assert {t: rank_budget(t, 10, 70, 600, 400) for t in steps} == steps


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_the_budget_falls_from_start_to_target_in_runs_of_any_length(steps):
    model, method = toy(steps, prune_interval=1)
    budgets = [log["budget"] for _, log in train_toy(model, method, steps) if log]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == 20 == sum(layer.rank for layer in method.layers.values())
    assert method.t_start < method.t_end <= steps


def test_equal_scores_keep_equal_ranks():
    mask = highest(torch.zeros(5, 6), 20)
    assert mask.sum(1).tolist() == [4] * 5
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert highest(scores, 3).tolist() == [[True, False, False], [False, True, True]]


def test_a_budget_that_prunes_nothing_is_legal():
    """PEFT asks for the 0-th smallest score there, and crashes."""
    model, method = toy(20, init_rank=4, target_rank=4, prune_interval=1)
    logs = [log for _, log in train_toy(model, method, 20) if log]
    assert {log["budget"] for log in logs} == {20}
    assert all(all(kept(layer)) and layer.rank == 4 for layer in method.layers.values())


def test_pruned_triplets_may_come_back_until_the_final_phase():
    model, method = toy(80, init_rank=6, target_rank=3, prune_interval=2, final_share=0.3)
    history, ranks = [], []
    for _, log in train_toy(model, method, 80):
        if log:
            history.append([kept(layer) for layer in method.layers.values()])
        if method.frozen:
            ranks.append([layer.rank for layer in method.layers.values()])
            assert history[-1] == [kept(layer) for layer in method.layers.values()]
    returned = [
        new and not old
        for before, after in itertools.pairwise(history)
        for a, b in zip(before, after)
        for old, new in zip(a, b)
    ]
    assert any(returned)
    assert len(ranks) == 25 and ranks == [ranks[0]] * 25
    assert len(set(ranks[0])) > 1  # ranks that never change would all be equal


def test_a_skipped_step_does_not_keep_the_mask_from_freezing():
    model, method = toy(20, prune_interval=1)
    for _ in train_toy(model, method, method.t_end - 1):
        assert not method.frozen
    (_, log), *_ = train_toy(model, method, method.t_end + 1, first=method.t_end)  # step t_end - 1 was not finite
    assert log["budget"] == 20 and method.frozen


# --- the layer -------------------------------------------------------------------------------------------------------
def test_adalora_of_rank_6_on_sd15_trains_the_published_percentages():
    model = LatentDiffusion(ModelConfig(), **build_networks(ModelConfig()))
    layers = add_adapter(model, "adalora", rank=6, layers="paper")
    counts = parameter_counts(model)
    assert [round(counts[network][2], 4) for network in ("unet", "text_encoder")] == [0.2160, 0.8027]
    assert counts["unet"][0] == 6 * (310_016 + 134)  # lambdas count
    assert {layer.scale for layer in layers.values()} == {1.0}


def unet_output(model):
    generator = torch.Generator().manual_seed(1)
    context = model.text_encoder(model.tokenize(["a chest x-ray", "male"]))
    return model.unet(torch.randn(2, 4, 8, 8, generator=generator).to(context), torch.tensor([10, 900]), context)


def disturbed_model():
    """A small model with a method whose lora_E is not zero."""
    model = small_model()
    method = AdaLoRA(model, AdaLoRASettings(alpha=9.0), 10, seed=0)
    generator = torch.Generator().manual_seed(3)
    for layer in method.layers.values():
        layer.lora_E.data = torch.randn(layer.lora_E.shape, generator=generator)
        layer.lora_B.data *= 20
    return model, method


def freeze_ranks(method):
    """Ranks 0, 1, 2, ..., 6, 0, ... of triplets at random places."""
    generator = torch.Generator().manual_seed(4)
    method.freeze(torch.stack([torch.randperm(6, generator=generator) < i % 7 for i in range(len(method.layers))]))


def test_a_new_adapter_changes_nothing_and_starts_as_peft_does():
    model = small_model()
    before = unet_output(model)
    layers = add_adapter(model, "adalora", rank=6)
    assert torch.equal(unet_output(model), before)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [f"{path}.lora_{factor}" for path in layers for factor in "ABE"]
    for name in ("lora_A", "lora_B"):
        values = torch.cat([getattr(layer, name).detach().flatten() for layer in layers.values()])
        assert values.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(values.mean().item()) < 1e-3


def test_the_fused_function_equals_the_plain_formula():
    model, method = disturbed_model()
    freeze_ranks(method)
    model.double()  # in float32 the gradient of a single lora_E loses digits to cancellation
    results = []
    for mode in (contextlib.nullcontext, kernels.plain):
        model.zero_grad()
        with mode():
            output = unet_output(model)
            output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 1 + 3 * len(method.layers)
    for fused, plain in zip(*results):
        assert relative_error(fused, plain) < 1e-5 or plain.abs().max() == fused.abs().max() == 0


def test_rank_0_is_legal_in_saving_merging_loading_counting_and_describing(tmp_path):
    model, method = disturbed_model()
    freeze_ranks(method)
    layers = method.layers.values()
    expected, loaded = unet_output(model).detach(), small_model()
    before = unet_output(loaded).detach()
    save_adapter(model, tmp_path / "adapter.safetensors")
    about = merge_file(loaded, tmp_path / "adapter.safetensors")
    assert (about["kind"], about["scale"]) == ("adalora", 1.5)
    assert set(about["ranks"].values()) == set(range(7))
    assert relative_error(unet_output(loaded), expected) < 1e-5 < relative_error(before, expected)
    numbers = sum(layer.rank * (1 + layer.base.in_features + layer.base.out_features) for layer in layers)
    assert sum(trained for trained, *_ in parameter_counts(model).values()) == numbers
    assert "ranks 0 to 6" in "\n".join(method.describe())
    merge_adapter(model)
    assert relative_error(unet_output(model), expected) < 1e-5
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_merging_an_adapter_of_rank_0_alone_says_that_it_changes_nothing(tmp_path):
    model, method = disturbed_model()
    method.freeze(torch.zeros(len(method.layers), 6, dtype=torch.bool))
    save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = small_model()
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with pytest.warns(UserWarning, match="adapter.safetensors changes nothing: all its layers have rank 0"):
        merge_file(loaded, tmp_path / "adapter.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_eval_mode_changes_nothing():
    """Elsewhere eval() merges, and only where the layer itself is called, which a parent's eval() does not."""
    model, method = disturbed_model()
    weights = {path: layer.base.weight.clone() for path, layer in method.layers.items()}
    training = unet_output(model.train())
    assert torch.equal(unet_output(model.eval()), training)
    assert torch.equal(unet_output(model.train()), training)
    assert all(torch.equal(layer.base.weight, weights[path]) for path, layer in method.layers.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_rank": 7}, ("--target-rank", "--init-rank", "7 and 6")),
        ({"initial_share": 0.6}, ("--initial-share 0.6", "--final-share 0.5", "below 1")),
        ({"prune_interval": 0}, ("--prune-interval",)),
        ({"orthogonality_weight": -1.0}, ("--orthogonality-weight",)),
    ],
)
def test_settings_that_cannot_work_are_named(changes, words):
    with pytest.raises(InputError) as error:
        settings("adalora", **changes)
    assert_says(error, *words)


# --- the penalty -----------------------------------------------------------------------------------------------------
def test_the_penalty_is_the_mean_of_norms_and_reaches_the_gradient():
    """In PEFT it is dropped silently where the model's output has no ``loss``, as a U-Net's."""
    _, method = toy(10)
    norms = []
    for layer in method.layers.values():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        norms += [(A @ A.t() - torch.eye(6)).square().sum().sqrt(), (B.t() @ B - torch.eye(6)).square().sum().sqrt()]
    penalty = method.penalty()
    assert penalty.item() == pytest.approx(0.5 * sum(norms).item() / len(norms), rel=1e-12)
    penalty.backward()
    for layer in method.layers.values():
        assert min(layer.lora_A.grad.abs().min(), layer.lora_B.grad.abs().min()) > 0


def test_the_loop_uses_the_penalty(tmp_path):
    def distance(method):
        return sum((layer.lora_A @ layer.lora_A.t() - torch.eye(6)).norm().item() for layer in method.layers.values())

    *_, run, with_penalty = short_run(tmp_path / "a", adapter="adalora", steps=12, lr=3e-3)
    logged = [entry["penalty"] for entry in run.entries() if "loss" in entry]
    assert logged == sorted(logged, reverse=True) and logged[-1] < 0.9 * logged[0]
    *_, run, without = short_run(tmp_path / "b", adapter="adalora", steps=12, lr=3e-3, orthogonality_weight=0.0)
    assert {entry["penalty"] for entry in run.entries() if "loss" in entry} == {0.0}
    assert distance(with_penalty) < 0.95 * distance(without)


# --- through the loop ------------------------------------------------------------------------------------------------
def test_a_run_learns_prunes_and_saves_what_loads_to_the_same_outputs(tmp_path):
    model, state, run, method = short_run(tmp_path / "run", adapter="adalora", steps=40, lr=6e-3, prune_interval=3)
    validation = [entry["validation"] for entry in run.entries() if "validation" in entry]
    assert min(validation) < 0.85 * validation[0]
    pruned = [entry for entry in run.entries() if "ranks" in entry]
    assert [entry["step"] for entry in pruned] == [6, 9, 12, 15, 18, 20]
    assert all(sum(entry["ranks"].values()) == entry["budget"] for entry in pruned)
    ranks = {path: layer.rank for path, layer in method.layers.items()}
    assert ranks == pruned[-1]["ranks"] and sum(ranks.values()) == 4 * 62 and len(set(ranks.values())) > 2
    lines = "\n".join(method.describe())
    assert "adalora on 62 layers" in lines and "mean 4.00" in lines and "372 until step 4, 248 from step 20" in lines

    assert state.best[1] == 40  # so that the saved adapter is the model's present one
    loaded = small_model()
    assert merge_file(loaded, run.result)["ranks"] == ranks
    assert relative_error(unet_output(loaded), unet_output(model)) < 1e-5


def test_the_best_is_not_kept_before_the_budget_has_reached_its_target(tmp_path, monkeypatch):
    """Validation that only gets worse: the first one of the final phase is the best."""
    losses = iter(range(1, 100))
    monkeypatch.setattr(finetune, "validation_loss", lambda *arguments: float(next(losses)))
    _, state, run, method = short_run(tmp_path / "run", adapter="adalora", steps=12, validation_interval=2)
    assert method.t_end == 6 and state.best == (4.0, 6)
    assert sum(merge_file(small_model(), run.result)["ranks"].values()) == 4 * 62


def test_pruned_triplets_stay_out_of_averaged_weights(tmp_path):
    """The average of a pruned lora_E is not zero; neither validation nor the saved file may see it."""
    model, state, run, method = short_run(
        tmp_path / "run", adapter="adalora", steps=12, lr=6e-3, ema_decay=0.9, validation_interval=12
    )
    path, layer = next((path, layer) for path, layer in method.layers.items() if layer.rank < 6)
    assert state.average.values[f"{path}.lora_E"][layer.mask == 0].abs().min() > 0
    loaded = small_model()
    merge_file(loaded, run.result)
    with state.averaged():
        assert sum(len(A) for A in factors(model)[::2]) == 4 * 62
        assert relative_error(unet_output(loaded), unet_output(model)) < 1e-5


@pytest.mark.parametrize("stop", [9, 25])  # in the pruning phase, in the final phase
def test_importance_and_masks_survive_a_saved_state(stop, tmp_path):
    changes = {"init_rank": 6, "target_rank": 3, "prune_interval": 2}
    model, method = toy(40, **changes)
    optimizer = AdamW(list(method.trained().values()))
    for _ in train_toy(model, method, stop, optimizer=optimizer):
        pass
    state = {"method": method.state_dict(), "trained": method.trained(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    uninterrupted = list(train_toy(model, method, 40, stop, optimizer=optimizer))

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model, resumed = toy(40, **changes)
    resumed.load_state_dict(state["method"])
    for name, parameter in resumed.trained().items():
        parameter.data.copy_(state["trained"][name])
    optimizer = AdamW(list(resumed.trained().values()))
    optimizer.load_state_dict(state["optimizer"])
    assert list(train_toy(model, resumed, 40, stop, optimizer=optimizer)) == uninterrupted
    for layer, other in zip(method.layers.values(), resumed.layers.values()):
        assert layer.rank == other.rank and torch.equal(layer.mask, other.mask)
        assert all(torch.equal(a, b) for a, b in zip(layer.factors(), other.factors()))
