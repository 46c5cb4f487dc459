"""Building blocks of the U-Net and the VAE: residual block, transformer block, down- and upsampling.

Feature maps are (B, C, h, w). They are kept channels-last in memory, so that reshaping a map to L = h * w tokens of
width C, and back, copies nothing. Modules have the names of the published checkpoints, hence ``to_out.0``,
``net.0.proj`` and ``downsamplers.0.conv``.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minildm import kernels


def timestep_embedding(timesteps, dim):
    """Sinusoids of the timestep at dim / 2 frequencies from 1 down to 1/10000, cosines first: (B,) -> (B, dim) float32.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.5."""
    # Operations in the published order: another order changes the angles near t = 1000 by 6e-5.
    exponent = -math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps[:, None].float() * torch.exp(exponent)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers after the sinusoids: (B, dim) -> (B, time_dim)."""

    def __init__(self, dim, time_dim):
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, sinusoids):
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return kernels.convolution(self, x) if kernels.enabled else super().forward(x)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, with the time embedding in between, and a shortcut: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in, c_out, groups, eps, time_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = Conv3x3(c_in, c_out)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, c_out)  # the VAE has no timesteps
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = Conv3x3(c_out, c_out)
        self.conv_shortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time=None):
        """x (B, C_in, h, w), time = SiLU of the time embedding, (B, time_dim) -> (B, C_out, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(time)[:, :, None, None]  # (B, C_out, 1, 1): the same shift at every position
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution: (B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to ``size`` (default: twice the input's), then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x, size=None):
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def attend(query, key, value, n_heads, causal=False):
    """softmax(Q K^T / sqrt(d_head)) V for each head: (B, L, D), (B, L_k, D), (B, L_k, D) -> (B, L, D).
    ``causal``: each query attends only to keys up to its own position. Vaswani et al. 2017, Eq. 1."""
    query = query.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, n_heads, L, d_head)
    key = key.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, n_heads, L_k, d_head)
    value = value.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, n_heads, L_k, d_head)
    attention = kernels.attention if kernels.enabled else F.scaled_dot_product_attention
    out = attention(query, key, value, is_causal=causal)  # (B, n_heads, L, d_head)
    return out.transpose(1, 2).flatten(2)  # (B, L, D)


class Attention(nn.Module):
    """Self-attention, or cross-attention to ``context``. The projections to queries, keys and values have no bias."""

    def __init__(self, dim, n_heads, context_dim=None):
        super().__init__()
        self.n_heads = n_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x, context=None):
        """x (B, L, dim), context (B, 77, context_dim) or None for self-attention -> (B, L, dim)."""
        context = x if context is None else context
        out = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.n_heads)
        return self.to_out[0](out)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020, arXiv:2002.05202): (B, L, D) -> (B, L, D_out)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)  # both layers in one

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Widen to 4 dim with a gate, then narrow: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])  # net.1 is dropout

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward, each with a residual: (B, L, dim) -> (B, L, dim)."""

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
    """A transformer block on the positions of a feature map (Rombach et al. 2022, arXiv:2112.10752, section 3.3)."""

    def __init__(self, channels, n_heads, context_dim, groups, linear_projection):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # The same projection, stored as a 1x1 convolution by SD 1.x and as a linear layer by SD 2.x.
        self.linear_projection = linear_projection
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, n_heads, context_dim)])
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        """x (B, C, h, w), context (B, 77, context_dim) -> (B, C, h, w)."""
        h, w = x.shape[2:]
        y = self.norm(x)
        y = self.proj_in(to_tokens(y)) if self.linear_projection else to_tokens(self.proj_in(y))
        y = self.transformer_blocks[0](y, context)  # (B, h * w, C)
        y = to_map(self.proj_out(y), h, w) if self.linear_projection else self.proj_out(to_map(y, h, w))
        return x + y


def to_tokens(x):
    """(B, C, h, w) -> (B, h * w, C), a view if ``x`` is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens, h, w):
    """(B, h * w, C) -> (B, C, h, w), a channels-last view."""
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)
