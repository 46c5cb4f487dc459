"""Settings of the networks and of sampling, as frozen dataclasses.

A field is something that differs between Stable Diffusion v1.x, v2.x and smaller models of the same form. What they all
share (GroupNorm eps, biases, 77 tokens, ...) is written in the networks. This module does not import torch.
"""

import math
from dataclasses import dataclass

from minildm.errors import InputError
from minildm.settings import Settings, setting

MAX_TOKENS = 77  # begin + at most 75 + end: the positions of CLIP's text encoders
SPATIAL_FACTOR = 8  # pixels per latent, in height and in width: the VAE has three downsamplers
STRENGTH = 0.8  # of image-to-image sampling, where none is given: diffusers' default
SAMPLER_NAMES = {"ddim": "DDIM", "ddpm": "DDPM", "plms": "PLMS", "dpm++": "DPM++ 2M"}  # ours: AUTOMATIC1111's


VOCABULARY = 49408  # CLIP's: the last two tokens are begin and end
BETA_SCHEDULES = ("scaled_linear", "linear")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def _require_sizes(config, **largest):
    """Raise InputError unless the fields are whole numbers from 1 to ``largest``. Tuples: each element of theirs.

    The limits lie far beyond any Stable Diffusion. A network of 10**9 blocks would not fit any machine.
    """
    for name, limit in largest.items():
        value = getattr(config, name)
        for n in value if isinstance(value, tuple) else (value,):
            if type(n) is not int or not 1 <= n <= limit:
                raise InputError(f"{name} must be a whole number from 1 to {limit:,}, got {str(n)[:40]}")


def _require_divisible(widths, norm_groups):
    for width in widths:
        if width % norm_groups:
            raise InputError(f"norm_groups = {norm_groups} does not divide the width {width} (of {tuple(widths)})")


@dataclass(frozen=True)
class UNetConfig:
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # channels of each level, finest level first
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformer blocks
    n_heads: tuple[int, ...] = (8, 8, 8, 8)  # of each level; SD 2.x: width / 64
    layers_per_block: int = 2
    context_dim: int = 768  # width of the text features; SD 2.x: 1024
    linear_projection: bool = False  # proj_in, proj_out: 1x1 convolutions (SD 1.x) or linear layers (SD 2.x)
    norm_groups: int = 32
    latent_channels: int = 4
    latent_size: int = 64  # height and width in training: 64 latents = 512 px

    def __post_init__(self):
        _require_sizes(self, widths=1 << 15, n_heads=1 << 15, layers_per_block=16, context_dim=1 << 15)
        _require_sizes(self, norm_groups=1 << 15, latent_channels=64, latent_size=1 << 12)
        if not 1 <= len(self.widths) <= 8:
            raise InputError(f"a U-Net has 1 to 8 levels, got {len(self.widths)} widths")
        lengths = {name: len(getattr(self, name)) for name in ("widths", "attention", "n_heads")}
        if len(set(lengths.values())) != 1:
            raise InputError(f"widths, attention and n_heads need one entry per U-Net level, got lengths {lengths}")
        _require_divisible(self.widths, self.norm_groups)
        for width, n_heads in zip(self.widths, self.n_heads):
            if width % n_heads:
                raise InputError(f"a U-Net level of {width} channels cannot be split into {n_heads} heads")

    @staticmethod
    def tiny(**changes):
        """A network for tests with all parts of a real one: attention at one level, 0.8 M parameters."""
        sizes = {"widths": (32, 64), "attention": (True, False), "n_heads": (4, 4), "layers_per_block": 1}
        return UNetConfig(**(sizes | {"context_dim": 32, "latent_size": 8} | changes))


@dataclass(frozen=True)
class VAEConfig:
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level, finest level first
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / standard deviation of the raw code z, so that latents have unit variance

    def __post_init__(self):
        _require_sizes(self, widths=1 << 15, layers_per_block=16, latent_channels=64, norm_groups=1 << 15)
        _require_divisible(self.widths, self.norm_groups)
        if not 0 < self.scaling_factor < math.inf:
            raise InputError(f"the VAE's scaling_factor must be a positive number, got {self.scaling_factor}")
        if 2 ** (len(self.widths) - 1) != SPATIAL_FACTOR:
            raise InputError(f"the VAE must have 4 levels (one latent per {SPATIAL_FACTOR} pixels), got {self.widths}")

    @staticmethod
    def tiny(**changes):
        return VAEConfig(**({"widths": (32, 32, 64, 64), "layers_per_block": 1} | changes))


@dataclass(frozen=True)
class TextEncoderConfig:
    width: int = 768
    n_layers: int = 12
    n_heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # OpenAI's CLIP (SD 1.x); "gelu": OpenCLIP (SD 2.x)
    vocabulary: int = VOCABULARY  # more: tokens that were added to CLIP's

    def __post_init__(self):
        _require_sizes(self, width=1 << 15, n_layers=128, n_heads=1 << 15, mlp_width=1 << 17, vocabulary=1 << 20)
        if self.vocabulary < VOCABULARY:
            raise InputError(
                f"the text encoder has a vocabulary of {self.vocabulary}, fewer than CLIP's {VOCABULARY} tokens, so it "
                "belongs to another tokenizer"
            )
        if self.activation not in ("quick_gelu", "gelu"):
            raise InputError(f"text encoder activation must be quick_gelu or gelu, got {self.activation!r}")
        if self.width % self.n_heads:
            raise InputError(f"a text encoder of width {self.width} cannot be split into {self.n_heads} heads")

    @staticmethod
    def tiny(**changes):
        return TextEncoderConfig(**({"width": 32, "n_layers": 2, "n_heads": 4, "mlp_width": 64} | changes))


@dataclass(frozen=True)
class ScheduleConfig:
    n_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: str = "epsilon"  # what the U-Net was trained to predict: the noise, or "v" (SD 2.x at 768 px)
    beta_schedule: str = "scaled_linear"  # what is evenly spaced: the betas' square roots, or "linear": the betas
    zero_terminal_snr: bool = False  # betas rescaled so that the last timestep is noise alone (arXiv:2305.08891)
    # Of ddim, ddpm and plms: Stable Diffusion's; "trailing" begins at the last timestep, "linspace" also ends at 0
    timestep_spacing: str = "leading"

    def __post_init__(self):
        for name, choices in (
            ("prediction", ("epsilon", "v")),
            ("beta_schedule", BETA_SCHEDULES),
            ("timestep_spacing", TIMESTEP_SPACINGS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
        _require_sizes(self, n_timesteps=100_000)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(
                "a noise schedule needs at least one timestep and 0 < beta_start <= beta_end < 1, got "
                f"{self.n_timesteps} timesteps, betas from {self.beta_start} to {self.beta_end}"
            )
        if self.zero_terminal_snr and (self.prediction != "v" or self.n_timesteps < 2):
            raise InputError(
                "a noise schedule with zero terminal SNR needs v-prediction (--prediction v): at its last timestep the "
                f"noise says nothing about the image; got {self.prediction!r}"
            )


@dataclass(frozen=True)
class ModelConfig:
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    pad_token_id: int = 49407  # SD 1.x pads prompts with end-of-text, SD 2.x with 0

    def __post_init__(self):
        if self.unet.context_dim != self.text_encoder.width:
            raise InputError(
                f"the U-Net expects text features of width {self.unet.context_dim}, but the text encoder gives width "
                f"{self.text_encoder.width}: they belong to different models"
            )
        if self.unet.latent_channels != self.vae.latent_channels:
            raise InputError(
                f"the U-Net has {self.unet.latent_channels} latent channels, the VAE "
                f"{self.vae.latent_channels}: they belong to different models"
            )

    @property
    def image_size(self):
        """Height and width in pixels of the U-Net's training images."""
        return self.unet.latent_size * SPATIAL_FACTOR

    @staticmethod
    def tiny(v2=False):
        """v1-shaped, or v2-shaped: heads of equal width, linear projections, gelu, v-prediction, zero padding."""
        if not v2:
            return ModelConfig(UNetConfig.tiny(), VAEConfig.tiny(), TextEncoderConfig.tiny())
        return ModelConfig(
            UNetConfig.tiny(n_heads=(2, 4), linear_projection=True),
            VAEConfig.tiny(),
            TextEncoderConfig.tiny(activation="gelu"),
            ScheduleConfig(prediction="v"),
            pad_token_id=0,
        )


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How `LatentDiffusion.sample` runs; also the sampling flags of sample.py."""

    sampler: str = setting("ddim", "20 steps are enough for dpm++", choices=tuple(SAMPLER_NAMES))
    steps: int = setting(50, "denoising steps, 1 to 1000", at_least=1, at_most=1000)
    guidance: float | None = setting(
        None,
        "guidance scale; 1 or less turns guidance off and is twice as fast (default: 7.5; 3 for models smaller than "
        "Stable Diffusion, such as weights/tiny)",
        at_least=0,
    )
    eta: float = setting(0.0, "amount of noise in ddim's steps, 0 to 1", at_least=0, at_most=1)
    karras: bool = setting(False, "Karras noise levels for dpm++")
    seed: int = setting(0, "random seed of the first image; image i has seed + i")
    height: int | None = setting(None, "pixels, a multiple of 8 (default: the model's training size)")
    width: int | None = setting(None, "pixels, a multiple of 8 (default: the model's training size)")
    strength: float | None = setting(
        None,
        f"with an initial image: the share of the steps to run; 1 keeps next to nothing of it (default: {STRENGTH})",
        above=0,
        at_most=1,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eta > 0 and self.sampler != "ddim":
            raise InputError(f"--eta is for the ddim sampler only, got --eta {self.eta} with --sampler {self.sampler}")
        if self.karras and self.sampler != "dpm++":
            raise InputError(f"--karras is for the dpm++ sampler only, got --sampler {self.sampler}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in [0, 2^63), got {self.seed}")
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels is not None and (pixels <= 0 or pixels % SPATIAL_FACTOR):
                nearest = max(round(pixels / SPATIAL_FACTOR), 1) * SPATIAL_FACTOR
                raise InputError(
                    f"--{name} must be a positive multiple of {SPATIAL_FACTOR}, got {pixels}; try {nearest}"
                )
        if self.skipped_steps == self.steps:
            raise InputError(
                f"--strength {self.strength:g} of {self.steps} steps leaves no step to run; give at least "
                f"{math.ceil(1000 / self.steps) / 1000:g}, or more --steps"
            )

    @property
    def skipped_steps(self):
        """How many steps are left out with an initial image; 0 without one. Rounded like diffusers' img2img pipeline
        (`get_timesteps`), floating-point error included: 50 steps at strength 0.58 run 28 and skip 22."""
        return 0 if self.strength is None else self.steps - int(self.steps * self.strength)

    @property
    def network_calls(self):
        """How often the U-Net is called: once per step, and once more by PLMS, whose second timestep is repeated."""
        return self.steps - self.skipped_steps + (self.sampler == "plms" and self.steps > 1)
