"""Fine-tuning methods, and adapters: small trainable changes of a frozen model."""

from minildm.adapters.adalora import AdaLoRA
from minildm.adapters.dylora import DyLoRA
from minildm.adapters.files import merge_file, save_adapter
from minildm.adapters.fisher import fisher_probe
from minildm.adapters.full import Full
from minildm.adapters.inject import NETWORKS, adapter_layers, merge_adapter, parameter_counts, target_paths, wrap
from minildm.adapters.lora import LoRA
from minildm.adapters.method import Method
from minildm.adapters.selora import SeLoRA, layers_to_grow
from minildm.errors import InputError

METHODS = {"selora": SeLoRA, "lora": LoRA, "adalora": AdaLoRA, "dylora": DyLoRA, "full": Full}  # --adapter NAME

__all__ = [
    "METHODS",
    "Method",
    "adapter_layers",
    "add_adapter",
    "fisher_probe",
    "layers_to_grow",
    "merge_adapter",
    "merge_file",
    "parameter_counts",
    "save_adapter",
    "target_paths",
]


def add_adapter(model, kind="lora", rank=4, alpha=None, targets=NETWORKS, layers="all-linear", seed=0):
    """Freeze the model and put a new adapter around its linear layers; the output does not change.

    Args:
        kind: "lora"; "selora", whose rank can grow; "adalora", whose rank can shrink; "dylora", which can be used at
            every rank up to ``rank``.
        rank: of every layer; SeLoRA's at the start.
        alpha: scale = alpha / rank, constant even if the rank grows; None = rank (scale 1).
        targets: networks to adapt. layers: "all-linear", "paper" or "attention".
        seed: of lora_A's initial values.
    Returns: {module path: layer}, in the model's order.
    Raises: InputError for unknown names, a rank outside [1, the layer's smaller side], an adapter already there.
    """
    kinds = {name: method for name, method in METHODS.items() if hasattr(method, "layer_class")}
    if kind not in kinds:
        raise InputError(f"unknown adapter kind {kind!r}; choose one of {', '.join(kinds)}")
    return wrap(model, kinds[kind].layer_class, rank, alpha, targets, layers, seed)
