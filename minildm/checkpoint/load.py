"""From a checkpoint's path to its networks: which layout is it (`inspect`), then load the tensors (`load_networks`).

Two layouts are in use: a diffusers folder (folder.py) and a single file (single_file.py). File names are not evidence,
only contents are.

Loading is strict: every missing, surplus or misshapen tensor is named. It is also lean: the networks are built without
memory, and each tensor goes straight from the memory-mapped file to its dtype and device.
"""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from minildm.checkpoint import folder, single_file
from minildm.checkpoint.recognise import why_no_match
from minildm.checkpoint.tensors import Source, TensorFile
from minildm.config import ModelConfig
from minildm.errors import InputError
from minildm.text_encoder import TextEncoder
from minildm.unet import UNet
from minildm.vae import VAE

NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}


@dataclass
class Checkpoint:
    """What a checkpoint holds, before any tensor is read."""

    path: Path
    config: ModelConfig
    networks: dict[str, torch.nn.Module]  # unet, vae, text_encoder: built on the meta device, without memory
    sources: dict[str, dict[str, Source]]  # network -> parameter name -> source
    hashed_files: list[Path]  # whose SHA-256 identifies the checkpoint: those that hold the U-Net
    unused: list[str] = field(default_factory=list)  # tensors that fit no parameter: an error when loading
    vae_path: Path | None = None  # where its VAE comes from, if not from ``path`` (autoencoder.py)
    vae_file: Path | None = None  # the file whose SHA-256 identifies that VAE

    @property
    def title(self):
        """Which model this is, for messages."""
        return f"{self.path}" if self.vae_path is None else f"{self.path} with the autoencoder {self.vae_path}"


def inspect(path, prediction=None):
    """Detect the layout of the checkpoint at ``path`` and find its tensors. Reads headers only.

    Args:
        prediction: "epsilon" or "v", overriding what the files say; None = what they say.
    Raises: FileNotFoundError; InputError for anything but a Stable Diffusion v1.x / v2.x model, saying what it is.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no such base model: {path}; give a .safetensors file or a diffusers-layout folder "
            "(weights/README.md lists the published ones)"
        )
    try:
        if path.is_dir():
            return _inspect_folder(path, prediction)
        return _inspect_single_file(path, prediction)
    except InputError as error:  # settings that make no network do not know which file they come from
        raise (error if str(path) in str(error) else InputError(f"{path}: {error}")) from None


def _inspect_folder(path, prediction):
    config = folder.read_config(path)
    _warn_of_override(path, config.schedule.prediction, prediction)
    if prediction is not None:
        config = replace(config, schedule=replace(config.schedule, prediction=prediction))
    networks = build_networks(config)
    sources, unused, unet_files = folder.find_tensors(path, networks)
    return Checkpoint(path, config, networks, sources, unet_files, unused)


def _inspect_single_file(path, prediction):
    file = TensorFile(path)
    config = single_file.read_config(file, prediction)
    if prediction is not None:
        _warn_of_override(path, single_file.stated_prediction(file, strict=False), prediction)
    networks = build_networks(config)
    sources, unused = single_file.find_tensors(file, config, networks)
    return Checkpoint(path, config, networks, sources, [path], unused)


def _warn_of_override(path, stated, prediction):
    if None not in (stated, prediction) and stated != prediction:
        warnings.warn(
            f"--prediction {prediction} overrides {path}, which says that its U-Net predicts {stated}; unless that is "
            "wrong, images will be noise",
            stacklevel=4,
        )


def build_networks(config):
    """The three networks of a ModelConfig on the meta device: shapes and no memory."""
    with torch.device("meta"):
        return {network: build(getattr(config, network)) for network, build in NETWORKS.items()}


def load_networks(checkpoint, device, dtype, vae_dtype=None):
    """Load the checkpoint's networks: {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}, frozen, in eval mode.

    Args: vae_dtype: of the VAE; None = ``dtype``.
    Raises InputError if tensors are missing, unused or of another shape or type, naming three of each and their number.
    """
    expected = {network: module.state_dict() for network, module in checkpoint.networks.items()}
    require_match(checkpoint, expected)
    for network, module in checkpoint.networks.items():
        sources = checkpoint.sources[network]
        parameters_of = {}  # file -> tensor name -> parameters: three where q, k and v are fused
        for parameter, source in sources.items():
            parameters_of.setdefault(source.file, {}).setdefault(source.name, []).append(parameter)
        of_network = vae_dtype if network == "vae" and vae_dtype is not None else dtype
        state = {}
        for file, parameters in parameters_of.items():
            for name, tensor in file.tensors(parameters):
                for parameter in parameters[name]:
                    shape = expected[network][parameter].shape
                    state[parameter] = _converted(tensor, sources[parameter].third, shape, device, of_network)
                del tensor  # before the next one is read
        module.load_state_dict(state, strict=True, assign=True)
        module.eval().requires_grad_(False)
    return checkpoint.networks


def _converted(tensor, third, shape, device, dtype):
    """A copy with the given shape, device and dtype. Convolution kernels become channels-last, as feature maps are; the
    1x1 convolutions of a single file's VAE attention become matrices."""
    if third is not None:
        tensor = tensor.chunk(3)[third]
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return tensor.reshape(shape).to(device).to(dtype, copy=True, memory_format=layout)


def require_match(checkpoint, expected):
    """Raise InputError unless every parameter has a tensor of its shape and every tensor has a parameter.

    Args: checkpoint: a Checkpoint or Autoencoder; expected: {network: {parameter: tensor}}.
    """
    missing, misshapen, no_floats, made = [], [], [], {}
    for network, parameters in expected.items():
        for name, parameter in parameters.items():
            source = checkpoint.sources[network].get(name)
            if source is None or source.name not in source.file.shapes:
                missing.append(f"{network}/{name}" if source is None else source.name)
                if source is not None and source.name in source.file.made:
                    made[source.name] = source.file.made[source.name]
                continue
            shape, wanted = source.file.shapes[source.name], tuple(parameter.shape)
            stored_as = source.file.dtypes[source.name]
            if source.third is not None:
                wanted = (3 * wanted[0], *wanted[1:])
            if shape not in (wanted, (*wanted, 1, 1)):
                misshapen.append(f"{source.name} {shape} (expected {wanted})")
            if not isinstance(stored_as, torch.dtype) or not stored_as.is_floating_point:
                no_floats.append(f"{source.name} ({stored_as})")
    problems = [
        f"{len(names)} {problem}: {', '.join(list(names)[:3])}{', ...' * (len(names) > 3)}"
        for problem, names in (
            ("missing", dict.fromkeys(missing)),  # without repetition: q, k and v may share a tensor
            ("not used by the model", checkpoint.unused),
            ("of another shape", dict.fromkeys(misshapen)),
            ("stored as other than real numbers", dict.fromkeys(no_floats)),
            ("in a form that is not loaded", [f"{name} ({what})" for name, what in made.items()]),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{checkpoint.path}: its tensors do not match the networks; {'; '.join(problems)}"
            f"{why_no_match(set(missing), checkpoint.unused)}"
        )
