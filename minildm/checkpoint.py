"""Stable Diffusion files <-> the networks' tensors.

Two layouts are in use, told apart by what is in them, never by their names:

- the *folder* of diffusers: unet/, vae/, text_encoder/ (each config.json + weights), scheduler/scheduler_config.json.
  Our parameter names are these files' own, so they load with no map (older files name the VAE's attention otherwise);
- the *single file* of CompVis and Stability: ``model.diffusion_model.*``, ``first_stage_model.*``,
  ``cond_stage_model.*``. `single_file_names` is the one table that translates. It says neither heads nor prediction
  type: v1 has 8 heads everywhere, v2 64 channels a head, and v-prediction must be named by the user.

Loading is strict (every missing, unused or misshapen tensor is named) and lean: the networks are built without memory
and every tensor goes from the memory-mapped file straight to its dtype and device.
"""

import contextlib
import json
import pickle
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minildm import config as settings
from minildm.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError
from minildm.files import written_beside
from minildm.text_encoder import TextEncoder
from minildm.unet import UNet
from minildm.vae import VAE

NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
CHUNK_BYTES = 64 << 20  # mapped pages count as memory until the file is closed: reopen it this often


class Source(NamedTuple):
    """Where a parameter's values are: a tensor of a file, or one third of it (OpenCLIP's fused q, k, v)."""
    file: "TensorFile"
    name: str
    third: int | None = None


@dataclass
class Checkpoint:
    """What a base consists of, before any tensor is read."""
    path: Path
    config: ModelConfig
    sources: dict[str, dict[str, Source]]  # network -> parameter name -> source
    hashed_file: Path  # the file whose SHA-256 stands for the whole
    unused: list[str] = field(default_factory=list)  # tensors nobody asked for: an error when loading


# --- files of tensors ------------------------------------------------------------------------------------------------
class TensorFile:
    """Names, shapes and (when asked) values of a safetensors file or a torch pickle."""

    def __init__(self, path):
        self.path = Path(path)
        self.shapes, self.pickled = {}, None
        with open(self.path, "rb") as file:
            head = file.read(9)
        if not head:
            raise InputError(f"{self.path} is empty (0 bytes); download it again")
        if head[8:] == b"{":
            self._read_safetensors_header()
        elif head[:2] == b"PK" or head[:1] == b"\x80":
            self.pickled = _read_pickle(self.path)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.pickled.items()}
        else:
            raise InputError(f"{self.path} is neither a safetensors file nor a torch checkpoint "
                             f"(it begins with {head[:8]!r})")

    def _read_safetensors_header(self):
        try:
            with safe_open(self.path, "pt") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{self.path} is not a whole safetensors file ({error}); its download was probably cut "
                             "short: get it again") from None

    def tensors(self, names):
        """Yield (name, tensor) for each name. Tensors may be views of the mapped file: convert and let go."""
        if self.pickled is not None:
            yield from ((name, self.pickled[name]) for name in names)
            return
        names, open_file, used = list(names), None, 0
        with contextlib.ExitStack() as stack:
            for name in names:
                if open_file is None or used > CHUNK_BYTES:
                    stack.close()
                    open_file, used = stack.enter_context(safe_open(self.path, "pt")), 0
                tensor = open_file.get_tensor(name)
                used += tensor.nbytes
                yield name, tensor
                del tensor


def _read_pickle(path):
    """Tensors of a .ckpt / .pt / .bin, by the loader that runs no code. {name: tensor}, memory-mapped."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL |global )([\w.]+)", str(error))
        raise InputError(f"{path} is a pickle that would run code when loaded"
                         f"{f' ({wanted[1]})' if wanted else ''}, which minildm refuses; use the .safetensors file of "
                         "the same release, or convert this one on a machine you can afford to lose") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read as a torch checkpoint ({str(error).splitlines()[0]}); it may be cut "
                         "short: get it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, expected a dictionary of tensors")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


# --- what is it? -----------------------------------------------------------------------------------------------------
def inspect(path, prediction=None):
    """Recognise the base at ``path`` (a single file or a folder) and plan its loading. Reads headers only.

    Args:
        prediction: "epsilon" or "v" where the user knows better than the files; None = what they say.
    Raises: FileNotFoundError; InputError if it is something else, naming what.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such base model: {path}; give a .safetensors file or a diffusers-layout folder "
                                "(weights/README.md lists the published ones)")
    checkpoint = _inspect_folder(path) if path.is_dir() else _inspect_single_file(path, prediction)
    if prediction is not None:
        schedule = replace(checkpoint.config.schedule, prediction=prediction)
        checkpoint.config = replace(checkpoint.config, schedule=schedule)
    return checkpoint


def _inspect_single_file(path, prediction):
    file = TensorFile(path)
    _refuse_other_models(file)
    config = _config_of_single_file(file)
    if prediction == "v" and config.text_encoder.activation == "gelu":
        config = replace(config, unet=replace(config.unet, latent_size=96))  # of v2.x, those that predict v draw 768 px
    names = single_file_names(config)
    sources = {network: {} for network in NETWORKS}
    used = set()
    bare = "cond_stage_model.transformer.embeddings.token_embedding.weight" in file.shapes  # no `text_model.` in it
    for network, table in names.items():
        for ours, (theirs, third) in table.items():
            theirs = theirs.replace("text_model.", "") if bare else theirs
            sources[network][ours] = Source(file, theirs, third)
            used.add(theirs)
    unused = [name for name in file.shapes if name not in used and not _is_known_extra(name, config)]
    return Checkpoint(path, config, sources, path, unused)


def _inspect_folder(path):
    missing = [name for name in NETWORKS if not (path / name).is_dir()]
    if missing:
        raise InputError(f"{path} is not a diffusers-layout model: no {', '.join(name + '/' for name in missing)} in "
                         "it; expected unet/, vae/, text_encoder/ and scheduler/")
    text_encoder = settings.text_encoder_from_json(_read_json(path / "text_encoder" / "config.json"))
    config = ModelConfig(
        unet=settings.unet_from_json(_read_json(path / "unet" / "config.json")),
        vae=settings.vae_from_json(_read_json(path / "vae" / "config.json")),
        text_encoder=text_encoder,
        schedule=settings.schedule_from_json(_read_json(path / "scheduler" / "scheduler_config.json")),
        pad_token_id=_pad_token_id(path / "tokenizer", text_encoder))
    sources, unused, files = {}, [], {}
    for network in NETWORKS:
        files[network] = file = TensorFile(_weights_file(path / network))
        with torch.device("meta"):
            expected = NETWORKS[network](getattr(config, network)).state_dict()
        sources[network] = {_modern_name(name, network): Source(file, name) for name in file.shapes
                            if not name.endswith("position_ids")}
        unused += [f"{network}/{sources[network].pop(name).name}" for name in list(sources[network])
                   if name not in expected]
    return Checkpoint(path, config, sources, files["unet"].path, unused)


def _weights_file(folder):
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    pickle_stem = "pytorch_model" if folder.name == "text_encoder" else stem
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{pickle_stem}.bin", f"{pickle_stem}.fp16.bin"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no weights in {folder}; expected one of {', '.join(names)}")


def _modern_name(name, network):
    """Today's name of a tensor in a diffusers-layout file: the VAE's attention was renamed, and newer tools drop the
    text encoder's prefix."""
    if network == "text_encoder" and not name.startswith("text_model."):
        return f"text_model.{name}"
    if network == "vae":
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    return name


def _pad_token_id(tokenizer_folder, text_encoder):
    """SD 1.x pads with end-of-text, SD 2.x with "!", whose id is 0. Without a tokenizer/ the activation tells them
    apart."""
    file = tokenizer_folder / "special_tokens_map.json"
    if file.is_file():
        token = _read_json(file).get("pad_token", "<|endoftext|>")
        token = token["content"] if isinstance(token, dict) else token
        known = {"<|endoftext|>": 49407, "!": 0}
        if token not in known:
            raise InputError(f"{file}: pad_token {token!r}, expected one of {', '.join(map(repr, known))}")
        return known[token]
    return 49407 if text_encoder.activation == "quick_gelu" else 0


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a diffusers-layout folder needs it")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None


def _refuse_other_models(file):
    shapes = file.shapes

    def has(part):
        return any(part in name for name in shapes)

    def refuse(what, do):
        raise InputError(f"{file.path} is {what}, not a Stable Diffusion v1.x / v2.x model; {do}")

    if has("lora_") or has("hada_") or has(".lora."):
        refuse("an adapter (LoRA)", "it changes a base model and cannot stand alone: give the base here")
    if has("conditioner.embedders."):
        refuse("an SDXL or SD 2.x refiner-family model", "use a v1.x or v2.x checkpoint")
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
    first = ", ".join(sorted(shapes)[:3]) or "none"
    refuse(f"something else (its tensors: {first}, ...)", "expected model.diffusion_model.*, first_stage_model.*, "
                                                          "cond_stage_model.*")


def _is_known_extra(name, config):
    """Tensors that published single files carry and that no network here reads: training's moving average (the main
    weights of "ema-only" files already are the average), schedule tables, and the unused ends of the text encoders."""
    last_block = f"cond_stage_model.model.transformer.resblocks.{config.text_encoder.n_layers}."
    return (name.startswith(("model_ema.", "first_stage_model.loss.", last_block))
            or name.endswith("position_ids")
            or name in ("cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection",
                        "cond_stage_model.model.attn_mask")
            or "." not in name)  # betas, alphas_cumprod, sqrt_..., posterior_..., lvlb_weights, logvar, scale_factor


# --- single file -----------------------------------------------------------------------------------------------------
def _config_of_single_file(file):
    """Read the networks' sizes off the shapes of a single file's tensors."""
    shapes = file.shapes

    def shape(name):
        if name not in shapes:
            raise InputError(f"{file.path}: tensor {name} is missing; the file is not a whole Stable Diffusion model")
        return shapes[name]

    def count(pattern):
        """1 + the largest number where the pattern has its group."""
        return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)

    unet = "model.diffusion_model"
    if shape(f"{unet}.input_blocks.0.0.weight")[1] != 4:
        raise InputError(f"{file.path}: " + settings.other_inputs(shape(f"{unet}.input_blocks.0.0.weight")[1]))
    # Walk down: every level is n_blocks blocks and, but for the last level, one strided convolution.
    blocks = count(rf"{unet}\.input_blocks\.(\d+)\.")
    downs = [i for i in range(blocks) if f"{unet}.input_blocks.{i}.0.op.weight" in shapes]
    n_blocks = (downs[0] if downs else blocks) - 1
    firsts = [1 + level * (n_blocks + 1) for level in range(len(downs) + 1)]
    widths = tuple(shape(f"{unet}.input_blocks.{i}.0.out_layers.0.weight")[0] for i in firsts)
    attention = tuple(f"{unet}.input_blocks.{i}.1.norm.weight" in shapes for i in firsts)
    context = next((n for n in shapes if n.startswith(unet) and n.endswith("attn2.to_k.weight")), None)
    if context is None:
        raise InputError(f"{file.path}: no cross-attention in the U-Net; it is not a text-to-image model")
    linear = len(shapes[f"{context.split('.transformer_blocks')[0]}.proj_in.weight"]) == 2

    v2 = "cond_stage_model.model.token_embedding.weight" in shapes
    if v2:
        text = "cond_stage_model.model"
        width, mlp = shape(f"{text}.ln_final.weight")[0], shape(f"{text}.transformer.resblocks.0.mlp.c_fc.weight")[0]
        n_layers = count(rf"{text}\.transformer\.resblocks\.(\d+)\.") - 1  # the last one's output is not used
        vocabulary = shape(f"{text}.token_embedding.weight")[0]
    else:
        text = "cond_stage_model.transformer.text_model"
        text = text if f"{text}.final_layer_norm.weight" in shapes else "cond_stage_model.transformer"
        width, mlp = shape(f"{text}.final_layer_norm.weight")[0], shape(f"{text}.encoder.layers.0.mlp.fc1.weight")[0]
        n_layers = count(rf"{re.escape(text)}\.encoder\.layers\.(\d+)\.")
        vocabulary = shape(f"{text}.embeddings.token_embedding.weight")[0]

    vae = "first_stage_model"
    levels = count(rf"{vae}\.encoder\.down\.(\d+)\.")
    vae_widths = tuple(shape(f"{vae}.encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels))
    return ModelConfig(
        unet=UNetConfig(widths=widths, attention=attention, layers_per_block=n_blocks,
                        n_heads=tuple(max(w // 64, 1) for w in widths) if v2 else (8,) * len(widths),
                        context_dim=shapes[context][1], linear_projection=linear),
        vae=VAEConfig(widths=vae_widths, layers_per_block=count(rf"{vae}\.encoder\.down\.0\.block\.(\d+)\.")),
        text_encoder=TextEncoderConfig(width=width, n_layers=n_layers, n_heads=max(width // 64, 1), mlp_width=mlp,
                                       activation="gelu" if v2 else "quick_gelu", vocabulary=vocabulary),
        pad_token_id=0 if v2 else 49407)


RESNET_PARTS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_PARTS = [("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
             ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"),
             ("to_k", "k"), ("to_v", "v"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
             (".resnets.", ".block."), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
             ("down_blocks", "down"), ("up_blocks", "up")]
OPEN_CLIP_PARTS = [("text_model.embeddings.token_embedding", "token_embedding"),
                   ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
                   ("text_model.final_layer_norm", "ln_final"), ("text_model.encoder.layers", "transformer.resblocks"),
                   ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn")]


def single_file_names(config):
    """{network: {our parameter name: (single-file name, None or which third of it)}} for a model of this config."""
    with torch.device("meta"):
        ours = {network: build(getattr(config, network)).state_dict() for network, build in NETWORKS.items()}
    v2 = config.text_encoder.activation == "gelu"
    unet_modules = _unet_modules(config.unet)
    return {"unet": {name: (_unet_name(name, unet_modules), None) for name in ours["unet"]},
            "vae": {name: (_vae_name(name, config.vae), None) for name in ours["vae"]},
            "text_encoder": {name: _open_clip_name(name) if v2 else (f"cond_stage_model.transformer.{name}", None)
                             for name in ours["text_encoder"]}}


def _unet_modules(config):
    """Our block -> the single file's, which numbers all blocks of the way down (and up) in one row."""
    table = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
             "time_embedding.linear_2": "time_embed.2", "mid_block.resnets.0": "middle_block.0",
             "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
             "conv_norm_out": "out.0", "conv_out": "out.2"}
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
    rest = name[len(ours) + 1:]
    if "resnets" in ours:
        part, tensor = rest.rsplit(".", 1)
        rest = f"{RESNET_PARTS[part]}.{tensor}"
    return f"model.diffusion_model.{modules[ours]}.{rest}"


def _vae_name(name, config):
    if match := re.match(r"decoder\.up_blocks\.(\d+)", name):  # the single file counts the decoder's levels backwards
        level = len(config.widths) - 1 - int(match[1])
        name = f"decoder.up_blocks.{level}{name[match.end():]}"
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


# --- loading and saving ----------------------------------------------------------------------------------------------
def load_networks(checkpoint, device, dtype):
    """Build the three networks and fill them: {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}, in eval mode.

    Raises InputError naming every tensor that is missing, unused or of another shape.
    """
    with torch.device("meta"):  # shapes only, no memory
        networks = {network: build(getattr(checkpoint.config, network)) for network, build in NETWORKS.items()}
    expected = {network: module.state_dict() for network, module in networks.items()}
    _require_match(checkpoint, expected)
    for network, module in networks.items():
        sources = checkpoint.sources[network]
        ours_of = {}
        for ours, source in sources.items():
            ours_of.setdefault(source.name, []).append(ours)
        state = {}
        for theirs, tensor in next(iter(sources.values())).file.tensors(ours_of):
            for ours in ours_of[theirs]:
                state[ours] = _converted(tensor, sources[ours].third, expected[network][ours].shape, device, dtype)
            del tensor
        module.load_state_dict(state, strict=True, assign=True)
        module.eval().requires_grad_(False)
    return networks


def _converted(tensor, third, shape, device, dtype):
    """The tensor in the wanted place, precision and layout: one copy, none of the file kept. 1x1 convolutions of the
    VAE's attention become matrices; other convolution kernels are stored channels-last, as feature maps are."""
    if third is not None:
        tensor = tensor.chunk(3)[third]
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return tensor.reshape(shape).to(device).to(dtype, copy=True, memory_format=layout)


def _require_match(checkpoint, expected):
    """Raise InputError unless every parameter has a tensor of its shape and every tensor has a parameter."""
    missing, misshapen = [], []
    for network, parameters in expected.items():
        for ours, parameter in parameters.items():
            source = checkpoint.sources[network].get(ours)
            if source is None or source.name not in source.file.shapes:
                missing.append(f"{network}/{ours}" if source is None else source.name)
                continue
            shape = source.file.shapes[source.name]
            if source.third is not None:
                shape = (shape[0] / 3, *shape[1:])
            if shape not in (wanted := tuple(parameter.shape), (*wanted, 1, 1)):
                misshapen.append(f"{source.name} {tuple(shape)} (expected {wanted})")
    problems = [f"{len(names)} {what}: {', '.join(names)}" for what, names in
                (("missing", missing), ("not used by the model", checkpoint.unused), ("of another shape", misshapen))
                if names]
    if problems:
        raise InputError(f"{checkpoint.path} does not fit the model it looks like; tensors {'; '.join(problems)}")


def save_folder(networks, config, path, dtype=torch.float16):
    """Write a diffusers-layout folder: networks {"unet": module, ...} and their ModelConfig, tensors as ``dtype``."""
    path = Path(path)
    to_json = {"unet": settings.unet_to_json, "vae": settings.vae_to_json,
               "text_encoder": settings.text_encoder_to_json}
    pad_token = "!" if config.pad_token_id == 0 else "<|endoftext|>"
    documents = {"scheduler/scheduler_config.json": settings.schedule_to_json(config.schedule),
                 "tokenizer/special_tokens_map.json": {"pad_token": pad_token}}
    for network, module in networks.items():
        documents[f"{network}/config.json"] = to_json[network](getattr(config, network))
        name = "model.safetensors" if network == "text_encoder" else "diffusion_pytorch_model.safetensors"
        state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
        (path / network).mkdir(parents=True, exist_ok=True)
        with written_beside(path / network / name) as beside:
            save_file(state, beside, metadata={"format": "pt"})
    for name, document in documents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path / name) as beside:
            beside.write_text(json.dumps(document, indent=2) + "\n")
