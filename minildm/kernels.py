"""Code that exists only for speed: equal to plain code up to rounding.

Each fast path replaces plain code, its twin, which the docstring names; a test compares the two. With
``kernels.enabled = False``, or inside ``with kernels.plain():``, layers run only the plain code (unless
`products_in_float32` has changed them before).
"""

import contextlib
import functools
import time
import weakref

import torch
import torch.nn.functional as F
from torch import nn

enabled = True
winograd_enabled = True  # in `convolution`; off while training, to save memory


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
    """Inside this block, run no code that needs more memory than its twin."""
    global winograd_enabled
    before, winograd_enabled = winograd_enabled, False
    try:
        yield
    finally:
        winograd_enabled = before


def convolution(layer, x):
    """Twin: the layer's own convolution, `torch.nn.functional.conv2d` with padding 1.

    Args: layer: nn.Conv2d with a 3x3 kernel, stride 1, no groups; x (B, C_in, h, w). Returns: (B, C_out, h, w).
    """
    if winograd_enabled and winograd_pays(layer, x):
        return winograd(x, winograd_weight(layer), layer.bias)
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
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def winograd_pays(layer, x):
    """Measured on CPUs without and with AMX, in float32: with at least 320 channels and maps larger than 4 x 4, 1.2 to
    2.6 times as fast. Without gradients only."""
    return (
        x.dtype == torch.float32
        and min(layer.weight.shape[:2]) >= 320
        and x.shape[2] * x.shape[3] > 16
        and not torch.is_grad_enabled()
        and eligible(layer, x)
    )


# Winograd's F(2x2, 3x3) (Lavin and Gray 2015, arXiv:1509.09308, Eq. 7 and 8): a 2 x 2 tile of the output from a 4 x 4
# tile d of the input and the kernel g takes 16 products instead of 36,
#
#     Y = A^T [ (G g G^T) * (B^T d B) ] A
#
#           1  0 -1  0           1    0    0            1  1  1  0
#     B^T = 0  1  1  0      G = 1/2  1/2  1/2     A^T = 0  1 -1 -1
#           0 -1  1  0          1/2 -1/2  1/2
#           0  1  0 -1           0    0    1
#
# The products * are sums over the input channels: 16 matrix products, one for each of the 16 positions in a tile.
_transformed = weakref.WeakKeyDictionary()  # layer -> (its weight, the weight's version, G g G^T)


def winograd_weight(layer):
    """G g G^T of each pair of channels, (16, C_in, C_out): 16/9 of the weight's memory, kept until the weight changes.
    (The entry also holds the weight, so that its address cannot be reused by another.)"""
    weight = layer.weight
    kept = _transformed.get(layer)
    if kept is None or kept[0].data_ptr() != weight.data_ptr() or kept[1] != weight._version:
        G = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        columns = (weight.detach().permute(2, 3, 1, 0).reshape(3, -1)).contiguous()  # (3, 3 C_in C_out)
        rows = (G @ columns).view(4, 3, -1).transpose(0, 1).reshape(3, -1)  # (3, 4 C_in C_out)
        transformed = (G @ rows).view(4, 4, *weight.shape[1::-1]).transpose(0, 1).reshape(16, *weight.shape[1::-1])
        kept = _transformed[layer] = (weight.detach(), weight._version, transformed)
    return kept[2]


def winograd(x, weight, bias, tiles=2048):
    """`convolution` by F(2x2, 3x3), in strips of about ``tiles`` tiles, which bounds the memory between the steps.

    Args: x (B, C_in, h, w); weight (16, C_in, C_out) of `winograd_weight`; bias (C_out,) or None.
    Returns: (B, C_out, h, w), channels-last.
    """
    height, width = x.shape[2:]
    rows, columns = -(-height // 2), -(-width // 2)  # of tiles
    # (B, 2 rows + 2, 2 columns + 2, C_in): a border of 1, and one more row or column where the size is odd
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
    out = x.new_empty(len(x), 2 * rows, 2 * columns, weight.shape[2])
    at_a_time = max(1, tiles // (len(x) * columns))  # rows of tiles
    for first in range(0, rows, at_a_time):
        n = min(at_a_time, rows - first)
        strip = x[:, 2 * first : 2 * (first + n) + 2]
        _winograd_strip(strip, weight, bias, out[:, 2 * first : 2 * (first + n)])
    return out[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _winograd_strip(x, weight, bias, out):
    """x (B, 2 n + 2, 2 m + 2, C_in) -> out (B, 2 n, 2 m, C_out), written in place."""
    batch, n, m = len(x), out.shape[1] // 2, out.shape[2] // 2
    d = [x[:, i : i + 2 * n : 2] for i in range(4)]  # row i of each tile, (B, n, 2 m + 2, C_in)
    half = x.new_empty(4, *d[0].shape)  # B^T d
    _times_B(d, half)
    d = [half[:, :, :, j : j + 2 * m : 2] for j in range(4)]  # column j, (4, B, n, m, C_in)
    tiles = x.new_empty(4, 4, batch, n, m, x.shape[-1])  # B^T d B
    _times_B(d, tiles.transpose(0, 1))
    products = torch.bmm(tiles.view(16, -1, x.shape[-1]), weight).view(4, 4, batch, n, m, -1)
    del half, tiles, d
    half = products.new_empty(2, 4, *products.shape[2:])  # A^T times the products
    _times_A(products, half)
    for i in range(2):
        for j, column in enumerate(_times_A(half[i])):
            out[:, i::2, j::2] = column if bias is None else column.add_(bias)


def _times_B(d, out):
    """The four rows of B^T d."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _times_A(y, out=(None, None)):
    """The two rows of A^T y."""
    return (torch.add(y[0], y[1], out=out[0]).add_(y[2]), torch.sub(y[1], y[2], out=out[1]).sub_(y[3]))


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
