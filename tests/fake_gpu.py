"""A GPU without a GPU: tensors on "cuda" that have shapes and dtypes but no values, for tests of where tensors live and
of when the CPU waits.

Tensors on the CPU are real, so schedules, seeds and batches have their values. Those on the GPU are torch's fake
tensors. An operation that mixes the two is an error, as it is on a GPU. What makes the CPU wait for a GPU is noted in
`FakeGPU.waits`: values read, a copy from the GPU, and a copy to it, which first lets all queued work finish unless it
is ``non_blocking`` and from pinned memory.
"""

import collections
import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any
from torch.utils.checkpoint import GraphExecGroup

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


class FakeGPU(TorchDispatchMode):
    """Inside, "cuda" is a fake GPU. ``waits``: what the CPU waited for, a list of strings, in order.

    Values that are read from the GPU are 1, or True.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.pinned = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and function.namespace == "aten":
            with self:  # composite operations arrive as one
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        on_gpu = tree_any(lambda x: isinstance(x, FakeTensor), (args, kwargs))
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if function is aten._local_scalar_dense.default and on_gpu:
            self.waits.append("value read")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if not on_gpu and not to_gpu:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is aten._to_copy.default:
            self.note_copy(args[0], device or args[0].device, kwargs.get("non_blocking"))
        if function is aten.copy_.default:
            self.note_copy(args[1], args[0].device, args[2:3] == (True,))
        return function(*args, **kwargs)

    def note_copy(self, source, device, non_blocking):
        there, here = source.device.type, torch.device(device).type
        if there == here:
            return
        if not non_blocking or here == "cpu":
            self.waits.append(f"copy {there} -> {here}")
        elif source.data_ptr() not in [tensor.data_ptr() for tensor in self.pinned]:
            self.waits.append("copy of pageable memory")

    def pin_memory(self, tensor):
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def tolist(self, tensor):
        self.waits.append("values read")
        return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    """Inside, "cuda" is a fake GPU, on which ``backward`` works. Yields: FakeGPU."""
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), FakeGPU() as gpu:
        patch.setattr(FakeTensor, "backward", run_backward)
        patch.setattr(FakeTensor, "tolist", lambda x: gpu.tolist(x))
        patch.setattr(torch.Tensor, "pin_memory", lambda x: gpu.pin_memory(x))
        yield gpu


def to_gpu(model):
    """Put the parameters and buffers of a module on the fake GPU, whose context must be entered."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = parameter.detach().to(CUDA)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = buffer if buffer is None else buffer.to(CUDA)
    return model


def run_backward(loss):
    """``loss.backward()``, node by node: torch's own engine wants a real device."""
    with torch.no_grad(), GraphExecGroup():  # in one group, checkpointing computes a block again only once
        _run_backward(loss)


def _run_backward(loss):
    root = loss.grad_fn
    incoming = collections.Counter()  # edges into each node
    found, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                incoming[node] += 1
                if node not in found:
                    found.add(node)
                    stack.append(node)
    gradients = collections.defaultdict(dict)  # node -> {which of its outputs: the gradient so far}
    gradients[root][0] = torch.ones_like(loss)
    ready = [root]
    while ready:
        node = ready.pop()
        edges = [(after, place) for after, place in node.next_functions if after is not None]
        for (after, place), gradient in zip(edges, _gradients(node, gradients.pop(node, {}))):
            if gradient is not None:
                wanted = after._input_metadata[place]
                assert gradient.device == loss.device, f"{node} gives a gradient on {gradient.device}"
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                before = gradients[after].get(place)
                gradients[after][place] = gradient if before is None else before + gradient
            incoming[after] -= 1
            if not incoming[after]:
                ready.append(after)


def _gradients(node, outputs):
    """The gradients that a node passes on, one for each of its inputs that wants one."""
    if not outputs:
        return [None] * len(node.next_functions)
    arguments = [outputs.get(i) for i in range(len(node._input_metadata))]
    if hasattr(node, "apply"):  # of a torch.autograd.Function, whose inputs need not be tensors
        results = node.apply(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return [result for result, needed in zip(results, node.needs_input_grad, strict=True) if needed]
    results = node(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    return [result for result, (after, _) in zip(results, node.next_functions) if after is not None]
