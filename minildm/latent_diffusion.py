"""The assembled model: three networks, a tokenizer and a noise schedule. Prompts in, images out."""

import functools
import warnings
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from minildm.config import SPATIAL_FACTOR, SamplingSettings
from minildm.errors import InputError
from minildm.files import sha256
from minildm.samplers import SAMPLERS, guide
from minildm.schedule import NoiseSchedule
from minildm.tokenizer import Tokenizer


def usual_guidance(config):
    """The default guidance scale for a ModelConfig: 7.5, or 3 for models smaller than any Stable Diffusion (context
    width below 768), such as the embedded one, whose images are over-saturated at 7.5."""
    return 3.0 if config.unet.context_dim < 768 else 7.5


def complete_settings(settings, config):
    """``settings`` (SamplingSettings) with guidance, height and width, where they are None, from the ModelConfig."""
    return replace(
        settings,
        guidance=usual_guidance(config) if settings.guidance is None else settings.guidance,
        height=config.image_size if settings.height is None else settings.height,
        width=config.image_size if settings.width is None else settings.width,
    )


class LatentDiffusion(nn.Module):
    """The networks ``unet``, ``vae`` and ``text_encoder`` with the tokenizer, noise schedule and samplers they need.

    Parameter names start with the network's: ``unet.down_blocks...``.
    """

    def __init__(self, config, unet, vae, text_encoder, files=None):
        super().__init__()
        self.config = config
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer = Tokenizer(config.pad_token_id)
        schedule = config.schedule
        self.schedule = NoiseSchedule(schedule.prediction, schedule.n_timesteps, schedule.beta_start, schedule.beta_end)
        self.files = files  # the Checkpoint it was loaded from
        self.merged = []  # adapters merged into it: [{"adapter": SHA-256, "multiplier": ..., "rank": ...}]

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @functools.cached_property
    def base_hash(self):
        """SHA-256 of the file that holds the U-Net, 64 hex digits. Reading a large file takes seconds."""
        return sha256(self.files.hashed_file)

    @functools.cached_property
    def vae_hash(self):
        """SHA-256 of the file of an autoencoder that is not the base's own, 64 hex digits; else None."""
        return None if self.files.vae_file is None else sha256(self.files.vae_file)

    # --- text --------------------------------------------------------------------------------------------------------
    def tokenize(self, prompts):
        """A list of B prompts -> token ids (B, 77) int64. Warns if a prompt is cut."""
        return self.tokenizer([prompts] if isinstance(prompts, str) else prompts)

    def encode_prompt(self, prompts):
        """A list of B prompts -> context (B, 77, D) in the model's dtype."""
        return self.text_encoder(self.tokenize(prompts).to(self.device))

    # --- images ------------------------------------------------------------------------------------------------------
    def encode_images(self, images, generator=None):
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8), sampled from the encoder's Gaussian.

        Raises: InputError unless H and W are multiples of 8.
        """
        if any(pixels % SPATIAL_FACTOR for pixels in images.shape[2:]):
            raise InputError(
                f"image height and width must be multiples of {SPATIAL_FACTOR}, got {tuple(images.shape[2:])}; "
                "crop or resize the images"
            )
        z = self.vae.encode(images.to(self.device, self.vae.quant_conv.weight.dtype)).sample(generator)
        return (z * self.config.vae.scaling_factor).to(self.dtype)

    def decode_latents(self, latents):
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w) float32, nominally in [-1, 1], not clamped.

        A VAE that overflows in half precision (SD 2.x) is converted to float32 permanently, with a warning.

        Raises: InputError if pixels are not finite in float32 either.
        """
        z = latents.to(self.device) / self.config.vae.scaling_factor
        vae_dtype = self.vae.post_quant_conv.weight.dtype
        images = self.vae.decode(z.to(vae_dtype)).float()
        if vae_dtype != torch.float32 and not images.isfinite().all():
            warnings.warn(
                f"the VAE gave non-finite pixels in {vae_dtype}; it decodes in float32 from here on", stacklevel=2
            )
            with torch.inference_mode(False):  # weights made in inference mode could never be trained
                self.vae.float()
            images = self.vae.decode(z.float())
        if not images.isfinite().all():
            raise InputError("the VAE gave non-finite pixels in float32; the latents or its weights are broken")
        return images

    # --- sampling ----------------------------------------------------------------------------------------------------
    def sample(
        self,
        prompts,
        negative_prompt="",
        steps=50,
        guidance=7.5,
        sampler="ddim",
        eta=0.0,
        seed=0,
        height=None,
        width=None,
        latents=None,
        output="pil",
        callback=None,
        karras=False,
    ):
        """Generate one image per prompt. Image i depends on its prompt and on seed + i, not on the rest of the batch
        (except for rounding, because products of other shapes round differently).

        Args:
            prompts: list of B prompts.
            negative_prompt: what guidance steers away from; one for all images, or a list of B.
            steps: 1 to 1000. guidance: scale s; None = `usual_guidance`; <= 1 runs no unconditional half.
            sampler: "ddim", "ddpm", "plms" or "dpm++". eta: noise of DDIM, in [0, 1]. karras: noise levels for "dpm++".
            seed: image i has its own torch.Generator("cpu") with seed + i. It gives the initial latents (unless they
                are passed), then float32 noise for each stochastic step.
            height, width: pixels, multiples of 8; None = the model's training size.
            latents: initial noise, (B, 4, height / 8, width / 8).
            output: "pil": list of images; "tensor": (B, 3, H, W) float32 in [-1, 1]; "latent": scaled latents, float32.
            callback: called as callback(step, latents) after each network call, step = 1, 2, ... (PLMS: to steps + 1).
        Raises: InputError (a ValueError) for anything out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        settings = SamplingSettings(sampler, steps, guidance, eta, karras, seed, height, width)  # checks the values
        settings = complete_settings(settings, self.config)
        self._check_sample(settings, prompts, negatives, output)
        height, width, guidance = settings.height, settings.width, settings.guidance
        shape = (self.config.unet.latent_channels, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]

        def sample_noise():
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        if latents is None:
            latents = sample_noise()
        elif latents.shape != (len(prompts), *shape):
            raise InputError(
                f"latents must be {(len(prompts), *shape)} for {len(prompts)} images of {height} x {width} px, "
                f"got {tuple(latents.shape)}"
            )
        options = {"eta": eta} if sampler == "ddim" else {"karras": karras} if sampler == "dpm++" else {}
        with torch.inference_mode():
            context = self.encode_prompt(prompts if guidance <= 1 else negatives + prompts)
            denoise = guide(self.unet, context, guidance)
            latents = latents.to(self.device, torch.float32)
            trajectory = SAMPLERS[sampler](denoise, latents, self.schedule, steps, sample_noise, **options)
            for step, latents in enumerate(trajectory, start=1):
                if callback is not None:
                    callback(step, latents)
            if not latents.isfinite().all():
                raise InputError(
                    f"the U-Net gave non-finite latents in {self.dtype}; try --dtype float32 (load(..., "
                    "dtype=torch.float32)), or check the base and the adapters"
                )
            images = latents if output == "latent" else self.decode_latents(latents).clamp(-1, 1)
        images = images.clone()  # an ordinary tensor: those of inference mode cannot be used in training
        return to_pil(images) if output == "pil" else images

    def _check_sample(self, settings, prompts, negatives, output):
        """Check the arguments of `sample` that `SamplingSettings` does not check. Raises InputError; may warn."""
        if output not in ("pil", "tensor", "latent"):
            raise InputError(f"output must be pil, tensor or latent, got {output!r}")
        if not prompts:
            raise InputError("no prompts: the list is empty; give at least one")
        if len(negatives) != len(prompts):
            raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        steps, n_timesteps = settings.steps, self.schedule.n_timesteps
        if steps > n_timesteps:
            raise InputError(f"--steps must be at most {n_timesteps}, the timesteps of this model, got {steps}")
        covered = n_timesteps // steps * steps
        if settings.sampler != "dpm++" and covered < 0.9 * n_timesteps:
            warnings.warn(
                f"{steps} steps of {settings.sampler} cover only {covered} of {n_timesteps} timesteps, too few to "
                f"start from pure noise; use a number of steps that divides {n_timesteps}, such as 50, 250 or 500",
                stacklevel=3,
            )
        if settings.guidance <= 1 and any(negatives):
            warnings.warn(f"the negative prompt is not used: guidance {settings.guidance} is off", stacklevel=3)


def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] -> list of B RGB images, rounded to 8 bits."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels.numpy()]  # (H, W, 3)
