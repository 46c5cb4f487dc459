"""Which layers get an adapter; putting adapters in, merging them away, counting them.

At any moment one adapter is live, the one being trained: `wrap` puts it around the layers, `merge_adapter` adds it to
the base's weights and takes the wrappers out again. Loaded adapters are merged at once (files.py).
"""

import math
import re

import torch
from torch import nn

from minildm.errors import InputError
from minildm.settings import is_finite_number

NETWORKS = ("unet", "text_encoder")

# Layer sets, by path. Counts are SD v1.5's: U-Net + text encoder.
LAYERS = {
    "all-linear": r"",  # 184 + 72
    "paper": r"attn\d\.to_[qkv]$|ff\.net\.0\.proj$|time_emb_proj$|^text_encoder\.",  # 134 + 72 (SeLoRA, section 4.1)
    "attention": r"attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$",  # 128 + 48
}


def wrap(model, layer_class, rank, alpha=None, targets=NETWORKS, layers="all-linear", seed=0, stabilized=False):
    """Freeze the model and put a new adapter around its linear layers; the output does not change.

    Args:
        layer_class: builds a wrapper from (base, rank, scale, generator).
        stabilized: scale = alpha / sqrt(rank) instead of alpha / rank (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
        The others as in `adapters.add_adapter`.
    Returns: {module path: wrapper}, in the model's order.
    """
    paths = check_fit(model, rank, targets, layers)
    if alpha is not None and not (is_finite_number(alpha) and alpha > 0):
        raise InputError(f"alpha must be a positive number, got {alpha!r:.40}")
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if stabilized else rank)
    model.requires_grad_(False)
    for path in paths:
        _replace(model, path, layer_class(model.get_submodule(path), rank, scale, generator))
    return adapter_layers(model)


def check_fit(model, rank, targets=NETWORKS, layers="all-linear"):
    """The paths of the layers that `wrap` would adapt. Raises: InputError if it cannot."""
    if adapter_layers(model):
        raise InputError("the model already has a live adapter; merge_adapter(model) first, or load the base again")
    paths = target_paths(model, targets, layers)
    for path in paths:
        base = model.get_submodule(path)
        most = min(base.in_features, base.out_features)
        if not 1 <= rank <= most:
            raise InputError(f"rank must be in [1, {most}] for {path}, got {rank}; choose another rank")
    if not paths:
        raise InputError(f"an adapter needs a network to adapt, from {', '.join(NETWORKS)}; got {targets}")
    return paths


def target_paths(model, targets=NETWORKS, layers="all-linear"):
    """Paths of the linear layers an adapter goes around, in the model's order: ``unet.down_blocks...to_q``."""
    if layers not in LAYERS:
        raise InputError(f"unknown layer set {layers!r}; choose one of {', '.join(LAYERS)}")
    if unknown := [name for name in targets if name not in NETWORKS]:
        raise InputError(f"unknown adapter target {unknown[0]!r}; choose from {', '.join(NETWORKS)}")
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.split(".")[0] in targets and re.search(LAYERS[layers], path)
    ]


def adapter_layers(model):
    """{module path: wrapper} of the live adapter; empty if there is none."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}


def merge_adapter(model):
    """Add the live adapter to the base's weights and remove it; the layers are plain linear layers again."""
    for path, layer in adapter_layers(model).items():
        _replace(model, path, layer.merged())


def parameter_counts(model):
    """{network: (trained, all, percent)} of the networks that are trained, percent = 100 trained / all.

    ``all`` counts the base and the adapter, as PEFT does. Rows of an adapter that are not in use do not count.
    """
    counts = {}
    for network in NETWORKS:
        module = getattr(model, network)
        layers = adapter_layers(module).values()
        stored = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if name.startswith("lora_"))
        total = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        unused = stored - sum(layer.n_parameters() for layer in layers)
        if trained:
            counts[network] = (trained - unused, total - unused, 100 * (trained - unused) / (total - unused))
    return counts


def _replace(model, path, module):
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    if isinstance(parent, nn.ModuleList):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)
