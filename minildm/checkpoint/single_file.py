"""The single-file layout of CompVis and Stability AI: names, sizes read off shapes, and which other models are refused.

``model.diffusion_model.*`` is the U-Net, ``first_stage_model.*`` the VAE, ``cond_stage_model.*`` the text encoder:
CLIP with transformers' names (SD 1.x), or OpenCLIP with its own names and q, k and v fused into one tensor (SD 2.x).

The tensors do not show the number of heads or the prediction type. SD 1.x has 8 heads everywhere, SD 2.x heads of 64
channels; v-prediction must be requested by the user.
"""

import re
import warnings
from dataclasses import replace

from minildm.checkpoint.tensors import Source
from minildm.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError


# --- sizes -----------------------------------------------------------------------------------------------------------
def read_config(file, prediction=None):
    """The ModelConfig of a TensorFile. ``prediction``: "epsilon" or "v" if the user says so, else None.

    Raises InputError if the file holds another kind of model, or only a part of one.
    """
    _refuse_other_models(file)
    config = ModelConfig(_unet_config(file), _vae_config(file), _text_encoder_config(file))
    prediction = stated_prediction(file) if prediction is None else prediction
    if prediction is not None:
        config = replace(config, schedule=replace(config.schedule, prediction=prediction))
    if not _is_open_clip(file):
        return config
    if prediction is None:
        warnings.warn(
            "an SD v2 single file does not say what the U-Net predicts; assuming epsilon and 512 px. The 768 px models "
            'need prediction="v" (--prediction v)',
            stacklevel=5,
        )
    if prediction == "v":  # the v2.x models that predict v are those for 768 px
        config = replace(config, unet=replace(config.unet, latent_size=96))
    return replace(config, pad_token_id=0)


def stated_prediction(file):
    """What the file's metadata says that the U-Net predicts, "epsilon" or "v"; None if nothing."""
    stated = file.metadata.get("modelspec.prediction_type")
    known = {None: None, "epsilon": "epsilon", "v": "v", "v_prediction": "v"}
    if stated not in known:
        raise InputError(f"{file.path}: modelspec.prediction_type is {stated!r}, expected epsilon or v")
    return known[stated]


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
    proj_in = _shape(file, f"{cross.split('.transformer_blocks')[0]}.proj_in.weight")
    return UNetConfig(
        widths=widths,
        attention=tuple(any(name.startswith(f"{unet}.input_blocks.{i}.1.") for name in names) for i in first_blocks),
        layers_per_block=n_blocks,
        n_heads=tuple(max(width // 64, 1) for width in widths) if _is_open_clip(file) else (8,) * len(widths),
        context_dim=_size(file, cross, axis=1),
        linear_projection=len(proj_in) == 2,
    )


def _vae_config(file):
    vae = "first_stage_model.encoder.down"
    n_levels = _count(file, rf"{re.escape(vae)}\.(\d+)\.")
    return VAEConfig(
        widths=tuple(_size(file, f"{vae}.{level}.block.0.conv2.weight") for level in range(n_levels)),
        layers_per_block=_count(file, rf"{re.escape(vae)}\.0\.block\.(\d+)\."),
    )


def _text_encoder_config(file):
    if _is_open_clip(file):
        text = "cond_stage_model.model"
        n_layers = _count(file, rf"{re.escape(text)}\.transformer\.resblocks\.(\d+)\.")
        # SD 2.x does not use the last layer. Published files hold it; those converted from a folder do not.
        if f"{text}.text_projection" in file.shapes or n_layers == 24:
            n_layers -= 1
        width = _size(file, f"{text}.ln_final.weight")
        mlp_width = _size(file, f"{text}.transformer.resblocks.0.mlp.c_fc.weight")
        vocabulary, activation = _size(file, f"{text}.token_embedding.weight"), "gelu"
    else:
        text = "cond_stage_model.transformer" + ("" if _lacks_prefix(file) else ".text_model")
        n_layers = _count(file, rf"{re.escape(text)}\.encoder\.layers\.(\d+)\.")
        width = _size(file, f"{text}.final_layer_norm.weight")
        mlp_width = _size(file, f"{text}.encoder.layers.0.mlp.fc1.weight")
        vocabulary, activation = _size(file, f"{text}.embeddings.token_embedding.weight"), "quick_gelu"
    return TextEncoderConfig(width, n_layers, max(width // 64, 1), mlp_width, activation, vocabulary)


def _is_open_clip(file):
    """Whether the text encoder is OpenCLIP's, which means SD 2.x."""
    return any(name.startswith("cond_stage_model.model.") for name in file.shapes)


def _lacks_prefix(file):
    """Whether the text encoder was saved by transformers 5, which leaves ``text_model.`` out of the names."""
    return not any(name.startswith("cond_stage_model.transformer.text_model.") for name in file.shapes)


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
    """1 + the largest number that the pattern's group matches in any name."""
    return 1 + max((int(match[1]) for name in file.shapes if (match := re.match(pattern, name))), default=-1)


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
    no_prefix = not _is_open_clip(file) and _lacks_prefix(file)
    sources = {
        network: {
            parameter: Source(file, name.replace("text_model.", "") if no_prefix else name, third)
            for parameter, (name, third) in table.items()
        }
        for network, table in names(config, networks).items()
    }
    used = {source.name for table in sources.values() for source in table.values()}
    return sources, [name for name in file.shapes if name not in used and not is_known_extra(name, config)]


def names(config, networks):
    """{network: {our parameter name: (single-file name, None or which third of that tensor)}}."""
    ours = {network: module.state_dict() for network, module in networks.items()}
    v2 = config.text_encoder.activation == "gelu"
    modules = unet_modules(config.unet)
    return {
        "unet": {name: (_unet_name(name, modules), None) for name in ours["unet"]},
        "vae": {name: (vae_name(name, config.vae), None) for name in ours["vae"]},
        "text_encoder": {
            name: _open_clip_name(name) if v2 else (f"cond_stage_model.transformer.{name}", None)
            for name in ours["text_encoder"]
        },
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


def _open_clip_name(name):
    third = None
    for i, projection in enumerate(("q_proj.", "k_proj.", "v_proj.")):
        if f"self_attn.{projection}" in name:
            name, third = name.replace(projection, "in_proj_"), i
    for ours, theirs in OPEN_CLIP_PARTS:
        name = name.replace(ours, theirs)
    return f"cond_stage_model.model.{name}", third


def is_known_extra(name, config):
    """Whether published files carry a tensor that the networks do not need: training's moving average (the main weights
    of an "ema-only" file are that average already), schedule tables, and the unused end of the text encoder."""
    last_block = f"cond_stage_model.model.transformer.resblocks.{config.text_encoder.n_layers}."
    unused_ends = [f"cond_stage_model.model.{end}" for end in ("logit_scale", "text_projection", "attn_mask")]
    return (
        name.startswith(("model_ema.", "first_stage_model.loss.", last_block))
        or name.endswith("position_ids")
        or name in unused_ends
        or "." not in name  # betas, alphas_cumprod, sqrt_..., posterior_..., lvlb_weights, logvar, scale_factor
    )


# --- other models ----------------------------------------------------------------------------------------------------
def _refuse_other_models(file):
    def has(part):
        return any(part in name for name in file.shapes)

    def refuse(kind, advice):
        raise InputError(f"{file.path} is {kind}, not a Stable Diffusion v1.x / v2.x model; {advice}")

    if has("lora_") or has("hada_") or has(".lora."):
        refuse("an adapter (LoRA)", "it changes a base model and cannot be used alone: give the base here")
    if has("conditioner.embedders."):
        refuse("an SDXL model (base or refiner)", "use a v1.x or v2.x checkpoint")
    if has("model.diffusion_model.joint_blocks") or has("double_blocks."):
        refuse("a diffusion transformer (SD 3, Flux)", "use a v1.x or v2.x checkpoint")
    if has("model.diffusion_model.input_blocks."):
        absent = [name for name in ("first_stage_model.", "cond_stage_model.") if not has(name)]
        if absent:
            refuse(f"a U-Net without {' and '.join(absent)}*", "use the file that holds all three networks")
        return
    if has("down_blocks.0.") and has("time_embedding."):
        refuse("the U-Net of a diffusers folder", "give the folder that holds unet/, vae/ and text_encoder/")
    if has("decoder.conv_in") or has("decoder.mid"):
        refuse("a VAE alone", "give the file or folder that holds all three networks")
    if has("text_model.encoder.layers"):
        refuse("a text encoder alone", "give the file or folder that holds all three networks")
    first = ", ".join(sorted(file.shapes)[:3]) or "none"
    refuse(
        f"something else (its tensors: {first}, ...)",
        "expected model.diffusion_model.*, first_stage_model.*, cond_stage_model.*",
    )


def other_input_channels(channels):
    """The error for a U-Net whose input does not have 4 channels: which model it is and what to use instead."""
    kind = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth-guided model", 7: "an upscaler"}
    return (
        f"the U-Net reads {channels} channels ({kind.get(channels, 'not a text-to-image model')}), expected 4; "
        "use the text-to-image checkpoint of the same release"
    )
