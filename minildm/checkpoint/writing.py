"""Writing safetensors files, and the single-file layout, one tensor at a time: they are never in memory together.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, the header as JSON ({name: dtype,
shape, offsets of the first and last byte}, ``__metadata__``), then the tensors' bytes without gaps.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minildm.checkpoint.single_file import names, read_config
from minildm.checkpoint.tensors import DTYPES, TensorFile
from minildm.config import UNetConfig
from minildm.errors import InputError
from minildm.files import written_beside

CODES = {dtype: code for code, dtype in DTYPES.items()}


class LazyTensor(NamedTuple):
    """A tensor that is made when it is written. ``read`` returns it, on any device, with this dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def n_bytes(self):
        return self.dtype.itemsize * math.prod(self.shape)


def module_tensors(module, dtype):
    """{name: LazyTensor} of a module's parameters, as ``dtype``."""
    return {
        name: LazyTensor(dtype, tuple(tensor.shape), lambda tensor=tensor: tensor.detach().to(dtype))
        for name, tensor in module.state_dict().items()
    }


def write_tensors(tensors, path, metadata=None):
    """Write {name: LazyTensor} as a safetensors file, whole or not at all.

    Args: metadata: {key: text}. Raises: InputError if the disk is too small, before anything is written.
    """
    path = Path(path)
    needed, free = sum(tensor.n_bytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"{path} takes {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free; make room, or write elsewhere"
        )
    ordered = sorted(
        tensors, key=lambda name: -tensors[name].dtype.itemsize
    )  # each tensor aligned to its numbers' size
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name in ordered:
        tensor, begin = tensors[name], end
        end += tensor.n_bytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            tensor = tensors[name].read().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == tensors[name][:2], name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


# --- single file -----------------------------------------------------------------------------------------------------
def save_single_file(networks, config, path, dtype=torch.float16):
    """Write all three networks as one .safetensors file. Raises as `write_single_file`."""
    write_single_file(
        {name: module_tensors(module, dtype) for name, module in networks.items()}, networks, config, path
    )


def write_single_file(tensors, networks, config, path, metadata=None):
    """Write {network: {parameter: LazyTensor}} as one .safetensors file.

    Its metadata says what the tensors cannot: ``modelspec.prediction_type`` and more (`modelspec`).

    Args:
        networks: of the config, for their parameters' names; may be on the meta device.
        metadata: {key: text} to add; None in place of a text leaves a key out.
    Raises: InputError for a model that a single file cannot express: readers take heads, groups, the VAE's scaling
        factor and the noise schedule from SD v1 or v2.
    """
    path = Path(path)
    about = modelspec(config, path.stem) | (metadata or {})
    about = {key: text for key, text in about.items() if text is not None}
    with written_beside(path) as beside:
        write_tensors(single_file_tensors(tensors, config, networks), beside, about)
        if not _reads_as(beside, config):
            raise InputError(
                f"{path}: a single file cannot express this model, only the sizes of SD v1.x and v2.x (8 heads, or 64 "
                "channels per head; 32 groups), their noise schedule and scaling factor 0.18215; keep the folder"
            )


def _reads_as(path, config):
    """Whether a reader of the single file takes it for a model of this config, apart from its image size."""
    try:
        read = read_config(TensorFile(path), config.schedule.prediction)
    except InputError:
        return False
    schedule = replace(read.schedule, prediction=config.schedule.prediction)
    return replace(read, unet=replace(read.unet, latent_size=config.unet.latent_size), schedule=schedule) == config


def single_file_tensors(tensors, config, networks):
    """{network: {parameter: LazyTensor}} -> {single-file name: LazyTensor}.

    q, k and v of an SD v2 text encoder become one tensor.
    """
    renamed, fused = {}, {}
    for network, table in names(config, networks).items():
        for ours, (theirs, third) in table.items():
            tensor = tensors[network][ours]
            if network == "vae" and "attentions.0.to_" in ours and len(tensor.shape) == 2:  # 1x1 convolutions there
                tensor = _as_convolution(tensor)
            if third is None:
                renamed[theirs] = tensor
            else:
                fused.setdefault(theirs, {})[third] = tensor
    return renamed | {theirs: _concatenated([parts[i] for i in range(3)]) for theirs, parts in fused.items()}


def _as_convolution(matrix):
    return LazyTensor(matrix.dtype, (*matrix.shape, 1, 1), lambda: matrix.read()[..., None, None])


def _concatenated(parts):
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyTensor(parts[0].dtype, shape, lambda: torch.cat([part.read() for part in parts]))


def modelspec(config, title):
    """Metadata by which other tools tell the model: github.com/Stability-AI/ModelSpec, version 1.0.0.

    The architecture is stated for Stable Diffusion's own sizes only.
    """
    prediction, pixels = config.schedule.prediction, config.image_size
    about = {
        "sai_model_spec": "1.0.0",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{pixels}x{pixels}",
        "prediction_type": prediction,
    }
    v2 = "stable-diffusion-v2-768-v" if prediction == "v" else "stable-diffusion-v2-512"
    if config.unet.widths == UNetConfig.widths:
        about["architecture"] = v2 if config.text_encoder.activation == "gelu" else "stable-diffusion-v1"
    return {f"modelspec.{key}": value for key, value in about.items()}
