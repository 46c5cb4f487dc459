"""torch's pickles (.ckpt, .pt, .bin) read as data: nothing in them is imported, called or built.

A pickle is a program for a stack machine. `read_pickle` follows it with plain lists and dictionaries. Where it asks for
a class or a function, or for a call of one, the name is noted down: ``Made("posix.system", ("rm -rf /",))`` is a note
that nobody acts on. Training frameworks leave many of these beside the tensors (callbacks, settings, NumPy numbers).
Of the notes that torch.save writes for a tensor, `find_tensors` takes where its numbers lie in the file.

Memory is bounded by what the file holds: the program may have 2 MB (that of SD v1.5 has 0.4), archives must be stored
without compression (torch never compresses), and a tensor must lie within the bytes of its storage.

Both formats are read: the zip archive of torch >= 1.6 and the one before it, pickles followed by the storages.
"""

import io
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from minildm.errors import InputError

MAX_PROGRAM_BYTES = 2 << 20
MAX_SHARING = 4  # how often, on average, tensors may use the same bytes of the file
# Under which key tools save the dictionary of tensors, from the outside in.
WRAPPERS = ("state_dict", "state_dict", "model_state_dict", "model", "module")
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,  # newer dtypes: the tensor says which
}
DTYPES = {str(dtype): dtype for dtype in (*STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2)}
DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")


class Made(NamedTuple):
    """What a pickle asks to import, or to call if there are arguments."""

    name: str
    arguments: object = None


class Storage(NamedTuple):
    """A run of numbers in the file, shared by the tensors that refer to it."""

    key: str
    kind: str  # such as "torch.HalfStorage"

    @property
    def dtype(self):
        """None if it holds complex or quantized numbers."""
        return STORAGES.get(self.kind)


class StoredTensor(NamedTuple):
    """Where a tensor lies: ``position`` in the file, in bytes; strides in numbers."""

    position: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self):
        """How many numbers lie between its first and its last, both counted."""
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides)) if all(self.shape) else 0


def find_tensors(path):
    """({name: StoredTensor}, {name: what would make it}) of a checkpoint's dictionary of tensors.

    The second holds entries that are not tensors of numbers. Others, such as counters, are left out.
    Raises: InputError if the file is damaged or is something else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            program, spans = _read_zip(file) if file.read(2) == b"PK" else _read_legacy(file)
        state = program
        for key in WRAPPERS:
            if isinstance(state, dict) and isinstance(state.get(key), (dict, Made)):
                state = state[key]
        if not isinstance(state, dict):
            what = f"{state.name}(...), which is not run" if isinstance(state, Made) else f"a {type(state).__name__}"
            raise InputError(f"{path} holds {what}, expected a dictionary of tensors; use the .safetensors file")
        tensors, made = {}, {}
        for name, value in state.items():
            if tensor := _as_tensor(value, spans):
                tensors[name] = tensor
            elif isinstance(value, Made):
                made[name] = value.name
        if sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values()) > MAX_SHARING * path.stat().st_size:
            raise InputError(f"{path} claims more numbers than it holds; it is damaged or made to exhaust memory")
        return tensors, made
    except InputError:
        raise
    except Exception as error:  # damaged bytes fail in any of a dozen ways: in zipfile, in pickletools, or here
        reason = (str(error).partition("\n")[0] or type(error).__name__)[:100]
        raise InputError(
            f"{path} cannot be read as a torch checkpoint ({reason}); it may be cut short: get it again"
        ) from None


def read_tensor(path, stored):
    """The tensor with its numbers, in memory of its own."""
    buffer = bytearray(stored.extent * stored.dtype.itemsize)
    if not buffer:
        return torch.empty(stored.shape, dtype=stored.dtype)
    with open(path, "rb") as file:
        file.seek(stored.position)
        if file.readinto(buffer) != len(buffer):
            raise InputError(f"{path} has become shorter while it was read; get it again")
    return torch.frombuffer(buffer, dtype=stored.dtype).as_strided(stored.shape, stored.strides)


# --- the two formats: (what the pickle holds, {storage key: (position, bytes)}) ---------------------------------------
def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("data.pkl") and name.count("/") < 2]
        if len(roots) != 1:
            raise InputError(f"{file.name} is a zip archive without torch's data.pkl; unpack it, or get another file")
        if any(name.startswith(f"{roots[0]}code/") for name in entries):
            raise InputError(f"{file.name} is a TorchScript program, which is not run; expected a file of tensors")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
            raise InputError(f"{file.name} is compressed or encrypted, which torch's checkpoints are not; get another")
        if (order := entries.get(f"{roots[0]}byteorder")) and archive.open(order).read(16) != b"little":
            raise InputError(f"{file.name} was written on a big-endian machine; use the .safetensors file")
        program = entries[f"{roots[0]}data.pkl"]
        if program.file_size > MAX_PROGRAM_BYTES:
            raise InputError(f"{file.name}: its data.pkl has {program.file_size:,} bytes, far more than any checkpoint")
        document = read_pickle(io.BytesIO(archive.read(program)))
        spans, prefix = {}, f"{roots[0]}data/"
        for name, entry in entries.items():
            if name.startswith(prefix):
                spans[name.removeprefix(prefix)] = (_position(file, entry), entry.file_size)
    size = file.seek(0, io.SEEK_END)
    return document, {key: (start, n_bytes) for key, (start, n_bytes) in spans.items() if start + n_bytes <= size}


def _position(file, entry):
    """Where the data of a zip entry begins: after a local header of 30 bytes, the name and an extra field."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("an entry of the archive has no header")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _read_legacy(file):
    """Five pickles (magic number, version, about the machine, the checkpoint, the order of the storages), and for each
    storage its length in numbers, 8 bytes, and its numbers."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PROGRAM_BYTES))
    if read_pickle(head) != LEGACY_MAGIC or read_pickle(head) != LEGACY_PROTOCOL:
        raise InputError(f"{file.name} is a Python pickle that torch.save did not write; use the .safetensors file")
    if read_pickle(head).get("little_endian") is not True:
        raise InputError(f"{file.name} was written on a big-endian machine; use the .safetensors file")
    storages = {}
    document, keys = read_pickle(head, storages), read_pickle(head)
    position, spans = head.tell(), {}
    for key in keys:
        file.seek(position)
        (numel,) = struct.unpack("<q", file.read(8))
        n_bytes = numel * storages[key].dtype.itemsize
        if numel < 0 or position + 8 + n_bytes > size:
            raise ValueError("its numbers end early")
        spans[key] = (position + 8, n_bytes)
        position += 8 + n_bytes
    return document, spans


def _as_tensor(value, spans):
    """The StoredTensor that a note of torch.save describes; None if it describes something else."""
    match value:
        case Made("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (data, *_)):
            return _as_tensor(data, spans)
        case Made("torch._tensor._rebuild_from_type_v2", (Made(name), _, arguments, *_)):
            return _as_tensor(Made(name, arguments), spans)
        case Made("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", arguments):
            storage, offset, shape, strides, *_ = arguments
            if (dtype := storage.dtype) is None:  # complex, quantized
                return None
        case Made("torch._utils._rebuild_tensor_v3", arguments):
            storage, offset, shape, strides, _, _, dtype, *_ = arguments
            dtype = DTYPES[dtype.name]
        case _:
            return None
    start, n_bytes = spans[storage.key]
    stored = StoredTensor(start + offset * dtype.itemsize, dtype, tuple(shape), tuple(strides))
    counts = (offset, *stored.shape, *stored.strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 48 for n in counts):
        raise ValueError("a tensor has an impossible shape")
    if (offset + stored.extent) * dtype.itemsize > n_bytes:
        raise ValueError("a tensor is larger than its storage")
    return stored


# --- the stack machine -----------------------------------------------------------------------------------------------
def read_pickle(stream, storages=None):
    """What the pickle at the stream's position holds: numbers, text, lists, tuples, dictionaries (entries whose key is
    text), `Storage`, and `Made` for everything else. ``storages``, a dict, receives the storages by their keys.

    Raises ValueError, LookupError, TypeError or AttributeError where the bytes are no such pickle.
    """
    machine = StackMachine({} if storages is None else storages)
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in REFUSED:
            raise ValueError(f"its pickle uses {opcode.name}, which torch.save does not write")
        OPERATIONS.get(opcode.name, StackMachine.push)(machine, argument)  # the others push their number or text
    return machine.stack.pop()


class StackMachine:
    """The state of a pickle that is being read: a stack of values, the heights at which groups of them begin (marks),
    and a memory of values to use again. A method is what one opcode does or several have in common."""

    def __init__(self, storages):
        self.stack, self.marks, self.memo, self.storages = [], [], {}, storages

    def push(self, value):
        self.stack.append(value)

    def push_top(self, _):
        self.push(self.stack[-1])

    def pop(self, _):
        self.stack.pop()

    def mark(self, _):
        self.marks.append(len(self.stack))

    def pop_group(self, _=None):
        """Remove and return the values above the last mark."""
        start = self.marks.pop()
        group = self.stack[start:]
        del self.stack[start:]
        return group

    def remember(self, key):
        self.memo[key] = self.stack[-1]

    def remember_next(self, _):
        self.remember(len(self.memo))

    def recall(self, key):
        self.push(self.memo[key])

    # tuples, lists (for sets, too) and dictionaries
    def make_tuple(self, _):
        self.push(tuple(self.pop_group()))

    def make_tuple_of(self, n):
        self.stack[-n:] = [tuple(self.stack[-n:])]

    def make_list(self, _):
        self.push(self.pop_group())

    def make_dict(self, _):
        items = self.pop_group()
        self.push({})
        self.update_top(items)

    def append(self, _):
        item = self.stack.pop()
        self.extend_top([item])

    def extend(self, _):
        self.extend_top(self.pop_group())

    def set_item(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.update_top([key, value])

    def set_items(self, _):
        self.update_top(self.pop_group())

    def extend_top(self, items):
        if isinstance(self.stack[-1], list):  # what belongs to a note is dropped
            self.stack[-1].extend(items)

    def update_top(self, items):
        top = self.stack[-1]
        if isinstance(top, dict):  # nothing but text is ever hashed: a deep tuple would exhaust the C stack
            top.update((key, value) for key, value in zip(items[::2], items[1::2]) if isinstance(key, str))

    # notes of what the pickle asks to import and to call
    def note_global(self, name):
        self.push(_global(name))

    def note_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self.push(Made(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"))

    def note_call(self, function, arguments):
        self.push({} if function.name in DICTIONARIES else Made(function.name, arguments))

    def note_reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.note_call(function, arguments)

    def note_new_with_keywords(self, _):
        _, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.note_call(function, arguments)

    def note_instance(self, name):
        self.note_call(_global(name), tuple(self.pop_group()))

    def note_object(self, _):
        function, *arguments = self.pop_group()
        self.note_call(function, tuple(arguments))

    def note_storage(self, _):
        kind, of, key, _, _, *view = self.stack.pop()
        if kind != "storage" or not isinstance(key, str) or view not in ([], [None]):
            raise ValueError("a reference to something other than a storage")
        self.storages[key] = Storage(key, of.name)
        self.push(self.storages[key])


def _global(text):
    """pickletools gives module and name with a space between them."""
    return Made(text.replace(" ", "."))


def _nothing(_, argument):
    """For what only frames a pickle."""


def _pushing(make):
    return lambda machine, _: machine.push(make())


OPERATIONS = {  # of pickle's opcodes; what is not here pushes its argument
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    "DUP": StackMachine.push_top,
    "POP": StackMachine.pop,
    "BUILD": StackMachine.pop,  # an object's state is dropped
    "MARK": StackMachine.mark,
    "POP_MARK": StackMachine.pop_group,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), StackMachine.remember),
    "MEMOIZE": StackMachine.remember_next,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), StackMachine.recall),
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "EMPTY_TUPLE": _pushing(tuple),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_SET": _pushing(list),
    "TUPLE": StackMachine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple_of(1),
    "TUPLE2": lambda machine, _: machine.make_tuple_of(2),
    "TUPLE3": lambda machine, _: machine.make_tuple_of(3),
    "LIST": StackMachine.make_list,
    "FROZENSET": StackMachine.make_list,
    "DICT": StackMachine.make_dict,
    "APPEND": StackMachine.append,
    "APPENDS": StackMachine.extend,
    "ADDITEMS": StackMachine.extend,
    "SETITEM": StackMachine.set_item,
    "SETITEMS": StackMachine.set_items,
    "GLOBAL": StackMachine.note_global,
    "STACK_GLOBAL": StackMachine.note_stack_global,
    "REDUCE": StackMachine.note_reduce,
    "NEWOBJ": StackMachine.note_reduce,
    "NEWOBJ_EX": StackMachine.note_new_with_keywords,
    "INST": StackMachine.note_instance,
    "OBJ": StackMachine.note_object,
    "BINPERSID": StackMachine.note_storage,
}
REFUSED = ("PERSID", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")
