"""Published Stable Diffusion checkpoints <-> the networks' tensors.

- load.py: which layout a checkpoint has (`inspect`), then its tensors into networks (`load_networks`)
- folder.py: the diffusers layout, a folder of config.json and tensor files; reading it and writing it (`save_folder`)
- single_file.py: the layout of CompVis and Stability AI, one file; names and sizes
- autoencoder.py: an autoencoder of its own in place of a checkpoint's (`replace_vae`)
- tensors.py, pickles.py: a file of tensors, safetensors or pickle (`TensorFile`)
- recognise.py: what a file is otherwise
- statements.py: what a single file says about itself; config_json.py, document.py: what a folder says
- writing.py: safetensors written one tensor at a time; the single-file layout (`save_single_file`)
"""

from minildm.checkpoint.autoencoder import replace_vae
from minildm.checkpoint.folder import save_folder
from minildm.checkpoint.load import NETWORKS, Checkpoint, build_networks, inspect, load_networks
from minildm.checkpoint.tensors import Source, TensorFile
from minildm.checkpoint.writing import save_single_file

__all__ = [
    "NETWORKS",
    "Checkpoint",
    "Source",
    "TensorFile",
    "build_networks",
    "inspect",
    "load_networks",
    "replace_vae",
    "save_folder",
    "save_single_file",
]
