"""How much memory a training step will take, measured before the first: one sample's forward, whose activations are
weighed as autograd asks for them and not kept."""

from pathlib import Path

import torch

from minildm.training.loss import blocks

SPARE = 1.15  # what allocators and kernels take besides


def forecast(model, one_sample_loss, config):
    """(bytes of a step at its peak, bytes that are free): free is None where the system does not say.

    Args: one_sample_loss: () -> the loss of one sample. Call before `checkpoint_blocks`.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept, inputs, largest = activations(model, one_sample_loss)
    sample = inputs + largest if config.checkpointing else kept
    needed = weights + 3 * trained + config.samples_at_a_time * sample  # 3: gradient and Adam's two means
    return int(SPARE * needed), free_memory(model.device, weights)


def activations(model, one_sample_loss):
    """(bytes autograd keeps for one sample, bytes of the blocks' inputs and of what lies between blocks, bytes of the
    block that keeps most)."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    bytes_of, inputs, at = {None: 0}, [0], [None]
    kept = {}  # of the present block: what several layers keep counts once (q, k and v keep one x)

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in own and place not in kept:
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
