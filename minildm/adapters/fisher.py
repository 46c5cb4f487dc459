"""How much a layer's adapter learns, and how much one more rank would: Fisher information from the ordinary backward.

SeLoRA (arXiv:2408.07196) scores a layer by the empirical Fisher information of its adapter, Eq. 3 and 4: the sum over
lora_A and lora_B of the mean over samples of *squared per-sample gradients*. It grows a layer whose score, with one
more row K in A and one more zero column in B, is at least lambda times the score without. The paper's Eq. 5 prints this
ratio the other way up; its text, section 3.3 and lambda >= 1 all need expanded / original, which is computed here (and
in the authors' code).

The paper runs a second forward and backward with the expanded layers. That is not needed. Let G_i (out, in) be sample
i's gradient of the layer's weight, the sum over tokens of dy x^T, times the scale. Then

    d/dA = B^T G_i      d/dB = G_i A^T      d/d(new row k) = 0, as its column is zero      d/d(new column) = G_i k

and neither the forward nor another gradient changes. So the one ordinary backward gives

    ratio = 1 + mean ||G_i k||^2 / (mean ||G_i A^T||^2 + mean ||B^T G_i||^2),

from x and dy, without ever forming G_i. The expectation over k has a closed form, too: k uniform within 1 / sqrt(in)
has variance v = 1 / (3 in), so E ||G_i k||^2 = v ||G_i||_F^2.

A probe puts a `Tap` behind each adapted layer: it passes the output on unchanged and reads dy on the way back. The loss
must be sum_i weight_i loss_i / B over a batch of B samples, however it is cut into micro-batches or over processes.
"""

import contextlib

import torch

from minildm.adapters.inject import adapter_layers
from minildm.adapters.lora import kaiming_rows
from minildm.seeds import to_device


class Tap(torch.autograd.Function):
    """The identity on y, whose backward shows (x, dy) to a layer's probe."""

    @staticmethod
    def forward(ctx, y, x, layer_probe):
        ctx.save_for_backward(x)  # the layer keeps x as well; under checkpointing it is computed again
        ctx.layer_probe = layer_probe
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        ctx.layer_probe.add(x, dy)
        return dy, None, None


class LayerProbe:
    """Sums for one layer: squared per-sample gradients, and how many samples they came from.

    ``sums`` (3,) float64: of the adapter's own parameters, of what the tested rows would add, samples. They stay apart
    until the end, so that sums of micro-batches and processes add up exactly.
    """

    def __init__(self, layer, expansion, sums, expected, batch_size):
        self.layer, self.expansion, self.sums = layer, expansion, sums  # K, (in, k): one tested row per column
        self.expected, self.batch_size = expected, batch_size

    def add(self, x, dy):
        """Take in the samples of one backward: x (B, ..., in), dy (B, ..., out)."""
        n = len(x)
        x = x.reshape(n, -1, x.shape[-1]).to(dy.dtype)  # (B, L, in); L = 1 for the time embedding
        dy = dy.reshape(n, -1, dy.shape[-1])  # (B, L, out); the layer's scale comes at the end
        A, B = (factor.to(dy.dtype) for factor in self.layer.factors())  # (r, in), (out, r)
        dA = (dy @ B).transpose(1, 2) @ x  # (B, r, in) = B^T G_i
        rows = torch.cat([A, self.expansion.t().to(dy.dtype)])  # (r + k, in)
        dB = dy.transpose(1, 2) @ (x @ rows.t())  # (B, out, r + k) = G_i [A^T, K]
        if self.expected:
            added = self.expansion.shape[1] / (3 * x.shape[-1]) * weight_gradient_norm(x, dy)
        else:
            added = squares(dB[..., len(A) :])
        original = squares(dA) + squares(dB[..., : len(A)])
        # The loss divides by the global batch size: a sample's gradient is that many times its contribution here.
        size = n if self.batch_size is None else self.batch_size
        factor = (size * self.layer.scale) ** 2
        self.sums += torch.stack([factor * original, factor * added, torch.full_like(original, n)])


def squares(tensor):
    return tensor.double().square().sum()


def weight_gradient_norm(x, dy):
    """Sum over the batch of ||G_i||_F^2, G_i = sum over tokens dy x^T, by the cheaper of two ways: from G_i itself, or
    from pairs of tokens, sum of (dy_l . dy_m)(x_l . x_m)."""
    length, d_in, d_out = x.shape[1], x.shape[2], dy.shape[2]
    x, dy = x.float(), dy.float()  # in half precision the sum over pairs would cancel
    if length * (d_in + d_out) < d_in * d_out:
        return ((dy @ dy.transpose(1, 2)).double() * (x @ x.transpose(1, 2)).double()).sum()  # (B, L, L) each
    return squares(dy.transpose(1, 2) @ x)


class FisherProbe:
    """What `fisher_probe` measured. Module paths are those of the files, with ``unet.`` or ``text_encoder.``."""

    def __init__(self, layers, generator, expected, batch_size):
        device = next(iter(layers.values())).base.weight.device if layers else "cpu"
        self.sums = torch.zeros(len(layers), 3, dtype=torch.float64, device=device)  # one tensor: summed over processes
        self.layers = {}
        for sums, (path, layer) in zip(self.sums, layers.items()):
            expansion = to_device(kaiming_rows(1, layer.base.in_features, generator).t(), device)
            self.layers[path] = LayerProbe(layer, expansion, sums, expected, batch_size)

    def scores(self):
        """{module path: (original, expanded)}: the layer's Fisher score as it is, and with the tested rows added;
        expanded / original is SeLoRA's ratio."""
        return {
            path: (original / max(count, 1), (original + added) / max(count, 1))
            for path, (original, added, count) in zip(self.layers, self.sums.tolist())
        }

    def expansion(self, path):
        """The tested K of a layer, (in, k): what growth inserts."""
        return self.layers[path].expansion


def fisher_probe(model, generator=None, expected=False, batch_size=None):
    """Measure the live adapter (LoRA, SeLoRA or DyLoRA; the score of AdaLoRA's triplets is another) while one ordinary
    forward and backward (or several, whose samples add up) run inside the block.

    Args:
        generator: samples the tested rows; None = seeded with 0.
        expected: the expectation over all rows K that could be sampled, instead of one sampled K.
        batch_size: B, which the loss was divided by; None = the loss is the mean over the batch of each backward.
    Yields: FisherProbe. A factor of the loss (float16's loss scale) cancels in the ratio.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return probe_layers(adapter_layers(model), generator, expected, batch_size)


@contextlib.contextmanager
def probe_layers(layers, generator, expected, batch_size):
    """`fisher_probe` of {path: layer}."""
    probe = FisherProbe(layers, generator, expected, batch_size)

    def tap(layer_probe):
        return lambda layer, inputs, y: Tap.apply(y, inputs[0], layer_probe)

    hooks = [p.layer.register_forward_hook(tap(p)) for p in probe.layers.values()]
    try:
        yield probe
    finally:
        for hook in hooks:
            hook.remove()
