"""Code that exists only for speed: equal to plain code up to rounding.

Each fast path replaces plain code, its twin, which the docstring names; a test compares the two. With
``kernels.enabled = False``, or inside ``with kernels.plain():``, layers run only the plain code (unless
`products_in_float32` has changed them before).
"""

import contextlib
import functools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import torch
import torch.nn.functional as F
from torch import nn

from minildm.winograd import WinogradConvolution, winograd_weight

enabled = True
lean_enabled = False
LEAN_CHANNELS = 640  # see `lean`
SMALL, LEAST_SIDE = 50_000_000, 16  # parameters, latent pixels; see `halves_pay`


@contextlib.contextmanager
def plain(wanted=True):
    """Run only the plain code inside this block, if ``wanted``."""
    global enabled
    before, enabled = enabled, enabled and not wanted
    try:
        yield
    finally:
        enabled = before


@contextlib.contextmanager
def lean():
    """Inside this block, as wherever gradients are computed, Winograd's algorithm only for layers of up to 640 output
    channels. Theirs are the large maps; the widest layers have most of the weights, and their transformed copies take
    3 GB of SD v1.5's U-Net (those of the others 0.5)."""
    global lean_enabled
    before, lean_enabled = lean_enabled, True
    try:
        yield
    finally:
        lean_enabled = before


def convolution(layer, x):
    """Twin: the layer's own convolution, `torch.nn.functional.conv2d` with padding 1.

    Args: layer: nn.Conv2d with a 3x3 kernel, stride 1, no groups; x (B, C_in, h, w). Returns: (B, C_out, h, w).
    """
    if winograd_pays(layer, x):
        return WinogradConvolution.apply(x, winograd_weight(layer), layer.bias)
    if product_pays(layer, x):
        return ConvolutionAsProduct.apply(x, layer.weight, layer.bias)
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def eligible(layer, x):
    """Whether the fast paths may take ``layer`` of ``x``: frozen, on a CPU, with one dtype and an ordinary tensor."""
    return (
        x.device.type == "cpu"
        and x.dtype == layer.weight.dtype
        and type(x) is torch.Tensor
        and not layer.weight.requires_grad
        and not (layer.bias is not None and layer.bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def winograd_pays(layer, x):
    """Measured on CPUs without and with AMX, in float32: with at least 320 channels and maps larger than 4 x 4, 1.2 to
    2.6 times as fast; forward and backward, of layers within `lean`'s limit, 1.5 to 1.9 times."""
    return (
        x.dtype == torch.float32
        and min(layer.weight.shape[:2]) >= 320
        and (layer.weight.shape[0] <= LEAN_CHANNELS or not (lean_enabled or torch.is_grad_enabled()))
        and x.shape[2] * x.shape[3] > 16
        and eligible(layer, x)
    )


def product_pays(layer, x):
    """Is `ConvolutionAsProduct` faster? Measured on CPUs without and with AMX, in float32 and bfloat16."""
    return x.dtype in (torch.float32, torch.bfloat16) and is_small_map(layer.weight, x) and eligible(layer, x)


def is_small_map(weight, x):
    """At least 640 channels, and no more positions than output channels: there one product is 1 to 2.8 times as fast in
    float32 and 1.2 to 4 times in bfloat16, more on smaller maps."""
    return (
        min(weight.shape[:2]) >= 640
        and len(x) * x.shape[2] * x.shape[3] <= weight.shape[0]
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


class ConvolutionAsProduct(torch.autograd.Function):
    """`convolution` as one matrix product: each position's neighbourhood of 9 C_in numbers times the weight.

    oneDNN repacks the weight at every call, forward and backward, which on small maps takes longer than the products. A
    product reads a channels-last weight as it lies.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight, ctx.shape = weight, x.shape
        return convolve_by_product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        return gradient_by_product(dy, ctx.weight, ctx.shape), None, None


def convolve_by_product(x, weight, bias):
    """x (B, C_in, h, w), weight (C_out, C_in, 3, 3) -> (B, C_out, h, w), channels-last."""
    batch, c_in, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, h + 2, w + 2, C_in)
    columns = x.new_empty(batch, h, w, 3, 3, c_in)
    for i in range(3):
        for j in range(3):
            columns[:, :, :, i, j] = padded[:, i : i + h, j : j + w]
    y = F.linear(columns.view(-1, 9 * c_in), weight.permute(0, 2, 3, 1).flatten(1), bias)  # (B h w, C_out)
    return y.view(batch, h, w, -1).permute(0, 3, 1, 2)


def gradient_by_product(dy, weight, shape):
    """The gradient with respect to x, of x's ``shape``, from that of the output, dy (B, C_out, h, w)."""
    batch, c_in, h, w = shape
    rows = dy.permute(0, 2, 3, 1).reshape(batch * h * w, -1)
    columns = (rows @ weight.permute(0, 2, 3, 1).flatten(1)).view(batch, h, w, 3, 3, c_in)
    dx = dy.new_zeros(batch, h + 2, w + 2, c_in, dtype=torch.float32)
    for i in range(3):
        for j in range(3):
            dx[:, i : i + h, j : j + w] += columns[:, :, :, i, j]
    return dx[:, 1:-1, 1:-1].permute(0, 3, 1, 2).to(dy.dtype)


def attention(query, key, value, is_causal=False):
    """Twin: `torch.nn.functional.scaled_dot_product_attention`.

    Args: query (B, n_heads, L, d_head), key and value (B, n_heads, L_k, d_head). is_causal: with L = L_k; each query
    attends only to keys up to its own position. Returns: (B, n_heads, L, d_head).
    """
    if not product_attention_pays(query, key):
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, n_heads, L, L_k)
    if is_causal:
        scores = scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    return scores.softmax(-1) @ value


def product_attention_pays(query, key):
    """Measured on a CPU with bfloat16 instructions, forward and backward: 1.4 to 5 times as fast as the fused kernel,
    whose backward pass is slow there. Up to 32 x 32 positions; beyond, the scores take too much memory."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[-2] * key.shape[-2] <= 2**20
        and query.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def in_two_halves(network):
    """A function like ``network`` that cuts each batch in two and computes the halves `at_once`. With guidance, even a
    single image is a batch of two. Twin: the network itself, which is what runs where this does not pay.

    Args: network: (x (B, 4, h, w), timesteps (1,), context (B, 77, D)) -> (B, 4, h, w); called in inference mode.
    """

    def run(x, timesteps, context):
        def half(rows):
            with torch.inference_mode():
                return network(x[rows], timesteps, context[rows])

        if not halves_pay(network, x):
            return network(x, timesteps, context)
        return torch.cat(at_once(half, two_halves(len(x))))

    return run


def halves_pay(network, x):
    """In a small network many operations take hardly longer than dividing them among threads does, and each waits until
    the slowest is done. Two halves of a batch wait for each other once: on two cores 1.2 times as fast for
    ``weights/tiny``, in sampling and in training.

    For networks smaller than any Stable Diffusion, on a CPU; neither compiled nor under autocast, whose state is per
    thread. Only from the main thread: `torch.set_num_threads` also sets the number that threads started later begin
    with."""
    return (
        enabled
        and x.device.type == "cpu"
        and len(x) > 1
        and min(x.shape[2:]) >= LEAST_SIDE  # a half of one sample would fail where a group norm sees a single pixel
        and torch.get_num_threads() > 1
        and threading.current_thread() is threading.main_thread()
        and network._compiled_call_impl is None
        and not torch.is_autocast_enabled("cpu")
        and sum(parameter.numel() for parameter in network.parameters()) < SMALL
    )


def two_halves(n):
    """The rows of the two halves of a batch of n."""
    return [slice(n // 2), slice(n // 2, n)]


_second_thread = None  # of `at_once`, started when it is first needed


def _forget_thread():
    global _second_thread
    _second_thread = None


os.register_at_fork(after_in_child=_forget_thread)  # a forked process has the object without the thread


def at_once(function, parts):
    """[function(part) for part in parts]: one part, or two at the same time, each with half of the threads.

    An error in either part is raised once both are done.
    """
    global _second_thread
    if len(parts) == 1:
        return [function(parts[0])]
    if _second_thread is None:
        _second_thread = ThreadPoolExecutor(1)
    first, second = parts
    threads = torch.get_num_threads()

    def with_half_the_threads(part):
        torch.set_num_threads(max(1, threads // 2))
        return function(part)

    others = []
    try:
        others.append(_second_thread.submit(with_half_the_threads, second))
        return [with_half_the_threads(first), others[0].result()]
    finally:
        try:
            wait(others)  # also where this half failed: it sets the number for threads started later, too
        finally:
            torch.set_num_threads(threads)


# --- bfloat16 on processors with and without instructions for it -----------------------------------------------------
def has_fast_bfloat16(device):
    """Whether products in bfloat16 are fast on ``device``: on GPUs from compute capability 8 (Ampere) on, and on CPUs
    with instructions for them (AMX, or AVX-512's), where they take about half as long as in float32. Other CPUs take
    ten to hundreds of times as long."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def is_bfloat16_on_cpu(dtype, device):
    return dtype == torch.bfloat16 and device.type == "cpu"


def float32_is_faster(dtype, device):
    """Whether products of ``dtype`` are faster in float32: for bfloat16 on a CPU that has no instructions for it. A
    measurement of under 0.1 s, so callers must record the answer. Prints a line if it is."""
    if not is_bfloat16_on_cpu(dtype, device):
        return False
    x, weight = torch.ones(256, 640), torch.ones(640, 640)
    inputs = {kind: (x.to(kind), weight.to(kind)) for kind in (torch.float32, torch.bfloat16)}
    seconds = {kind: [] for kind in inputs}
    for _ in range(4):  # alternate and keep the fastest: the first run warms up, others may be disturbed
        for kind, pair in inputs.items():
            begun = time.perf_counter()
            F.linear(*pair)
            seconds[kind].append(time.perf_counter() - begun)
    faster = min(seconds[torch.float32]) < min(seconds[torch.bfloat16])
    if faster:
        print("bfloat16 is slower than float32 on this processor: weights in bfloat16, products in float32 (--plain: "
              "all in bfloat16)")  # fmt: skip
    return faster


def products_in_float32(model):
    """Compute the products of all frozen layers in float32: their weights and what lies between layers stay bfloat16,
    so a training step keeps no more memory. Twin: the layers as they are.

    Sets, in each layer: ``wide``, x -> the output in float32; ``forward``.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.dtype == torch.bfloat16:
            layer.wide = functools.partial(_wide, layer)
            layer.forward = functools.partial(_in_float32, layer)


def _wide(layer, x):
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    if isinstance(layer, nn.Linear):
        return F.linear(x.float(), weight, bias)
    if is_plain_conv3x3(layer) and is_small_map(weight, x):
        return convolve_by_product(x.float(), weight, bias)
    return F.conv2d(x.float(), weight, bias, layer.stride, layer.padding)


def is_plain_conv3x3(layer):
    return layer.kernel_size == (3, 3) and layer.stride == (1, 1) and layer.padding == (1, 1)


def _in_float32(layer, x):
    if layer.weight.requires_grad:  # its gradient is autograd's
        return type(layer).forward(layer, x)
    return Float32Product.apply(x, layer)


class Float32Product(torch.autograd.Function):
    """A frozen layer in bfloat16, computed in float32. (Plain autograd would keep float32 copies of the weights.)"""

    @staticmethod
    def forward(ctx, x, layer):
        """x (..., in) or (B, C_in, h, w), layer: nn.Linear or nn.Conv2d -> its output, in x's dtype."""
        ctx.layer, ctx.shape = layer, x.shape
        return layer.wide(x).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        layer, dy_wide = ctx.layer, dy.float()
        if isinstance(layer, nn.Linear):
            return (dy_wide @ layer.weight.float()).to(dy.dtype), None
        weight = layer.weight.float()
        if is_plain_conv3x3(layer) and is_small_map(weight, dy):
            return gradient_by_product(dy_wide, weight, ctx.shape).to(dy.dtype), None
        dx = torch.nn.grad.conv2d_input(ctx.shape, weight, dy_wide, layer.stride, layer.padding)
        return dx.to(dy.dtype), None
