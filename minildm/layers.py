"""The building blocks of the U-Net and the VAE: residual block, transformer block, down- and upsampling.

Feature maps are (B, C, h, w), kept channels-last in memory, so that a map becomes L = h * w tokens of width C and back
without a copy. Names of modules are those of the published checkpoints; the odd ones (``to_out.0``, ``net.0.proj``,
``downsamplers.0.conv``) come from there.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def timestep_embedding(timesteps, dim):
    """Sinusoids of the timestep at dim / 2 frequencies from 1 to 1/10000, cosines first: (B,) -> (B, dim) float32.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.5."""
    # In the published order of operations: another one rounds the angles near t = 1000 6e-5 apart.
    exponent = -math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps[:, None].float() * torch.exp(exponent)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers on the sinusoids: (B, dim) -> (B, time_dim)."""

    def __init__(self, dim, time_dim):
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, sinusoids):
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around the time embedding, plus a shortcut. (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in, c_out, groups, eps, time_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, c_out)  # the VAE has no time
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time=None):
        """``time``: SiLU of the time embedding, (B, time_dim)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]  # (B, C_out, 1, 1): the same shift at every position
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width: (B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2)); a strided 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour to ``size``, or twice the size, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def linear(x, weight, bias=None):
    """x W^T + b: (..., in), (out, in), (out,) -> (..., out). Large float32 products on a CPU run as the 1x1 convolution
    they equal: oneDNN's takes 0.5 to 0.7 of the time of MKL's matrix product on AMD processors, as long on Intel's."""
    small = x.numel() * len(weight) < LARGE or torch.get_num_threads() == 1  # there torch has another convolution
    if x.dtype != torch.float32 or x.device.type != "cpu" or small:
        return F.linear(x, weight, bias)
    maps = x.reshape(1, -1, x.shape[-1]).transpose(1, 2).unsqueeze(2)  # (1, in, 1, tokens): channels-last, no copy
    y = F.conv2d(maps, weight[:, :, None, None], bias)  # (1, out, 1, tokens)
    return y[0, :, 0].t().reshape(*x.shape[:-1], len(weight))  # a view


LARGE = 25_000_000  # multiplications


class Linear(nn.Linear):
    """torch's linear layer, by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def attend(query, key, value, n_heads, causal=False):
    """softmax(Q K^T / sqrt(d_head)) V for each head: (B, L, D), (B, L_k, D), (B, L_k, D) -> (B, L, D). ``causal``: a
    query sees no key after it."""
    query, key, value = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (query, key, value))
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.compiler.is_compiling():
        out = attend_by_products(query, key, value, causal)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)  # (B, n_heads, L, d_head)
    return out.transpose(1, 2).flatten(2)  # (B, L, D)


def attend_by_products(query, key, value, causal=False, rows=512):
    """Attention of (B, n_heads, L, d_head), for bfloat16 on a CPU: PyTorch's fused kernel does not use the processor's
    bfloat16 products there (0.09 TFLOP/s at 40-wide heads, where the plain products below run at 0.25)."""
    query = query * query.shape[-1] ** -0.5
    if query.shape[2] * key.shape[2] <= 1 << 16:  # a head's weights fit as they are
        weights = query @ key.transpose(-1, -2)
        if causal:
            weights = weights + torch.full(weights.shape[-2:], -math.inf, dtype=weights.dtype).triu(1)
        return weights.softmax(-1, dtype=query.dtype) @ value
    if causal or any(x.requires_grad for x in (query, key, value)):  # fused, autograd keeps no (L, L_k) weights
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=1.0)
    # Blocks of queries keep the (rows, L_k) weights in the cache.
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for q, k, v, o in zip(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), out.flatten(0, 1)):
        for q_block, o_block in zip(q.split(rows), o.split(rows)):  # (rows, d_head)
            torch.mm((q_block @ k.t()).softmax(-1), v, out=o_block)
    return out


class Attention(nn.Module):
    """Self-attention, or cross-attention to ``context``. Queries, keys and values have no bias."""

    def __init__(self, dim, n_heads, context_dim=None):
        super().__init__()
        self.n_heads = n_heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim or dim, dim, bias=False)
        self.to_v = Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x, context=None):
        """x (B, L, dim), context (B, 77, context_dim) -> (B, L, dim)."""
        context = x if context is None else context
        out = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.n_heads)
        return self.to_out[0](out)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another one (Shazeer 2020, arXiv:2002.05202): (B, L, D) -> (B, L, D_out)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = Linear(dim, 2 * dim_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Widen four-fold, gate, narrow: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])  # net.1: no dropout

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Tokens look at each other, then at the prompt, then each by itself: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim, n_heads, context_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, n_heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map (Rombach et al. 2022, arXiv:2112.10752, section 3.3)."""

    def __init__(self, channels, n_heads, context_dim, groups, linear_projection):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # The same product; SD 1.x stores it as a 1x1 convolution, SD 2.x as a linear layer.
        self.linear_projection = linear_projection
        self.proj_in = Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, n_heads, context_dim)])
        self.proj_out = Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        """x (B, C, h, w), context (B, 77, context_dim) -> (B, C, h, w)."""
        h, w = x.shape[2:]
        y = self.norm(x)
        y = self.proj_in(to_tokens(y)) if self.linear_projection else to_tokens(self.proj_in(y))
        y = self.transformer_blocks[0](y, context)  # (B, h * w, C)
        y = to_map(self.proj_out(y), h, w) if self.linear_projection else self.proj_out(to_map(y, h, w))
        return x + y


def to_tokens(x):
    """(B, C, h, w) -> (B, h * w, C): a view when ``x`` is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens, h, w):
    """(B, h * w, C) -> (B, C, h, w), channels-last: a view."""
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)
