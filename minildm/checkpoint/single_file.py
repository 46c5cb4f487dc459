"""Single-file checkpoints (CompVis, Stability): what their tensors are called, and what sizes their shapes tell.

``model.diffusion_model.*`` is the U-Net, ``first_stage_model.*`` the VAE, ``cond_stage_model.*`` the text encoder:
CLIP in transformers' names (SD 1.x) or OpenCLIP in its own, with q, k and v fused into one tensor (SD 2.x).
"""

import re

from minildm import config as settings
from minildm.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError


def read_config(file):
    """Read the networks' sizes off the shapes of a single file's tensors."""
    shapes = file.shapes

    def shape(name):
        if name not in shapes:
            raise InputError(f"{file.path}: tensor {name} is missing; the file is not a whole Stable Diffusion model")
        return shapes[name]

    def size(name, axis=0):
        if len(shape(name)) <= axis:
            raise InputError(
                f"{file.path}: tensor {name} has the shape {shapes[name]}; the file is damaged or not a "
                "Stable Diffusion model"
            )
        return shapes[name][axis]

    def count(pattern):
        """1 + the largest number where the pattern has its group."""
        return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)

    unet = "model.diffusion_model"
    if (channels := size(f"{unet}.input_blocks.0.0.weight", axis=1)) != 4:
        raise InputError(f"{file.path}: {settings.other_inputs(channels)}")
    # Walk down: every level is n_blocks blocks and, but for the last level, one strided convolution.
    blocks = count(rf"{unet}\.input_blocks\.(\d+)\.")
    downs = [i for i in range(blocks) if any(name.startswith(f"{unet}.input_blocks.{i}.0.op.") for name in shapes)]
    n_blocks = (downs[0] if downs else blocks) - 1
    firsts = [1 + level * (n_blocks + 1) for level in range(len(downs) + 1)]
    widths = tuple(size(f"{unet}.input_blocks.{i}.0.out_layers.0.weight") for i in firsts)
    attention = tuple(any(name.startswith(f"{unet}.input_blocks.{i}.1.") for name in shapes) for i in firsts)
    context = next((n for n in shapes if n.startswith(unet) and n.endswith("attn2.to_k.weight")), None)
    if context is None:
        raise InputError(f"{file.path}: no cross-attention in the U-Net; it is not a text-to-image model")
    linear = len(shape(f"{context.split('.transformer_blocks')[0]}.proj_in.weight")) == 2

    v2 = any(name.startswith("cond_stage_model.model.") for name in shapes)
    if v2:
        text = "cond_stage_model.model"
        width, mlp = size(f"{text}.ln_final.weight"), size(f"{text}.transformer.resblocks.0.mlp.c_fc.weight")
        n_layers = count(rf"{text}\.transformer\.resblocks\.(\d+)\.")
        if f"{text}.text_projection" in shapes or n_layers == 24:  # a whole text tower, whose last layer is not used;
            n_layers -= 1  # files converted from a folder hold only what is used
        vocabulary = size(f"{text}.token_embedding.weight")
    else:
        text = "cond_stage_model.transformer.text_model"
        text = text if any(name.startswith(f"{text}.") for name in shapes) else "cond_stage_model.transformer"
        width, mlp = size(f"{text}.final_layer_norm.weight"), size(f"{text}.encoder.layers.0.mlp.fc1.weight")
        n_layers = count(rf"{re.escape(text)}\.encoder\.layers\.(\d+)\.")
        vocabulary = size(f"{text}.embeddings.token_embedding.weight")

    vae = "first_stage_model"
    levels = count(rf"{vae}\.encoder\.down\.(\d+)\.")
    vae_widths = tuple(size(f"{vae}.encoder.down.{i}.block.0.conv2.weight") for i in range(levels))
    return ModelConfig(
        unet=UNetConfig(
            widths=widths,
            attention=attention,
            layers_per_block=n_blocks,
            n_heads=tuple(max(w // 64, 1) for w in widths) if v2 else (8,) * len(widths),
            context_dim=size(context, axis=1),
            linear_projection=linear,
        ),
        vae=VAEConfig(widths=vae_widths, layers_per_block=count(rf"{vae}\.encoder\.down\.0\.block\.(\d+)\.")),
        text_encoder=TextEncoderConfig(
            width=width,
            n_layers=n_layers,
            n_heads=max(width // 64, 1),
            mlp_width=mlp,
            activation="gelu" if v2 else "quick_gelu",
            vocabulary=vocabulary,
        ),
        pad_token_id=0 if v2 else 49407,
    )


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


def names(config, networks):
    """{network: {our parameter name: (single-file name, None or which third of it)}} for a model's networks."""
    ours = {network: module.state_dict() for network, module in networks.items()}
    v2 = config.text_encoder.activation == "gelu"
    unet_modules = _unet_modules(config.unet)
    return {
        "unet": {name: (_unet_name(name, unet_modules), None) for name in ours["unet"]},
        "vae": {name: (_vae_name(name, config.vae), None) for name in ours["vae"]},
        "text_encoder": {
            name: _open_clip_name(name) if v2 else (f"cond_stage_model.transformer.{name}", None)
            for name in ours["text_encoder"]
        },
    }


def _unet_modules(config):
    """Our block -> the single file's, which numbers all blocks of the way down (and up) in one row."""
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
        position = 2 if config.attention[levels - 1 - level] else 1  # after the resnet and the attention, if any
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{up + n}.{position}.conv"
    return table


def _unet_name(name, modules):
    ours = next(module for module in modules if name.startswith(f"{module}."))
    rest = name[len(ours) + 1 :]
    if "resnets" in ours:
        part, tensor = rest.rsplit(".", 1)
        rest = f"{RESNET_PARTS[part]}.{tensor}"
    return f"model.diffusion_model.{modules[ours]}.{rest}"


def _vae_name(name, config):
    if match := re.match(r"decoder\.up_blocks\.(\d+)", name):  # the single file counts the decoder's levels backwards
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
    """Tensors that published single files carry and that no network here reads: training's moving average (the main
    weights of "ema-only" files already are the average), schedule tables, and the unused ends of the text encoders."""
    last_block = f"cond_stage_model.model.transformer.resblocks.{config.text_encoder.n_layers}."  # of a whole tower
    return (
        name.startswith(("model_ema.", "first_stage_model.loss.", last_block))
        or name.endswith("position_ids")
        or name
        in (
            "cond_stage_model.model.logit_scale",
            "cond_stage_model.model.text_projection",
            "cond_stage_model.model.attn_mask",
        )
        or "." not in name
    )  # betas, alphas_cumprod, sqrt_..., posterior_..., lvlb_weights, logvar, scale_factor
