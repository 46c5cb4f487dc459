"""Small real models, made data in memory and short runs, for the tests of training."""

import dataclasses
import time
from pathlib import Path

import torch
from peers import random_model

from minildm import kernels
from minildm.adapters import METHODS, adapter_layers
from minildm.config import ModelConfig
from minildm.data.cache import CachedLatents
from minildm.data.records import Record
from minildm.training.config import TrainingConfig
from minildm.training.finetune import Finetuning, Samples, contexts_folder, finetune
from minildm.training.loop import train_step
from minildm.training.machine import Machine, checkpoint_blocks, forecast, peak_memory_mb
from minildm.training.run import Run
from minildm.training.state import State


def small_model(v2=False, seed=0):
    """Norms of several channels a group: with one, the time embedding's shift cancels and has no gradient at all."""
    config = ModelConfig.tiny(v2)
    return random_model(dataclasses.replace(config, unet=dataclasses.replace(config.unet, norm_groups=8)), seed)


def samples(n=12, seed=0, side=8):
    """Moments as a VAE might give them: a common shape, and some variation of each image."""
    generator = torch.Generator().manual_seed(seed)
    common = 4 * torch.randn(4, side, side, generator=generator)
    rows = {
        bytes([i]): torch.cat(
            [common + torch.randn(4, side, side, generator=generator), torch.full((4, side, side), -6.0)]
        )
        for i in range(n)
    }
    records = tuple(Record(f"{i:03}.png", f"p{i}") for i in range(n))
    prompts = tuple(f"chest x-ray, age {30 + i}" for i in range(n))
    return Samples(records, prompts, CachedLatents(rows, records, list(rows)))


def settings(adapter="selora", **changes):
    """(settings of the method, TrainingConfig) of a short run."""
    method = METHODS[adapter].settings_class
    short = {"steps": 12, "batch_size": 4, "lr": 1e-3, "validation_pairs": 6, "validation_interval": 6}
    values = short | {"save_interval": 5, "expand_interval": 4} | changes
    parts = []
    for part in (method, TrainingConfig):
        names = {field.name for field in dataclasses.fields(part)}
        parts.append(part(**{name: value for name, value in values.items() if name in names}))
    return parts


def training_config(**changes):
    return settings(**changes)[1]


def short_run(folder, resume=False, model=None, n=12, validation=4, workers=0, adapter="selora", **changes):
    """Train a small model. Returns: (model, State, Run, the method)."""
    method_settings, config = settings(adapter, **changes)
    model = small_model() if model is None else model
    run = Run(folder, {"seed": config.seed}, resume=resume, result=METHODS[adapter].result)
    run.begin()
    machine = Machine(cache=folder.parent / "cache", workers=workers)
    contexts = contexts_folder(method_settings, machine.cache)
    task = Finetuning(model, samples(n), samples(validation, seed=1), config, contexts, workers=workers)
    state, method = finetune(task, METHODS[adapter], method_settings, run, machine)
    return model, state, run, method


def factors(model):
    """Every tensor of the live adapter."""
    return [tensor for layer in adapter_layers(model).values() for tensor in layer.factors()]


def same_bits(model, other):
    ours, theirs = factors(model), factors(other)
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def largest_difference(model, other):
    return max((a - b).abs().max().item() for a, b in zip(factors(model), factors(other), strict=True))


def full_size_model(dtype):
    """An SD v1.5-shaped model of random weights, with a small VAE, on the CPU."""
    from minildm.checkpoint import build_networks
    from minildm.config import VAEConfig
    from minildm.latent_diffusion import LatentDiffusion

    config = dataclasses.replace(ModelConfig(), vae=VAEConfig.tiny())
    networks = {name: net.to(dtype).to_empty(device="cpu").eval() for name, net in build_networks(config).items()}
    generator = torch.Generator().manual_seed(0)
    for network in networks.values():
        for name, p in network.named_parameters():
            if p.dim() < 2:
                p.data.fill_(float("norm" in name and name.endswith("weight")))
            else:
                p.data.normal_(0, p[0].numel() ** -0.5, generator=generator)
    return LatentDiffusion(config, **networks)


def full_size_run(folder):
    """Three SeLoRA steps on an SD v1.5-shaped random model at 224 px, batch 1, bfloat16. Prints the peak in GB."""
    model = full_size_model(torch.bfloat16)
    run = Run(folder, {})
    run.begin()
    method, config = settings(steps=3, batch_size=1, expand_interval=2, checkpointing=True, save_interval=3)
    machine = Machine(cache=Path(folder).parent / "cache")
    if machine.products(torch.bfloat16, model.device, run):  # as train.py does; without it, hours on some processors
        kernels.products_in_float32(model)
    task = Finetuning(model, samples(2, side=28), samples(0), config)
    state, _ = finetune(task, METHODS["selora"], method, run, machine)
    assert state.skipped == 0
    assert any("grown" in entry for entry in run.entries())
    print(run.entries()[-1]["memory_mb"] / 1000)


def full_size_step():
    """Two steps of full fine-tuning of an SD v1.5-shaped U-Net at 224 px, batch 1, float32, checkpointing. Prints the
    forecast, the peak (both in GB) and the seconds of the second step."""
    model = full_size_model(torch.float32)
    method_settings, config = settings("full", steps=2, batch_size=1, checkpointing=True)
    task = Finetuning(model, samples(2, side=28), samples(0), config)
    method = METHODS["full"](model, method_settings, 2, 0)
    one = torch.utils.data.default_collate([task.pairs[0]]) | {"id": torch.zeros(1, dtype=torch.int64)}
    needed, _ = forecast(model, lambda: task.losses(one), config)
    checkpoint_blocks(model.unet, model.text_encoder)
    state = State(method, config)
    for batch in task.batches(0, 2):
        begun = time.perf_counter()
        entry = train_step(state, method, task, config, batch, 1e-5)
        state.step += 1
    assert "skipped" not in entry
    print(needed / 1e9, peak_memory_mb(model) / 1000, time.perf_counter() - begun)
