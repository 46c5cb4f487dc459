"""What commands set before NumPy and torch are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {
    "GOMP_SPINCOUNT": "1000",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
SHOW = f"import os; print({{name: os.environ.get(name) for name in {tuple(OURS)}}})"


def run(code, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean | environment, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def prepared(**environment):
    return eval(run(f"from minildm.startup import prepare_process; prepare_process(); {SHOW}", **environment))


def test_threads_sleep_and_memory_is_kept_unless_the_user_says_otherwise():
    assert prepared() == OURS
    others = {"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_NUM_THREADS": "4", "THP_MEM_ALLOC_ENABLE": "0"}
    assert prepared(**others) == others | {"GOMP_SPINCOUNT": None}
    assert prepared(GOMP_SPINCOUNT="1000")["OMP_WAIT_POLICY"] is None


def test_a_library_leaves_the_process_alone():
    assert eval(run(f"import minildm, train, sample, minildm.__main__; {SHOW}")) == dict.fromkeys(OURS)


@pytest.mark.parametrize(
    ("file", "libraries"),
    [
        ("sample.py", {"torch"}),  # it multiplies no matrices of NumPy's
        ("train.py", {"torch", "numpy"}),
        ("minildm/__main__.py", {"torch", "numpy"}),
    ],
)
def test_each_command_prepares_its_process_before_the_libraries_with_threads_are_imported(file, libraries):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "\n    prepare_process()" in text
    before = text.split("\n    prepare_process()")[0]
    heads = [line for line in before.splitlines() if line.startswith(("import ", "from "))]
    assert run("\n".join([*heads, f"import sys; print({libraries} & {{*sys.modules}})"])) == "set()"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
@pytest.mark.parametrize("environment, mapped", [({}, "False"), ({"MALLOC_ARENA_MAX": "2"}, "True")])
def test_a_large_block_stays_with_the_process(environment, mapped):
    """glibc gives a block of 100 MB a mapping of its own, which it returns when the block is freed."""
    code = """
import ctypes
from minildm.startup import prepare_process
prepare_process()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = resident()
block = libc.malloc(ctypes.c_size_t(10**8))
ctypes.memset(ctypes.c_void_p(block), 1, 10**8)
assert resident() - before > 9 * 10**7
libc.free(ctypes.c_void_p(block))
print(resident() - before < 10**7)
"""
    assert run(code, **environment) == mapped
