"""What the loop promises to methods and tasks, each promise with a small method or task that would notice."""

import math

import pytest
import torch
from made_runs import samples, settings, small_model, training_config
from torch import nn

from minildm import distributed
from minildm.adapters import METHODS
from minildm.adapters.method import Method
from minildm.data.records import Record
from minildm.optimizer import FusedAdamW
from minildm.training import loop, state
from minildm.training.finetune import Finetuning, Samples
from minildm.training.run import Run
from minildm.training.state import State
from minildm.training.task import Task


class Fit(Task):
    """Fit a vector to ones. ``validations``: what `validate` answers, one after the other."""

    batch_size = 4

    def __init__(self, network, validations=None):
        self.network, self.validations, self.seen = network, validations, []
        self.validation_interval = None if validations is None else 1

    def batches(self, first_step, last_step):
        for step in range(first_step, last_step):
            yield {"id": torch.arange(4 * step, 4 * step + 4), "weight": torch.ones(4), "x": torch.ones(4, 3)}

    def losses(self, batch):
        return (self.network(batch["x"]) - 1).square().mean(1)

    def validate(self):
        self.seen.append(self.network.weight.detach().clone())
        return self.validations[len(self.seen) - 1]


class Recorder(Method):
    """All parameters of a module; remembers the weights of every save."""

    def __init__(self, model):
        super().__init__(model, None, 10, 0)
        self.saved = []

    def save(self, path, about):
        self.saved.append(self.model.weight.detach().clone())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def train(folder, method, task, steps, **changes):
    run = Run(folder, {})
    run.begin()
    return loop.train(method, task, training_config(**{"lr": 0.1} | changes), run, steps), run


def one_step(method, task, before=lambda state: None, **changes):
    """(what the first step logs, the State)"""
    config = training_config(**{"lr": 0.1, "clip": 0} | changes)
    state = State(method, config)
    before(state)
    return loop.train_step(state, method, task, config, next(task.batches(0, 1)), config.lr), state


# --- the loss and its gradient ---------------------------------------------------------------------------------------
class Penalised(Recorder):
    def penalty(self):
        return 10 * self.model.weight.square().sum()


def test_a_penalty_reaches_the_gradients_whatever_the_loss_scale(network):
    task = Fit(network)
    total = task.losses(next(task.batches(0, 1))).mean() + 10 * network.weight.square().sum()
    gradients = torch.autograd.grad(total, list(network.parameters()))
    expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    for scale in (1.0, 1024.0):
        entry, _ = one_step(
            Penalised(network), task, lambda state, scale=scale: setattr(state, "loss_scale", scale), lr=0
        )
        assert entry["grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_is_skipped_even_if_its_gradient_is(network):
    class Nan(Fit):
        def losses(self, batch):
            return super().losses(batch) + math.nan

    before = network.weight.detach().clone()
    entry, state = one_step(Recorder(network), Nan(network))
    assert math.isfinite(entry["grad_norm"]) and entry["skipped"] == state.bad_steps == 1
    assert torch.equal(network.weight, before)


def test_the_loss_scale_halves_after_an_overflow_and_doubles_after_many_good_steps(network, monkeypatch):
    monkeypatch.setattr(state, "FP16_PATIENCE", 2)
    method, task, config = Recorder(network), Fit(network), training_config(lr=0)
    scales, current = [], State(method, config)
    current.loss_scale = 2.0**10
    for factor in (1, 1, math.inf, 1, 1):
        task.losses = lambda batch, factor=factor: Fit.losses(task, batch) * factor
        loop.train_step(current, method, task, config, next(task.batches(0, 1)), 0.0)
        scales.append(math.log2(current.loss_scale))
    assert scales == [10, 11, 10, 10, 11]


def test_processes_sum_loss_gradients_and_statistics(network, monkeypatch):
    """Two processes that see the same are simulated: every sum over processes doubles."""

    class Counting(Recorder):
        counts = torch.ones(3)

        def statistics(self):
            return [self.counts]

    alone, _ = one_step(Counting(network), Fit(network), lr=0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda tensors: [tensor.mul_(2) for tensor in tensors])
    both, _ = one_step(Counting(network), Fit(network), lr=0)
    assert both["loss"] == pytest.approx(2 * alone["loss"]) and both["grad_norm"] == pytest.approx(
        2 * alone["grad_norm"]
    )
    assert torch.equal(Counting.counts, torch.full((3,), 2.0))


# --- between steps ---------------------------------------------------------------------------------------------------
def test_the_result_is_saved_when_validation_is_best_and_only_then(tmp_path, network):
    method, task = Recorder(network), Fit(network, (3.0, 2.0, 2.5, math.nan, 1.0, 1.0))
    found, _ = train(tmp_path / "run", method, task, 5)
    assert found.best == (1.0, 4)
    assert len(method.saved) == 3
    for saved, step in zip(method.saved, (0, 1, 4)):
        assert torch.equal(saved, task.seen[step])


def test_a_run_without_a_finite_validation_keeps_the_last_weights(tmp_path, network):
    found, _ = train(tmp_path / "run", method := Recorder(network), Fit(network, (math.nan,) * 3), 2)
    assert found.best is None and len(method.saved) == 1 and torch.equal(method.saved[0], network.weight)


def test_a_method_may_forbid_a_best_result(tmp_path, network):
    class Late(Recorder):
        def may_be_best(self, step):
            return step >= 2

    found, _ = train(tmp_path / "run", method := Late(network), Fit(network, (1.0, 1.0, 3.0, 4.0)), 3)
    assert found.best == (3.0, 2) and len(method.saved) == 1


def test_validation_and_result_see_the_averaged_weights(tmp_path, network):
    method, task = Recorder(network), Fit(network, (3.0, 2.0, 1.0))
    found, _ = train(tmp_path / "run", method, task, 2, ema_decay=0.5)
    average = found.average.values["weight"]
    assert torch.equal(task.seen[-1], average) and torch.equal(method.saved[-1], average)
    assert not torch.equal(network.weight, average)


def test_finish_is_called_once_at_the_end_and_logged(tmp_path, network):
    class Finishing(Recorder):
        def finish(self, validate):
            return {"by_rank": validate()}

    _, run = train(tmp_path / "run", Finishing(network), Fit(network, (3.0, 2.0, 1.0, 0.5)), 2)
    assert [entry["by_rank"] for entry in run.entries() if "by_rank" in entry] == [0.5]


def test_a_state_keeps_every_number(network):
    method, config = Recorder(network), training_config()
    ours, theirs = State(method, config), State(method, config)
    numbers = {name for name, value in vars(ours).items() if value is None or isinstance(value, (int, float))}
    assert len(numbers) == 8
    for i, name in enumerate(sorted(numbers)):
        setattr(ours, name, (0.5, 3) if name == "best" else 7 + i)
    theirs.load_state_dict(ours.state_dict(), config)
    assert {name: vars(ours)[name] for name in numbers} == {name: vars(theirs)[name] for name in numbers}


# --- fine-tuning -----------------------------------------------------------------------------------------------------
def test_full_fine_tuning_uses_one_fused_optimizer():
    method_settings, config = settings("full")
    method = METHODS["full"](small_model(), method_settings, 10, 0)
    assert isinstance(State(method, config).optimizer, FusedAdamW)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_products_are_computed_in_the_precision_asked_for(precision):
    model, dtypes = small_model(), []
    model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(
        lambda layer, inputs, output: dtypes.append(output.dtype)
    )
    task = Finetuning(model, samples(4), samples(2, seed=1), training_config(), precision=precision)
    losses = task.losses(next(iter(task.batches(0, 1))))
    task.validate()
    assert set(dtypes) == {precision or torch.float32} and losses.dtype == torch.float32


def test_balanced_classes_come_equally_often():
    data = samples(12)
    kinds = ["normal"] * 9 + ["effusion"] * 3
    records = tuple(Record(r.name, r.patient, {"diagnosis": kind}) for r, kind in zip(data.records, kinds))
    data = Samples(records, data.prompts, data.latents)
    shares = {}
    for balance in (None, "diagnosis"):
        task = Finetuning(small_model(), data, samples(0), training_config(), balance=balance)
        shown = torch.cat([batch["index"] for batch in task.batches(0, 30)])
        shares[balance] = (shown >= 9).double().mean().item()
    assert shares == {None: 0.25, "diagnosis": 0.5}
