"""The autoencoder: images (B, 3, H, W) in [-1, 1] <-> codes z (B, 4, H/8, W/8).

The KL-regularised autoencoder of Rombach et al. 2022, arXiv:2112.10752, section 3.1. Codes z are raw; the latents that
the U-Net sees are z times the scaling factor. Two details are easily missed: the downsampler pads right and bottom only
(else a relative error of 0.1), and every norm has eps 1e-6 (else 1e-4).
"""

import torch
import torch.nn.functional as F
from torch import nn

from minildm.layers import ResnetBlock, Upsample, attend, to_map, to_tokens

EPS = 1e-6


class Gaussian:
    """The encoder's output: a diagonal Gaussian over codes. ``mean``, ``logvar``: (B, 4, h, w)."""

    def __init__(self, mean, logvar):
        self.mean, self.logvar = mean, logvar.clamp(-30.0, 20.0)

    def sample(self, generator=None):
        """mean + std * noise, (B, 4, h, w). The noise is float32, sampled on ``generator``'s device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)
        return self.mean + (0.5 * self.logvar).exp() * noise


class VAEDownsample(nn.Module):
    """Halve height and width: (B, C, H, W) -> (B, C, H/2, W/2). Pads right and bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class VAEAttention(nn.Module):
    """Self-attention over all positions, one head, with biases: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        y = to_tokens(self.group_norm(x))  # (B, h * w, C)
        y = self.to_out[0](attend(self.to_q(y), self.to_k(y), self.to_v(y), n_heads=1))
        return x + to_map(y, *x.shape[2:])


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Residual blocks at one resolution, then down- or upsampling (neither at the last level)."""

    def __init__(self, c_in, c_out, n_blocks, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups, EPS) for i in range(n_blocks)
        )
        self.downsamplers = nn.ModuleList([VAEDownsample(c_out)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x):
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)  # mean and log-variance

    def forward(self, images):
        x = self.conv_in(images)  # (B, 128, H, W)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)  # (B, 512, H/8, W/8)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 8, H/8, W/8)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, groups = config.widths[::-1], config.norm_groups  # coarsest first
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))  # (B, 512, h, w)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 3, 8h, 8w)


class VAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> Gaussian over raw codes (B, 4, H/8, W/8)."""
        moments = self.quant_conv(self.encoder(images.contiguous(memory_format=torch.channels_last)))
        return Gaussian(*moments.chunk(2, dim=1))

    def decode(self, z):
        """Raw codes (B, 4, h, w) -> images (B, 3, 8h, 8w), nominally in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=torch.channels_last)))
