"""The machine a run runs on: device and precision, stop signals, memory and its forecast, activation checkpointing."""

import contextlib
import functools
import platform
import resource
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from minildm import kernels
from minildm.distributed import count, from_first, share_size
from minildm.errors import InputError, is_out_of_memory
from minildm.layers import ResnetBlock, SpatialTransformer
from minildm.record import machine_of
from minildm.settings import Settings, setting
from minildm.text_encoder import EncoderLayer
from minildm.torchrun import launch, launched
from minildm.winograd import transformed_bytes

ECHO = 5.0  # seconds
CACHE = Path.home() / ".cache" / "minildm"


@dataclass(frozen=True)
class Machine(Settings):
    """What a run takes from its machine. All but ``plain`` may differ when it is resumed."""

    device: str | None = setting(None, "cpu, cuda, ... (default: a GPU where there is one)")
    workers: int = setting(0, "processes that read ahead", at_least=0)
    cache: Path = setting(CACHE, "folder for latents and contexts")
    plain: bool = setting(False, "only the textbook code: slower, the same up to rounding; a resumed run keeps it")
    compile: bool = setting(
        False, "compile the networks: slow to start, and when a layer's rank passes 8, 16, ...; then faster on a GPU"
    )

    def products(self, dtype, device, run):
        """ "float32" if the products of a run in bfloat16 are computed in float32, which is faster on some CPUs; else
        None. A resumed run keeps its choice."""
        if run.resume:
            return run.found("products")
        faster = from_first(lambda: not (self.plain or self.compile) and kernels.float32_is_faster(dtype, device))
        return "float32" if faster else None


# --- memory ----------------------------------------------------------------------------------------------------------
def blocks(network):
    """The residual and transformer blocks of a network."""
    kinds = (ResnetBlock, SpatialTransformer, EncoderLayer)
    return [module for module in network.modules() if isinstance(module, kinds)]


def checkpoint_blocks(*networks):
    """Keep only each block's input for the backward, and compute the block once more there (Chen et al. 2016,
    arXiv:1604.06174): a third more time, a fraction of the memory."""
    for network in networks:
        for block in blocks(network):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


SPARE = 1.15  # activations: allowance for allocator and kernel overhead


def forecast(model, one_sample_loss, config):
    """(bytes of a step at its peak, bytes that are free): free is None where the system does not say.

    One sample's forward is run, and the activations that autograd would keep are counted, not kept. The weights that
    Winograd's algorithm transforms for it (`kernels.lean` says which) stay, and count.
    Args: one_sample_loss: () -> the loss of one sample. Call before `checkpoint_blocks`.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept, inputs, largest = activations(model, one_sample_loss)
    sample = inputs + largest if config.checkpointing else kept
    copies = 4 if config.ema_decay else 3  # gradient, Adam's two means, and the moving average
    needed = weights + copies * trained + SPARE * (config.micro_batch or share_size(config.batch_size)) * sample
    needed += transformed_bytes(model)
    return int(needed), free_memory(model.device, weights)


def disk_forecast(model, method, config, folder):
    """(bytes that the run writes at its peak, bytes that are free in its folder).

    A state holds the trained weights, Adam's two means and the moving average. It is written beside the one before, and
    so is the result: the trained weights, or the whole model where the result is a model.
    """
    trained = sum(p.numel() * p.element_size() for p in method.trained().values())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    state, result = (4 if config.ema_decay else 3) * trained, whole if method.float32_weights else trained
    result *= 2 if getattr(method.settings, "single_file", False) else 1
    return 2 * (state + result), shutil.disk_usage(folder).free


def activations(model, one_sample_loss):
    """(bytes autograd keeps for one sample, bytes of the blocks' inputs and of what lies between blocks, bytes of the
    block that keeps most)."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    bytes_of, inputs, at = {None: 0}, [0], [None]
    kept = {}  # of the present block: what several layers keep counts once (q, k and v keep one x)

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and place not in kept:
            kept[place] = tensor
            bytes_of[at[0]] = bytes_of.get(at[0], 0) + tensor.numel() * tensor.element_size()
        # Nothing is kept beyond its block: there will be no backward.

    def enter(block, arguments):
        kept.clear()
        at[0] = block
        inputs[0] += arguments[0].numel() * arguments[0].element_size()

    def leave(block, arguments, output):
        kept.clear()
        at[0] = None

    handles = [
        handle
        for network in (model.unet, model.text_encoder)
        for block in blocks(network)
        for handle in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            one_sample_loss()
    finally:
        for handle in handles:
            handle.remove()
    between = bytes_of.pop(None)
    return sum(bytes_of.values()) + between, inputs[0] + between, max(bytes_of.values(), default=0)


def free_memory(device, used):
    """Bytes this process may have in all, ``used`` of which it has already; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(free.split()[1]) * 1024 + used


def peak_memory_mb(model):
    """The peak so far in MB: of the GPU's allocator, or of this process (from /proc where there is one: getrusage
    counts what a parent process held when it started this one)."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6


@contextlib.contextmanager
def helpful_out_of_memory(config):
    """Turn an out-of-memory error into one that names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError("out of memory; " + memory_advice(config)) from None


def memory_advice(config):
    """The flags that lower the memory of a step, those that keep the result first."""
    at_a_time = config.micro_batch or share_size(config.batch_size)
    flags = [f"--micro-batch {max(at_a_time // 2, 1)} (same result)"] * (at_a_time > 1)
    flags += ["--checkpointing (same result, slower)"] * (not config.checkpointing)
    return "what helps: " + ", ".join([*flags, "in a new run --dtype bfloat16", "a smaller --size"])


# --- what a run says of the machine ----------------------------------------------------------------------------------
def session_facts(device, command):
    """What sessions.jsonl says of a process that trains: when, by which command, where and with which versions."""
    facts = machine_of(device)
    facts["machine"] |= {"name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()}
    if device.type == "cuda" and (watts := _power_limit(device)):
        facts["machine"]["power_limit_watts"] = watts
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts |= {"processes": count(), "launch": launch()} if count() > 1 else {}
    return {"started": started, "command": command, "python": platform.python_version(), **facts}


def _cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _power_limit(device):
    """The power limit of a GPU in watts, as NVIDIA's tool gives it; None without the tool."""
    index = str(torch.cuda.current_device() if device.index is None else device.index)
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "-i", index]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


# --- signals ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def stop_requests():
    """Ctrl-C and SIGTERM ask for an end between two steps: the yielded list is then not empty. A second one does not
    wait. (Under torchrun it may be the same one, which torchrun passes on: it counts after ECHO seconds.)"""
    requests, before = [], {}

    def request(number, frame):
        if requests and not (launched() and time.monotonic() < requests[0] + ECHO):
            raise KeyboardInterrupt
        requests.append(time.monotonic())

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
