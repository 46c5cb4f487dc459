"""The assembled model: three networks, a tokenizer and a noise schedule. Prompts in, pictures out."""

import functools
import math
import warnings

import numpy as np
import torch
from PIL import Image
from torch import nn

from minildm.config import SPATIAL_FACTOR
from minildm.errors import InputError
from minildm.files import sha256
from minildm.samplers import SAMPLERS, guide
from minildm.schedule import NoiseSchedule
from minildm.tokenizer import Tokenizer


def usual_guidance(config):
    """The guidance scale that suits a model: 7.5, and 3 for those smaller than any Stable Diffusion (contexts narrower
    than 768), such as the embedded one, whose greys burn out at 7.5."""
    return 3.0 if config.unet.context_dim < 768 else 7.5


class LatentDiffusion(nn.Module):
    """The networks ``unet``, ``vae`` and ``text_encoder``, with what turns prompts into their inputs and latents into
    pictures. Parameter names begin with the network's: ``unet.down_blocks...``."""

    def __init__(self, config, unet, vae, text_encoder, files=None):
        super().__init__()
        self.config = config
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer = Tokenizer(config.pad_token_id)
        schedule = config.schedule
        self.schedule = NoiseSchedule(schedule.prediction, schedule.n_timesteps, schedule.beta_start, schedule.beta_end)
        self.files = files  # the checkpoint it came from
        self.merged = []  # adapters merged into it: [{"adapter": SHA-256, "multiplier": ...}]

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @functools.cached_property
    def base_hash(self):
        """SHA-256 of the file the U-Net came from, 64 hex digits. Reads the file: seconds for a large one."""
        return sha256(self.files.hashed_file)

    # --- text --------------------------------------------------------------------------------------------------------
    def tokenize(self, prompts):
        """A list of B prompts -> token ids (B, 77) int64. Warns when a prompt is cut."""
        return self.tokenizer([prompts] if isinstance(prompts, str) else prompts)

    def encode_prompt(self, prompts):
        """A list of B prompts -> context (B, 77, D) in the model's dtype."""
        return self.text_encoder(self.tokenize(prompts).to(self.device))

    # --- images: the only place where the scaling factor is applied ---------------------------------------------------
    def encode_images(self, images, generator=None):
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8), drawn from the encoder's Gaussian."""
        if any(side % SPATIAL_FACTOR for side in images.shape[2:]):
            raise InputError(
                f"images must have sides that are multiples of {SPATIAL_FACTOR}, got "
                f"{tuple(images.shape[2:])}; crop or resize them"
            )
        z = self.vae.encode(images.to(self.device, self.vae.quant_conv.weight.dtype)).sample(generator)
        return (z * self.config.vae.scaling_factor).to(self.dtype)

    def decode_latents(self, latents):
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w) float32, nominally in [-1, 1], not clamped.

        Half precision can overflow in the VAE (SD 2.x is known for it): then the VAE changes to float32, for good, and
        a warning says so.
        """
        z = latents.to(self.device) / self.config.vae.scaling_factor
        vae_dtype = self.vae.post_quant_conv.weight.dtype
        images = self.vae.decode(z.to(vae_dtype)).float()
        if vae_dtype != torch.float32 and not images.isfinite().all():
            warnings.warn(
                f"the VAE gave non-finite pixels in {vae_dtype}; it decodes in float32 from here on", stacklevel=2
            )
            with torch.inference_mode(False):  # weights made in inference mode could never take part in training
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
        """Draw one picture for each prompt. Image i depends on its prompt and on seed + i; on its batch only in the
        last digits, as products of other shapes are rounded otherwise.

        Args:
            prompts: list of B prompts.
            negative_prompt: what guidance leads away from; one for all, or a list of B.
            steps: 1 to 1000. guidance: scale s; <= 1 runs no unconditional half.
            sampler: "ddim", "ddpm", "plms" or "dpm++"; eta in [0, 1]: DDIM's noise; karras: DPM-Solver++'s spacing.
            seed: picture i has its own torch.Generator("cpu") seeded seed + i, which draws first the initial latents
                (unless given), then float32 noise for each stochastic step.
            height, width: pixels, multiples of 8; None = the size the model was trained at.
            latents: initial noise, (B, 4, height / 8, width / 8).
            output: "pil": list of images; "tensor": (B, 3, H, W) float32 in [-1, 1]; "latent": scaled latents, float32.
            callback: called as callback(step, latents) after every network call, step = 1, 2, ... (PLMS: steps + 1).
        Raises: InputError (a ValueError) for anything out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        height, width = (self.config.image_size if side is None else side for side in (height, width))
        check_sampling(steps, guidance, sampler, eta, karras, seed, height, width, output, self.schedule.n_timesteps)
        if not prompts:
            raise InputError("no prompts: the list is empty; give at least one")
        if len(negatives) != len(prompts):
            raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        reached = self.schedule.n_timesteps // steps * steps
        if sampler != "dpm++" and reached < 0.9 * self.schedule.n_timesteps:
            warnings.warn(
                f"{steps} steps of {sampler} begin at timestep {reached} of {self.schedule.n_timesteps}, too "
                "late for pure noise; take a number that divides it (such as 50, 250, 500)",
                stacklevel=2,
            )
        if guidance <= 1 and any(negatives):
            warnings.warn(f"the negative prompt is not used: guidance {guidance} is off", stacklevel=2)
        shape = (self.config.unet.latent_channels, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]

        def draw_noise():
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        if latents is None:
            latents = draw_noise()
        elif latents.shape != (len(prompts), *shape):
            raise InputError(
                f"latents must be {(len(prompts), *shape)} for {len(prompts)} pictures of {height} x "
                f"{width} px, got {tuple(latents.shape)}"
            )
        options = {"eta": eta} if sampler == "ddim" else {"karras": karras} if sampler == "dpm++" else {}
        with torch.inference_mode():
            context = self.encode_prompt(prompts if guidance <= 1 else negatives + prompts)
            denoise = guide(self.unet, context, guidance)
            latents = latents.to(self.device, torch.float32)
            path = SAMPLERS[sampler](denoise, latents, self.schedule, steps, draw_noise, **options)
            for step, latents in enumerate(path, start=1):
                if callback is not None:
                    callback(step, latents)
            if not latents.isfinite().all():
                raise InputError(
                    f"the U-Net gave non-finite latents in {self.dtype}; try --dtype float32 (load(..., "
                    "dtype=torch.float32)), or look at the base and the adapters"
                )
            images = latents if output == "latent" else self.decode_latents(latents).clamp(-1, 1)
        images = images.clone()  # an ordinary tensor again, that may take part in training
        return to_pil(images) if output == "pil" else images


def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] -> list of B RGB pictures, 8 bit, rounded."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels.numpy()]  # (H, W, 3)


def check_sampling(
    steps, guidance, sampler, eta=0.0, karras=False, seed=0, height=None, width=None, output="pil", n_timesteps=1000
):
    """Raise InputError, naming the setting, if `LatentDiffusion.sample` could not run with these."""
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= n_timesteps:
        raise InputError(f"steps must be in [1, {n_timesteps}], got {steps}")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise InputError(f"guidance must be a number >= 0 (1 = off, 7.5 is usual), got {guidance}")
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and sampler != "ddim":
        raise InputError(f"eta is an option of the ddim sampler only, got eta = {eta} with {sampler}")
    if karras and sampler != "dpm++":
        raise InputError(f"karras spacing is an option of the dpm++ sampler only, got it with {sampler}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be in [0, 2^63), got {seed}")
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side <= 0 or side % SPATIAL_FACTOR):
            near = max(round(side / SPATIAL_FACTOR), 1) * SPATIAL_FACTOR
            raise InputError(f"{name} must be a positive multiple of {SPATIAL_FACTOR}, got {side}; try {near}")
    if output not in ("pil", "tensor", "latent"):
        raise InputError(f"output must be pil, tensor or latent, got {output!r}")
