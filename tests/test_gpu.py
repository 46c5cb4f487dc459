"""Sampling and training steps on a GPU that is not there (fake_gpu.py): all tensors are where they should be, and the
CPU waits no more often than it must."""

import contextlib

import pytest
import torch
from fake_gpu import CUDA, fake_gpu, to_gpu
from made_runs import samples, settings, small_model
from peers import random_model

from minildm import seeds
from minildm.adapters import METHODS
from minildm.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.samplers import SAMPLERS
from minildm.training.finetune import Finetuning
from minildm.training.loop import train_step
from minildm.training.machine import checkpoint_blocks
from minildm.training.state import State


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


def model_of_one_level(dtype):
    """Every kind of layer but down- and upsampling; on the fake GPU."""
    config = ModelConfig(
        UNetConfig.tiny(widths=(32,), attention=(True,), n_heads=(4,), norm_groups=8),
        VAEConfig.tiny(),
        TextEncoderConfig.tiny(n_layers=1),
    )
    model = to_gpu(random_model(config).to(dtype))
    model.schedule.snr(torch.zeros(1, dtype=torch.int64, device=CUDA))  # the schedule's tables are copied once
    return model


# --- the fake GPU notices --------------------------------------------------------------------------------------------
def test_mixed_devices_are_an_error(gpu):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CUDA) + torch.ones(3)
    assert (torch.ones(3) + torch.ones(3)).tolist() == [2, 2, 2]  # the CPU is real


@pytest.mark.parametrize(
    "wait, noted",
    [
        (lambda x: x.sum().item(), "value read"),
        (lambda x: bool(x.isfinite().all()), "value read"),
        (lambda x: x.tolist(), "values read"),
        (lambda x: x.cpu(), "copy cuda -> cpu"),
        (lambda x: torch.zeros(3).copy_(x), "copy cuda -> cpu"),
        (lambda x: torch.zeros(3).to(x.device), "copy cpu -> cuda"),
        (lambda x: torch.zeros(3).to(x), "copy cpu -> cuda"),
        (lambda x: x.copy_(torch.zeros(3)), "copy cpu -> cuda"),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), "copy of pageable memory"),
    ],
)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_every_kind_of_wait_is_noted(gpu, wait, noted, mode):
    with mode():
        wait(torch.ones(3, device=CUDA))
    assert gpu.waits == [noted]


def test_its_backward_reaches_every_parameter_with_the_right_shape(gpu):
    weight, bias = (torch.ones(shape, device=CUDA, requires_grad=True) for shape in ((4, 3), (4,)))
    x = torch.ones(2, 3, device=CUDA)
    (torch.nn.functional.linear(x, weight, bias) * bias.sum()).square().mean().backward()
    assert weight.grad.shape == (4, 3) and bias.grad.shape == (4,) and bias.grad.is_cuda


def test_copies_to_a_gpu_do_not_wait(gpu):
    x = torch.rand(2, 3)
    there = seeds.to_device(x, CUDA, torch.float16)
    assert there.is_cuda and there.dtype == torch.float16 and there.shape == (2, 3)
    assert gpu.waits == []
    assert seeds.to_device(x, torch.device("cpu")) is x


# --- sampling --------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*starts from pure noise")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampling_step_waits(gpu, sampler):
    """Before the steps, token ids are copied; after them, one value says whether all latents are finite."""
    model, waits, n = model_of_one_level(torch.float32), [], 3
    options = {"sampler": sampler, "guidance": 1 if sampler == "plms" else 3, "eta": 1.0 if sampler == "ddim" else 0.0}
    gpu.waits.clear()
    latents = model.sample(
        ["a", "b"], steps=n, output="latent", callback=lambda *_: waits.append(len(gpu.waits)), **options
    )
    assert latents.device == CUDA and latents.shape == (2, 4, 8, 8)
    assert gpu.waits == ["copy cpu -> cuda", "value read"]
    assert waits == [1] * (n + (sampler == "plms"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_images_are_encoded_and_decoded_where_the_model_is(gpu, dtype):
    model = to_gpu(small_model().to(dtype))
    images = model.sample(
        ["a"], steps=2, sampler="dpm++", init_images=torch.zeros(1, 1, 64, 64), strength=0.5, output="tensor"
    )
    assert images.device == CUDA and images.shape == (1, 3, 64, 64) and images.dtype == torch.float32


# --- training --------------------------------------------------------------------------------------------------------
def training_steps(gpu, adapter, n=1, dtype=torch.float32, checkpointing=False, **changes):
    """Take ``n`` steps. Returns: what the CPU waited for in each, and what each logged."""
    model = model_of_one_level(dtype)
    method_settings, config = settings(adapter, **{"layers": "attention"} | changes)
    task = Finetuning(model, samples(), samples(0), config)
    method = METHODS[adapter](model, method_settings, 10, seed=0)
    if checkpointing:
        checkpoint_blocks(model.unet, model.text_encoder)
    state, steps = State(method, config), []
    for batch in task.batches(0, n):
        gpu.waits.clear()
        entry = train_step(state, method, task, config, batch, 1e-3)
        state.step += 1
        state.average.update(state.step, state.trained)
        steps.append((list(gpu.waits), entry))
    assert all(parameter.is_cuda and parameter.grad is None for parameter in state.trained.values())
    return steps


@pytest.mark.parametrize("adapter", METHODS)
def test_a_training_step_waits_once(gpu, adapter):
    """For the loss and the norm of its gradient: whether the step is finite decides what the CPU does next."""
    changes = {"min_snr_gamma": 5.0, "noise_offset": 0.1, "caption_dropout": 0.5, "ema_decay": 0.9}
    if adapter == "lora":
        changes |= {"layers": "all-linear", "micro_batch": 3}  # accumulated over two micro-batches
    ((waits, entry),) = training_steps(gpu, adapter, **changes, expand_interval=10)
    assert waits == ["values read"]
    assert entry.keys() >= {"loss", "lr", "grad_norm"} and "skipped" not in entry
    assert ("penalty" in entry) == (adapter == "adalora")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"dtype": torch.float16}])
def test_a_step_in_parts_or_in_float16_waits_once_too(gpu, changes):
    assert training_steps(gpu, "lora", **changes)[0][0] == ["values read"]


@pytest.mark.parametrize("criterion", ["sampled", pytest.param("expected", marks=pytest.mark.slow)])
def test_a_test_of_selora_reads_its_scores_in_one_go(gpu, criterion):
    ((waits, entry),) = training_steps(gpu, "selora", expand_interval=1, expand_criterion=criterion)
    assert "fisher_ratios" in entry and waits == ["values read"] * 2


@pytest.mark.slow
def test_a_pruning_of_adalora_reads_its_ranks_in_one_go(gpu):
    changes = {"prune_interval": 1, "initial_share": 0.1, "final_share": 0.7}  # begins after step 1, ends with step 3
    _, (pruned, entry), (frozen, _) = training_steps(gpu, "adalora", n=3, **changes)
    assert "ranks" in entry and pruned == ["values read"] * 2
    assert frozen == ["values read"] * 3
