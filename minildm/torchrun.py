"""What torchrun tells a process in its environment: which of how many it is, its device, how it was started, and who
speaks. What the processes then do together is in distributed.py."""

import contextlib
import hashlib
import os
import sys
import traceback
import warnings
from datetime import timedelta

from minildm import errors
from minildm.errors import InputError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOST = "lost the connection to another process"
FAILED = {"code": 0, "resume": None}  # this process' exit code after an error; the command that continues its work


def launched():
    """Whether torchrun has started this process beside others; they may not have met yet (`join`)."""
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def only_the_first_speaks():
    """Silence all processes but the first; errors name their process. To be called before anything is printed."""
    if launched():
        errors.REPORT.append(_named)
        sys.excepthook = _traceback
        if os.environ["RANK"] != "0":
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
            warnings.simplefilter("ignore")


def shows_progress():
    """Whether this process shows progress: the first does, also before it has joined the others."""
    return not launched() or os.environ["RANK"] == "0"


def own_device(name):
    """The device of this process: of several on a machine each takes the GPU of its own number. ``name``: "cuda", ...

    Raises: InputError where there are too few, or where all would take the same.
    """
    if not launched() or not str(name).startswith("cuda"):
        return name
    import torch

    index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if str(name) not in ("cuda", f"cuda:{index}"):
        raise InputError(f"--device {name} is one GPU for all processes; give --device cuda: each takes its own")
    if index >= gpus:
        raise InputError(f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {gpus} GPUs; give torchrun "
                         f"--nproc-per-node {gpus}, or --device cpu")  # fmt: skip
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def launcher():
    """The words that start a script as this process was started: "python", or torchrun with its numbers."""
    if not launched():
        return "python"
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    hosts = "" if here == everywhere else f"--nnodes {-(-everywhere // here)} ... "  # what follows is the site's
    return f"torchrun {hosts}--nproc-per-node {here}"


def launch():
    """A name for this start of torchrun, the same after a failure (--max-restarts); None without torchrun."""
    if not launched():
        return None
    from minildm.files import MACHINE

    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" unless --rdzv-id or --standalone gives one
    return name if name != "none" else f"{MACHINE}-{os.getppid()}"


def without_torchrun(environment):
    """The environment for a process that works alone, though this one works beside others."""
    return {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")
            and name not in (*TORCHRUN, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE")}  # fmt: skip


# --- errors ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def resumable(command):
    """Inside, and after an error, messages of this process end with ``command``, which continues the work."""
    FAILED["resume"] = command
    yield
    FAILED["resume"] = None


def _named(message):
    """An error message with the name of this process, and the command to go on; None if another process has printed
    the same: what is wrong for all is said once."""
    FAILED["code"] = 130 if message == "interrupted" else 2
    if FAILED["resume"] and FAILED["resume"] not in message:
        message = f"{message}; continue with: {FAILED['resume']}"
    if LOST not in message and _said(message):
        return None
    rank, everywhere = int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
    return f"process {rank + 1} of {everywhere} (RANK {rank} on {os.uname().nodename}): {message}"


def _said(message):
    """Whether another process has said so, which torchrun's store knows."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    import torch

    key = f"minildm {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {hashlib.sha256(message.encode()).hexdigest()}"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = torch.distributed.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
        return store.add(key, 1) > 1
    except Exception:  # nobody can be asked: said twice is better than never
        return False


def _traceback(kind, error, trace):
    traceback.print_exception(kind, error, trace)
    if message := _named(f"error: {kind.__name__}"):
        print(message, file=sys.stderr)
