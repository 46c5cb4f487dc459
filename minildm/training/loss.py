"""One training step's mathematics: cached moments and captions -> each sample's loss.

All randomness of a sample (which point of the VAE's Gaussian, timestep, noise, whether its caption is dropped) is a
function of the run's seed and the sample's id. It does not depend on how batches are cut, on workers or devices, or on
whether the run was interrupted.
"""

import math
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

from minildm.config import MAX_TOKENS
from minildm.distributed import share, share_size, sum_over_processes
from minildm.progress import Progress
from minildm.seeds import seeded, to_device


class Randomness(NamedTuple):
    """What is random about B samples, on the CPU."""

    timesteps: torch.Tensor  # (B,) int64
    noise: torch.Tensor  # (B, 4, h, w), standard normal
    latent_noise: torch.Tensor  # (B, 4, h, w): picks z from the VAE's Gaussian
    offset: torch.Tensor  # (B, 4, 1, 1): one number per channel, for the noise offset
    caption: torch.Tensor  # (B,) uniform in [0, 1): whether the caption is dropped or cut short


def sample_randomness(seed, purpose, ids, shape, n_timesteps):
    """The Randomness of the samples with these ids. ``shape``: (4, h, w) of a latent."""
    rows = []
    for sample_id in ids:
        generator = seeded(seed, purpose, int(sample_id))
        rows.append(
            (
                torch.randint(n_timesteps, (), generator=generator),
                torch.randn(shape, generator=generator),
                torch.randn(shape, generator=generator),
                torch.randn(shape[0], 1, 1, generator=generator),
                torch.rand((), generator=generator),
            )
        )
    return Randomness(*(torch.stack(column) for column in zip(*rows)))


KEPT = 1 << 28  # bytes of contexts in memory, for each Captions: 11,000 of the embedded model, 1,100 of SD v1.5


class Captions:
    """Prompts -> context; some of them empty, for guidance, and some cut short, so that short prompts work, too.

    ``contexts``: cache.CachedContexts of ``caption_texts(prompts, cut)`` where the text encoder is frozen; otherwise
    None, and the text encoder runs at every step. ``cut``: whether captions may be cut short.
    """

    def __init__(self, model, prompts, contexts=None, cut=False):
        self.text_encoder, self.contexts = model.text_encoder, contexts
        self.device, self.dtype = model.device, model.dtype
        texts, self.n_different = caption_texts(prompts, cut), len(set(prompts))
        row = {text: i for i, text in enumerate(texts)}
        self.shorter = [[row[text] for text in shorter_captions(prompt)] if cut else [] for prompt in prompts]
        self.token_ids = None if contexts is not None else model.tokenize(texts)  # (n, 77)
        self.kept = None  # {row: its context}, see `freeze`

    @torch.no_grad()
    def freeze(self, most=math.inf):
        """The text encoder no longer changes: compute contexts now, in the same batches every time, and keep them: up
        to KEPT bytes and ``most`` of them, the empty caption's first."""
        config = self.text_encoder.config
        most = min(most, KEPT // (MAX_TOKENS * config.width * self.dtype.itemsize))
        rows, self.kept = [-1, *range(len(self.token_ids) - 1)][:most], {}
        for first in Progress("encoding captions", "batch", iterable=range(0, len(rows), 16), leave=False):
            some = rows[first : first + 16]
            self.kept |= dict(zip(some, self.text_encoder(to_device(self.token_ids[some], self.device))))

    def rows(self, index, u, config):
        """Which text each sample gets, as a row of `caption_texts`: its caption; the empty one with the probability
        ``config.caption_dropout``; or, of the others, one cut at a random comma with ``config.caption_cut``.

        Args: index (B,) of the captions; u (B,) uniform in [0, 1). Returns: (B,) int64.
        """
        rows = torch.where(u < config.caption_dropout, -1, index)
        if config.caption_cut:
            place = (u - config.caption_dropout) / ((1 - config.caption_dropout) * config.caption_cut)
            for k in ((place >= 0) & (place < 1)).nonzero()[:, 0].tolist():
                if shorter := self.shorter[index[k]]:
                    rows[k] = shorter[int(place[k] * len(shorter))]
        return rows

    def __call__(self, batch, rows):
        """batch["index"] (B,), rows (B,) of `rows` -> context (B, 77, D), on the model's device."""
        if self.kept is not None:
            return torch.stack([self._kept(row) for row in rows.tolist()])
        if self.contexts is None:
            return self.text_encoder(to_device(self.token_ids[rows], self.device))
        context = batch["context"].clone()  # of the whole captions
        for k in (rows != batch["index"]).nonzero()[:, 0].tolist():
            context[k] = self.contexts[int(rows[k]) % len(self.contexts)]
        return to_device(context, self.device, self.dtype)

    @torch.no_grad()
    def _kept(self, row):
        """The context (77, D) of one row. Those not kept are computed alone: in a batch, rounding depends on others."""
        if row not in self.kept:
            return self.text_encoder(to_device(self.token_ids[row][None], self.device))[0]
        return self.kept[row]


def caption_texts(prompts, cut=False):
    """All texts that `Captions` may choose: the prompts; with ``cut``, their shorter forms; last, the empty one."""
    shorter = [text for prompt in prompts for text in shorter_captions(prompt)] if cut else []
    return [*prompts, *dict.fromkeys(shorter), ""]


def shorter_captions(prompt):
    """The beginnings of a caption, up to each of its commas: "a, b, c" -> ["a", "a, b"]."""
    pieces = prompt.split(",")
    return [",".join(pieces[:n]) for n in range(1, len(pieces))]


def denoising_losses(model, batch, randomness, captions, config):
    """Each sample's loss, (B,) float32: the U-Net's mean squared error (DDPM, Ho et al. 2020, Eq. 14).

    Args:
        batch: "index" (B,), "mean" and "logvar" (B, 4, h, w) of the VAE, "context" where contexts are cached.
        config: caption_dropout, caption_cut, min_snr_gamma and noise_offset.
    """
    context = captions(batch, captions.rows(batch["index"], randomness.caption, config))
    device = context.device
    z = batch["mean"] + (0.5 * batch["logvar"]).exp() * randomness.latent_noise
    latents = to_device(z * model.config.vae.scaling_factor, device)
    # Noise offset: a shift of each channel's mean, which noise alone hardly ever hides, so that the U-Net also learns
    # an image's overall brightness (Guttenberg 2023, "Diffusion with Offset Noise").
    noise = to_device(randomness.noise + config.noise_offset * randomness.offset, device)
    timesteps = to_device(randomness.timesteps, device)
    noisy_latents = model.schedule.add_noise(latents, noise, timesteps)

    prediction = model.unet(noisy_latents.to(context.dtype), timesteps, context).float()
    losses = (prediction - model.schedule.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
    if config.min_snr_gamma:
        losses = losses * model.schedule.min_snr_weight(timesteps, config.min_snr_gamma)
    return losses


MOST_PAIRS = 512  # of a validation


class PlainLoss(NamedTuple):
    """What validation measures, whatever is trained on."""

    caption_dropout: float = 0.0
    caption_cut: float = 0.0
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0


@torch.no_grad()
def validation_loss(model, pairs, captions, config):
    """The mean loss over fixed (image, timestep, noise) triples: the same at every call, so that differences are the
    model's. Timesteps are spread evenly over the schedule; captions stay, and no weight is applied."""
    count = min(max(config.validation_pairs, len(pairs)), MOST_PAIRS)
    order = torch.randperm(count, generator=seeded(config.seed, "validation order"))
    spread = ((order + 0.5) / count * model.schedule.n_timesteps).long()
    mine, size = share(range(count)), config.micro_batch or share_size(config.batch_size)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for first in Progress("validating", "batch", iterable=range(0, len(mine), size), leave=False):
        ids = mine[first : first + size]
        batch = default_collate([pairs[i % len(pairs)] for i in ids])
        shape = batch["mean"].shape[1:]
        randomness = sample_randomness(config.seed, "validation", ids, shape, model.schedule.n_timesteps)
        randomness = randomness._replace(timesteps=spread[ids.start : ids.stop])
        total += denoising_losses(model, batch, randomness, captions, PlainLoss()).double().sum()
    sum_over_processes([total])
    return total.item() / count
