"""The training loop: batches -> losses -> gradients -> steps, for an adapter or for any other parameters.

A run can stop at any moment and go on as if it had not: `State` holds all that changes, the order of the data and all
randomness are functions of the step (step.py, data/loader.py), and the state's file is whole or the one before.

A step's gradients, and with them the Fisher sums and counts of SeLoRA's test, are complete after `backward`: there a
distributed run adds them up over its processes. All files are written through `Run`.
"""

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minildm.adapters.fisher import fisher_probe
from minildm.adapters.selora import BLOCK, SeLoRALinear, layers_to_grow
from minildm.errors import InputError
from minildm.optimizer import AdamW, clip_gradients
from minildm.training.loss import learning_rate, seeded

FP16_SCALE = 2.0**16  # of the loss, so that small gradients survive float16
FP16_PATIENCE = 2000  # good steps before the scale doubles


class State:
    """Everything that changes while training."""

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.step = 0
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # in the optimizer's order
        self.optimizer = AdamW(list(self.trained.values()), weight_decay=config.weight_decay)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if config.ema_decay else {}
        self.best = None  # (validation loss, step)
        self.bad_steps, self.skipped = 0, 0  # in a row; in all
        self.loss_scale = FP16_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0
        self.good_steps = 0  # since the loss scale changed
        self.seconds = 0.0  # of training, over all sittings

    NUMBERS = ("step", "best", "bad_steps", "skipped", "loss_scale", "good_steps", "seconds")

    def growing(self):
        """{path: layer} whose rank grows."""
        return {path: module for path, module in self.model.named_modules() if isinstance(module, SeLoRALinear)}

    def grow(self, layer, expansion):
        """Add the tested row; it counts its own steps."""
        new = layer.grow(expansion)
        if new:
            added = {
                name: p for name, p in self.model.named_parameters() if p.requires_grad and name not in self.trained
            }
            self.trained |= added
            if self.average:
                self.average |= {name: p.detach().clone() for name, p in added.items()}
            self.optimizer.add(new)
        else:
            A, B = layer.blocks()[-1]
            row = (layer.rank - 1) % BLOCK
            self.optimizer.restart(A, row, dim=0)
            self.optimizer.restart(B, row, dim=1)

    def update_average(self):
        """The weights' moving average, shorter while training is young (as if ``decay`` grew from 0.1 to its value)."""
        if self.average:
            decay = min(self.config.ema_decay, self.step / (self.step + 9))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has its averaged weights, where there is an average."""
        self.swap_average()
        try:
            yield
        finally:
            self.swap_average()

    def swap_average(self):
        for name in self.average:
            parameter = self.trained[name]
            parameter.data, self.average[name] = self.average[name], parameter.data

    def state_dict(self):
        return {name: getattr(self, name) for name in self.NUMBERS} | {
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "average": dict(self.average),
            "ranks": {path: layer.rank for path, layer in self.growing().items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state):
        for path, layer in self.growing().items():
            layer.grow(torch.zeros(layer.base.in_features, state["ranks"][path] - layer.rank))
        parameters = dict(self.model.named_parameters())
        self.trained = {name: parameters[name] for name in state["trained"]}  # the order they came in
        for name, values in state["trained"].items():
            self.trained[name].data.copy_(values)
        self.average = {name: values.to(self.trained[name].device) for name, values in state["average"].items()}
        self.optimizer = AdamW(list(self.trained.values()), weight_decay=self.config.weight_decay)
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.NUMBERS:
            setattr(self, name, state[name])


def train(model, losses, batches, steps, config, run, validate=None, validation_steps=None, keep=None, draw=None):
    """Train the parameters of ``model`` that require gradients, from the run's saved state on, to step ``steps``.

    Args:
        losses: (batch, numbers of its samples) -> (B,) losses.
        batches: (first step, last step) -> batches: dicts of tensors and lists of ``config.batch_size`` samples.
        validate: () -> loss, every ``validation_steps`` steps, before the first and after the last.
        keep: (path) writes what was learnt: when validation is best, or without validation at the end.
        draw: (step) makes sample pictures, every ``config.sample_interval`` steps.
    With ``config.ema_decay``, ``validate``, ``keep`` and ``render`` see the averaged weights.
    Returns: State. Raises: InputError when losses stay not finite, memory runs out or the disk is full;
    KeyboardInterrupt after Ctrl-C, the state being saved.
    """
    state = State(model, config)
    if saved := run.load_state():
        state.load_state_dict(saved)

    def look():
        """What happens between steps: validation, the best adapter, pictures, the saved state."""
        step, last = state.step, state.step == steps
        with state.averaged():
            if validate is not None and (last or step % validation_steps == 0):
                loss = validate()
                run.log(step=step, validation=loss)
                if math.isfinite(loss) and (state.best is None or loss < state.best[0]):
                    state.best = (loss, step)
                    if keep is not None:
                        run.save_adapter(keep)
            elif last and validate is None and keep is not None:
                run.save_adapter(keep)
            if draw is not None and config.sample_interval and (last or step % config.sample_interval == 0):
                draw(step)
        if (last or step % config.save_interval == 0) and not state.bad_steps:
            run.save_state(state.state_dict())

    begun, before = time.perf_counter(), state.seconds
    with (
        helpful_out_of_memory(config),
        stop_asked() as asked,
        tqdm(total=steps, initial=state.step, unit="step", disable=None, dynamic_ncols=True) as bar,
    ):
        if not saved:
            look()
        for batch in batches(state.step, steps):
            entry = train_step(state, batch, losses, learning_rate(state.step, steps, config))
            state.step += 1
            state.update_average()
            state.seconds = before + time.perf_counter() - begun
            run.log(step=state.step, **entry, seconds=round(state.seconds, 3), memory_mb=round(peak_memory_mb(model)))
            bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
            bar.update()
            if state.bad_steps >= config.max_bad_steps:
                raise InputError(_not_finite(state, run))
            look()
            if asked and state.step < steps:
                run.save_state(state.state_dict())
                bar.close()
                print(
                    f"stopped at step {state.step} of {steps}, the state is saved; continue with: {run.continue_with}"
                )
                raise KeyboardInterrupt
    if asked:  # during the last step, whose state is saved
        print(f"stopped after the last step; for what follows it: {run.continue_with}")
        raise KeyboardInterrupt
    return state


def train_step(state, batch, losses, lr):
    """One step of the optimizer. Returns: what to log."""
    config, step = state.config, state.step
    layers = state.growing() if (step + 1) % config.expand_interval == 0 else {}
    with measured(state.model, config, step) if layers else contextlib.nullcontext() as probe:
        loss = backward(state, batch, losses)
    parameters = state.optimizer.parameters
    if state.loss_scale != 1:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], state.loss_scale)
    norm = clip_gradients(parameters, config.clip).item()
    entry = {"loss": loss, "lr": lr, "grad_norm": norm}
    if math.isfinite(loss) and math.isfinite(norm):
        state.optimizer.step(lr)
        state.bad_steps, state.good_steps = 0, state.good_steps + 1
        if layers:
            entry |= test_ranks(state, layers, probe)
    else:
        state.bad_steps, state.skipped, state.good_steps = state.bad_steps + 1, state.skipped + 1, 0
        entry["skipped"] = state.skipped
    adjust_loss_scale(state)
    for parameter in parameters:
        parameter.grad = None
    return entry


def backward(state, batch, losses):
    """Gradients of the batch's mean loss, one micro-batch after the other. Returns: the loss."""
    size, config = len(next(iter(batch.values()))), state.config
    total = 0.0
    for first in range(0, size, config.samples_at_a_time):
        own = slice(first, first + config.samples_at_a_time)
        micro = {name: values[own] for name, values in batch.items()}
        numbers = range(state.step * size + first, state.step * size + min(own.stop, size))
        part = losses(micro, numbers).sum() / size
        (part * state.loss_scale).backward()
        total = total + part.detach()
    return total.item()


@contextlib.contextmanager
def measured(model, config, step):
    """SeLoRA's test at this step: the rows it draws depend on the seed and the step alone. Compiled networks run as
    they are written, for the probe to see each layer."""
    generator = seeded(config.seed, "rows", step)
    compiled = "torch._dynamo" in sys.modules  # which the stance alone would import
    with (
        torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext(),
        fisher_probe(model, generator, config.expand_criterion == "expected") as probe,
    ):
        yield probe


def test_ranks(state, layers, probe):
    """Grow the layers whose Fisher ratio says so. Returns: what to log, every ratio and every rank."""
    config, scores = state.config, probe.scores()
    ranks = {path: layer.rank for path, layer in layers.items()}
    sizes = {path: (layer.base.in_features, layer.base.out_features) for path, layer in layers.items()}
    open_scores = {path: score for path, score in scores.items() if path in ranks and ranks[path] < min(sizes[path])}
    grown = layers_to_grow(
        open_scores,
        ranks,
        {path: sum(size) for path, size in sizes.items()},
        config.expand_threshold,
        config.max_rank,
        config.max_parameters,
    )
    for path in grown:
        state.grow(layers[path], probe.expansion(path))
    ratios = {path: expanded / original if original > 0 else None for path, (original, expanded) in scores.items()}
    return {"fisher_ratios": ratios, "ranks": {path: layer.rank for path, layer in layers.items()}, "grown": len(grown)}


def adjust_loss_scale(state):
    """float16 only: halve after an overflow, double after many good steps."""
    if state.loss_scale == 1:
        return
    if state.good_steps == 0:
        state.loss_scale = max(state.loss_scale / 2, 2.0)
    elif state.good_steps % FP16_PATIENCE == 0:
        state.loss_scale *= 2


@contextlib.contextmanager
def stop_asked():
    """Ctrl-C and SIGTERM ask for an end between two steps: the yielded list is then not empty. A second one does not
    wait."""
    asked, before = [], {}

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def helpful_out_of_memory(config):
    """Answer a lack of memory with the flags that help."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "not enough memory" not in str(error):
            raise
        raise InputError("out of memory; " + memory_advice(config)) from None


def memory_advice(config):
    """The flags that lower the memory of a step, those that keep the result first."""
    flags = [f"--micro-batch {max(config.samples_at_a_time // 2, 1)} (same result)"] * (config.samples_at_a_time > 1)
    flags += ["--checkpointing (same result, slower)"] * (not config.checkpointing)
    return "what helps: " + ", ".join([*flags, "in a new run --dtype bfloat16", "a smaller --size"])


def peak_memory_mb(model):
    """The device's peak so far: of the GPU's allocator, or of this process (by /proc where there is one: getrusage
    counts what a parent process held when it started this one)."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6


def _not_finite(state, run):
    kept = run.adapter.exists() and state.best
    best = f"the best weights (step {state.best[1]}) are in {run.adapter}, " if kept else ""
    return (
        f"the loss or its gradient was not finite at {state.bad_steps} steps in a row, to step {state.step}; lower "
        f"the learning rate (it is {state.config.lr:g}) or raise --warmup; {best}the last good state is in "
        f"{run.state}"
    )
