"""LoRA: a frozen linear layer plus a trainable product of two thin matrices (Hu et al. 2021, arXiv:2106.09685, Eq. 3).

    y = x W^T + b + scale (x A^T) B^T        dW = scale B A        lora_A (rank, in), lora_B (out, rank)

A starts Kaiming-uniform (a = sqrt 5: uniform within 1 / sqrt(in)), B zero, so a new adapter changes nothing. The base
keeps its own precision; A and B are float32 and are cast to what passes through the layer.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """A frozen ``base`` with its adapter: (..., in) -> (..., out). ``scale`` = alpha / rank."""

    def __init__(self, base, rank, scale, generator):
        super().__init__()
        self.base = base
        self.scale = scale
        self.lora_A = nn.Parameter(kaiming_rows(rank, base.in_features, generator).to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.probe = None  # a LayerProbe while the Fisher information is measured (fisher.py)

    @property
    def rank(self):
        return self.lora_A.shape[0]

    def blocks(self):
        """The products that make up dW: [(rows of A, columns of B)]. One here; SeLoRA has several."""
        return [(self.lora_A, self.lora_B)]

    def forward(self, x):
        if torch.compiler.is_compiling():  # the compiler decides by itself what to keep and what to compute again
            y = self.base(x)
            for A, B in self.blocks():
                y = y + self.scale * (x @ A.to(x.dtype).t()) @ B.to(x.dtype).t()
            return y
        return AdaptedLinear.apply(x, self, *(factor for block in self.blocks() for factor in block))

    def factors(self):
        """(lora_A (rank, in), lora_B (out, rank)), without gradient: what the adapter's file holds."""
        return self.lora_A.detach(), self.lora_B.detach()

    def merged(self):
        """The plain layer with dW added, in float32 before the cast to the base's precision."""
        A, B = self.factors()
        self.base.weight.data = (self.base.weight.float() + self.scale * B @ A).to(self.base.weight.dtype)
        return self.base


def kaiming_rows(rows, d_in, generator):
    """(rows, d_in) float32, uniform within 1 / sqrt(d_in), drawn on the CPU: variance 1 / (3 d_in)."""
    return (2 * torch.rand(rows, d_in, generator=generator) - 1) / math.sqrt(d_in)


class AdaptedLinear(torch.autograd.Function):
    """base(x) + scale (x A^T) B^T, for every pair A, B of ``factors``.

    Autograd would keep x A^T and make each term of a sum as a tensor of its own; here products add into one result, and
    only x is kept (the same tensor for q, k and v, so once). x A^T is computed again in the backward, which costs
    rank / out of the layer. The base's weight gets no gradient: it is frozen.
    """

    @staticmethod
    def forward(ctx, x, layer, *factors):
        y = layer.base(x)
        ctx.save_for_backward(x, *factors)
        ctx.layer, ctx.probe, ctx.dtype = layer, layer.probe, y.dtype
        rows, out = x.reshape(-1, x.shape[-1]).to(y.dtype), y.reshape(-1, y.shape[-1])  # (tokens, in), (tokens, out)
        for A, B in zip(factors[::2], factors[1::2]):
            out.addmm_(rows @ A.to(y.dtype).t(), B.to(y.dtype).t(), alpha=layer.scale)
        return out.view(y.shape)

    @staticmethod
    def backward(ctx, dy):
        x, *factors = ctx.saved_tensors
        xs = x.to(ctx.dtype).reshape(len(x), -1, x.shape[-1])  # (B, L, in): one sample a row, L = 1 for time
        dy = dy.reshape(len(x), -1, dy.shape[-1])  # (B, L, out)
        g = dy if ctx.layer.scale == 1 else dy * ctx.layer.scale
        rows, g_rows = xs.flatten(0, 1), g.flatten(0, 1)  # all tokens of the batch
        dx = None
        if ctx.needs_input_grad[0]:
            dx = F.linear(dy.flatten(0, 1), ctx.layer.base.weight.to(ctx.dtype).t())  # dy W, (tokens, in)
        gradients = []
        for i, (A, B) in enumerate(zip(factors[::2], factors[1::2])):
            dh = g_rows @ B.to(ctx.dtype)  # (tokens, rank)
            if dx is not None:
                dx.addmm_(dh, A.to(ctx.dtype))
            if ctx.probe is None:
                dA, dB = dh.t() @ rows, g_rows.t() @ (rows @ A.to(ctx.dtype).t())  # (rank, in), (out, rank)
            else:
                dA, dB = ctx.probe.gradients(xs, g, dh.view(*g.shape[:2], -1), A, i == 0)
            gradients += [dA.to(A.dtype), dB.to(B.dtype)]
        return None if dx is None else dx.view(x.shape).to(x.dtype), None, *gradients
