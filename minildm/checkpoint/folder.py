"""The diffusers layout: a folder with unet/, vae/, text_encoder/ and scheduler/.

Each network has a config.json and one file of tensors. Tensors have our parameter names, so they load without a table,
with two exceptions: older files name the VAE's attention otherwise, and newer tools drop the prefix ``text_model.``.
"""

import json
from pathlib import Path

import torch

from minildm.checkpoint.single_file import other_input_channels
from minildm.checkpoint.tensors import Source, TensorFile
from minildm.checkpoint.writing import module_tensors, write_tensors
from minildm.config import MAX_TOKENS, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError
from minildm.files import written_beside


# --- reading ---------------------------------------------------------------------------------------------------------
def read_config(path):
    """The ModelConfig of the folder ``path``. Raises InputError or FileNotFoundError, naming the file."""
    if missing := [f"{name}/" for name in ("unet", "vae", "text_encoder") if not (path / name).is_dir()]:
        raise InputError(
            f"{path} is not a diffusers-layout model: it has no {', '.join(missing)}; "
            "expected unet/, vae/, text_encoder/ and scheduler/"
        )
    text_encoder = _read_settings(path / "text_encoder" / "config.json", text_encoder_from_json)
    return ModelConfig(
        unet=_read_settings(path / "unet" / "config.json", unet_from_json),
        vae=read_vae_config(path / "vae" / "config.json"),
        text_encoder=text_encoder,
        schedule=_read_settings(path / "scheduler" / "scheduler_config.json", schedule_from_json),
        pad_token_id=_pad_token_id(path / "tokenizer", text_encoder),
    )


def read_vae_config(path):
    """The VAEConfig of a config.json. Raises InputError or FileNotFoundError, naming the file."""
    return _read_settings(path, vae_from_json)


def find_tensors(path, networks):
    """Where the folder holds each parameter of ``networks``.

    Returns: ({network: {parameter: Source}}, tensors that are no parameter, the U-Net's file).
    """
    sources, unused, files = {}, [], {}
    for network, module in networks.items():
        files[network] = file = TensorFile(weights_file(path / network))
        expected = module.state_dict()
        sources[network] = {}
        for name in file.shapes:
            parameter = current_name(name, network)
            if parameter in expected:
                sources[network][parameter] = Source(file, name)
            elif not name.endswith("position_ids"):
                unused.append(f"{network}/{name}")
    return sources, unused, files["unet"].path


def weights_file(folder):
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    pickle_stem = "pytorch_model" if folder.name == "text_encoder" else stem
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{pickle_stem}.bin", f"{pickle_stem}.fp16.bin"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no weights in {folder}; expected one of {', '.join(names)}")


def current_name(name, network):
    """The present name of a tensor in a file of any age."""
    if network == "text_encoder" and not name.startswith("text_model."):
        return f"text_model.{name}"
    if network == "vae":
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    return name


def _pad_token_id(tokenizer_folder, text_encoder):
    """SD 1.x pads with end-of-text, SD 2.x with "!", whose id is 0. Without a tokenizer/ the activation tells which."""
    file = tokenizer_folder / "special_tokens_map.json"
    if file.is_file():
        token = _read_json(file).get("pad_token", "<|endoftext|>")
        token = token["content"] if isinstance(token, dict) else token
        known = {"<|endoftext|>": 49407, "!": 0}
        if token not in known:
            raise InputError(f"{file}: pad_token is {token!r}, expected one of {', '.join(map(repr, known))}")
        return known[token]
    return 49407 if text_encoder.activation == "quick_gelu" else 0


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a diffusers-layout folder needs it")
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); get it again") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}, expected a JSON object; get it again")
    return document


def _read_settings(path, from_json):
    """Apply ``from_json``, which checks neither keys nor types, to the file; errors name the file."""
    document = _read_json(path)
    try:
        return from_json(document)
    except KeyError as error:
        raise InputError(f"{path} has no {error}, which every published one has; get it again") from None
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path} holds a value of the wrong kind ({error}); get it again") from None


# --- writing ---------------------------------------------------------------------------------------------------------
def save_folder(networks, config, path, dtype=torch.float16):
    """Write a diffusers-layout folder: networks {"unet": module, ...} and their ModelConfig, tensors as ``dtype``.

    The tokenizer's vocabulary is not written: all models share CLIP's. Raises InputError if an adapter is live.
    """
    if any("lora_" in name for module in networks.values() for name, _ in module.named_parameters()):
        raise InputError("the model has a live adapter; merge_adapter(model) before saving it as a base")
    write_folder({name: module_tensors(module, dtype) for name, module in networks.items()}, config, path)


def write_folder(tensors, config, path):
    """Write a diffusers-layout folder from {network: {parameter: LazyTensor}} and a ModelConfig."""
    path = Path(path)
    to_json = {"unet": unet_to_json, "vae": vae_to_json, "text_encoder": text_encoder_to_json}
    documents = {
        "scheduler/scheduler_config.json": schedule_to_json(config.schedule),
        "tokenizer/special_tokens_map.json": {"pad_token": "!" if config.pad_token_id == 0 else "<|endoftext|>"},
    }
    for network in tensors:
        documents[f"{network}/config.json"] = to_json[network](getattr(config, network))
        name = "model.safetensors" if network == "text_encoder" else "diffusion_pytorch_model.safetensors"
        (path / network).mkdir(parents=True, exist_ok=True)
        write_tensors(tensors[network], path / network / name)
    for name, document in documents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path / name) as beside:
            beside.write_text(json.dumps(document, indent=2) + "\n")


# --- config.json <-> dataclass ---------------------------------------------------------------------------------------
# Keys with one value in all of Stable Diffusion v1.x and v2.x, assumed where a file leaves them out. Any other value
# means another network.
UNET_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "encoder_hid_dim": None,
    "cross_attention_norm": None,
}
VAE_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
SCHEDULE_FIXED = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False, "trained_betas": None}


def unet_from_json(document):
    """UNetConfig of a ``unet/config.json`` (a dict). Raises InputError for features that SD 1.x / 2.x do not have."""
    _require_fixed(document, UNET_FIXED, "unet/config.json")
    channels = document.get("in_channels", 4)
    if document.get("out_channels", 4) != channels:
        raise InputError(other_input_channels(channels))
    widths = tuple(document["block_out_channels"])
    # Despite its name, `attention_head_dim` is the *number* of heads.
    n_heads = document.get("num_attention_heads")
    n_heads = document.get("attention_head_dim", 8) if n_heads is None else n_heads
    blocks = document.get("down_block_types", ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"])
    for block in blocks:
        if block not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            raise InputError(f"unet/config.json: block {block} is not part of Stable Diffusion v1.x / v2.x")
    return UNetConfig(
        widths=widths,
        attention=tuple(block == "CrossAttnDownBlock2D" for block in blocks),
        n_heads=(n_heads,) * len(widths) if isinstance(n_heads, int) else tuple(n_heads),
        layers_per_block=document.get("layers_per_block", 2),
        context_dim=document.get("cross_attention_dim", 768),
        linear_projection=document.get("use_linear_projection", False),
        norm_groups=document.get("norm_num_groups", 32),
        latent_channels=channels,
        latent_size=document.get("sample_size", 64),
    )


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


def vae_from_json(document):
    """VAEConfig of a ``vae/config.json`` (a dict)."""
    _require_fixed(document, VAE_FIXED, "vae/config.json")
    return VAEConfig(
        widths=tuple(document["block_out_channels"]),
        layers_per_block=document.get("layers_per_block", 1),
        latent_channels=document.get("latent_channels", 4),
        norm_groups=document.get("norm_num_groups", 32),
        scaling_factor=document.get("scaling_factor", 0.18215),  # missing in SD 1.4's file
    )


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


def text_encoder_from_json(document):
    """TextEncoderConfig of a transformers ``text_encoder/config.json`` (a dict)."""
    if document.get("max_position_embeddings", MAX_TOKENS) != MAX_TOKENS:
        raise InputError(
            f"text_encoder/config.json: {document['max_position_embeddings']} positions, expected {MAX_TOKENS}"
        )
    return TextEncoderConfig(
        width=document.get("hidden_size", 512),
        n_layers=document.get("num_hidden_layers", 12),
        n_heads=document.get("num_attention_heads", 8),
        mlp_width=document.get("intermediate_size", 2048),
        activation=document.get("hidden_act", "quick_gelu"),
        vocabulary=document.get("vocab_size", 49408),
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


def schedule_from_json(document):
    """ScheduleConfig of a ``scheduler/scheduler_config.json`` (a dict)."""
    _require_fixed(document, SCHEDULE_FIXED, "scheduler/scheduler_config.json")
    names = {"epsilon": "epsilon", "v_prediction": "v"}
    prediction = document.get("prediction_type", "epsilon")
    if prediction not in names:
        raise InputError(f"scheduler_config.json: prediction_type {prediction!r}, expected one of {', '.join(names)}")
    return ScheduleConfig(
        document.get("num_train_timesteps", 1000),
        document.get("beta_start", 0.00085),
        document.get("beta_end", 0.012),
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


def _require_fixed(document, fixed, file):
    for key, value in fixed.items():
        if key in document and document[key] != value:
            raise InputError(f"{file}: {key} is {document[key]!r}, but Stable Diffusion v1.x / v2.x has {value!r}")
