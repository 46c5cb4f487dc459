"""Settings of the networks: frozen dataclasses, read from a diffusers-layout ``config.json`` or guessed from tensors.

Only what differs between Stable Diffusion v1.x, v2.x and smaller models of the same shape is a field; what they all
share (GroupNorm eps, biases, 77 tokens, ...) stands in the networks. A config that asks for anything else is refused.
"""

import dataclasses
from dataclasses import dataclass

from minildm.errors import InputError

MAX_TOKENS = 77  # begin + at most 75 + end; the CLIP text encoders know no more positions
SPATIAL_FACTOR = 8  # pixels a latent side: three downsamplers in the VAE


def _require_levels(config, *names):
    lengths = {name: len(getattr(config, name)) for name in names}
    if len(set(lengths.values())) != 1:
        raise InputError(f"every level needs one entry in each of {', '.join(names)}, got lengths {lengths}")


def _require_divisible(widths, groups, name):
    for width in widths:
        if width % groups:
            raise InputError(f"{name} = {groups} does not divide the width {width} (of {tuple(widths)})")


@dataclass(frozen=True)
class UNetConfig:
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # channels of each level, finest first
    attention: tuple[bool, ...] = (True, True, True, False)  # levels that hold transformer blocks
    n_heads: tuple[int, ...] = (8, 8, 8, 8)  # of each level; SD 2.x: width / 64
    layers_per_block: int = 2
    context_dim: int = 768  # width of the text features; SD 2.x: 1024
    linear_projection: bool = False  # proj_in / proj_out: 1x1 convolution (SD 1.x) or linear layer (SD 2.x)
    norm_groups: int = 32
    latent_channels: int = 4
    latent_size: int = 64  # side it was trained at: 64 latents = 512 px

    def __post_init__(self):
        _require_levels(self, "widths", "attention", "n_heads")
        _require_divisible(self.widths, self.norm_groups, "norm_groups")
        for width, heads in zip(self.widths, self.n_heads):
            if width % heads:
                raise InputError(f"a U-Net level of {width} channels cannot be split into {heads} heads")

    @staticmethod
    def tiny(**changes):
        """A real network small enough for a test: one attention level, 0.8 M parameters."""
        return UNetConfig(
            **(
                {
                    "widths": (32, 64),
                    "attention": (True, False),
                    "n_heads": (4, 4),
                    "layers_per_block": 1,
                    "context_dim": 32,
                    "latent_size": 8,
                }
                | changes
            )
        )


@dataclass(frozen=True)
class VAEConfig:
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / standard deviation of the raw code, so that latents have unit variance

    def __post_init__(self):
        _require_divisible(self.widths, self.norm_groups, "norm_groups")
        if 2 ** (len(self.widths) - 1) != SPATIAL_FACTOR:
            raise InputError(f"the VAE must have 4 levels (a latent for {SPATIAL_FACTOR} pixels), got {self.widths}")

    @staticmethod
    def tiny(**changes):
        return VAEConfig(**({"widths": (32, 32, 64, 64), "layers_per_block": 1} | changes))


@dataclass(frozen=True)
class TextEncoderConfig:
    width: int = 768
    n_layers: int = 12
    n_heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # "quick_gelu": OpenAI's CLIP (SD 1.x); "gelu": OpenCLIP (SD 2.x)
    vocabulary: int = 49408

    def __post_init__(self):
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
    prediction: str = "epsilon"  # what the U-Net was trained to say: the noise, or v (SD 2.x at 768 px)

    def __post_init__(self):
        if self.prediction not in ("epsilon", "v"):
            raise InputError(f"prediction must be 'epsilon' or 'v', got {self.prediction!r}")
        if not (self.n_timesteps >= 1 and 0 < self.beta_start <= self.beta_end < 1):
            raise InputError(
                f"a noise schedule needs timesteps and 0 < beta_start <= beta_end < 1, got "
                f"{self.n_timesteps} timesteps, {self.beta_start} to {self.beta_end}"
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
                f"the U-Net reads text features {self.unet.context_dim} wide, but the text encoder gives "
                f"{self.text_encoder.width}: they belong to different models"
            )
        if self.unet.latent_channels != self.vae.latent_channels:
            raise InputError(
                f"the U-Net has {self.unet.latent_channels} latent channels, the VAE "
                f"{self.vae.latent_channels}: they belong to different models"
            )

    @property
    def image_size(self):
        """Pixels a side the U-Net was trained at."""
        return self.unet.latent_size * SPATIAL_FACTOR

    @staticmethod
    def tiny(v2=False):
        """v1-shaped, or v2-shaped: fixed head width, linear projections, gelu, v-prediction, zero padding."""
        if not v2:
            return ModelConfig(UNetConfig.tiny(), VAEConfig.tiny(), TextEncoderConfig.tiny())
        return ModelConfig(
            UNetConfig.tiny(n_heads=(2, 4), linear_projection=True),
            VAEConfig.tiny(),
            TextEncoderConfig.tiny(activation="gelu"),
            ScheduleConfig(prediction="v"),
            pad_token_id=0,
        )


def to_json(config):
    """A (nested) settings dataclass as plain dicts, lists and numbers."""
    return dataclasses.asdict(config)


# --- diffusers-layout config.json ------------------------------------------------------------------------------------
# Keys whose other values would mean another network. (diffusers drops defaults only rarely, so absence is the default.)
_UNET_FIXED = {
    "act_fn": ("silu",),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "transformer_layers_per_block": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "encoder_hid_dim": (None,),
    "cross_attention_norm": (None,),
}
_VAE_FIXED = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
_SCHEDULE_FIXED = {"beta_schedule": ("scaled_linear",), "rescale_betas_zero_snr": (False,), "trained_betas": (None,)}


def unet_from_json(config):
    """UNetConfig of a diffusers ``unet/config.json`` (a dict). Raises InputError for what SD 1.x / 2.x do not have."""
    _require_fixed(config, _UNET_FIXED, "unet/config.json")
    channels = config.get("in_channels", 4)
    if config.get("out_channels", 4) != channels:
        raise InputError(other_inputs(channels))
    widths = tuple(config["block_out_channels"])
    # `attention_head_dim` holds the *number* of heads: a name that could never be taken back.
    heads = config.get("num_attention_heads")
    heads = config.get("attention_head_dim", 8) if heads is None else heads
    kinds = config.get("down_block_types", ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"])
    for kind in kinds:
        if kind not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            raise InputError(f"unet/config.json: block {kind} is not part of Stable Diffusion v1.x / v2.x")
    return UNetConfig(
        widths=widths,
        attention=tuple(kind == "CrossAttnDownBlock2D" for kind in kinds),
        n_heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        layers_per_block=config.get("layers_per_block", 2),
        context_dim=config.get("cross_attention_dim", 768),
        linear_projection=config.get("use_linear_projection", False),
        norm_groups=config.get("norm_num_groups", 32),
        latent_channels=channels,
        latent_size=config.get("sample_size", 64),
    )


def unet_to_json(config):
    """The ``unet/config.json`` that diffusers reads as this network."""
    kinds = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.latent_size,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": list(config.n_heads),
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
    }


def vae_from_json(config):
    """VAEConfig of a diffusers ``vae/config.json`` (a dict)."""
    _require_fixed(config, _VAE_FIXED, "vae/config.json")
    return VAEConfig(
        widths=tuple(config["block_out_channels"]),
        layers_per_block=config.get("layers_per_block", 1),
        latent_channels=config.get("latent_channels", 4),
        norm_groups=config.get("norm_num_groups", 32),
        scaling_factor=config.get("scaling_factor", 0.18215),
    )  # SD 1.4's file says none


def vae_to_json(config):
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder_from_json(config):
    """TextEncoderConfig of a transformers ``text_encoder/config.json`` (a dict)."""
    if config.get("max_position_embeddings", MAX_TOKENS) != MAX_TOKENS:
        raise InputError(f"text_encoder/config.json: {config['max_position_embeddings']} positions, expected 77")
    return TextEncoderConfig(
        width=config.get("hidden_size", 512),
        n_layers=config.get("num_hidden_layers", 12),
        n_heads=config.get("num_attention_heads", 8),
        mlp_width=config.get("intermediate_size", 2048),
        activation=config.get("hidden_act", "quick_gelu"),
        vocabulary=config.get("vocab_size", 49408),
    )


def text_encoder_to_json(config):
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": MAX_TOKENS,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "projection_dim": config.width,
    }


def schedule_from_json(config):
    """ScheduleConfig of a diffusers ``scheduler/scheduler_config.json`` (a dict)."""
    _require_fixed(config, _SCHEDULE_FIXED, "scheduler/scheduler_config.json")
    names = {"epsilon": "epsilon", "v_prediction": "v"}
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in names:
        raise InputError(f"scheduler_config.json: prediction_type {prediction!r}, expected one of {', '.join(names)}")
    return ScheduleConfig(
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", 0.00085),
        config.get("beta_end", 0.012),
        names[prediction],
    )


def schedule_to_json(config):
    return {
        "_class_name": "PNDMScheduler",
        "skip_prk_steps": True,
        "num_train_timesteps": config.n_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction" if config.prediction == "v" else "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "clip_sample": False,
    }


def _require_fixed(config, fixed, file):
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise InputError(f"{file}: {key} is {config[key]!r}, but Stable Diffusion v1.x / v2.x has {allowed[0]!r}")


def other_inputs(channels):
    """What a U-Net with another number of input channels is, and what to do."""
    kind = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth-guided model", 7: "an upscaler"}
    return (
        f"the U-Net reads {channels} channels ({kind.get(channels, 'not a text-to-image model')}), expected 4; "
        "use the text-to-image checkpoint of the same release"
    )
