"""config.json of the diffusers layout <-> our settings.

What a file states is used, or refused by name if it asks for something that Stable Diffusion v1.x and v2.x do not have.
Keys that are unknown here and not empty are named in a warning.
"""

import warnings

from minildm.checkpoint.document import Document, brief, same_or_list
from minildm.checkpoint.recognise import other_input_channels
from minildm.config import (
    BETA_SCHEDULES,
    MAX_TOKENS,
    TIMESTEP_SPACINGS,
    VOCABULARY,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from minildm.errors import InputError

# Keys with one value in all of Stable Diffusion v1.x and v2.x, assumed where a file leaves them out. Any other value
# means another network.
UNET_FIXED = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "cross_attention_norm": None,
}
UNET_HARMLESS = ("upcast_attention", "dropout", "addition_embed_type_num_heads")
VAE_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
VAE_HARMLESS = ("sample_size", "force_upcast")
TEXT_FIXED = {"layer_norm_eps": 1e-5}
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
SCHEDULE_FIXED = {"trained_betas": None, "use_flow_sigmas": False}
# How the samplers here work. clip_sample and steps_offset are not read: diffusers' pipeline sets them itself.
SAMPLERS_FIXED = {"thresholding": False, "set_alpha_to_one": False}
# All of them add noise as DDPM does and differ in how they take it away, which is the sampler's part.
SCHEDULERS = [
    f"{name}Scheduler"
    for name in """PNDM DDIM DDIMParallel DDPM DDPMParallel LMSDiscrete EulerDiscrete EulerAncestralDiscrete
    HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep
    UniPCMultistep SASolver""".split()  # noqa: SIM905
]


# --- reading ---------------------------------------------------------------------------------------------------------
def unet_from_json(document, file="unet/config.json"):
    """UNetConfig of a ``unet/config.json`` (a dict). Raises InputError for features that SD 1.x / 2.x do not have."""
    document = Document(document, file)
    document.require(UNET_FIXED)
    channels = document.integer("in_channels", 4)
    if document.integer("out_channels", 4) != channels:
        raise InputError(f"{file}: {other_input_channels(channels)}")
    widths = document.integers("block_out_channels")
    # Despite its name, `attention_head_dim` is the *number* of heads.
    document.take("attention_head_dim", 8)
    key = "attention_head_dim" if document.take("num_attention_heads", None) is None else "num_attention_heads"
    one_for_all = not isinstance(document.take(key, 8), list)
    n_heads = (document.integer(key, 8),) * len(widths) if one_for_all else document.integers(key)
    sizes = same_or_list(document.take("sample_size", 64))
    config = _build(
        UNetConfig,
        file,
        widths=widths,
        attention=_attention_levels(document, len(widths)),
        n_heads=n_heads,
        layers_per_block=document.integer("layers_per_block", 2),
        context_dim=document.integer("cross_attention_dim", 768),
        linear_projection=document.choice("use_linear_projection", False, (False, True)),
        norm_groups=document.integer("norm_num_groups", 32),
        latent_channels=channels,
        latent_size=64 if sizes is None else document.integer("sample_size", 64),
    )
    document.warn_of_the_rest(UNET_HARMLESS)
    return config


def _attention_levels(document, n_levels):
    """Which levels have attention, from the types of the blocks down and, where stated, up."""
    usual = ["CrossAttnDownBlock2D"] * (n_levels - 1) + ["DownBlock2D"]
    if not isinstance(blocks := document.take("down_block_types", usual), list):
        document.refuse("down_block_types", "a list")
    for block in blocks:
        if block not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            raise InputError(
                f"{document.file}: block {brief(block)} is not part of Stable Diffusion v1.x / v2.x, whose blocks are "
                "CrossAttnDownBlock2D and DownBlock2D"
            )
    mirrored = [block.replace("Down", "Up") for block in reversed(blocks)]
    if document.take("up_block_types", mirrored) != mirrored:
        document.refuse("up_block_types", f"the mirror of down_block_types, {mirrored}")
    return tuple(block == "CrossAttnDownBlock2D" for block in blocks)


def _build(kind, file, **values):
    """The settings ``kind`` of these values; errors name the file."""
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def unet_to_json(config):
    """The ``unet/config.json`` from which diffusers builds this network."""
    blocks = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention]
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
        "down_block_types": blocks,
        "up_block_types": [block.replace("Down", "Up") for block in reversed(blocks)],
    }


def vae_from_json(document, file="vae/config.json"):
    """VAEConfig of a ``vae/config.json`` (a dict)."""
    document = Document(document, file)
    document.require(VAE_FIXED)
    config = _build(
        VAEConfig,
        file,
        widths=document.integers("block_out_channels"),
        layers_per_block=document.integer("layers_per_block", 1),
        latent_channels=document.integer("latent_channels", 4),
        norm_groups=document.integer("norm_num_groups", 32),
        scaling_factor=document.number("scaling_factor", 0.18215),  # missing in SD 1.4's file
    )
    document.warn_of_the_rest(VAE_HARMLESS)
    return config


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


def text_encoder_from_json(document, file="text_encoder/config.json"):
    """TextEncoderConfig of a transformers ``text_encoder/config.json`` (a dict)."""
    classes = document.get("architectures")
    if isinstance(document.get("text_config"), dict):  # of a whole CLIP model
        document = document["text_config"]
    document = Document(document, file)
    if classes is not None and not (isinstance(classes, list) and classes and classes[0] in TEXT_CLASSES):
        raise InputError(
            f"{file}: the text encoder is {brief(classes)}, expected CLIP's ({', '.join(TEXT_CLASSES)}); it is not a "
            "Stable Diffusion v1.x / v2.x model"
        )
    if (positions := document.integer("max_position_embeddings", MAX_TOKENS)) != MAX_TOKENS:
        raise InputError(f"{file}: {positions} positions, expected {MAX_TOKENS}")
    document.require(TEXT_FIXED)
    return _build(
        TextEncoderConfig,
        file,
        width=document.integer("hidden_size", 512),
        n_layers=document.integer("num_hidden_layers", 12),
        n_heads=document.integer("num_attention_heads", 8),
        mlp_width=document.integer("intermediate_size", 2048),
        activation=document.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        vocabulary=document.integer("vocab_size", VOCABULARY),
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


def schedule_from_json(document, file="scheduler/scheduler_config.json"):
    """ScheduleConfig of a ``scheduler/scheduler_config.json`` (a dict).

    What is absent has diffusers' default, which for the betas is not Stable Diffusion's: linear, 0.0001 to 0.02.
    """
    document = Document(document, file)
    if (name := document.take("_class_name", "PNDMScheduler")) not in SCHEDULERS:
        raise InputError(
            f"{file}: the scheduler is {brief(name)}, which does not belong to Stable Diffusion v1.x / v2.x (flow "
            "matching, or a distilled model that needs its own sampler); if the model is an ordinary one, put the "
            "scheduler_config.json of its original there"
        )
    document.require(SCHEDULE_FIXED)
    if asked := [key for key, usual in SAMPLERS_FIXED.items() if document.take(key, usual) != usual]:
        warnings.warn(
            f"{file} asks for {' and '.join(asked)}, which no sampler here does, as Stable Diffusion's own file "
            "does not; images will differ from diffusers'",
            stacklevel=3,
        )
    names = {"epsilon": "epsilon", "v_prediction": "v"}
    return _build(
        ScheduleConfig,
        file,
        n_timesteps=document.integer("num_train_timesteps", 1000),
        beta_start=document.number("beta_start", 0.0001),
        beta_end=document.number("beta_end", 0.02),
        prediction=names[document.choice("prediction_type", "epsilon", tuple(names))],
        beta_schedule=document.choice("beta_schedule", "linear", BETA_SCHEDULES),
        zero_terminal_snr=document.choice("rescale_betas_zero_snr", False, (False, True)),
        timestep_spacing=document.choice("timestep_spacing", "leading", TIMESTEP_SPACINGS),
    )


def schedule_to_json(config):
    """The scheduler file from which diffusers builds the same noise schedule. Its DDIM knows all of it, its PNDM, which
    Stable Diffusion's file names, all but zero terminal SNR."""
    if config.zero_terminal_snr:
        kind = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    else:
        kind = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    return kind | {
        "num_train_timesteps": config.n_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": "v_prediction" if config.prediction == "v" else "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": config.timestep_spacing,
        "trained_betas": None,
        "clip_sample": False,
    }
