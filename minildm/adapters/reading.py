"""Reading an adapter file of any dialect: its tensors, checked, and each layer's scale.

The dialect is told from what is in the file, never from its name. Nothing is guessed: each tensor must be known, each
layer needs both factors, all numbers must be finite. An adapter without any alpha has alpha = rank, so dW = B A, as
diffusers and kohya's readers take it, too. `recognize` and `stated_scales` need the header and the alphas only. Whether
an adapter fits a model is checked when it is merged (files.py).
"""

import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from minildm.adapters.formats import CLONEOFSIMO, NATIVE, TEXT_LAYERS, other_kind, other_model, read_name
from minildm.adapters.metadata import LOADABLE, native_metadata, origin, stated_json, stated_scales
from minildm.checkpoint import TensorFile
from minildm.errors import InputError

IN_FOLDERS = (  # what a folder's adapter may be called: ours, PEFT's, diffusers'
    "adapter.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)  # what an alpha may be, too
FAMILIES = {768: "Stable Diffusion v1.x", 1024: "Stable Diffusion v2.x", 2048: "SDXL"}  # by the width of the context


class Factors(NamedTuple):
    """A layer's change of the weights, dW = scale B A."""

    A: torch.Tensor  # (rank, in), or a convolution's (rank, in, kh, kw)
    B: torch.Tensor  # (out, rank), or (out, rank, 1, 1)
    scale: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds."""

    path: Path
    dialect: str  # whose names it has
    kind: str  # the method that trained it
    factors: dict[str, Factors]  # by module path
    about: dict  # what else the file says about itself


class Header(NamedTuple):
    """What an adapter file says before any factor is read."""

    dialect: str
    layers: dict[str, dict[str, str]]  # {module path: {"A": tensor's name, "B": ..., perhaps "alpha": ...}}
    about: dict


def adapter_file(path):
    """The adapter's file where ``path`` is a folder: a run, PEFT's or diffusers'; else ``path``."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path's, never fails: False for a name that is too long
        return path
    return next((path / name for name in IN_FOLDERS if (path / name).is_file()), path / IN_FOLDERS[0])


def read_adapter(path):
    """The Adapter in a file, or in a folder (see `adapter_file`). Factors have the file's own precision.

    Raises: FileNotFoundError; InputError for what is no whole adapter that minildm can load, saying what it is.
    """
    path = adapter_file(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such adapter: {path}; give PATH[@RANK][:MULTIPLIER] of a file or a run folder")
    file = TensorFile(path)
    dialect, layers, about = recognize(file)
    scales, _ = stated_scales(file, dialect, layers, about)
    names = {name: (layer, part) for layer, parts in layers.items() for part, name in parts.items() if part in "AB"}
    factors = {}
    for name, tensor in file.tensors(names):
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinite numbers; the training that made it had failed")
        layer, part = names[name]
        factors.setdefault(layer, {})[part] = tensor.clone()
    factors = {layer: Factors(**pair, scale=scales[layer]) for layer, pair in factors.items()}
    return Adapter(path, dialect, about["kind"], factors, about)


def recognize(file):
    """The Header of a TensorFile, of which names, shapes, types and metadata are checked.

    Raises: InputError for what is no whole adapter that minildm can load, saying what it is.
    """
    path = file.path
    if "minildm" in file.metadata:
        about, names = native_metadata(file), {name: read_name(name) for name in file.shapes}
        if odd := [name for name, entry in names.items() if entry is None or entry.dialect != NATIVE]:
            raise InputError(f"{path}: tensor {odd[0]} is not of an adapter")
        if not names:
            raise InputError(f"{path} holds no tensors; the training that made it had failed")
        return Header(NATIVE, _layers(file, names), about)
    if model := other_model(file.shapes):
        raise InputError(f"{path} holds an adapter for {model}; minildm loads {LOADABLE}")
    if kind := other_kind(file.shapes):
        raise InputError(f"{path} holds {kind}; minildm loads {LOADABLE}")
    names = _known_names(file)
    (dialect,) = {entry.dialect for entry in names.values()}
    if dialect == NATIVE:
        raise InputError(f"{path} has names of minildm's format, but not its metadata, so its scale is unknown; "
                         "take the file as train.py wrote it")  # fmt: skip
    if dialect == CLONEOFSIMO:
        _check_counted(file, names)
    layers = _layers(file, names)
    if (width := context_width({layer: file.shapes[parts["A"]] for layer, parts in layers.items()})) == 2048:
        raise InputError(f"{path} holds an adapter for {FAMILIES[width]}; minildm loads {LOADABLE}")
    return Header(dialect, layers, origin(file))


def context_width(shapes):
    """The width of the text features that an adapter was trained for, 768 or 1024 for Stable Diffusion, from {module
    path: shape of A}; None if it changes no layer that shows it."""
    for path, shape in shapes.items():
        if (path.startswith(TEXT_LAYERS) and "fc2" not in path) or re.search(r"attn2\.to_[kv]$", path):
            return shape[1]
    return None


# --- names and tensors -----------------------------------------------------------------------------------------------
def _known_names(file):
    """{tensor's name: Name} of a file that holds one adapter in one dialect, textual-inversion vectors left out."""
    path, names = file.path, {name: read_name(name) for name in file.shapes}
    known = {name: entry for name, entry in names.items() if entry}
    tokens = sorted(name for name in names if re.fullmatch(r"<[^<>]+>", name))  # cloneofsimo's: words, not layers
    unknown = [name for name in names if name not in known and name not in tokens]
    if not known:
        shown = ", ".join(sorted(names)[:2])
        raise InputError(f"{path} is not an adapter in minildm's format or another that it knows; its tensors: "
                         f"{shown or 'none'}{', ...' if len(names) > 2 else ''}")  # fmt: skip
    if unknown:
        raise InputError(
            f"{path}: tensor {unknown[0]} belongs to no layer of {LOADABLE.removeprefix('LoRA for ')}"
            f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}; the file is damaged or for another model"
        )
    if len(dialects := sorted({entry.dialect for entry in known.values()})) > 1:
        raise InputError(f"{path} mixes the names of {' and '.join(dialects)}; convert its parts alone")
    seen = {}
    for name, entry in known.items():
        if (first := seen.setdefault((entry.path, entry.part), name)) != name:
            raise InputError(f"{path}: tensors {first} and {name} are for the same layer; keep one of them")
    if tokens:
        warnings.warn(f"{path} also holds {len(tokens)} textual-inversion vectors, which are not used: the words "
                      f"{', '.join(tokens)} in a prompt have no special meaning", stacklevel=5)  # fmt: skip
    return known


def _check_counted(file, names):
    """Refuse cloneofsimo's names if the file counted its layers in another way."""
    path = file.path
    expected = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
    for network, classes in expected.items():
        stated = stated_json(file, network, list)
        if stated is not None and {str(name) for name in stated} != classes:
            raise InputError(f"{path} numbers the layers of {stated!r:.80}, expected those of {sorted(classes)}: which "
                             "layers are meant cannot be told")  # fmt: skip
    for name in names:
        rank = file.metadata.get(f"{name.rpartition(':')[0]}:rank")
        if rank is not None and (not file.shapes[name] or rank != str(min(file.shapes[name]))):
            raise InputError(f"{path}: {name} has shape {file.shapes[name]}, but the metadata say rank {rank:.20}")


def _layers(file, names):
    """{module path: {part: tensor's name}} of {tensor's name: Name}, types and shapes checked."""
    path, layers = file.path, {}
    for name, entry in names.items():
        allowed = (*FLOATS, *WHOLE) if entry.part == "alpha" else FLOATS
        if (dtype := file.dtypes[name]) not in allowed:
            raise InputError(f"{path}: {name} is stored as {str(dtype).removeprefix('torch.')}, expected float32, "
                             "float16 or bfloat16")  # fmt: skip
        layers.setdefault(entry.path, {})[entry.part] = name
    for parts in layers.values():
        if missing := [part for part in "AB" if part not in parts]:
            raise InputError(f"{path}: {next(iter(parts.values()))} has no partner (factor {missing[0]} is missing); "
                             "the file is incomplete")  # fmt: skip
        A, B = (file.shapes[parts[part]] for part in "AB")
        if not {len(A), len(B)} <= {2, 4} or A[0] != B[1] or tuple(B[2:]) not in ((), (1, 1)):
            raise InputError(f"{path}: {parts['A']} has shape {A} and {parts['B']} {B}; expected (rank, in) and (out, "
                             "rank), or (rank, in, kh, kw) and (out, rank, 1, 1)")  # fmt: skip
        if "alpha" in parts and math.prod(file.shapes[parts["alpha"]]) != 1:
            raise InputError(f"{path}: {parts['alpha']} must be one positive number, got shape "
                             f"{file.shapes[parts['alpha']]}")  # fmt: skip
    return dict(sorted(layers.items()))
