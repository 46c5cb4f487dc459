"""A file of named tensors: safetensors, or a torch pickle, of which nothing is run (pickles.py).

Names, shapes and dtypes come from the header. Values are read when asked for, one tensor at a time.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minildm.checkpoint import pickles
from minildm.errors import InputError
from minildm.files import shown

DTYPES = {  # safetensors' codes
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK_BYTES = 16 << 20  # reopen the file this often: pages that were read count as memory until it is closed
NOT_TENSORS = {  # how files begin that people take for checkpoints
    b"version https://git-lfs": "a git-lfs pointer, which stands for the file: run git lfs pull, or download the file",
    b"<": "a web page (the download needed a login or failed): download the file itself",
    b"GGUF": "a GGUF file, quantized for other programs: get the .safetensors or .ckpt file",
    b"\x1f\x8b": "a compressed archive: unpack it",
    b"7z\xbc\xaf": "a compressed archive: unpack it",
    b"Rar!": "a compressed archive: unpack it",
    b"\x93NUMPY": "a NumPy file: get the .safetensors or .ckpt file",
    b"\x89HDF": "an HDF5 file (TensorFlow or Keras): get the .safetensors or .ckpt file",
    b"\0\0\0\0\0\0\0\0": "filled with zeros, as unfinished downloads are: get it again",
}


class TensorFile:
    """Names, shapes and, when asked for, values of a safetensors file or a torch pickle.

    ``shapes``: {name: shape}; ``dtypes``: {name: torch.dtype, or the format's code for one that torch lacks};
    ``metadata``: {key: text}, empty for a pickle; ``made``: {name: what a pickle would call to make this entry, which
    is not done}.
    """

    def __init__(self, path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{self.path} is not a regular file; give a .safetensors or .ckpt file")
        with open(self.path, "rb") as file:
            head = file.read(32)
        if not head:
            raise InputError(f"{self.path} is empty (0 bytes); download it again")
        is_safetensors = head[8:9] == b"{"  # bytes 0 to 7 are the length of the JSON header
        self.pickled = not is_safetensors and (head[:2] == b"PK" or head[:1] == b"\x80")
        self.metadata, self.made = {}, {}
        if is_safetensors:
            self.shapes, self.dtypes, self.metadata = _read_safetensors_header(self.path)
        elif self.pickled:
            self._stored, self.made = pickles.find_tensors(self.path)
            self.shapes = {name: stored.shape for name, stored in self._stored.items()}
            self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        else:
            kind = next((kind for begin, kind in NOT_TENSORS.items() if head.lstrip().startswith(begin)), None)
            raise InputError(
                f"{self.path} is neither a safetensors file nor a torch checkpoint but {kind}"
                if kind
                else f"{self.path} is neither a safetensors file nor a torch checkpoint (it begins with {head[:8]!r})"
            )

    def tensors(self, names):
        """Yield (name, tensor) for each name. A tensor may be a view of the mapped file: convert it, then drop it."""
        read = self.reader()
        for name in names:
            yield name, read(name)

    def reader(self):
        """A function from a name to its tensor, for tensors that are converted and dropped one by one."""
        if self.pickled:
            return lambda name: pickles.read_tensor(self.path, self._stored[name])
        file, bytes_read = None, 0

        def read(name):
            nonlocal file, bytes_read
            if file is None or bytes_read > CHUNK_BYTES:
                file = None  # closes the file before it is opened again
                file, bytes_read = safe_open(self.path, "pt"), 0
            tensor = file.get_tensor(name)
            bytes_read += tensor.nbytes
            return tensor

        return read


class Source(NamedTuple):
    """Where a parameter's values are: a tensor of a file, or one third of it (OpenCLIP stores q, k and v as one)."""

    file: TensorFile
    name: str
    third: int | None = None


def _read_safetensors_header(path):
    """{name: shape}, {name: dtype}, metadata."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{shown(path)}: its name is not UTF-8, which safetensors cannot open; rename it") from None
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(entry.get_shape()) for name, entry in slices.items()}
            dtypes = {name: DTYPES.get(entry.get_dtype(), entry.get_dtype()) for name, entry in slices.items()}
            return shapes, dtypes, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({_damage(path, error)}): get it again") from None


def _damage(path, error):
    """What is wrong with a safetensors file: how many bytes are there and how many its header promises, or the
    library's own words."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        promised = 8 + int.from_bytes(file.read(8), "little")  # where the header ends
        if promised < min(size, 100 << 20):
            try:
                header = json.loads(file.read(promised - 8))
                promised += max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                promised = 0
    if size < promised < 1 << 48:
        return f"{size:,} of {promised:,} bytes are there; the download was cut short"
    return f"{str(error)[:200]}; it is damaged"
