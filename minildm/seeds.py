"""Seeds: every random number has a generator of its own, made from what it is for."""

import hashlib

import torch


def seeded(*purpose):
    """A torch.Generator("cpu") that depends on ``purpose`` alone: ``seeded(seed, "sample", 12)``."""
    digest = hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
