"""LoRA: a frozen linear layer plus a trainable product of two thin matrices (Hu et al. 2021, arXiv:2106.09685, Eq. 3).

    y = x W^T + b + scale (x A^T) B^T        dW = scale B A        lora_A (rank, in), lora_B (out, rank)

A starts Kaiming-uniform (a = sqrt 5: uniform within 1 / sqrt(in)), B zero, so a new adapter changes nothing. The base
keeps its own precision; A and B are float32 and are cast to what passes through the layer.
"""

import math

import torch
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
        y = self.base(x)
        for i, (A, B) in enumerate(self.blocks()):
            y = AddLowRank.apply(y, x, A, B, self.scale, self.probe, i == 0)
        return y

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


class AddLowRank(torch.autograd.Function):
    """y + scale (x A^T) B^T, keeping only what passes anyway: x (the same tensor for q, k and v, so stored once), A and
    B. x A^T is computed again in the backward, which costs rank / out of the layer."""

    @staticmethod
    def forward(ctx, y, x, A, B, scale, probe, first):
        ctx.save_for_backward(x, A, B)
        ctx.scale, ctx.probe, ctx.first, ctx.dtype = scale, probe, first, y.dtype
        h = x.to(y.dtype) @ A.to(y.dtype).t()  # (..., rank)
        return torch.add(y, h @ B.to(y.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx, dy):
        x, A, B = ctx.saved_tensors
        dx = None
        g = (dy * ctx.scale).reshape(len(dy), -1, dy.shape[-1])  # (B, L, out): one sample a row, L = 1 for time
        xs = x.to(ctx.dtype).reshape(len(x), -1, x.shape[-1])  # (B, L, in)
        dh = g @ B.to(ctx.dtype)  # (B, L, rank)
        if ctx.needs_input_grad[1]:
            dx = (dh @ A.to(ctx.dtype)).reshape(x.shape).to(x.dtype)
        if ctx.probe is None:
            h = xs @ A.to(ctx.dtype).t()  # (B, L, rank)
            dA = dh.flatten(0, 1).t() @ xs.flatten(0, 1)  # (rank, in)
            dB = g.flatten(0, 1).t() @ h.flatten(0, 1)  # (out, rank)
        else:
            dA, dB = ctx.probe.gradients(xs, g, dh, A, ctx.first)
        return dy, dx, dA.to(A.dtype), dB.to(B.dtype), None, None, None
