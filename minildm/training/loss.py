"""One training step's mathematics: cached moments and prompts -> each sample's loss.

Everything random about a sample (which part of the VAE's Gaussian, timestep, noise, whether its caption is dropped) is
a function of the run's seed and of the sample's number in the endless sequence of epochs, and of nothing else: not of
how batches are cut, of workers, of devices, or of whether the run was interrupted.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from minildm.layers import ResnetBlock, SpatialTransformer
from minildm.text_encoder import EncoderLayer


class Draws(NamedTuple):
    """What is random about B samples, on the CPU."""

    timesteps: torch.Tensor  # (B,) int64
    noise: torch.Tensor  # (B, 4, h, w), standard normal
    latent_noise: torch.Tensor  # (B, 4, h, w): picks z from the VAE's Gaussian
    offset: torch.Tensor  # (B, 4, 1, 1): one number a channel, for the noise offset
    caption: torch.Tensor  # (B,) uniform in [0, 1): below caption_dropout, the caption is dropped


def seeded(*what):
    """A generator for this purpose: ``seeded(seed, "sample", 12)``."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw(seed, purpose, numbers, shape, n_timesteps):
    """The draws of the samples with these numbers. ``shape``: (4, h, w) of a latent."""
    rows = []
    for number in numbers:
        generator = seeded(seed, purpose, number)
        rows.append(
            (
                torch.randint(n_timesteps, (), generator=generator),
                torch.randn(shape, generator=generator),
                torch.randn(shape, generator=generator),
                torch.randn(shape[0], 1, 1, generator=generator),
                torch.rand((), generator=generator),
            )
        )
    return Draws(*(torch.stack(column) for column in zip(*rows)))


class Captions:
    """Prompts -> context, with dropout. Frozen text encoder: ``contexts`` (cache.CachedContexts of the prompts and, as
    their last, the empty one); otherwise the text encoder runs on the token ids at every step."""

    def __init__(self, model, prompts, contexts=None):
        self.model, self.contexts = model, contexts
        self.token_ids = None if contexts is not None else model.tokenize([*prompts, ""])  # (n + 1, 77)

    def __call__(self, batch, dropped):
        """batch["index"] (B,) and dropped (B,) bool -> context (B, 77, D)."""
        device = self.model.device
        if self.contexts is None:
            return self.model.text_encoder(self.token_ids[torch.where(dropped, -1, batch["index"])].to(device))
        empty = self.contexts[len(self.contexts) - 1]  # (77, D)
        return torch.where(dropped[:, None, None], empty, batch["context"]).to(device, self.model.dtype)


def sample_losses(model, batch, draws, captions, config):
    """Each sample's loss, (B,) float32: the U-Net's mean squared error (DDPM, Ho et al. 2020, Eq. 14).

    Args: batch: "index" (B,), "mean" and "logvar" (B, 4, h, w) of the VAE, perhaps "context"; draws: its Draws.
    """
    z = batch["mean"] + (0.5 * batch["logvar"]).exp() * draws.latent_noise
    latents = (z * model.config.vae.scaling_factor).to(model.device)
    # Noise offset: a shift of each channel's mean, which noise alone hardly ever hides, so that the U-Net also learns
    # a picture's overall grey (Guttenberg 2023, "Diffusion with Offset Noise").
    noise = (draws.noise + config.noise_offset * draws.offset).to(model.device)
    timesteps = draws.timesteps.to(model.device)
    noisy_latents = model.schedule.add_noise(latents, noise, timesteps)

    context = captions(batch, draws.caption < config.caption_dropout)
    prediction = model.unet(noisy_latents.to(model.dtype), timesteps, context).float()
    losses = (prediction - model.schedule.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
    if config.min_snr_gamma:
        losses = losses * model.schedule.min_snr_weight(timesteps, config.min_snr_gamma)
    return losses


def validation_loss(model, pairs, captions, config):
    """The mean loss over fixed (picture, timestep, noise) triples: the same at every call, so that differences are the
    model's. Timesteps are spread evenly over the schedule; captions stay, and no weight is applied."""
    count = min(max(config.validation_pairs, len(pairs)), 512)
    order = torch.randperm(count, generator=seeded(config.seed, "validation order"))
    spread = ((order + 0.5) / count * model.schedule.n_timesteps).long()
    settings = PlainLoss()
    total = 0.0
    with torch.no_grad():
        for first in range(0, count, config.samples_at_a_time):
            numbers = range(first, min(first + config.samples_at_a_time, count))
            batch = torch.utils.data.default_collate([pairs[number % len(pairs)] for number in numbers])
            draws = draw(config.seed, "validation", numbers, batch["mean"].shape[1:], model.schedule.n_timesteps)
            draws = draws._replace(timesteps=spread[first : numbers.stop])
            total += sample_losses(model, batch, draws, captions, settings).double().sum().item()
    return total / count


class PlainLoss(NamedTuple):
    """What validation measures, whatever is trained on."""

    caption_dropout: float = 0.0
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0


def blocks(network):
    """The residual and transformer blocks of a network."""
    return [
        module for module in network.modules() if isinstance(module, (ResnetBlock, SpatialTransformer, EncoderLayer))
    ]


def checkpoint_blocks(*networks):
    """Keep only each block's input for the backward, and compute the block once more there (Chen et al. 2016,
    arXiv:1604.06174): a third more time, a fraction of the memory."""
    for network in networks:
        for block in blocks(network):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def learning_rate(step, steps, config):
    """Of step 0, 1, ..., steps - 1: linear warm-up, then constant or a cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
