"""Published Stable Diffusion files <-> the networks' tensors."""

from minildm.checkpoint.load import (
    NETWORKS,
    Checkpoint,
    Source,
    TensorFile,
    build_networks,
    inspect,
    load_networks,
    save_folder,
)

__all__ = [
    "NETWORKS",
    "Checkpoint",
    "Source",
    "TensorFile",
    "build_networks",
    "inspect",
    "load_networks",
    "save_folder",
]
