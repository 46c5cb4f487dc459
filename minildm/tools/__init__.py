"""Tools for adapters and checkpoints: what a file holds, merging adapters into a checkpoint, lowering their rank."""
