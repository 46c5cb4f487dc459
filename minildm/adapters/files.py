"""The live adapter to a file, and a file into a model: what reading.py and writing.py are for."""

import warnings

import torch
from torch import nn

from minildm.adapters.inject import adapter_layers
from minildm.adapters.metadata import rank_flag, without_path
from minildm.adapters.reading import FAMILIES, Factors, context_width, read_adapter
from minildm.adapters.writing import check_format, write_adapter
from minildm.errors import InputError
from minildm.files import sha256
from minildm.settings import is_finite_number

NESTED = ("dylora",)  # kinds of which the first rows are an adapter, too


def save_adapter(model, path, format="native", settings=None):
    """Write the live adapter.

    Args: format: "native", "kohya" (ComfyUI, A1111 and others) or "diffusers", see writing.py. settings: a dict to
        record beside it in native files (steps, learning rate, seed, ...).
    Raises: InputError if the model has no live adapter, or for another format.
    """
    check_format(format)
    layers = adapter_layers(model)
    if not layers:
        raise InputError("the model has no live adapter to save; add_adapter(model) first")
    ((kind, scale),) = {(layer.kind, layer.scale) for layer in layers.values()}
    about = {"base": model.base_hash if model.files else None, "on_top_of": model.merged, "settings": settings or {}}
    factors = {name: Factors(*layer.factors(), scale) for name, layer in layers.items()}
    write_adapter(factors, path, kind, about, format)


def merge_file(model, path, multiplier=1.0, rank=None):
    """Add an adapter file of any dialect to the model's weights: W += multiplier scale B A, in float32 before the cast.

    Args: rank: use the first ``rank`` rows of a DyLoRA file; None = all.
    Returns: what the file says about itself, a dict.
    Raises: InputError for a file that is not an adapter, or one that does not fit, naming the tensor; for a rank that
        the file does not have. Then nothing has changed.
    """
    if not is_finite_number(multiplier):
        raise InputError(f"the multiplier of {path} must be a finite number, got {multiplier!r:.40}")
    adapter = read_adapter(path)
    path, about = adapter.path, adapter.about
    _check_family(model, adapter)
    layers = {name: _layer(model, name, adapter) for name in adapter.factors}
    for name, factors in adapter.factors.items():
        _check_fit(name, factors, layers[name], path)
        _check_size(name, factors, multiplier, layers[name], path)
    if rank is not None:
        check_rank(rank, adapter, f"@{rank}")
    if not any(len(A) for A, _, _ in adapter.factors.values()):
        warnings.warn(f"{path} changes nothing: all its layers have rank 0", stacklevel=2)
    if about.get("base") and model.files and about["base"] != model.base_hash:
        warnings.warn(
            f"{path} was trained on another base ({about['base'][:10]}) than this one ({model.base_hash[:10]})",
            stacklevel=2,
        )
    merged = [without_path(one) for one in model.merged]
    if missing := [one for one in about.get("on_top_of", []) if without_path(one) not in merged]:
        names = ", ".join(f"{one.get('path', 'one')} (SHA-256 {one['adapter'][:10]})" for one in missing)
        flags = " ".join(
            f"--adapter {one.get('path', 'PATH')}{rank_flag(one)}:{one['multiplier']!r}" for one in missing
        )
        warnings.warn(
            f"{path} was trained on top of other adapters, not merged here: {names}; without them its images are "
            f"wrong: give {flags} --adapter {path}",
            stacklevel=2,
        )
    digest, at_rank = sha256(path), {} if rank is None else {"rank": rank}
    for name, (A, B, scale) in adapter.factors.items():  # only now that all of it fits
        layer = layers[name]
        A, B = (factor.to(layer.weight.device, torch.float32).flatten(1) for factor in (A[:rank], B[:, :rank]))
        change = (multiplier * scale * B @ A).reshape(layer.weight.shape)
        layer.weight.data = (layer.weight.float() + change).to(layer.weight.dtype)
    model.merged.append({"adapter": digest, "multiplier": multiplier, **at_rank, "path": str(path)})
    return about


def check_rank(rank, adapter, flag):
    """Refuse a rank that cannot be taken from an Adapter; ``flag``: what gave it."""
    if adapter.kind not in NESTED:
        raise InputError(
            f"{adapter.path} is a {adapter.kind} adapter, which has one rank only: leave {flag} out (only dylora files "
            "can be loaded at any rank)"
        )
    max_rank = max(len(A) for A, _, _ in adapter.factors.values())
    if not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise InputError(f"the rank of {adapter.path} must be in [1, {max_rank}], got {rank}; change {flag}")


def _layer(model, name, adapter):
    """The layer of the base that an adapter changes."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"{adapter.path} is for another base: this one has no {name}") from None
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise InputError(f"{adapter.path}: {name} is no plain layer of the base (a live adapter must be merged first)")
    return layer


def _check_family(model, adapter):
    """Name the two families of models where the text features of adapter and base differ in width."""
    width = context_width({name: entry.A.shape for name, entry in adapter.factors.items()})
    expected = model.config.unet.context_dim
    if width != expected and None not in (FAMILIES.get(width), FAMILIES.get(expected)):
        raise InputError(
            f"{adapter.path} is for {FAMILIES[width]} (text features of width {width}), but the base is "
            f"{FAMILIES[expected]} ({expected}); give an adapter for this base, or another --base"
        )


def _check_fit(name, factors, layer, path):
    """Refuse factors whose product is no change of the layer's weight. A 1x1 convolution counts as a linear layer."""
    A, B, rows = factors.A, factors.B, len(factors.A)
    size, kernel = layer.weight.shape[:2], tuple(layer.weight.shape[2:])
    kernels = ((), (1, 1)) if kernel in ((), (1, 1)) else (kernel,)
    if A.shape[1] != size[1] or B.shape[0] != size[0] or tuple(A.shape[2:]) not in kernels:
        raise InputError(
            f"{path} is for another base: {name} has factors A {tuple(A.shape)} and B {tuple(B.shape)}, expected "
            f"{(rows, size[1], *kernel)} and {(size[0], rows, *[1 for _ in kernel])}"
        )


def _check_size(name, factors, multiplier, layer, path):
    """Refuse a change of the weights that their precision cannot hold, by the bound |dW| <= |scale| sum_r |A_r| |B_r|
    of the largest values; half of the range is left to the weights themselves."""
    A, B, scale = factors
    if not len(A):
        return
    largest = A.flatten(1).abs().amax(1).double() @ B.flatten(1).abs().amax(0).double()
    bound, dtype = abs(float(multiplier) * scale) * largest.item(), layer.weight.dtype
    if not bound < torch.finfo(dtype).max / 2:
        raise InputError(
            f"{path} with multiplier {float(multiplier):g} and scale {scale:g} changes {name} by up to {bound:.1e}, "
            f"more than {str(dtype).removeprefix('torch.')} can hold; lower the multiplier"
        )
