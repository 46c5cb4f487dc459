"""Stable Diffusion files <-> the networks' tensors.

Two layouts are in use, told apart by what is in them, never by their names:

- the *folder* of diffusers: unet/, vae/, text_encoder/ (each config.json + weights), scheduler/scheduler_config.json.
  Our parameter names are these files' own, so they load with no map (older files name the VAE's attention otherwise);
- the *single file* of CompVis and Stability: ``model.diffusion_model.*``, ``first_stage_model.*``,
  ``cond_stage_model.*``; `single_file.py` translates. It says neither heads nor prediction type: v1 has 8 heads
  everywhere, v2 64 channels a head, and v-prediction must be named by the user.

Loading is strict (every missing, unused or misshapen tensor is named) and lean: the networks are built without memory
and every tensor goes from the memory-mapped file straight to its dtype and device.
"""

import json
import math
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minildm import config as settings
from minildm.checkpoint import single_file
from minildm.config import ModelConfig
from minildm.errors import InputError
from minildm.files import written_beside
from minildm.text_encoder import TextEncoder
from minildm.unet import UNet
from minildm.vae import VAE

NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
CHUNK_BYTES = 16 << 20  # mapped pages count as memory until the file is closed: reopen it this often


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
    networks: dict[str, torch.nn.Module]  # unet, vae, text_encoder: built, but on the meta device, without memory
    sources: dict[str, dict[str, Source]]  # network -> parameter name -> source
    hashed_file: Path  # the file whose SHA-256 stands for the whole
    unused: list[str] = field(default_factory=list)  # tensors nobody asked for: an error when loading


# --- files of tensors ------------------------------------------------------------------------------------------------
class TensorFile:
    """Names, shapes and (when asked) values of a safetensors file or a torch pickle."""

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            head = file.read(9)
        if not head:
            raise InputError(f"{self.path} is empty (0 bytes); download it again")
        is_safetensors = head[8:] == b"{"  # after the header's length, whose first byte may be any
        self.pickled = not is_safetensors and (head[:2] == b"PK" or head[:1] == b"\x80")
        if is_safetensors:
            self.shapes = _read_safetensors_header(self.path)
        elif self.pickled:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in _read_pickle(self.path).items()}
        else:
            raise InputError(
                f"{self.path} is neither a safetensors file nor a torch checkpoint (it begins with {head[:8]!r})"
            )

    def tensors(self, names):
        """Yield (name, tensor) for each name. Tensors may be views of the mapped file: convert and let go."""
        limit = CHUNK_BYTES
        if self.pickled:  # unpickling takes 50 ms each time; where nothing is mapped, reading again would win nothing
            limit = 4 * CHUNK_BYTES if _is_mappable(self.path) else math.inf
        get, used = None, 0
        for name in names:
            if get is None or used > limit:
                get = None  # closes the file, before it is opened again
                get, used = self._open(), 0
            tensor = get(name)
            used += tensor.nbytes
            yield name, tensor
            del tensor

    def _open(self):
        """A function name -> tensor. The file is closed when this and its tensors are let go."""
        return _read_pickle(self.path).get if self.pickled else safe_open(self.path, "pt").get_tensor


def _read_safetensors_header(path):
    """{name: shape}."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); its download was probably cut short: get it again"
        ) from None


def _is_mappable(path):
    """Whether torch can map a pickle into memory: not those of torch < 1.6, and not under a name it mistakes."""
    return zipfile.is_zipfile(path) and path.suffix != ".safetensors"


def _read_pickle(path):
    """Tensors of a .ckpt / .pt / .bin, by the loader that runs no code. {name: tensor}, memory-mapped if it can be."""
    mapped = _is_mappable(path)
    try:
        with open(path, "rb") as file:
            state = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL |global )([\w.]+)", str(error))
        raise InputError(
            f"{path} is a pickle that would run code when loaded"
            f"{f' ({wanted[1]})' if wanted else ''}, which minildm refuses; use the .safetensors file of "
            "the same release, or convert this one on a machine you can afford to lose"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path} cannot be read as a torch checkpoint ({reason}); it may be cut short: get it again"
        ) from None
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
        raise FileNotFoundError(
            f"no such base model: {path}; give a .safetensors file or a diffusers-layout folder "
            "(weights/README.md lists the published ones)"
        )
    try:
        checkpoint = _inspect_folder(path) if path.is_dir() else _inspect_single_file(path, prediction)
    except InputError as error:  # of a config that makes no sense
        raise (error if str(path) in str(error) else InputError(f"{path}: {error}")) from None
    if prediction is not None:
        schedule = replace(checkpoint.config.schedule, prediction=prediction)
        checkpoint.config = replace(checkpoint.config, schedule=schedule)
    return checkpoint


def _inspect_single_file(path, prediction):
    file = TensorFile(path)
    _refuse_other_models(file)
    config = single_file.read_config(file)
    if prediction is None and config.text_encoder.activation == "gelu":
        warnings.warn(
            "an SD v2 single file cannot say what it predicts: taken as epsilon, 512 px; the 768 px models "
            'need prediction="v" (--prediction v)',
            stacklevel=4,
        )
    if prediction == "v" and config.text_encoder.activation == "gelu":
        config = replace(config, unet=replace(config.unet, latent_size=96))  # of v2.x, those that predict v draw 768 px
    networks = build_networks(config)
    names = single_file.names(config, networks)
    sources = {network: {} for network in NETWORKS}
    used = set()
    bare = "cond_stage_model.transformer.embeddings.token_embedding.weight" in file.shapes  # no `text_model.` in it
    for network, table in names.items():
        for ours, (theirs, third) in table.items():
            theirs = theirs.replace("text_model.", "") if bare else theirs
            sources[network][ours] = Source(file, theirs, third)
            used.add(theirs)
    unused = [name for name in file.shapes if name not in used and not single_file.is_known_extra(name, config)]
    return Checkpoint(path, config, networks, sources, path, unused)


def _inspect_folder(path):
    missing = [name for name in NETWORKS if not (path / name).is_dir()]
    if missing:
        raise InputError(
            f"{path} is not a diffusers-layout model: no {', '.join(name + '/' for name in missing)} in "
            "it; expected unet/, vae/, text_encoder/ and scheduler/"
        )
    text_encoder = _read_settings(path / "text_encoder" / "config.json", settings.text_encoder_from_json)
    config = ModelConfig(
        unet=_read_settings(path / "unet" / "config.json", settings.unet_from_json),
        vae=_read_settings(path / "vae" / "config.json", settings.vae_from_json),
        text_encoder=text_encoder,
        schedule=_read_settings(path / "scheduler" / "scheduler_config.json", settings.schedule_from_json),
        pad_token_id=_pad_token_id(path / "tokenizer", text_encoder),
    )
    networks, sources, unused, files = build_networks(config), {}, [], {}
    for network, module in networks.items():
        files[network] = file = TensorFile(_weights_file(path / network))
        expected = module.state_dict()
        sources[network] = {
            _modern_name(name, network): Source(file, name) for name in file.shapes if not name.endswith("position_ids")
        }
        unused += [
            f"{network}/{sources[network].pop(name).name}" for name in list(sources[network]) if name not in expected
        ]
    return Checkpoint(path, config, networks, sources, files["unet"].path, unused)


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
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); get it again") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}, expected a JSON object; get it again")
    return document


def _read_settings(path, from_json):
    """A network's settings by ``from_json``, which trusts the document to have the published keys and types."""
    document = _read_json(path)
    try:
        return from_json(document)
    except KeyError as error:
        raise InputError(f"{path} has no {error}, which every published one has; get it again") from None
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path} holds a value of the wrong kind ({error}); get it again") from None


def _refuse_other_models(file):
    shapes = file.shapes

    def has(part):
        return any(part in name for name in shapes)

    def refuse(what, do):
        raise InputError(f"{file.path} is {what}, not a Stable Diffusion v1.x / v2.x model; {do}")

    if has("lora_") or has("hada_") or has(".lora."):
        refuse("an adapter (LoRA)", "it changes a base model and cannot stand alone: give the base here")
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
    first = ", ".join(sorted(shapes)[:3]) or "none"
    refuse(
        f"something else (its tensors: {first}, ...)",
        "expected model.diffusion_model.*, first_stage_model.*, cond_stage_model.*",
    )


# --- loading and saving ----------------------------------------------------------------------------------------------
def build_networks(config):
    """The three networks of a ModelConfig on the meta device: shapes and no memory."""
    with torch.device("meta"):
        return {network: build(getattr(config, network)) for network, build in NETWORKS.items()}


def load_networks(checkpoint, device, dtype):
    """Fill the checkpoint's networks: {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}, frozen, in eval mode.

    Raises InputError naming every tensor that is missing, unused or of another shape.
    """
    expected = {network: module.state_dict() for network, module in checkpoint.networks.items()}
    _require_match(checkpoint, expected)
    for network, module in checkpoint.networks.items():
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
    return checkpoint.networks


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
            shape, wanted = source.file.shapes[source.name], tuple(parameter.shape)
            if source.third is not None:
                wanted = (3 * wanted[0], *wanted[1:])
            if shape not in (wanted, (*wanted, 1, 1)):
                misshapen.append(f"{source.name} {shape} (expected {wanted})")
    problems = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (  # each once: q, k, v share one
            ("missing", dict.fromkeys(missing)),
            ("not used by the model", checkpoint.unused),
            ("of another shape", dict.fromkeys(misshapen)),
        )
        if names
    ]
    if problems:
        raise InputError(f"{checkpoint.path} does not fit the model it looks like; tensors {'; '.join(problems)}")


def save_folder(networks, config, path, dtype=torch.float16):
    """Write a diffusers-layout folder: networks {"unet": module, ...} and their ModelConfig, tensors as ``dtype``.

    The tokenizer's vocabulary is not written: it is CLIP's, the same for all. Raises InputError if an adapter is live.
    """
    if any("lora_" in name for module in networks.values() for name, _ in module.named_parameters()):
        raise InputError("the model has a live adapter; merge_adapter(model) before saving it as a base")
    path = Path(path)
    to_json = {
        "unet": settings.unet_to_json,
        "vae": settings.vae_to_json,
        "text_encoder": settings.text_encoder_to_json,
    }
    pad_token = "!" if config.pad_token_id == 0 else "<|endoftext|>"
    documents = {
        "scheduler/scheduler_config.json": settings.schedule_to_json(config.schedule),
        "tokenizer/special_tokens_map.json": {"pad_token": pad_token},
    }
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
