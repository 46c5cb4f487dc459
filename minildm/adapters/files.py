"""Adapter files: our own format, and merging one into a model.

A safetensors file with ``<module path>.lora_A`` (rank, in) and ``.lora_B`` (out, rank), float32, and one metadata
entry ``minildm``: a JSON object with the kind, the scale, ranks by path, the base's hash and what else the caller
gives. Never captions or tags: they may be patient text.
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minildm.adapters.inject import adapter_layers
from minildm.errors import InputError
from minildm.files import sha256, written_beside

FORMAT = 1
NESTED = ("dylora",)  # kinds of which the first rows are an adapter, too


class Factors(NamedTuple):
    """A layer's change of the weights, dW = scale B A."""

    A: torch.Tensor  # (rank, in)
    B: torch.Tensor  # (out, rank)
    scale: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds."""

    path: Path
    dialect: str  # whose names it has
    kind: str  # the method that trained it
    factors: dict[str, Factors]  # by module path
    about: dict  # what else the file says about itself


def save_adapter(model, path, format="native", settings=None):
    """Write the live adapter. ``settings``: a dict to record beside it (steps, learning rate, seed, ...).

    Raises: InputError if the model has no live adapter, or for another format.
    """
    if format != "native":
        raise InputError(f"adapter format must be 'native', got {format!r}")
    layers = adapter_layers(model)
    if not layers:
        raise InputError("the model has no live adapter to save; add_adapter(model) first")
    ((kind, scale),) = {(layer.kind, layer.scale) for layer in layers.values()}
    about = {"base": model.base_hash if model.files else None, "on_top_of": model.merged, "settings": settings or {}}
    write_native({name: Factors(*layer.factors(), scale) for name, layer in layers.items()}, path, kind, about)


def write_native(factors, path, kind, about):
    """Write {module path: Factors}, all of one scale. ``about``: {"base": ..., "on_top_of": ..., "settings": ...}."""
    (scale,) = {entry.scale for entry in factors.values()}
    tensors = {
        f"{name}.lora_{letter}": factor.cpu().contiguous()
        for name, entry in factors.items()
        for letter, factor in zip("AB", entry)
    }
    ranks = {name: len(entry.A) for name, entry in factors.items()}
    metadata = {"format": FORMAT, "kind": kind, "scale": scale, "ranks": ranks} | about
    with written_beside(path) as beside:
        save_file(tensors, beside, metadata={"minildm": json.dumps(metadata)})


def read_adapter(path):
    """The Adapter of a file.

    Raises: FileNotFoundError; InputError for a file that is no whole adapter, or holds numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such adapter: {path}; give PATH[@RANK][:MULTIPLIER] of a file or a run folder")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("minildm", "null"))
            names = list(file.keys())
            if not isinstance(about, dict) or "scale" not in about:  # a checkpoint, too: not read for that
                raise InputError(
                    f"{path} is not an adapter in minildm's format (no such metadata); its tensors: "
                    f"{', '.join(sorted(names)[:2])}, ..."
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from None
    if about.get("format") != FORMAT or not isinstance(about.get("scale"), float | int):
        raise InputError(
            f"{path}: format {about.get('format')!r} with scale {about.get('scale')!r}, expected format "
            f"{FORMAT} and a number; it was written by another version of minildm"
        )
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"{path}: {bad[0]} holds NaN or infinite numbers; the training that made it had failed")
    paths = sorted({name.rpartition(".")[0] for name in tensors})
    expected = {f"{name}.lora_{factor}" for name in paths for factor in "AB"}
    if odd := sorted(expected ^ set(tensors)):
        raise InputError(f"{path}: tensor {odd[0]} is {'missing' if odd[0] in expected else 'not of an adapter'}")
    factors = {name: Factors(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], about["scale"]) for name in paths}
    return Adapter(path, "native", str(about.get("kind")), factors, about)


def merge_file(model, path, multiplier=1.0, rank=None):
    """Add an adapter file to the model's weights: W += multiplier scale B A, in float32 before the cast.

    Args: rank: use the first ``rank`` rows of a DyLoRA file; None = all.
    Returns: what the file says about itself, a dict.
    Raises: InputError for a file that is not an adapter, or one that does not fit, naming the tensor; for a rank that
        the file does not have.
    """
    path = Path(path)
    if not math.isfinite(multiplier):
        raise InputError(f"the multiplier of {path} must be a finite number, got {multiplier}")
    adapter = read_adapter(path)
    about = adapter.about
    layers = {name: _linear(model, name, path) for name in adapter.factors}
    for name, (A, B, _) in adapter.factors.items():
        layer, rows = layers[name], len(A)
        if A.shape != (rows, layer.in_features) or B.shape != (layer.out_features, rows):
            raise InputError(
                f"{path} is for another base: {name} has lora_A {tuple(A.shape)} and lora_B "
                f"{tuple(B.shape)}, expected ({rows}, {layer.in_features}) and ({layer.out_features}, "
                f"{rows})"
            )
    if rank is not None:
        _check_rank(rank, path, adapter.kind, max(len(A) for A, _, _ in adapter.factors.values()))
    if about.get("base") and model.files and about["base"] != model.base_hash:
        warnings.warn(
            f"{path} was trained on another base ({about['base'][:10]}) than this one ({model.base_hash[:10]})",
            stacklevel=2,
        )
    merged = [_without_path(one) for one in model.merged]
    if missing := [one for one in about.get("on_top_of", []) if _without_path(one) not in merged]:
        names = ", ".join(f"{one.get('path', 'one')} (SHA-256 {one['adapter'][:10]})" for one in missing)
        flags = " ".join(f"--adapter {one.get('path', 'PATH')}:{one['multiplier']:g}" for one in missing)
        warnings.warn(
            f"{path} was trained on top of other adapters, not merged here: {names}; without them its images are "
            f"wrong: give {flags} --adapter {path}",
            stacklevel=2,
        )
    at_rank = {} if rank is None else {"rank": rank}
    model.merged.append({"adapter": sha256(path), "multiplier": multiplier, **at_rank, "path": str(path)})
    for name, (A, B, scale) in adapter.factors.items():  # only now that all of it fits
        layer = layers[name]
        A, B = (factor.to(layer.weight.device, torch.float32) for factor in (A[:rank], B[:, :rank]))
        layer.weight.data = (layer.weight.float() + multiplier * scale * B @ A).to(layer.weight.dtype)
    return about


def _without_path(entry):
    """What identifies an entry of ``on_top_of`` or ``model.merged``: a file may lie somewhere else today."""
    return {key: value for key, value in entry.items() if key != "path"}


def _check_rank(rank, path, kind, max_rank):
    if kind not in NESTED:
        raise InputError(
            f"{path} is a {kind} adapter, which has one rank only: leave @{rank} out (only dylora files can be loaded "
            "at any rank)"
        )
    if not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise InputError(f"the rank of {path} must be in [1, {max_rank}], got {rank}; change @{rank}")


def _linear(model, name, path):
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"{path} is for another base: this one has no {name}") from None
    if not isinstance(layer, torch.nn.Linear):
        raise InputError(f"{path}: {name} is no linear layer of the base (a live adapter must be merged first)")
    return layer
