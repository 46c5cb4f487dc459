"""The training loop: batches -> losses -> gradients -> a step, for any method (adapters/method.py) and task (task.py).

A run can be interrupted at any moment and resumed exactly: `State` holds all that changes, the order of the data and
all randomness are functions of the step, and a saved state is the new one or the one before. All files are written
through `Run`.
"""

import math
import time

import torch

from minildm import kernels
from minildm.distributed import on_any_process, require_same, sum_gradients, wait_for_all
from minildm.errors import InputError, is_out_of_memory
from minildm.optimizer import clip_gradients
from minildm.progress import Progress
from minildm.seeds import to_device
from minildm.torchrun import resumable
from minildm.training.machine import helpful_out_of_memory, peak_memory_mb, stop_requests
from minildm.training.state import State


def train(method, task, config, run, steps):
    """Train to step ``steps``, from the run's saved state if there is one.

    With ``config.ema_decay``, validation, sample sheets and the saved result see the averaged weights.
    Returns: State. Raises: InputError when losses stay not finite, memory runs out or the disk is full;
    KeyboardInterrupt after Ctrl-C, when the state has been saved.
    """
    state = State(method, config)
    if saved := run.load_state():
        try:
            state.load_state_dict(saved, config)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise run.damaged_state(f"not a state of this run: {error}") from None
        if state.step < 0:
            raise run.damaged_state(f"step {state.step}")
    if state.step > steps:
        raise InputError(
            f"{run.folder} has {state.step:,} steps already, and its end would be step {steps:,}; give more --steps or "
            "--epochs"
        )
    run.adopt_settings()
    task.begin()

    def between_steps():
        """Validation, the best result, sample images, the saved state: each at its interval, and at the end."""
        step, last = state.step, state.step == steps
        interval = task.validation_interval
        with state.averaged():
            if interval is not None and (last or step % interval == 0):
                loss = task.validate()
                run.log(step=step, validation=loss)
                better = math.isfinite(loss) and (state.best is None or loss < state.best[0])
                if better and method.may_be_best(step):
                    state.best = (loss, step)
                    save_result(method, config, run)
            if last and state.best is None:  # nothing to validate on, or never a finite loss
                save_result(method, config, run)
            if config.sample_interval and (last or step % config.sample_interval == 0):
                run.save_sheet(step, task.sample_sheet)
            if last and (found := method.finish(task.validate if interval is not None else None)):
                run.log(step=step, **found)  # before the state is saved: a resumed run keeps it
        if last:
            state.ended = step
        if (last or step % config.save_interval == 0) and not state.bad_steps:
            require_same(state.trained.values())
            run.save_state(state.state_dict())

    begun, before = time.perf_counter(), state.seconds
    with (
        resumable(run.continue_with),
        helpful_out_of_memory(config),
        stop_requests() as stops,
        Progress("training", "step", steps, initial=state.step) as bar,
    ):
        if not saved or (state.step == steps and state.ended != steps):  # --resume RUN --steps N, to end where it is
            between_steps()
        for batch in task.batches(state.step, steps):
            entry = train_step(state, method, task, config, batch, learning_rate(state.step, steps, config))
            state.step += 1
            state.average.update(state.step, state.trained)
            state.seconds = before + time.perf_counter() - begun
            memory = round(peak_memory_mb(method.model))
            run.log(step=state.step, **entry, seconds=round(state.seconds, 3), memory_mb=memory)
            bar.update(note=f"loss {entry['loss']:.4f}")
            if state.bad_steps >= config.max_bad_steps:
                raise InputError(_not_finite(state, config, run))
            between_steps()
            if state.step < steps and on_any_process(stops):
                run.save_state(state.state_dict())
                wait_for_all()  # a process that ends before the first has saved would end that one, too
                bar.close()
                print(
                    f"stopped at step {state.step} of {steps}; the state is saved. Continue with: {run.continue_with}"
                )
                raise KeyboardInterrupt
    if on_any_process(stops):  # during the last step, whose state is saved
        print(f"stopped after the last step. For the rest: {run.continue_with}")
        raise KeyboardInterrupt
    return state


def train_step(state, method, task, config, batch, lr):
    """One step of the optimizer. Returns: what to log."""
    size, micro = task.batch_size, config.micro_batch or task.batch_size
    parameters = state.optimizer.parameters
    device = parameters[0].device
    loss = torch.zeros((), device=device)

    def backward(part):  # the lines below, as a function for two threads
        part_loss = (to_device(part["weight"], device) * task.losses(part)).sum() / size
        (part_loss * state.loss_scale).backward()
        return part_loss.detach()

    with method.watch(state.step):
        for first in range(0, len(batch["id"]), micro):
            part = {name: values[first : first + micro] for name, values in batch.items()}
            # Two halves at once only where no sum could depend on which one is done first (a + b = b + a).
            if len(batch["id"]) <= micro and not method.statistics() and len(halves := task.halves(part)) == 2:
                loss = loss + sum(kernels.at_once(backward, halves))
                continue
            part_loss = (to_device(part["weight"], device) * task.losses(part)).sum() / size  # of (b,) each
            (part_loss * state.loss_scale).backward()
            loss = loss + part_loss.detach()
    if torch.distributed.is_initialized():
        sum_gradients(parameters, [loss, *method.statistics()])
    measured = {"loss": loss}
    if method.penalty is not None:
        penalty = method.penalty()
        (penalty * state.loss_scale).backward()
        measured["penalty"] = penalty.detach()
    if state.loss_scale != 1:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], state.loss_scale)
    measured["grad_norm"] = clip_gradients(parameters, config.clip)
    # The one time in a step that the CPU waits for a GPU: what follows depends on whether the step is finite.
    entry = {"lr": lr} | dict(zip(measured, torch.stack(list(measured.values())).tolist()))
    good = math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])
    if good:
        state.optimizer.step(lr)
        state.bad_steps = 0
        if changes := method.update(state.step, state.optimizer):
            adopt(state, method)
            entry |= changes
    else:
        state.bad_steps, state.skipped = state.bad_steps + 1, state.skipped + 1
        entry["skipped"] = state.skipped
    if state.loss_scale != 1:
        state.adjust_loss_scale(good)
    for parameter in parameters:
        parameter.grad = None
    return entry


def adopt(state, method):
    """Give the parameters a method has added, and the rows it has restarted, to the optimizer and the average."""
    added = {name: parameter for name, parameter in method.trained().items() if name not in state.trained}
    if added:
        state.trained |= added
        state.optimizer.add(list(added.values()), [method.rate(name) for name in added])
        state.average.add(added)
    names = {id(parameter): name for name, parameter in state.trained.items()}
    for parameter, row, dim in state.optimizer.take_restarted():
        state.average.restart(names[id(parameter)], parameter, row, dim)


def learning_rate(step, steps, config):
    """At step 0, 1, ..., steps - 1: linear warm-up, then constant or a cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def save_result(method, config, run):
    about = config.as_json() | (method.settings.as_json() if method.settings is not None else {})
    run.save_result(lambda path: method.save(path, about))
    if config.save_format != "native":
        run.save_file(exported_name(config.save_format), lambda path: method.export(path, config.save_format))


def exported_name(format):
    """The file in a run's folder that ``--save-format`` adds."""
    return f"adapter.{format}.safetensors"


def _not_finite(state, config, run):
    best = f"the best weights (step {state.best[1]}) are in {run.result}, " if state.best else ""
    return (
        f"the loss or its gradient was not finite at {state.bad_steps} steps in a row, up to step {state.step}; lower "
        f"the learning rate (--lr {config.lr:g}) or raise --warmup; {best}the last good state is in {run.state}"
    )
