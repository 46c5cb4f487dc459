"""torch's pickles as data: what is read, what is refused, and that nothing runs or fills the memory."""

import collections
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import peers
import pytest
import torch
from peers import assert_says, shared_model

import minildm
from minildm.checkpoint import TensorFile
from minildm.errors import InputError


def values(file):
    return dict(file.tensors(file.shapes))


def assert_reads(path, expected):
    file = TensorFile(path)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in values(file).items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=0)


def zipped(path, program, compression=zipfile.ZIP_STORED, storages=(), root="archive/"):
    """A zip as torch writes it, around any pickle program."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}data.pkl", program)
        for key, data in enumerate(storages):
            archive.writestr(f"{root}data/{key}", data)
    return path


def refusal(path):
    with pytest.raises(InputError) as error:
        TensorFile(path)
    return error


# --- what is read ----------------------------------------------------------------------------------------------------
STATE = {
    "a": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "slice": torch.arange(20.0)[5:9],
    "strided": torch.arange(20.0)[3::4],
    "expanded": torch.tensor([7.0]).expand(5),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "double": torch.tensor([1e300], dtype=torch.float64),
    "int": torch.arange(3),
    "bool": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "buffer": torch.nn.Buffer(torch.ones(2)),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_tensors_of_every_form_are_read(as_zip, protocol, tmp_path):
    shared = torch.arange(10.0)
    state = STATE | {"first": shared[:6], "last": shared[4:]}  # of one storage
    for i, document in enumerate((state, {"state_dict": state}, {"state_dict": collections.OrderedDict(state)})):
        path = tmp_path / f"{i}.ckpt"
        torch.save(document, path, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
        assert_reads(path, state)


def test_float8_is_read(tmp_path):
    state = {str(dtype): torch.tensor([1.0, -0.5]).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    torch.save(state, tmp_path / "a.ckpt")
    read = values(TensorFile(tmp_path / "a.ckpt"))
    assert all(read[name].dtype == tensor.dtype and read[name].tolist() == [1, -0.5] for name, tensor in state.items())


def save_like_lightning(state, path, **options):
    """As PyTorch Lightning of 2022 saved: callbacks by their class, NumPy numbers, settings, an optimizer's state."""
    module = types.ModuleType("lightning_callbacks")
    module.Checkpoint = type("Checkpoint", (), {"__module__": module.__name__})
    module.settings = type("Settings", (dict,), {"__module__": module.__name__})
    module.Settings = module.settings
    sys.modules[module.__name__] = module
    about = {
        "epoch": 0,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {module.Checkpoint: {"best": torch.tensor(0.5), "path": "epoch=0.ckpt", ("a", 1): module}.copy()},
        "lr_schedulers": [{"base_lrs": [np.float64(1e-4)], "counts": np.arange(3), "kind": np.dtype("float32")}],
        "hyper_parameters": module.Settings(a=1, b=[{1, 2}, frozenset({3}), 1 + 2j, b"x", range(3), slice(1)]),
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}}],
        3: "a number as key",
    }
    del about["callbacks"][module.Checkpoint]["a", 1]  # a module cannot be pickled
    try:
        torch.save(about | {"state_dict": state}, path, **options)
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_of_lightning_loads(as_zip, tmp_path):
    path = tmp_path / "sd-v1-4.ckpt"
    save_like_lightning(peers.single_file_state(shared_model()), path, _use_new_zipfile_serialization=as_zip)
    peers.assert_equal_weights(minildm.load(path, device="cpu"), shared_model())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.eye(2).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.ones(2, device="meta"),
        lambda: torch.ones(2, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "csr", "nested", "meta", "complex", "quantized"],
)
@pytest.mark.filterwarnings("ignore")  # of torch: these are prototypes
def test_other_tensors_are_left_alone_unless_the_network_needs_them(make, tmp_path):
    state = peers.single_file_state(shared_model())
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "loss": make()}, path)
    minildm.load(path, device="cpu")
    name = "model.diffusion_model.out.2.bias"
    torch.save({"state_dict": state | {name: make()}}, path)
    with pytest.raises(InputError) as error:
        minildm.load(path, device="cpu")
    assert_says(error, path, f"1 missing: {name}", "in a form that is not loaded", "torch.")


# --- nothing runs ----------------------------------------------------------------------------------------------------
class Bomb:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["itself", "state_dict", "a tensor", "beside", "key"])
def test_a_call_is_noted_and_not_made(place, as_zip, tmp_path):
    bomb, state = Bomb(open, str(tmp_path / "made"), "w"), peers.single_file_state(shared_model())
    name = "model.diffusion_model.out.2.bias"
    document = {
        "itself": bomb,
        "state_dict": {"state_dict": bomb},
        "a tensor": state | {name: bomb},
        "beside": {"state_dict": state, "callbacks": [bomb]},
        "key": {"state_dict": state, bomb: 1},
    }[place]
    torch.save(document, tmp_path / "model.ckpt", _use_new_zipfile_serialization=as_zip)
    if place in ("beside", "key"):
        minildm.load(tmp_path / "model.ckpt", device="cpu")
    else:
        with pytest.raises(InputError) as error:
            minildm.load(tmp_path / "model.ckpt", device="cpu")
        assert_says(error, tmp_path / "model.ckpt", "io.open")
    assert not (tmp_path / "made").exists()


def test_opcodes_that_import_or_call_in_other_ways_do_nothing(tmp_path):
    target = str(tmp_path / "made").encode()
    arguments = b"X" + struct.pack("<I", len(target)) + target + b"X\x01\0\0\0w"
    calls = {
        "INST": b"(" + arguments + b"iio\nopen\n",
        "OBJ": b"(cio\nopen\n" + arguments + b"o",
        "NEWOBJ": b"cio\nopen\n(" + arguments + b"t\x81",
        "NEWOBJ_EX": b"cio\nopen\n(" + arguments + b"t}\x92",
        "STACK_GLOBAL": b"X\x02\0\0\0ioX\x04\0\0\0open\x93(" + arguments + b"tR",
        "BUILD": b"cio\nopen\n(" + arguments + b"tb",
    }
    for name, call in calls.items():
        path = zipped(tmp_path / f"{name}.ckpt", b"\x80\x04" + call + b".")
        assert_says(refusal(path), path, "io.open")
        path = zipped(tmp_path / f"{name}.ckpt", b"\x80\x04}X\x01\0\0\0a" + call + b"s.")
        assert TensorFile(path).made == {"a": "io.open"}
    assert not (tmp_path / "made").exists()


def test_a_whole_network_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    assert_says(refusal(tmp_path / "a.pt"), "torch.nn.modules.linear.Linear(...), which is not run")


def test_torchscript_is_refused_as_a_program(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    assert_says(refusal(tmp_path / "a.pt"), "TorchScript program")


# --- memory and time are bounded -------------------------------------------------------------------------------------
HOSTILE = {
    "bytearray(2**33)": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R.",
    "bytes of 2**60": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "bytearray of 2**40": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "numbers of 100,000 digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "a program of 3 MB": b"\x80\x02" + b"N0" * (3 << 19) + b"}.",
    "lists in lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "tuples in tuples": b"\x80\x02N" + b"\x85" * 100_000 + b".",
    "a deep key": b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.",
    "parameters in parameters": b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_parameter\nq\x00N\x85R"
    + b"\x85q\x010h\x00h\x01R" * 5_000
    + b"s.",
    "a memo that is not there": b"\x80\x02h\x07.",
    "an empty stack": b"\x80\x02R.",
    "marks alone": b"\x80\x02" + b"(" * 100_000 + b".",
    "an extension": b"\x80\x02\x82\x01.",
}
MEMORY = """
import resource, sys
from minildm.checkpoint import TensorFile
from minildm.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        TensorFile(path)
        print("read")
    except InputError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_hostile_programs_end_in_one_line_in_little_memory(tmp_path):
    paths = [zipped(tmp_path / f"{i}.ckpt", program) for i, program in enumerate(HOSTILE.values())]
    legacy_head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for i, program in enumerate(HOSTILE.values()):
        (path := tmp_path / f"legacy-{i}.ckpt").write_bytes(legacy_head + program + b"\x80\x02].")
        paths.append(path)
    paths.append(zipped(tmp_path / "bomb.ckpt", b"\x80\x02" + b"N0" * (20 << 20) + b"}.", zipfile.ZIP_DEFLATED))
    assert paths[-1].stat().st_size < 1 << 20
    paths.append(zipped(tmp_path / "bz2.ckpt", b"\x80\x02}.", zipfile.ZIP_BZIP2))
    done = subprocess.run([sys.executable, "-c", MEMORY, *map(str, paths)], capture_output=True, text=True, timeout=120)
    *said, kilobytes = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(paths), done.stderr
    assert all(len(line) < 400 for line in said)
    assert int(kilobytes) < 200_000  # of the 40 MB in the archive, nothing


def tensor_note(storage="0", offset=0, shape=(2,), strides=(1,), kind="torch\nFloatStorage"):
    """The program of {"a": a tensor}, with whatever it claims."""

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def text(words):
        return b"X" + struct.pack("<I", len(words)) + words.encode()

    return (
        b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage") + b"c" + kind.encode() + b"\n" + text(storage) + text("cpu") + number(2) + b"tQ"
        + number(offset) + b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides)) + b"t\x89NtRs."
    )  # fmt: skip


def test_a_tensor_lies_within_its_storage_whatever_it_claims(tmp_path):
    data = [struct.pack("<2f", 1, 2)]
    assert_reads(zipped(tmp_path / "a.ckpt", tensor_note(), storages=data), {"a": torch.tensor([1.0, 2.0])})
    for claim in (
        {"shape": (3,)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (2,)},
        {"strides": (-1,)},
        {"shape": (-2,)},
        {"shape": (1 << 62,)},
        {"shape": (10**9, 10**9), "strides": (0, 0)},
        {"shape": (1 << 40,), "strides": (0,)},
        {"shape": (1 << 20, 1 << 20), "strides": (1, 1)},
        {"shape": (2, 2)},
        {"storage": "1"},
        {"kind": "torch\nDoubleStorage"},
    ):
        path = zipped(tmp_path / "a.ckpt", tensor_note(**claim), storages=data)
        assert_says(refusal(path), path)
    path = zipped(tmp_path / "a.ckpt", tensor_note(kind="os\nsystem"), storages=data)
    assert TensorFile(path).shapes == {} and TensorFile(path).made == {"a": "torch._utils._rebuild_tensor_v2"}


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file_ends_in_one_line(as_zip, tmp_path):
    torch.save({"state_dict": {"a": torch.arange(30.0), "b": torch.ones(2, 2)}}, tmp_path / "whole", 
               _use_new_zipfile_serialization=as_zip)  # fmt: skip
    whole = (tmp_path / "whole").read_bytes()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "damaged.ckpt"
    for i in range(300):
        data = bytearray(whole)
        for position in torch.randint(2, len(whole), (1 + i % 5,), generator=generator).tolist():
            data[position] = int(torch.randint(256, (), generator=generator))
        cut = len(data) if i % 3 else int(torch.randint(2, len(data), (), generator=generator))
        path.write_bytes(data[:cut])
        try:
            values(TensorFile(path))
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)


def test_other_archives_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("README", "nothing")
    assert_says(refusal(tmp_path / "other.zip"), "zip archive without torch's data.pkl")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert_says(refusal(tmp_path / "plain.pkl"), "pickle that torch.save did not write")
    with zipfile.ZipFile(tmp_path / "big.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", "big")
    assert_says(refusal(tmp_path / "big.ckpt"), "big-endian")
