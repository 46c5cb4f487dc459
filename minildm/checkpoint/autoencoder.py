"""An autoencoder from a file or folder of its own, which takes the place of the one in a checkpoint.

- A file with our names, which are diffusers' (``encoder.down_blocks.0.resnets.0...``), or CompVis' names
  (``encoder.down.0.block.0...``), bare or after ``first_stage_model.``. A whole single-file checkpoint is such a file.
- A folder with config.json and ``diffusion_pytorch_model.safetensors`` or ``.bin``, or a pipeline folder with ``vae/``.

A folder's config.json states sizes and scaling factor. A file shows its sizes; groups of 32 channels and a factor of
0.18215, those of all published Stable Diffusion v1.x and v2.x autoencoders, are assumed. CompVis' training files also
hold the loss with its discriminator and a moving average, which are left out.
"""

import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from minildm.checkpoint import folder, single_file
from minildm.checkpoint.load import require_match
from minildm.checkpoint.tensors import Source, TensorFile
from minildm.config import VAEConfig
from minildm.errors import InputError
from minildm.vae import VAE

PREFIXES = ("first_stage_model.", "vae.", "")
SURPLUS = ("loss.", "model_ema.", "discriminator.")  # parts of CompVis' training files
SDXL_FACTOR = 0.13025


@dataclass
class Autoencoder:
    """What an autoencoder's file or folder holds, before any tensor is read."""

    path: Path  # as the user names it
    config: VAEConfig
    network: VAE  # on the meta device
    sources: dict[str, dict[str, Source]]  # {"vae": {parameter: source}}
    file: TensorFile
    stated: bool  # whether a config.json states sizes and scaling factor
    unused: list[str] = field(default_factory=list)  # none: `inspect` refuses them


def inspect(path):
    """Find the autoencoder's sizes, scaling factor and tensors at ``path``. Reads headers only.

    Raises: FileNotFoundError; InputError for anything but the autoencoder of Stable Diffusion v1.x / v2.x.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no such autoencoder: {path}; give a .safetensors or .ckpt file, or a folder with config.json and "
            "diffusion_pytorch_model.safetensors (weights/README.md names one)"
        )
    try:
        file, config = _open(path)
        prefix = _prefix(file)
        stated = config is not None
        config = config if stated else _config_from_shapes(file, prefix)
    except InputError as error:  # settings that make no network do not know which file they come from
        raise (error if str(path) in str(error) else InputError(f"{path}: {error}")) from None
    if config.latent_channels != 4:
        raise InputError(
            f"{path} has latents of {config.latent_channels} channels"
            f"{' (the autoencoder of SD 3 or Flux)' if config.latent_channels == 16 else ''}, Stable Diffusion v1.x / "
            "v2.x has 4; use another autoencoder"
        )
    with torch.device("meta"):
        network = VAE(config)
    sources, unused = _find_tensors(file, prefix, config, network)
    found = Autoencoder(path, config, network, {"vae": sources}, file, stated, unused)
    require_match(found, {"vae": network.state_dict()})
    return found


def replace_vae(checkpoint, path):
    """Let the Checkpoint take its autoencoder from ``path``. Raises as `inspect`."""
    found = inspect(path)
    factor = found.config.scaling_factor
    if factor == SDXL_FACTOR != checkpoint.config.vae.scaling_factor:
        warnings.warn(
            f"{path} states the scaling factor {factor} of SDXL's autoencoder, whose latents mean nothing to a U-Net "
            "of Stable Diffusion v1.x / v2.x unless it was trained with them",
            stacklevel=3,
        )
    if not found.stated and found.config != VAEConfig():
        warnings.warn(
            f"{path} has other sizes than Stable Diffusion's autoencoder and states neither its "
            "scaling factor nor its groups; assuming 0.18215 and 32; give its folder with config.json if it has one",
            stacklevel=3,
        )
    checkpoint.config = replace(checkpoint.config, vae=found.config)
    checkpoint.networks["vae"], checkpoint.sources["vae"] = found.network, found.sources["vae"]
    checkpoint.vae_path, checkpoint.vae_file = found.path, found.file.path


# --- layouts ---------------------------------------------------------------------------------------------------------
def _open(path):
    """(TensorFile, VAEConfig or None if nothing but the tensors tells the sizes)."""
    if path.is_dir():
        inner = path / "vae" if (path / "vae").is_dir() else path
        return TensorFile(folder.weights_file(inner)), folder.read_vae_config(inner / "config.json")
    beside = path.parent / "config.json"
    if path.name.startswith("diffusion_pytorch_model.") and beside.is_file():  # one of a folder's two files
        return TensorFile(path), folder.read_vae_config(beside)
    return TensorFile(path), None


def _prefix(file):
    """What stands before ``encoder.`` and ``decoder.`` in the names. Raises InputError if nothing does."""
    for prefix in PREFIXES:
        if all(f"{prefix}{part}.conv_in.weight" in file.shapes for part in ("encoder", "decoder")):
            return prefix
    first = ", ".join(sorted(file.shapes)[:3]) or "none"
    kind = "not an autoencoder of Stable Diffusion v1.x / v2.x"
    if any("lora_" in name or ".lora." in name for name in file.shapes):
        kind = "an adapter (LoRA), not an autoencoder"
    elif any(name.startswith(("down_blocks.0.", "model.diffusion_model.")) for name in file.shapes):
        kind = "a U-Net, not an autoencoder"
    raise InputError(
        f"{file.path} is {kind} (its tensors: {first}, ...); expected encoder.conv_in.* and decoder.conv_in.*, bare or "
        "after first_stage_model."
    )


def _config_from_shapes(file, prefix):
    """Sizes from either layout's names."""
    widths, layers = {}, set()
    pattern = re.compile(
        re.escape(prefix) + r"encoder\.(?:down|down_blocks)\.(\d{1,9})\.(?:block|resnets)\.(\d{1,9})\.conv2\.weight$"
    )
    for name, shape in file.shapes.items():
        if (match := pattern.match(name)) and len(shape) == 4:
            widths[int(match[1])] = shape[0]
            layers.add(int(match[2]))
    latents = file.shapes[f"{prefix}decoder.conv_in.weight"]
    if len(latents) != 4 or not widths:
        raise InputError(
            f"{file.path}: decoder.conv_in.weight has shape {latents}, and {len(widths)} levels of convolutions in "
            "encoder.down were found; expected 4 axes and 4 levels; it may be another network, or damaged"
        )
    return VAEConfig(tuple(widths[level] for level in sorted(widths)), 1 + max(layers), latents[1])


def _find_tensors(file, prefix, config, network):
    """({parameter: Source}, tensors of the autoencoder that no parameter takes)."""
    compvis = {
        single_file.vae_name(name, config).removeprefix("first_stage_model."): name for name in network.state_dict()
    }
    sources, unused = {}, []
    for name in file.shapes:
        bare = name.removeprefix(prefix)
        if not name.startswith(prefix) or bare.startswith(SURPLUS):
            continue
        parameter = compvis.get(_compvis_attention(bare), folder.current_name(bare, "vae"))
        if parameter in network.state_dict():
            sources[parameter] = Source(file, name)
        elif prefix or "." in bare:
            unused.append(name)
    return sources, unused


def _compvis_attention(name):
    """Some converters keep diffusers' names, of either age, for the attention within CompVis' ``mid.attn_1``."""
    for diffusers, compvis in (("to_out.0", "proj_out"), ("proj_attn", "proj_out"), ("query", "q"), ("key", "k"),
                               ("value", "v"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):  # fmt: skip
        name = name.replace(f"mid.attn_1.{diffusers}.", f"mid.attn_1.{compvis}.")
    return name.replace("mid.attn_1.group_norm.", "mid.attn_1.norm.")
