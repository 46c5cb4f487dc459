"""The assembled model: three networks, a tokenizer and a noise schedule. Prompts in, images out."""

import functools
import hashlib
import math
import operator
import warnings
from dataclasses import asdict, replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from minildm import kernels
from minildm.config import SPATIAL_FACTOR, STRENGTH, SamplingSettings
from minildm.errors import InputError
from minildm.files import sha256
from minildm.samplers import SAMPLERS, guide, starting_point
from minildm.schedule import NoiseSchedule
from minildm.seeds import to_device
from minildm.tokenizer import Tokenizer

EARLIEST_START = 0.9  # share of the schedule; `_check_start` warns of sampling that starts before
LARGEST_PIXEL = 8  # far beyond the [-1, 1] of images and what filters and decoders make of it, far below 8 bits


IN_FLOAT32 = "try --dtype float32 (load(..., dtype=torch.float32))"


def usual_guidance(config):
    """The default guidance scale for a ModelConfig: 7.5, or 3 for models smaller than any Stable Diffusion (context
    width below 768), such as the embedded one, whose images are over-saturated at 7.5."""
    return 3.0 if config.unet.context_dim < 768 else 7.5


def complete_settings(settings, config, has_init_image=False):
    """``settings`` (SamplingSettings) with guidance, height and width, where they are None, from the ModelConfig, and
    with a strength if there is an initial image."""
    return replace(
        settings,
        guidance=usual_guidance(config) if settings.guidance is None else settings.guidance,
        height=config.image_size if settings.height is None else settings.height,
        width=config.image_size if settings.width is None else settings.width,
        strength=STRENGTH if settings.strength is None and has_init_image else settings.strength,
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
        self.schedule = NoiseSchedule(**asdict(config.schedule))
        self.files = files  # the Checkpoint it was loaded from
        self.rounded_to = None  # the dtype of weights that `compute_in_float32` has converted
        self.merged = []  # adapters merged into it: [{"adapter": SHA-256, "multiplier", "rank", "path"}]

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @property
    def precision(self):
        """The dtype that the weights have, or were rounded to."""
        return self.rounded_to or self.dtype

    def compute_in_float32(self):
        """Convert all weights to float32, without changing their values."""
        self.rounded_to = self.precision
        self.float()

    @functools.cached_property
    def base_hash(self):
        """SHA-256 of the file that holds the U-Net, 64 hex digits; of several, of their hashes one after the other.
        Reading a large file takes seconds."""
        first, *more = [sha256(file) for file in self.files.hashed_files]
        return hashlib.sha256("".join([first, *more]).encode()).hexdigest() if more else first

    @functools.cached_property
    def vae_hash(self):
        """SHA-256 of the file of an autoencoder that is not the base's own, 64 hex digits; else None."""
        return None if self.files.vae_file is None else sha256(self.files.vae_file)

    def compile_networks(self, **options):
        """Compile what `sample` runs, U-Net, text encoder and the VAE's decoder: each becomes one graph at its first
        call. Args: options: of torch.compile."""
        self.unet.compile(**options)
        self.text_encoder.compile(**options)
        self.vae.decode = torch.compile(self.vae.decode, **options)

    # --- text --------------------------------------------------------------------------------------------------------
    def tokenize(self, prompts):
        """A list of B prompts -> token ids (B, 77) int64. Warns if a prompt is cut."""
        return self.tokenizer([prompts] if isinstance(prompts, str) else prompts)

    def encode_prompt(self, prompts):
        """A list of B prompts -> context (B, 77, D) in the model's dtype."""
        return self.text_encoder(self.tokenize(prompts).to(self.device))

    # --- images ------------------------------------------------------------------------------------------------------
    def encode_images(self, images, generator=None):
        """Images in [-1, 1] -> scaled latents (B, 4, H/8, W/8), sampled from the encoder's Gaussian.

        Args: images: (B, 3, H, W), or (B, 1, H, W) for grey; one image may lack the B.
        Raises: InputError for another shape or range, and unless H and W are multiples of 8.
        """
        return self._scaled(self._encode(_as_batch(images, "images")).sample(generator)).to(self.dtype)

    def _encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> Gaussian over raw codes."""
        return self.vae.encode(images.to(self.device, self.vae.quant_conv.weight.dtype))

    def _scaled(self, z):
        return z * self.config.vae.scaling_factor

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
        guidance=None,
        sampler="ddim",
        eta=0.0,
        seed=0,
        height=None,
        width=None,
        latents=None,
        output="pil",
        callback=None,
        karras=False,
        *,
        init_images=None,
        strength=None,
    ):
        """Generate one image per prompt. Image i depends on its prompt and on seed + i, not on the rest of the batch
        (except for rounding, because products of other shapes round differently).

        With ``init_images`` this is image-to-image sampling as in diffusers' StableDiffusionImg2ImgPipeline: the image
        is encoded, gets as much noise as it would have after the skipped steps, and the last int(steps * strength)
        steps run. Its latents are sampled from the VAE's Gaussian, not its mean.

        Args:
            prompts: list of B prompts.
            negative_prompt: what guidance steers away from; one for all images, or a list of B.
            steps: 1 to 1000. guidance: scale s; None = `usual_guidance`; <= 1 runs no unconditional half.
            sampler: "ddim", "ddpm", "plms" or "dpm++". eta: noise of DDIM, in [0, 1]. karras: noise levels for "dpm++".
            seed: image i has its own torch.Generator("cpu") with seed + i; or a list of B seeds. It gives, in this
                order and in float32: the noise of the VAE's sample (only with ``init_images``), the initial latents
                (unless they are passed), and noise for each stochastic step.
            height, width: pixels, multiples of 8; None = those of ``init_images``, or the model's training size.
            latents: initial noise, (B, 4, height / 8, width / 8).
            output: "pil": list of images; "tensor": (B, 3, H, W) float32 in [-1, 1]; "latent": scaled latents, float32.
            callback: called as callback(step, latents) after each network call, step = 1, 2, ... (PLMS: to steps + 1).
            init_images: images in [-1, 1] to start from, (B, 3, H, W), or (1, 3, H, W) for all prompts; grey as in
                `encode_images`. strength: share of the steps to run, above 0 and at most 1; None = 0.8. At 1 all steps
                run, and next to nothing is left of the image.
        Raises: InputError (a ValueError) for anything out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        seeds = _seeds(seed, len(prompts))
        if init_images is not None:
            init_images = _as_batch(init_images, "init_images")
            height = init_images.shape[2] if height is None else height
            width = init_images.shape[3] if width is None else width
        settings = SamplingSettings(sampler, steps, guidance, eta, karras, seeds[0], height, width, strength)
        settings = complete_settings(settings, self.config, has_init_image=init_images is not None)
        self._check_sample(settings, prompts, negatives, init_images, latents, output)

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        sample_noise = functools.partial(self._sample_noise, generators, self._latent_shape(settings))
        guided = settings.guidance > 1
        with torch.inference_mode():
            context = self.encode_prompt(negatives + prompts if guided else prompts)
            latents = self._first_latents(settings, init_images, latents, generators, sample_noise)
            denoise = guide(kernels.in_two_halves(self.unet), context, settings.guidance)
            options = {"eta": eta} if sampler == "ddim" else {"karras": karras} if sampler == "dpm++" else {}
            trajectory = SAMPLERS[sampler](
                denoise, latents, self.schedule, steps, sample_noise, settings.skipped_steps, **options
            )
            for step, latents in enumerate(trajectory, start=1):
                if callback is not None:
                    callback(step, latents)
            self._check_latents(latents)
            images = latents if output == "latent" else self.decode_latents(latents).clamp(-1, 1)
        images = images.clone()  # an ordinary tensor: those of inference mode cannot be used in training
        return to_pil(images) if output == "pil" else images

    def _latent_shape(self, settings):
        """(4, h, w) of one image."""
        size = (settings.height // SPATIAL_FACTOR, settings.width // SPATIAL_FACTOR)
        return self.config.unet.latent_channels, *size

    def _sample_noise(self, generators, shape):
        """Standard normal noise (B, *shape) float32, that of each image by its own generator."""
        return to_device(torch.stack([torch.randn(shape, generator=g) for g in generators]), self.device)

    def _first_latents(self, settings, init_images, noise, generators, sample_noise):
        """What the sampler starts from, (B, 4, h, w) float32: ``noise``, or new noise where that is None; with initial
        images, their latents with as much noise as they would have after the skipped steps."""
        init_latents = None if init_images is None else self._init_latents(init_images, generators)
        noise = (sample_noise() if noise is None else noise).to(self.device, torch.float32)
        if init_latents is None:
            return noise
        _, alpha_bar = starting_point(
            settings.sampler, self.schedule, settings.steps, settings.skipped_steps, settings.karras
        )
        return math.sqrt(alpha_bar) * init_latents + math.sqrt(1 - alpha_bar) * noise  # DDPM, Eq. 4

    def _init_latents(self, init_images, generators):
        """Scaled latents of the initial images, (B, 4, h, w) float32: one sample of an image's Gaussian per generator.
        Images are encoded one by one, so that none depends on its batch."""
        gaussians = [self._encode(image[None]) for image in init_images]
        z = torch.cat([gaussians[i % len(gaussians)].sample(g) for i, g in enumerate(generators)])
        if not z.isfinite().all():
            raise InputError(
                f"the VAE gave non-finite latents for the initial image in {z.dtype}; "
                + (IN_FLOAT32 if z.dtype != torch.float32 else "check the base and its VAE")
            )
        return self._scaled(z.float())

    def _check_latents(self, latents):
        """Raise InputError unless the sampler's result is finite."""
        if not latents.isfinite().all():
            raise InputError(
                f"the U-Net gave non-finite latents in {self.dtype}; "
                + (f"{IN_FLOAT32}, or " if self.dtype != torch.float32 else "")
                + "check the base and the adapters"
            )

    def _check_sample(self, settings, prompts, negatives, init_images, latents, output):
        """Check the arguments of `sample` that `SamplingSettings` does not check. Raises InputError; may warn."""
        if output not in ("pil", "tensor", "latent"):
            raise InputError(f"output must be pil, tensor or latent, got {output!r}")
        if not prompts:
            raise InputError("no prompts: the list is empty; give at least one")
        if len(negatives) != len(prompts):
            raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        if settings.strength is not None and init_images is None:
            raise InputError(f"strength {settings.strength:g} is for initial images; give init_images")
        if init_images is not None:
            if len(init_images) not in (1, len(prompts)):
                raise InputError(
                    f"{len(init_images)} initial images for {len(prompts)} prompts; give one, or one for each"
                )
            if init_images.shape[2:] != (settings.height, settings.width):
                raise InputError(
                    f"init_images are {init_images.shape[2]} x {init_images.shape[3]} px, but height and width are "
                    f"{settings.height} and {settings.width}; resize the images, or leave height and width out"
                )
        if settings.steps > self.schedule.n_timesteps:
            raise InputError(
                f"--steps must be at most {self.schedule.n_timesteps}, the timesteps of this model, got "
                f"{settings.steps}"
            )
        shape = (len(prompts), *self._latent_shape(settings))
        if latents is not None and latents.shape != shape:
            raise InputError(
                f"latents must be {shape} for {len(prompts)} images of {settings.height} x {settings.width} px, got "
                f"{tuple(latents.shape)}"
            )
        if init_images is None:
            self._check_start(settings)
        if settings.guidance <= 1 and any(negatives):
            warnings.warn(f"the negative prompt is not used: guidance {settings.guidance} is off", stacklevel=3)

    def _check_start(self, settings):
        """Warn if the first timestep lies so early that pure noise is not what the U-Net expects there."""
        n_timesteps = self.schedule.n_timesteps
        t, _ = starting_point(settings.sampler, self.schedule, settings.steps, karras=settings.karras)
        if t < EARLIEST_START * n_timesteps:
            warnings.warn(
                f"{settings.sampler} with {settings.steps} steps starts from pure noise at timestep {t} of "
                f"{n_timesteps}, where the U-Net expects part of an image; use 10 steps or more, a number that divides "
                f"{n_timesteps}, such as 20 or 50, or the sampler dpm++, which starts at the end with any number",
                stacklevel=4,
            )


def _seeds(seed, n_prompts):
    """The ``n_prompts`` seeds that ``seed`` means. Raises InputError for anything but whole numbers in range."""
    try:
        if isinstance(seed, (list, tuple, range)):
            seeds = [operator.index(each) for each in seed]
        else:
            seeds = [operator.index(seed) + i for i in range(max(n_prompts, 1))]
    except TypeError:
        raise InputError(f"seed must be a whole number, or a list of one per prompt, got {seed!r}") from None
    if len(seeds) != max(n_prompts, 1):
        raise InputError(f"{len(seeds)} seeds for {n_prompts} prompts; give one, or one for each")
    if outside := [each for each in seeds if not 0 <= each < 2**63]:
        raise InputError(f"--seed must be in [0, 2^63), got {outside[0]}")
    return seeds


def _as_batch(images, name):
    """Images (B, 3, H, W) from what is clearly meant: (B, 1, H, W) is grey, (3, H, W) and (1, H, W) are one image.

    Raises: InputError for other shapes, H or W that are no multiples of 8, and values that are not around [-1, 1].
    """
    wanted = f"{name} must be a float tensor (B, 3, H, W) in [-1, 1]"
    if not isinstance(images, torch.Tensor):
        raise InputError(f"{wanted}, got a {type(images).__name__}")
    batch = images[None] if images.dim() == 3 else images
    if batch.dim() != 4 or batch.shape[1] not in (1, 3) or not batch.numel():
        raise InputError(f"{wanted}, or (B, 1, H, W) for grey, got shape {tuple(images.shape)}")
    if any(pixels % SPATIAL_FACTOR for pixels in batch.shape[2:]):
        raise InputError(
            f"image height and width must be multiples of {SPATIAL_FACTOR}, got {tuple(batch.shape[2:])}; "
            "crop or resize the images"
        )
    if not batch.is_floating_point():
        raise InputError(f"{wanted}, got {batch.dtype}; divide 8-bit pixels by 127.5 and subtract 1")
    if not batch.abs().max() <= LARGEST_PIXEL:  # NaN fails, too
        raise InputError(f"{wanted}, got values from {batch.min():g} to {batch.max():g}; scale them first")
    return batch.expand(-1, 3, -1, -1)


def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] -> list of B RGB images, rounded to 8 bits."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels.numpy()]  # (H, W, 3)
