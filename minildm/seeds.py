"""Random numbers: each use has its own generator, seeded by its purpose."""

import hashlib

import torch


def seeded(*purpose):
    """A torch.Generator("cpu") whose seed depends only on ``purpose``, such as ``seeded(seed, "sample", 12)``."""
    digest = hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
