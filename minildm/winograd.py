"""Winograd's convolution F(2x2, 3x3), forward and backward (Lavin and Gray 2015, arXiv:1509.09308, Eq. 7 and 8).

A 2 x 2 tile of the output from a 4 x 4 tile d of the input and the kernel g takes 16 products instead of 36,

    Y = A^T [ (G g G^T) * (B^T d B) ] A

          1  0 -1  0           1    0    0            1  1  1  0
    B^T = 0  1  1  0      G = 1/2  1/2  1/2     A^T = 0  1 -1 -1
          0 -1  1  0          1/2 -1/2  1/2
          0  1  0 -1           0    0    1

The products * are sums over the input channels: 16 matrix products, one for each of the 16 positions in a tile.
All of it is linear in d, so the gradient with respect to x is the same algorithm transposed,

    dd = B [ (G g G^T) * (A dY A^T) ] B^T

where the products are sums over the output channels, and overlapping tiles are added up. `minildm.kernels` decides
which layers are computed in this way.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

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


def transformed_bytes(model):
    """Bytes of the transformed weights that are kept for the model's layers."""
    kept = (_transformed.get(layer) for layer in model.modules() if isinstance(layer, nn.Conv2d))
    return sum(entry[2].nbytes for entry in kept if entry is not None)


class WinogradConvolution(torch.autograd.Function):
    """The convolution of a frozen layer, in both directions from one transformed weight; only x gets a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight, ctx.shape = weight, x.shape
        return winograd(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return winograd_gradient(dy, ctx.weight, ctx.shape), None, None


def winograd(x, weight, bias, tiles=2048):
    """A convolution with padding 1, in strips of about ``tiles`` tiles, which bounds the memory between the steps.

    Args: x (B, C_in, h, w); weight (16, C_in, C_out) of `winograd_weight`; bias (C_out,) or None.
    Returns: (B, C_out, h, w), channels-last.
    """
    height, width = x.shape[2:]
    # (B, 2 rows + 2, 2 columns + 2, C_in): a border of 1, and one more row or column where the size is odd
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
    out = x.new_empty(len(x), x.shape[1] - 2, x.shape[2] - 2, weight.shape[2])
    for first, end in _strips(out, tiles):
        _winograd_strip(x[:, first : end + 2], weight, bias, out[:, first:end])
    return out[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def winograd_gradient(dy, weight, shape, tiles=2048):
    """The gradient of `winograd` with respect to x, of x's ``shape``, from that of the output, dy (B, C_out, h, w)."""
    batch, c_in, height, width = shape
    dy = F.pad(dy.permute(0, 2, 3, 1), (0, 0, 0, width % 2, 0, height % 2))  # (B, 2 rows, 2 columns, C_out)
    dx = dy.new_zeros(batch, dy.shape[1] + 2, dy.shape[2] + 2, c_in)
    for first, end in _strips(dy, tiles):
        _winograd_gradient_strip(dy[:, first:end], weight, dx[:, first : end + 2])
    return dx[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)


def _strips(out, tiles):
    """Cut ``out``, (B, 2 rows, 2 columns, C), into strips of about ``tiles`` tiles: pairs of first row and end."""
    rows = 2 * max(1, tiles // (len(out) * out.shape[2] // 2))
    return [(first, min(first + rows, out.shape[1])) for first in range(0, out.shape[1], rows)]


def _winograd_strip(x, weight, bias, out):
    """x (B, 2 n + 2, 2 m + 2, C_in) -> out (B, 2 n, 2 m, C_out), written in place."""
    batch, n, m = len(x), out.shape[1] // 2, out.shape[2] // 2
    d = [x[:, i : i + 2 * n : 2] for i in range(4)]  # row i of each tile, (B, n, 2 m + 2, C_in)
    half = x.new_empty(4, *d[0].shape)  # B^T d
    _times_B_transposed(d, half)
    d = [half[:, :, :, j : j + 2 * m : 2] for j in range(4)]  # column j, (4, B, n, m, C_in)
    tiles = x.new_empty(4, 4, batch, n, m, x.shape[-1])  # B^T d B
    _times_B_transposed(d, tiles.transpose(0, 1))
    products = torch.bmm(tiles.view(16, -1, x.shape[-1]), weight).view(4, 4, batch, n, m, -1)
    del half, tiles, d
    half = products.new_empty(2, 4, *products.shape[2:])  # A^T times the products
    _times_A_transposed(products, half)
    for i in range(2):
        for j, column in enumerate(_times_A_transposed(half[i])):
            out[:, i::2, j::2] = column if bias is None else column.add_(bias)


def _winograd_gradient_strip(dy, weight, dx):
    """dy (B, 2 n, 2 m, C_out) -> added to dx (B, 2 n + 2, 2 m + 2, C_in)."""
    batch, n, m, c_out = len(dy), dy.shape[1] // 2, dy.shape[2] // 2, dy.shape[3]
    half = dy.new_empty(4, batch, n, 2 * m, c_out)  # A dY
    _times_A((dy[:, 0::2], dy[:, 1::2]), half)
    tiles = dy.new_empty(4, 4, batch, n, m, c_out)  # A dY A^T
    _times_A((half[:, :, :, 0::2], half[:, :, :, 1::2]), tiles.transpose(0, 1))
    products = torch.bmm(tiles.view(16, -1, c_out), weight.transpose(1, 2)).view(4, 4, batch, n, m, -1)
    del half, tiles
    half = products.new_empty(4, *products.shape[1:])  # B times the products; row i of each tile, columns still apart
    _times_B(products, half)
    rows = half.new_zeros(4, batch, 2 * n + 2, m, half.shape[-1])  # rows put together
    for i in range(4):
        rows[:, :, i : i + 2 * n : 2] += half[i]
    del products, half
    columns = torch.empty_like(rows)  # times B^T
    _times_B(rows, columns)
    for j in range(4):
        dx[:, :, j : j + 2 * m : 2] += columns[j]


def _times_B_transposed(d, out):
    """The four rows of B^T d."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _times_B(v, out):
    """The four rows of B v."""
    out[0] = v[0]
    torch.sub(v[1], v[2], out=out[1]).add_(v[3])
    torch.sub(v[1], v[0], out=out[2]).add_(v[2])
    torch.neg(v[3], out=out[3])


def _times_A_transposed(y, out=(None, None)):
    """The two rows of A^T y."""
    return (torch.add(y[0], y[1], out=out[0]).add_(y[2]), torch.sub(y[1], y[2], out=out[1]).sub_(y[3]))


def _times_A(y, out):
    """The four rows of A y."""
    out[0] = y[0]
    torch.add(y[0], y[1], out=out[1])
    torch.sub(y[0], y[1], out=out[2])
    torch.neg(y[1], out=out[3])
