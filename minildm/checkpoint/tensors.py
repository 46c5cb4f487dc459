"""A file of named tensors: safetensors, or a torch pickle read by the loader that runs no code.

Shapes come from the header. Values are read when asked for, straight from the memory-mapped file.
"""

import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minildm.errors import InputError

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


class TensorFile:
    """Names, shapes and, when asked for, values of a safetensors file or a torch pickle.

    ``shapes``: {name: shape}; ``dtypes``: {name: torch.dtype, or the format's code for one that torch lacks};
    ``metadata``: {key: text}, empty for a pickle.
    """

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            head = file.read(9)
        if not head:
            raise InputError(f"{self.path} is empty (0 bytes); download it again")
        is_safetensors = head[8:] == b"{"  # bytes 0 to 7 are the length of the JSON header
        self.pickled = not is_safetensors and (head[:2] == b"PK" or head[:1] == b"\x80")
        if is_safetensors:
            self.shapes, self.dtypes, self.metadata = _read_safetensors_header(self.path)
        elif self.pickled:
            state = _read_pickle(self.path)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            self.dtypes = {name: tensor.dtype for name, tensor in state.items()}
            self.metadata = {}
        else:
            raise InputError(
                f"{self.path} is neither a safetensors file nor a torch checkpoint (it begins with {head[:8]!r})"
            )

    def tensors(self, names):
        """Yield (name, tensor) for each name. A tensor may be a view of the mapped file: convert it, then drop it."""
        read = self.reader()
        for name in names:
            yield name, read(name)

    def reader(self):
        """A function from a name to its tensor, for tensors that are converted and dropped one by one."""
        limit = CHUNK_BYTES
        if self.pickled:  # each unpickling takes 50 ms; unmapped files are in memory anyway, so are read once
            limit = 4 * CHUNK_BYTES if _is_mappable(self.path) else math.inf
        get_tensor, bytes_read = None, 0

        def read(name):
            nonlocal get_tensor, bytes_read
            if get_tensor is None or bytes_read > limit:
                get_tensor = None  # closes the file before it is opened again
                get_tensor, bytes_read = self._open(), 0
            tensor = get_tensor(name)
            bytes_read += tensor.nbytes
            return tensor

        return read

    def _open(self):
        """A function from a name to its tensor. The file is closed once the function and its tensors are dropped."""
        return _read_pickle(self.path).get if self.pickled else safe_open(self.path, "pt").get_tensor


class Source(NamedTuple):
    """Where a parameter's values are: a tensor of a file, or one third of it (OpenCLIP stores q, k and v as one)."""

    file: TensorFile
    name: str
    third: int | None = None


def _read_safetensors_header(path):
    """{name: shape}, {name: dtype}, metadata."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(entry.get_shape()) for name, entry in slices.items()}
            dtypes = {name: DTYPES.get(entry.get_dtype(), entry.get_dtype()) for name, entry in slices.items()}
            return shapes, dtypes, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); the download was probably cut short: get it again"
        ) from None


def _is_mappable(path):
    """Whether torch can map a pickle into memory: only zip archives (torch >= 1.6) without a misleading suffix."""
    return zipfile.is_zipfile(path) and path.suffix != ".safetensors"


def _read_pickle(path):
    """{name: tensor} of a .ckpt, .pt or .bin file by torch's loader that runs no code; memory-mapped if possible."""
    mappable = _is_mappable(path)
    try:
        with open(path, "rb") as file:
            state = torch.load(path if mappable else file, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL |global )([\w.]+)", str(error))  # what it would import
        raise InputError(
            f"{path} is a pickle that would run code when loaded"
            f"{f' ({code[1]})' if code else ''}, which minildm refuses; use the .safetensors file of "
            "the same release, or convert this one on a machine you can afford to lose"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path} cannot be read as a torch checkpoint ({reason}); it may be cut short: get it again"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, expected a dictionary of tensors")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
