"""Fast paths against their twins: products in float32 where bfloat16 is slow, attention, halves side by side."""

import copy
import functools
import os
import signal

import made_runs
import pytest
import torch
from made_runs import samples, short_run
from peers import random_network, relative_error
from torch import nn

from minildm import kernels
from minildm.adapters.inject import wrap
from minildm.adapters.lora import LoRALinear
from minildm.config import UNetConfig
from minildm.errors import InputError
from minildm.training.finetune import Finetuning
from minildm.training.task import Task

CPU = torch.device("cpu")


def test_the_measurement_is_made_only_for_bfloat16_on_a_cpu_and_says_what_it_found(monkeypatch, capsys):
    def elapse(dtype):
        clock = iter(range(10**6))
        monkeypatch.setattr(kernels.time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(kernels.F, "linear", lambda x, weight: [next(clock) for _ in range(9) if x.dtype == dtype])

    elapse(slow := torch.bfloat16)
    assert kernels.float32_is_faster(slow, CPU)
    assert "products in float32" in capsys.readouterr().out
    elapse(torch.float32)
    assert not kernels.float32_is_faster(slow, CPU)
    monkeypatch.setattr(kernels.F, "linear", None)
    assert not kernels.float32_is_faster(slow, torch.device("cuda"))
    assert not kernels.float32_is_faster(torch.float16, CPU) and not kernels.float32_is_faster(torch.float32, CPU)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(6, 10), (2, 5, 6)),
        (nn.Linear(6, 10, bias=False), (3, 6)),
        (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 5, 7)),
        (nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 5, 8)),
        (nn.Conv2d(6, 10, 1), (1, 6, 3, 3)),
        (nn.Conv2d(640, 640, 3, padding=1).to(memory_format=torch.channels_last), (1, 640, 3, 2)),  # one product
    ],
)
def test_a_layer_in_float32_is_the_layer_and_its_gradient(layer, shape):
    generator = torch.Generator().manual_seed(0)
    layer = layer.bfloat16().requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(shape, generator=generator).bfloat16()
    kernels.products_in_float32(layer)
    y, (dx,) = _with_gradient(layer, x)
    exact_y, (exact_dx,) = _with_gradient(exact, x.double())
    half = 2.0**-8  # one rounding to bfloat16
    assert y.dtype == dx.dtype == torch.bfloat16
    assert relative_error(y, exact_y) <= half and relative_error(dx, exact_dx) <= 2 * half


def _with_gradient(network, *inputs):
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    y = network(*inputs)
    return y, torch.autograd.grad(y.float().square().sum(), [x for x in inputs if x.requires_grad])


def test_a_network_with_an_adapter_is_as_near_to_the_exact_one_as_in_bfloat16():
    """Output and gradients of the adapters, in a U-Net with LoRA: what is rounded to bfloat16 is the same."""

    def results(dtype, wide):
        unet = random_network(UNetConfig.tiny(norm_groups=8), seed=3).bfloat16().to(dtype)
        model = nn.ModuleDict({"unet": unet, "text_encoder": nn.Identity()})
        layers = wrap(model, LoRALinear, 2, targets=("unet",), layers="attention")
        for i, layer in enumerate(layers.values()):
            nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(i))
        if wide:
            kernels.products_in_float32(model)
        generator = torch.Generator().manual_seed(1)
        x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
        y = unet(x.bfloat16().to(dtype), torch.tensor([3, 900]), context.bfloat16().to(dtype))
        y.float().square().mean().backward()
        return [y.detach().double(), *(layer.lora_A.grad.double() for layer in layers.values())]

    exact, half, wide = results(torch.float64, False), results(torch.bfloat16, False), results(torch.bfloat16, True)
    errors = [[relative_error(a, b) for a, b in zip(ours, exact)] for ours in (half, wide)]
    assert sum(errors[1]) <= 1.2 * sum(errors[0]) and max(errors[1]) <= 0.05


def test_autograd_keeps_no_weights_in_float32():
    layer = nn.Linear(64, 64).bfloat16().requires_grad_(False)
    kernels.products_in_float32(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.ones(2, 64, dtype=torch.bfloat16, requires_grad=True))
    assert kept == []


def test_a_trained_layer_keeps_its_own_product_and_its_gradient():
    layer = nn.Linear(4, 3).bfloat16()
    kernels.products_in_float32(layer)
    layer(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.eq(2).all()


@pytest.mark.parametrize("length, length_k, causal", [(9, 9, False), (9, 7, False), (7, 7, True)])
def test_attention_by_products_is_attention_and_its_gradient(length, length_k, causal):
    generator = torch.Generator().manual_seed(0)
    shapes = (length, length_k, length_k)
    inputs = [torch.randn(2, 3, n, 8, generator=generator).bfloat16() for n in shapes]
    assert kernels.product_attention_pays(inputs[0].requires_grad_(), inputs[1])

    def exact(*inputs):
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)

    y, gradients = _with_gradient(lambda *inputs: kernels.attention(*inputs, is_causal=causal), *inputs)
    exact_y, exact_gradients = _with_gradient(exact, *(x.double() for x in inputs))
    assert y.dtype == torch.bfloat16 and relative_error(y, exact_y) <= 2.0**-7
    for gradient, right in zip(gradients, exact_gradients):
        assert relative_error(gradient, right) <= 2.0**-6


def test_attention_by_products_is_for_training_in_bfloat16_on_a_cpu():
    x = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert kernels.product_attention_pays(x, x)
    assert not kernels.product_attention_pays(x.float(), x.float())
    assert not kernels.product_attention_pays(x.detach(), x)
    assert not kernels.product_attention_pays(x.to("meta"), x.to("meta"))
    large = torch.zeros(1, 1, 1025, 8, dtype=torch.bfloat16, requires_grad=True)
    assert not kernels.product_attention_pays(large, large)
    with torch.no_grad():
        assert not kernels.product_attention_pays(x, x)


def test_bfloat16_is_fast_where_there_are_instructions_for_it(monkeypatch):
    for avx, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert kernels.has_fast_bfloat16(CPU) == (avx or amx)
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):  # T4, A100, H100
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert kernels.has_fast_bfloat16(torch.device("cuda")) == fast


class Small(nn.Module):
    """Records the batch sizes it is called with, and the number of threads."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), []

    def forward(self, x, timesteps, context):
        self.calls.append((len(x), torch.get_num_threads()))
        if not x.isfinite().all():
            raise ValueError("not finite")
        return x * self.weight + timesteps + context


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # whatever ran left it as it was
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [2, 3])
def test_two_halves_side_by_side_are_the_whole(two_threads, batch):
    x, t, context = torch.randn(batch, 4, 16, 16), torch.tensor([7]), torch.randn(batch, 4, 16, 16)
    with torch.inference_mode():
        run = kernels.in_two_halves(network := Small())
        assert torch.equal(run(x, t, context), x + 7 + context)
    assert sorted(network.calls) == [(1, 1), (batch - 1, 1)]


def test_a_unet_in_halves_is_the_unet(two_threads):
    unet = random_network(config := UNetConfig.tiny())
    x, t, context = torch.randn(4, 4, 16, 24), torch.tensor([500]), torch.randn(4, 77, config.context_dim)
    with torch.inference_mode():
        assert kernels.halves_pay(unet, x)
        assert relative_error(kernels.in_two_halves(unet)(x, t, context), unet(x, t, context)) < 5e-6


@pytest.mark.parametrize("where", ["first", "second"])
def test_an_error_in_either_half_arrives_and_the_threads_are_restored(two_threads, where):
    x = torch.zeros(2, 4, 16, 16)
    x[0 if where == "first" else 1] = torch.inf
    with torch.inference_mode(), pytest.raises(ValueError, match="not finite"):
        kernels.in_two_halves(Small())(x, torch.tensor([7]), x)


def test_halves_are_for_small_plain_networks_and_batches_on_several_threads(two_threads, monkeypatch):
    network, x = Small(), torch.zeros(2, 4, 16, 16)
    assert kernels.halves_pay(network, x)
    assert not kernels.halves_pay(network, x[:1])
    assert not kernels.halves_pay(network, x[..., :15])
    assert not kernels.halves_pay(network, x.to("meta"))
    with kernels.plain():
        assert not kernels.halves_pay(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.halves_pay(network, x)
    compiled = Small()
    compiled._compiled_call_impl = compiled.forward  # as nn.Module.compile sets it
    assert not kernels.halves_pay(compiled, x)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "SMALL", 1)
        assert not kernels.halves_pay(network, x)
    torch.set_num_threads(1)
    assert not kernels.halves_pay(network, x)
    torch.set_num_threads(2)


# --- halves in training ----------------------------------------------------------------------------------------------
@pytest.fixture
def supposed_threads():
    """As many as that, without the cost of two threads that share each operation beside other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        patch.setattr(torch, "set_num_threads", lambda n: None)
        yield


def halved_run(folder, monkeypatch, adapter, halves=True, steps=6, **changes):
    """A short run on latents of 16 x 16. Returns: (what was trained, the sizes of all parts of batches)."""
    sizes, ordinary = [], Finetuning.losses

    def losses(task, batch):
        sizes.append(len(batch["id"]))
        return ordinary(task, batch)

    monkeypatch.setattr(Finetuning, "losses", losses)
    monkeypatch.setattr(made_runs, "samples", functools.partial(samples, side=16))
    if not halves:
        monkeypatch.setattr(Finetuning, "halves", Task.halves)
    model, *_ = short_run(folder, adapter=adapter, steps=steps, batch_size=5, **changes)
    monkeypatch.undo()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p.detach().clone() for p in trained], sizes[1:]  # the first is the forecast's


@pytest.mark.parametrize("adapter", ["full", "lora", "selora", "adalora", "dylora"])
def test_a_step_in_halves_is_the_step_and_the_same_every_time(tmp_path, monkeypatch, supposed_threads, adapter):
    whole, _ = halved_run(tmp_path / "whole", monkeypatch, adapter, halves=False)
    halves, sizes = halved_run(tmp_path / "halves", monkeypatch, adapter)
    again, _ = halved_run(tmp_path / "again", monkeypatch, adapter)
    # SeLoRA's probe, at the fourth step, sums over the samples of a whole batch.
    assert sorted(sizes) == sorted([2, 3] * 5 + [5] if adapter == "selora" else [2, 3] * 6)
    for one, two, three in zip(whole, halves, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
        assert torch.equal(two, three)


def test_a_resumed_run_in_halves_is_the_run(tmp_path, monkeypatch, supposed_threads):
    whole, _ = halved_run(tmp_path / "whole", monkeypatch, "selora")
    halved_run(tmp_path / "parts", monkeypatch, "selora", steps=2)
    parts, _ = halved_run(tmp_path / "parts", monkeypatch, "selora", resume=True)
    assert all(map(torch.equal, whole, parts))


def test_an_error_in_half_a_step_is_raised(tmp_path, monkeypatch, supposed_threads):
    ordinary, calls = Finetuning.losses, []

    def losses(task, batch):
        calls.append(len(batch["id"]))
        if len(batch["id"]) == 3:
            raise InputError("the second half fails")
        return ordinary(task, batch)

    monkeypatch.setattr(made_runs, "samples", functools.partial(samples, side=16))
    monkeypatch.setattr(Finetuning, "losses", losses)
    with pytest.raises(InputError, match="the second half fails"):
        short_run(tmp_path / "run", adapter="lora", batch_size=5)
    assert 2 in calls


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"micro_batch": 3}])
def test_halves_are_not_taken_where_they_could_not_be_the_same(tmp_path, monkeypatch, supposed_threads, changes):
    _, sizes = halved_run(tmp_path / "run", monkeypatch, "lora", **changes)
    assert sizes == [5] * 6 if "checkpointing" in changes else [3, 2] * 6


def test_a_forked_process_starts_its_own_second_thread(supposed_threads):
    assert kernels.at_once(lambda part: part + 1, [1, 2]) == [2, 3]
    process = os.fork()
    if process == 0:
        signal.alarm(20)  # it would wait for ever
        try:
            os._exit(0 if kernels.at_once(lambda part: part + 1, [1, 2]) == [2, 3] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(process, 0)[1] == 0
