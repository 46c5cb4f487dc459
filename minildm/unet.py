"""The denoising U-Net of Stable Diffusion: noisy latents, timesteps and text features -> predicted noise or v.

Rombach et al. 2022, arXiv:2112.10752. SD 1.5 at 512 px (859,520,964 parameters) has these levels:

    level  width  latents    down                          up
    0      320    64 x 64    resnet + attention, twice     resnet + attention, three times
    1      640    32 x 32    resnet + attention, twice     resnet + attention, three times
    2      1280   16 x 16    resnet + attention, twice     resnet + attention, three times
    3      1280   8 x 8      resnet, twice                 resnet, three times
           1280   8 x 8      middle: resnet, attention, resnet

Every output of the down path becomes a skip connection, which the up path concatenates to its input, last first.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minildm.layers import Downsample, ResnetBlock, SpatialTransformer, TimestepEmbedding, Upsample, timestep_embedding


class UNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        widths, n_blocks, groups = config.widths, config.layers_per_block, config.norm_groups
        time_dim = 4 * widths[0]

        def resnet(c_in, c_out):
            return ResnetBlock(c_in, c_out, groups, eps=1e-5, time_dim=time_dim)

        def transformer(level):
            return SpatialTransformer(
                widths[level], config.n_heads[level], config.context_dim, groups, config.linear_projection
            )

        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # widths of the skip connections, in the order of their creation
        for level, width in enumerate(widths):
            block = nn.Module()
            block.resnets = nn.ModuleList(resnet(skips[-1] if i == 0 else width, width) for i in range(n_blocks))
            if config.attention[level]:
                block.attentions = nn.ModuleList(transformer(level) for _ in range(n_blocks))
            skips += [width] * n_blocks
            if level < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList([resnet(widths[-1], widths[-1]), resnet(widths[-1], widths[-1])])
        self.mid_block.attentions = nn.ModuleList([transformer(len(widths) - 1)])

        self.up_blocks = nn.ModuleList()  # coarsest level first; one block more than the down path
        channels = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            block = nn.Module()
            block.resnets = nn.ModuleList()
            for _ in range(n_blocks + 1):
                block.resnets.append(resnet(channels + skips.pop(), width))
                channels = width
            if config.attention[level]:
                block.attentions = nn.ModuleList(transformer(level) for _ in range(n_blocks + 1))
            if level > 0:
                block.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.latent_channels, 3, padding=1)

    def forward(self, latents, timesteps, context):
        """Predict the noise in ``latents``, or v.

        Args:
            latents: noisy scaled latents, (B, 4, h, w), any h and w.
            timesteps: (B,) int64, or one integer for the whole batch.
            context: text features, (B, 77, context_dim).
        Returns: prediction, (B, 4, h, w).
        """
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(latents.shape[0])
        sinusoids = timestep_embedding(timesteps, self.config.widths[0]).to(latents.dtype)
        time = F.silu(self.time_embedding(sinusoids))  # (B, time_dim); every resnet needs this SiLU

        x = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = resnet(x, time)
                if hasattr(block, "attentions"):
                    x = block.attentions[i](x, context)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)

        x = self.mid_block.resnets[0](x, time)
        x = self.mid_block.attentions[0](x, context)
        x = self.mid_block.resnets[1](x, time)

        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                x = resnet(torch.cat([x, skips.pop()], dim=1), time)
                if hasattr(block, "attentions"):
                    x = block.attentions[i](x, context)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, size=skips[-1].shape[2:])  # 2x would be wrong after an odd size was halved

        return self.conv_out(F.silu(self.conv_norm_out(x)))
