"""The single-file layout of CompVis and Stability AI: names, and sizes read off shapes.

``model.diffusion_model.*`` is the U-Net, ``first_stage_model.*`` the VAE, ``cond_stage_model.*`` the text encoder
(``conditioner.embedders.0.*`` in files of Stability's newer code), under transformers' names or under OpenCLIP's, which
fuse q, k and v into one tensor.

Shapes tell the version, whatever the names: projections beside the U-Net's transformers are convolutions in SD 1.x,
linear in SD 2.x. SD 1.x has 8 heads everywhere and CLIP's ViT-L (quick_gelu, padded with end-of-text), SD 2.x heads of
64 channels and OpenCLIP's ViT-H (gelu, padded with 0). What the U-Net predicts is no shape: metadata
(``modelspec.*``) or a tensor ``v_pred`` may state it, else the user does.
"""

import re
import warnings
from dataclasses import replace
from typing import NamedTuple

from minildm.checkpoint.recognise import other_input_channels, refuse_other_models
from minildm.checkpoint.statements import (
    stated_pixels,
    stated_prediction,
    stated_schedule,
    warn_of_added_tokens,
    warn_of_clip_skip,
)
from minildm.checkpoint.tensors import Source
from minildm.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError

MAX_BLOCKS = 256  # of one kind; SD has 24 at most
VIT_L, VIT_H = 768, 1024  # widths of the text encoders of SD 1.x and SD 2.x


# --- sizes -----------------------------------------------------------------------------------------------------------
def read_config(file, prediction=None):
    """The ModelConfig of a TensorFile. ``prediction``: "epsilon" or "v" if the user says so, else None.

    Raises InputError if the file holds another kind of model, or only a part of one.
    """
    refuse_other_models(file)
    stated = stated_prediction(file) if prediction is None else prediction
    unet = _unet_config(file)
    v2 = unet.linear_projection
    if v2 and stated is None:
        warnings.warn(
            "an SD v2 single file does not say what the U-Net predicts; assuming epsilon and 512 px. The 768 px models "
            'need prediction="v" (--prediction v)',
            stacklevel=5,
        )
    text_encoder = _text_encoder_config(file, v2)
    warn_of_clip_skip(file)
    warn_of_added_tokens(file.path, text_encoder)
    if pixels := stated_pixels(file):
        unet = replace(unet, latent_size=pixels // 8)
    elif v2 and stated == "v":  # the v2.x models that predict v are those for 768 px
        unet = replace(unet, latent_size=96)
    return ModelConfig(
        unet,
        _vae_config(file),
        text_encoder,
        stated_schedule(file, stated or "epsilon"),
        pad_token_id=0 if v2 else 49407,
    )


def _unet_config(file):
    unet, names = "model.diffusion_model", file.shapes
    if (channels := _size(file, f"{unet}.input_blocks.0.0.weight", axis=1)) != 4:
        raise InputError(f"{file.path}: {other_input_channels(channels)}")
    # input_blocks are numbered through all levels: a convolution, then for each level n_blocks blocks and (except for
    # the last level) a downsampler.
    n_input_blocks = _count(file, rf"{unet}\.input_blocks\.(\d+)\.")
    downsamplers = [
        i for i in range(n_input_blocks) if any(name.startswith(f"{unet}.input_blocks.{i}.0.op.") for name in names)
    ]
    n_blocks = (downsamplers[0] if downsamplers else n_input_blocks) - 1
    first_blocks = [1 + level * (n_blocks + 1) for level in range(len(downsamplers) + 1)]  # of each level
    widths = tuple(_size(file, f"{unet}.input_blocks.{i}.0.out_layers.0.weight") for i in first_blocks)
    cross = next((name for name in names if name.startswith(unet) and name.endswith("attn2.to_k.weight")), None)
    if cross is None:
        raise InputError(f"{file.path}: no cross-attention in the U-Net; it is not a text-to-image model")
    linear = len(_shape(file, f"{cross.split('.transformer_blocks')[0]}.proj_in.weight")) == 2
    return UNetConfig(
        widths=widths,
        attention=tuple(any(name.startswith(f"{unet}.input_blocks.{i}.1.") for name in names) for i in first_blocks),
        layers_per_block=n_blocks,
        n_heads=tuple(max(width // 64, 1) for width in widths) if linear else (8,) * len(widths),
        context_dim=_size(file, cross, axis=1),
        linear_projection=linear,
    )


def _vae_config(file):
    vae = "first_stage_model.encoder.down"
    n_levels = _count(file, rf"{re.escape(vae)}\.(\d+)\.")
    return VAEConfig(
        widths=tuple(_size(file, f"{vae}.{level}.block.0.conv2.weight") for level in range(n_levels)),
        layers_per_block=_count(file, rf"{re.escape(vae)}\.0\.block\.(\d+)\."),
    )


def _text_encoder_config(file, v2):
    text = _text_names(file)
    if text.open_clip:
        blocks, table, mlp, last = "transformer.resblocks", "token_embedding", "mlp.c_fc", "ln_final"
    else:
        blocks, table, mlp, last = "encoder.layers", "embeddings.token_embedding", "mlp.fc1", "final_layer_norm"
    width = _size(file, f"{text.prefix}.{last}.weight")
    if width == (VIT_L if v2 else VIT_H) or (text.open_clip and not v2):
        raise InputError(
            f"{file.path} has the U-Net of SD v{2 if v2 else 1}.x with a text encoder of width {width} under "
            f"{'OpenCLIP' if text.open_clip else 'transformers'}' names, that of another model; use the original file"
        )
    n_layers = _count(file, rf"{re.escape(f'{text.prefix}.{blocks}')}\.(\d+)\.")
    # SD 2.x does not use the last of its 24 layers. Published files hold it; those converted from a folder do not.
    # Other sizes: files with an output projection are whole text encoders.
    whole = n_layers == 24 or (n_layers != 23 and f"{text.prefix}.text_projection" in file.shapes)
    return TextEncoderConfig(
        width,
        n_layers - (v2 and whole),
        max(width // 64, 1),
        _size(file, f"{text.prefix}.{blocks}.0.{mlp}.weight"),
        "gelu" if v2 else "quick_gelu",
        _size(file, f"{text.prefix}.{table}.weight"),
    )


class TextNames(NamedTuple):
    """How a file names its text encoder: what stands before the names, and whether they are OpenCLIP's."""

    prefix: str
    open_clip: bool


def _text_names(file):
    for root in ("cond_stage_model", "conditioner.embedders.0"):
        for part, open_clip in (("model", True), ("transformer.text_model", False), ("transformer", False)):
            if any(name.startswith(f"{root}.{part}.") for name in file.shapes):
                return TextNames(f"{root}.{part}", open_clip)
    raise InputError(f"{file.path}: its cond_stage_model.* is not CLIP's text encoder; it is another kind of model")


def _shape(file, name):
    if name not in file.shapes:
        raise InputError(f"{file.path}: tensor {name} is missing; the file is not a whole Stable Diffusion model")
    return file.shapes[name]


def _size(file, name, axis=0):
    shape = _shape(file, name)
    if len(shape) <= axis:
        raise InputError(
            f"{file.path}: tensor {name} has the shape {shape}; the file is damaged or not a Stable Diffusion model"
        )
    return shape[axis]


def _count(file, pattern):
    """How many numbers, from 0 on, the pattern's group matches in the names."""
    found = {int(match[1]) for name in file.shapes if (match := re.match(pattern, name)) and len(match[1]) < 10}
    missing = sorted(set(range(len(found))) - found)
    if missing or len(found) > MAX_BLOCKS:
        what = f"leave out number {missing[0]} but have {max(found)}" if missing else f"have {len(found):,} numbers"
        raise InputError(
            f"{file.path}: names like {pattern.replace(chr(92), '')} {what}; the file is damaged or not a Stable "
            "Diffusion model"
        )
    return len(found)


# --- names -----------------------------------------------------------------------------------------------------------
RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = [
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    (".resnets.", ".block."),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("down_blocks", "down"),
    ("up_blocks", "up"),
]
OPEN_CLIP_PARTS = [
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
]


def find_tensors(file, config, networks):
    """Where a TensorFile holds each parameter of ``networks``.

    Returns: ({network: {parameter: Source}}, tensors that nobody needs and published files do not have).
    """
    text = _text_names(file)
    sources = {
        network: {
            parameter: Source(file, _present_name(file, name), third) for parameter, (name, third) in table.items()
        }
        for network, table in names(config, networks, text).items()
    }
    used = {source.name for table in sources.values() for source in table.values()}
    return sources, [name for name in file.shapes if name not in used and not is_known_extra(name, config, text)]


def _present_name(file, name):
    """``name``, or the one by which converters keep the attention of the VAE if the file has that instead."""
    if name not in file.shapes and ".mid.attn_1." in name:
        part, tensor = name.rsplit(".", 2)[1:]
        for other in {"q": ("to_q", "query"), "k": ("to_k", "key"), "v": ("to_v", "value"), "norm": ("group_norm",),
                      "proj_out": ("to_out.0", "proj_attn")}.get(part, ()):  # fmt: skip
            if (present := name.replace(f".{part}.{tensor}", f".{other}.{tensor}")) in file.shapes:
                return present
    return name


def names(config, networks, text=None):
    """{network: {our parameter name: (single-file name, None or which third of that tensor)}}.

    Args: text: the TextNames of a file; None = those of published files.
    """
    ours = {network: module.state_dict() for network, module in networks.items()}
    if text is None:
        v2 = config.text_encoder.activation == "gelu"
        text = TextNames("cond_stage_model.model" if v2 else "cond_stage_model.transformer.text_model", v2)
    modules = unet_modules(config.unet)
    return {
        "unet": {name: (_unet_name(name, modules), None) for name in ours["unet"]},
        "vae": {name: (vae_name(name, config.vae), None) for name in ours["vae"]},
        "text_encoder": {name: _text_name(name, text) for name in ours["text_encoder"]},
    }


def unet_modules(config):
    """Our module -> the single file's, which numbers the blocks of all levels consecutively."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    n, levels = config.layers_per_block, len(config.widths)
    for level in range(levels):
        down, up = 1 + level * (n + 1), level * (n + 1)
        for i in range(n):
            table[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{down + i}.0"
            table[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{down + i}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{down + n}.0.op"
        for i in range(n + 1):
            table[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{up + i}.0"
            table[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{up + i}.1"
        position = 2 if config.attention[levels - 1 - level] else 1  # after the resnet and any attention
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{up + n}.{position}.conv"
    return table


def _unet_name(name, modules):
    ours = next(module for module in modules if name.startswith(f"{module}."))
    rest = name[len(ours) + 1 :]
    if "resnets" in ours:
        part, tensor = rest.rsplit(".", 1)
        rest = f"{RESNET_PARTS[part]}.{tensor}"
    return f"model.diffusion_model.{modules[ours]}.{rest}"


def vae_name(name, config):
    if match := re.match(r"decoder\.up_blocks\.(\d+)", name):  # the single file numbers the decoder's levels backwards
        level = len(config.widths) - 1 - int(match[1])
        name = f"decoder.up_blocks.{level}{name[match.end() :]}"
    for ours, theirs in VAE_PARTS:
        name = name.replace(ours, theirs)
    return f"first_stage_model.{name}"


def _text_name(name, text):
    if not text.open_clip:
        return f"{text.prefix}.{name.removeprefix('text_model.')}", None
    third = None
    for i, projection in enumerate(("q_proj.", "k_proj.", "v_proj.")):
        if f"self_attn.{projection}" in name:
            name, third = name.replace(projection, "in_proj_"), i
    for ours, theirs in OPEN_CLIP_PARTS:
        name = name.replace(ours, theirs)
    return f"{text.prefix}.{name}", third


# What CompVis' code registers; each follows from the betas.
SCHEDULE_TABLES = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar scale_factor
""".split()  # noqa: SIM905


def is_known_extra(name, config, text):
    """Whether published files carry a tensor that the networks do not need: training's moving average (the main weights
    of an "ema-only" file are that average already), schedule tables, a safety checker, the unused end of the text
    encoder."""
    last = f"{text.prefix}.{'transformer.resblocks' if text.open_clip else 'encoder.layers'}"
    root = text.prefix.partition(".model")[0].partition(".transformer")[0]
    ends = (".logit_scale", ".text_projection", ".text_projection.weight", ".attn_mask", ".position_ids")
    return (
        name.startswith(
            ("model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "denoiser.", "safety_checker.")
        )
        or name.startswith(f"{last}.{config.text_encoder.n_layers}.")
        or (name.startswith(f"{root}.") and name.endswith(ends))
        or name in (*SCHEDULE_TABLES, "v_pred", "ztsnr")
    )
