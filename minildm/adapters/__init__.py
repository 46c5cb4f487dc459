"""Adapters: small trainable changes of a frozen model."""

from minildm.adapters.files import merge_file, save_adapter
from minildm.adapters.fisher import fisher_probe
from minildm.adapters.inject import adapter_layers, add_adapter, merge_adapter, parameter_counts, target_paths
from minildm.adapters.selora import layers_to_grow

__all__ = [
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
