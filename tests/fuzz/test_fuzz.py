"""Damaged and hostile input, a seeded fuzzer: every case ends well or with the project's own error, within seconds and
with bounded memory.

    python -m pytest tests/fuzz                 a few cases of each target
    python -m pytest tests/fuzz -m stress       thousands
    python tests/fuzz/test_fuzz.py 500 images   tries and faults of the targets named; the faults with their numbers
"""

import collections
import contextlib
import io
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]  # also when run as a script
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from targets import TARGETS  # noqa: E402

from minildm.errors import InputError  # noqa: E402

ALLOWED = (InputError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
SECONDS, MEMORY = 5, 4 << 30  # per case: seconds, bytes of address space beyond what is used


def fuzz(target, cases, seed=0):
    """Run ``cases`` cases. Returns: the faults, [(number of the case, exception as text), ...]."""
    rng, faults = random.Random(f"{target} {seed}"), []
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(TARGETS[target](Path(folder), rng)) as stream:
        for number in range(cases):
            case = next(stream)
            try:
                with limited(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    with contextlib.redirect_stderr(io.StringIO()):
                        case()
            except ALLOWED:
                pass
            except SystemExit as end:
                if end.code not in (0, 2, None):
                    faults.append((number, f"exit code {end.code}"))
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}, line {place.lineno}"
                faults.append((number, f"{type(error).__name__}: {str(error)[:100]} ({where})"))
    return faults


@contextlib.contextmanager
def limited():
    """Inside, a case that hangs or allocates too much ends with TimeoutError or MemoryError."""

    def stop(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_gives_the_projects_own_errors(target):
    assert fuzz(target, 20) == []


@pytest.mark.stress
@pytest.mark.parametrize("target", TARGETS)
def test_thousands_of_damaged_inputs_give_the_projects_own_errors(target):
    assert fuzz(target, 1000, seed=1) == []


def main(cases="200", *targets):
    for target in targets or TARGETS:
        faults = fuzz(target, int(cases), seed=1)
        print(f"{target}: {cases} cases, {len(faults)} faults", flush=True)
        kinds = collections.Counter(text for _, text in faults)
        for text, count in kinds.most_common(8):
            print(f"  {count} x {text}, case {next(n for n, t in faults if t == text)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
