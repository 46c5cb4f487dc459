"""Several processes that train together, as torchrun starts them. One process alone needs none of this."""

import torch


def sum_over_processes(tensors):
    """Add up each tensor over the processes, in place."""
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
