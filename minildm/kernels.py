"""The same numbers, faster: code that exists only for speed.

Each function here equals plain code that stands where it is used; its docstring names that twin and a test compares the
two. With ``kernels.enabled = False``, or inside ``with kernels.plain():``, only the plain code runs.
"""

import contextlib
import math
import weakref

import torch
import torch.nn.functional as F

enabled = True
winograd_enabled = True  # in `convolution`; off while training, which has better uses for the memory


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
    """Inside this block, nothing that needs more memory than the plain code."""
    global winograd_enabled
    before, winograd_enabled = winograd_enabled, False
    try:
        yield
    finally:
        winograd_enabled = before


def convolution(layer, x):
    """Twin: the layer's own convolution, `torch.nn.functional.conv2d` with padding 1.

    Args: layer: nn.Conv2d with a 3x3 kernel; x (B, C_in, h, w). Returns: (B, C_out, h, w).
    """
    if winograd_enabled and winograd_pays(layer, x):
        return winograd(x, winograd_weight(layer), layer.bias)
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def winograd_pays(layer, x):
    """Measured on CPUs without and with AMX, in float32: from 320 channels and maps larger than 4 x 4 on, 1.2 to 2.6
    times as fast. Without gradients only, and for frozen weights, which are transformed once."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32 == layer.weight.dtype
        and min(layer.weight.shape[:2]) >= 320
        and x.shape[2] * x.shape[3] > 16
        and not torch.is_grad_enabled()
        and not layer.weight.requires_grad
        and not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
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
    (An entry keeps the weight's memory as well, so that no other weight can come to lie there unnoticed.)"""
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


def attention(query, key, value, is_causal=False):
    """Twin: `torch.nn.functional.scaled_dot_product_attention`, called everywhere but for bfloat16 on a CPU.

    Args: query (B, n_heads, L, d_head); key, value (B, n_heads, L_k, d_head); is_causal: mask the keys after a query.
    Returns: (B, n_heads, L, d_head).
    """
    # A compiler fuses the plain code by itself.
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.compiler.is_compiling():
        return attention_by_products(query, key, value, is_causal)
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def attention_by_products(query, key, value, is_causal=False, rows=512):
    """`attention` as matrix products, which use a CPU's bfloat16 instructions; PyTorch's fused CPU kernel does not.

    Measured at heads of 40 channels: 0.25 TFLOP/s here, 0.09 in the fused kernel.
    """
    query = query * query.shape[-1] ** -0.5
    if query.shape[2] * key.shape[2] <= 1 << 16:  # small enough to hold the (L, L_k) weights of all heads
        weights = query @ key.transpose(-1, -2)
        if is_causal:
            weights = weights + torch.full(weights.shape[-2:], -math.inf, dtype=weights.dtype).triu(1)
        return weights.softmax(-1, dtype=query.dtype) @ value
    if is_causal or any(x.requires_grad for x in (query, key, value)):  # autograd would keep the (L, L_k) weights
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=1.0)
    # One head and ``rows`` queries at a time, so that the (rows, L_k) weights stay in the processor's cache.
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for q, k, v, o in zip(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), out.flatten(0, 1)):
        for q_block, o_block in zip(q.split(rows), o.split(rows)):  # (rows, d_head)
            torch.mm((q_block @ k.t()).softmax(-1), v, out=o_block)
    return out
