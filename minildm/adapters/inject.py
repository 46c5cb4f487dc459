"""Which layers get an adapter, and putting adapters in and merging them away.

At any moment one adapter is live, the one being trained: `add_adapter` wraps the layers, `merge_adapter` adds what was
learnt to the base's weights and takes the wrappers out again. Loaded adapters are merged at once (files.py).
"""

import math
import re

import torch
from torch import nn

from minildm.adapters.lora import LoRALinear
from minildm.adapters.selora import SeLoRALinear
from minildm.errors import InputError

KINDS = {"lora": LoRALinear, "selora": SeLoRALinear}
NETWORKS = ("unet", "text_encoder")

# Layer sets, by path. Counts are SD v1.5's: U-Net + text encoder.
LAYERS = {
    "all-linear": r"",  # 184 + 72
    "paper": r"attn\d\.to_[qkv]$|ff\.net\.0\.proj$|time_emb_proj$|^text_encoder\.",  # 134 + 72 (SeLoRA, section 4.1)
    "attention": r"attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$",  # 128 + 48
}


def add_adapter(model, kind="lora", rank=4, alpha=None, targets=NETWORKS, layers="all-linear", seed=0):
    """Freeze the model and put a new adapter around its linear layers; the output does not change.

    Args:
        kind: "lora", or "selora", whose rank grows from ``rank`` (1 in the paper) on.
        alpha: scale = alpha / rank; None = rank (scale 1). SeLoRA's scale is alpha / ``rank`` as it starts, constant.
        targets: networks to adapt. layers: "all-linear", "paper" or "attention".
        seed: of lora_A's first values.
    Returns: {module path: layer}, in the model's order.
    Raises: InputError for unknown names, a rank outside [1, the layer's smaller side], an adapter already there.
    """
    if kind not in KINDS:
        raise InputError(f"unknown adapter kind {kind!r}; choose one of {', '.join(KINDS)}")
    if adapter_layers(model):
        raise InputError("the model already has a live adapter; merge_adapter(model) first, or load the base again")
    paths = target_paths(model, targets, layers)
    for path in paths:
        base = model.get_submodule(path)
        most = min(base.in_features, base.out_features)
        if not 1 <= rank <= most:
            raise InputError(f"rank must be in [1, {most}] for {path}, got {rank}; choose another --rank")
    if not paths or not (alpha is None or math.isfinite(alpha)):
        raise InputError(
            f"an adapter needs targets (from {', '.join(NETWORKS)}) and a finite alpha, got {targets}, {alpha}"
        )
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 if alpha is None else alpha / rank
    model.requires_grad_(False)
    for path in paths:
        _replace(model, path, KINDS[kind](model.get_submodule(path), rank, scale, generator))
    return adapter_layers(model)


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
    """{module path: layer} of the live adapter; empty if there is none."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_adapter(model):
    """Add the live adapter to the base's weights and remove it; the layers are plain linear layers again."""
    for path, layer in adapter_layers(model).items():
        _replace(model, path, layer.merged())


def parameter_counts(model):
    """{network: (adapter's parameters, the network's own, percentage)} for the networks that carry an adapter."""
    counts = {}
    for network in NETWORKS:
        layers = [layer for path, layer in adapter_layers(model).items() if path.startswith(f"{network}.")]
        if layers:
            own = sum(factor.numel() for layer in layers for factor in layer.factors())
            stored = sum(tensor.numel() for layer in layers for block in layer.blocks() for tensor in block)
            base = sum(parameter.numel() for parameter in getattr(model, network).parameters()) - stored
            counts[network] = (own, base, 100 * own / base)
    return counts


def _replace(model, path, module):
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    if isinstance(parent, nn.ModuleList):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)
