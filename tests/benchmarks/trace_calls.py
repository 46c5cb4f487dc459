"""How deep a reader has to go: the minildm files that one step crosses and its deepest nesting of minildm calls.

python tests/benchmarks/trace_calls.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from peers import noise, random_model

import minildm
from minildm import kernels
from minildm.config import ModelConfig
from minildm.samplers import ddim, guide

PACKAGE = str(Path(minildm.__file__).resolve().parent)


def trace(function):
    """Call ``function()`` with the plain code only (`kernels.plain`) and record every call of a minildm function.

    A resumed generator counts as a call. Comprehensions do not count, nor do calls of torch and the standard library.
    Only this thread is seen; the backward pass runs in it on a CPU, but not on a GPU.

    Returns:
        files: set of names, relative to minildm/, of the files whose functions ran.
        depth: largest number of minildm calls that were active at the same time.
        stack: those calls, outermost first: ["samplers.py: ddim", ...].
    """
    files, active, deepest = set(), [], []

    def record(frame, event, _):
        nonlocal deepest
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name in ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>"):
            return
        if event == "return":
            active.pop()
            return
        file = str(Path(code.co_filename).relative_to(PACKAGE))
        files.add(file)
        active.append(f"{file}: {getattr(code, 'co_qualname', code.co_name)}")  # co_qualname: Python 3.11
        if len(active) > len(deepest):
            deepest = list(active)

    with kernels.plain():
        sys.setprofile(record)
        try:
            function()
        finally:
            sys.setprofile(None)
    return files, len(deepest), deepest


@torch.no_grad()
def guided_ddim_step():
    """A function that takes one guided DDIM step with a small model."""
    model = random_model(ModelConfig.tiny())
    context = model.encode_prompt(["", "chest x-ray"])
    denoise = guide(model.unet, context, guidance=7.5)
    steps = ddim(denoise, noise(1, 4, 8, 8), model.schedule, 50, sample_noise=None)
    return torch.no_grad()(lambda: next(steps))


def selora_training_step():
    """A function that takes one training step at which SeLoRA tests every layer, with a small model."""
    from made_runs import samples, settings

    from minildm.adapters import METHODS
    from minildm.data.cache import CachedLatents
    from minildm.training.finetune import Finetuning, Samples
    from minildm.training.loop import train_step
    from minildm.training.state import State

    model = random_model(ModelConfig.tiny())
    method_settings, config = settings("selora", expand_interval=1)
    method = METHODS["selora"](model, method_settings, 10, config.seed)
    nothing = Samples((), (), CachedLatents({}, (), []))
    task = Finetuning(model, samples(8), nothing, config)
    batch, state = next(iter(task.batches(0, 1))), State(method, config)
    return lambda: train_step(state, method, task, config, batch, config.lr)


def show(title, function):
    files, depth, stack = trace(function)
    print(f"{title}: {len(files)} files ({', '.join(sorted(files))}), {depth} nested calls:")
    for level, call in enumerate(stack):
        print("  " * (level + 1) + call)


def main():
    show("one guided DDIM step", guided_ddim_step())
    show("one SeLoRA training step with its test", selora_training_step())


if __name__ == "__main__":
    main()
