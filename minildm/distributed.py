"""Several processes that work together, as torchrun starts them. One process alone needs none of this: each function
below then returns at once.

    torchrun --nproc-per-node 4 train.py ...        NCCL between GPUs, one for each process; gloo between CPUs

Training is data-parallel, and B is the *global* batch. Each process holds the whole model and takes its `share` of the
batch's positions; shares may differ in size and may be empty. As the step's loss is sum_i weight_i loss_i / B, the sum
of all processes' gradients is the gradient of one process with the whole batch. `sum_over_processes` adds up the loss,
the gradients and a method's statistics before anything is computed from them. So all processes see the same numbers,
decide alike (is the step finite, which layer grows), take the same step, and keep the same weights to the last bit,
which `require_same` checks whenever a state is saved: devices of one kind are needed.
All randomness is a function of seed and sample, whichever process has it: another number of processes changes rounding
only.

The first process alone reads and writes the run's folder (`from_first` tells the others what it found), prints and
shows progress. An error is printed by the process that failed, with its name (torchrun.py).

Settings: the environment variable MINILDM_TIMEOUT, the seconds that a process waits for the others before it ends with
an error (default: 1800). A process that dies is noticed at once; only a lost network takes that long.
"""

import atexit
import contextlib
import io
import os
import pickle
import re
import sys
import time
from datetime import timedelta

from minildm.errors import InputError, is_out_of_memory
from minildm.torchrun import FAILED, LOST, launched

BUCKET_BYTES = 256 << 20  # summed at a time: the spare memory of a sum, and enough for any network's full rate
TIMEOUT = "MINILDM_TIMEOUT"
GROUP = {"index": 0, "count": 1}  # of this process, once it has joined the others


# --- the group -------------------------------------------------------------------------------------------------------
def join(seconds=None):
    """Meet the other processes that torchrun has started, if any. ``seconds``: to wait for them, also later on."""
    if not launched() or GROUP["count"] > 1:
        return
    import torch

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=_timeout() if seconds is None else seconds)
    index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with _together():
        store = _meeting(index, count, timeout)
        torch.distributed.init_process_group(backend, store=store, rank=index, world_size=count, timeout=timeout)
    GROUP.update(index=index, count=count)
    atexit.register(_leave)


def _leave():
    """The last thing this process does: close the connections; after an error, end at once, as threads of gloo and NCCL
    may wait for processes that are gone."""
    import torch

    if not FAILED["code"]:
        torch.distributed.destroy_process_group()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED["code"])


def _meeting(index, count, timeout):
    """The store in which the processes leave their addresses: torchrun's, under a name of this start alone.

    After a failure torchrun starts processes anew but keeps its store, with the addresses of the dead ones, and hosts
    may count the starts differently. So the first process makes up a name, the others answer with a word of their own,
    and the name holds for those whose word the first repeats.
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, word, answered = next(rendezvous("env://", timeout=timeout))[0], os.urandom(16).hex(), None
    if index == 0:
        store.set("minildm", word)
        words = [store.get(f"{word} {other}") for other in range(1, count)]  # waits for each
        store.set(f"{word} met", b" ".join(words))
        return PrefixStore(word, store)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        name = store.get("minildm").decode()
        if name != answered:
            store.set(f"{name} {index}", word)
            answered = name
        if store.check([f"{name} met"]) and word.encode() in store.get(f"{name} met").split():
            return PrefixStore(name, store)
        time.sleep(0.02)
    raise RuntimeError(f"the first process did not answer within {timeout.total_seconds():g} s")


def count():
    """The number of processes that have joined; 1 for a process alone."""
    return GROUP["count"]


def is_first():
    return GROUP["index"] == 0


@contextlib.contextmanager
def alone():
    """Inside, this process works by itself, though it has joined others."""
    joined = GROUP["index"], GROUP["count"]
    GROUP.update(index=0, count=1)
    try:
        yield
    finally:
        GROUP.update(index=joined[0], count=joined[1])


def _timeout():
    text = os.environ.get(TIMEOUT, "1800")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e8:
        raise InputError(f"the environment variable {TIMEOUT} must be a number of seconds, at least 1, got {text!r}")
    return seconds


# --- what processes do together --------------------------------------------------------------------------------------
def share(items):
    """This process' part of a sequence, cut into consecutive parts as equal as can be."""
    n, i, parts = len(items), GROUP["index"], GROUP["count"]
    return items[n * i // parts : n * (i + 1) // parts]


def share_size(n):
    """The size of the largest share of n."""
    return -(-n // GROUP["count"])


def turns(items):
    """This process' part of a sequence, dealt out in turns: i, i + N, i + 2 N, ..."""
    return items[GROUP["index"] :: GROUP["count"]]


def own_first(items):
    """The whole sequence, from this process' share on: all of several processes begin at different places."""
    start = len(items) * GROUP["index"] // GROUP["count"]
    return items[start:] + items[:start]


def sum_over_processes(tensors):
    """Add up each tensor over the processes, in place, and to the same bits in all of them.

    Tensors of one type travel as one flat buffer, or as several of up to 256 MiB.
    """
    if GROUP["count"] == 1:
        return
    import torch

    for bucket in buckets(tensors, BUCKET_BYTES):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with _together():
            torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view(tensor.shape) for part, tensor in zip(parts, bucket)])
        del flat, parts  # before the next bucket is joined


def sum_gradients(parameters, others):
    """Add up the parameters' gradients and the tensors ``others`` over the processes, in place. A parameter without a
    gradient in any of them still has none afterwards, so the optimizer leaves it alone, as in one process."""
    import torch

    missing = [i for i, parameter in enumerate(parameters) if parameter.grad is None]
    had = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    for i in missing:  # all processes sum the same tensors, whatever share of the batch each has
        parameters[i].grad = torch.zeros_like(parameters[i])
    had = had.to(parameters[0].device)
    sum_over_processes([had, *others, *(parameter.grad for parameter in parameters)])
    if missing:
        for i, n in enumerate(had.tolist()):
            if n == 0:
                parameters[i].grad = None


def buckets(tensors, most_bytes):
    """Lists of tensors of one type and device, in order, of at most ``most_bytes`` each (or a single larger tensor)."""
    found, filled = {}, {}
    for tensor in tensors:
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        if kind not in found or filled[kind] + size > most_bytes:
            found.setdefault(kind, []).append([])
            filled[kind] = 0
        found[kind][-1].append(tensor)
        filled[kind] += size
    return [bucket for lists in found.values() for bucket in lists]


def on_any_process(flag):
    """Whether ``flag`` is true in any process."""
    if GROUP["count"] == 1:
        return bool(flag)
    import torch

    total = torch.tensor([int(bool(flag))])
    with _together():
        torch.distributed.all_reduce(total)
    return bool(total.item())


def wait_for_all():
    """Return when all processes are here."""
    on_any_process(False)


def require_same(tensors):
    """Raise InputError unless these float32 tensors are the same in all processes, to the last bit."""
    if GROUP["count"] == 1:
        return
    import torch

    sums = [tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
    sums = torch.stack(sums).cpu()
    extremes = torch.cat([sums, -sums])  # (2 n,): the largest, and the smallest with its sign turned
    with _together():
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
    if not torch.equal(extremes[: len(sums)], -extremes[len(sums) :]):
        raise InputError("the processes' weights have drifted apart, as they do where devices round differently; train "
                         "on devices of one kind, with one version of torch")  # fmt: skip


def from_first(function):
    """What ``function()`` returns in the first process, in all of them; only the first calls it.

    If it raises there, the others end without a word. Tensors are sent one by one, so memory holds them once.
    """
    if GROUP["count"] == 1:
        return function()
    import torch

    tensors, message = [], [None]
    if is_first():
        try:
            message = [_packed(function(), tensors)]
        except BaseException:
            with contextlib.suppress(Exception):
                torch.distributed.broadcast_object_list([None], device=torch.device("cpu"))
            raise
    with _together():
        torch.distributed.broadcast_object_list(message, device=torch.device("cpu"))
        if message[0] is None:
            FAILED["code"] = 2
            raise SystemExit(2)
        data, shapes = message[0]
        if not is_first():
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
    return _Unpickler(data, tensors).load()


def gather_to_first(value):
    """The ``value`` of each process, in their order, in the first process; None in the others."""
    if GROUP["count"] == 1:
        return [value]
    import torch

    values = [None] * GROUP["count"] if is_first() else None
    with _together():
        torch.distributed.gather_object(value, values)
    return values


def _packed(value, tensors):
    """``value`` as (bytes, [(shape, dtype)] of its tensors); the tensors themselves are appended to ``tensors``."""
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, part):
            if not isinstance(part, torch.Tensor):
                return None
            tensors.append(part.detach().cpu().contiguous())
            return len(tensors) - 1

    with io.BytesIO() as file:
        Pickler(file).dump(value)
        return file.getvalue(), [(tensor.shape, tensor.dtype) for tensor in tensors]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data, tensors):
        super().__init__(io.BytesIO(data))
        self.tensors = tensors

    def persistent_load(self, i):
        return self.tensors[i]


@contextlib.contextmanager
def _together():
    """Inside, an error of torch means that another process has ended, or cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or "CUDA error" in str(error):  # of work before, noticed here
            raise
        reason = re.sub(r"^\[[^]]*\] ", "", str(error)).partition("\n")[0].partition(". ")[0][:160]
        raise InputError(f"{LOST}, which has ended or cannot be reached ({reason})") from None
