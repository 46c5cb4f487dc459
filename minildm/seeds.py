"""Random numbers: each use has its own generator, seeded by its purpose, on the CPU; and the way to the device."""

import hashlib

import torch


def seeded(*purpose):
    """A torch.Generator("cpu") whose seed depends only on ``purpose``, such as ``seeded(seed, "sample", 12)``."""
    digest = hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def to_device(tensor, device, dtype=None):
    """``tensor.to(device, dtype)`` without a wait: a plain copy from the CPU to a GPU waits until all work queued there
    is done; one from pinned memory does not."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
