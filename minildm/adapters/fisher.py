"""How much a layer's adapter learns, and how much one more rank would: Fisher information from the ordinary backward.

SeLoRA (arXiv:2408.07196) scores a layer by the empirical Fisher information of its adapter, Eq. 3 and 4: the sum over
lora_A and lora_B of the mean over samples of *squared per-sample gradients*. It grows a layer whose score, with one
more row K in A and one more zero column in B, is at least lambda times the score without. The paper's Eq. 5 prints this
ratio the other way up; its text, section 3.3 and lambda >= 1 all need expanded / original, which is what we compute.

The paper runs a second forward and backward with the expanded layers. That is not needed. Let G_i (out, in) be sample
i's gradient of the layer's weight, the sum over tokens of dy x^T, times the scale. Then

    d/dA = B^T G_i      d/dB = G_i A^T      d/d(new row k) = 0, as its column is zero      d/d(new column) = G_i k

and neither the forward nor another gradient changes. So in the one ordinary backward

    ratio = 1 + mean ||G_i k||^2 / (mean ||G_i A^T||^2 + mean ||B^T G_i||^2),

from x and dy, without ever forming G_i: k is simply one more row of A in the product x A^T that the backward needs
anyway, and gradients are summed over the samples only after they have been squared. The expectation over k is known
too: k uniform within 1 / sqrt(in) has variance v = 1 / (3 in), so E ||G_i k||^2 = v ||G_i||_F^2.
"""

import contextlib

import torch

from minildm.adapters.lora import LoRALinear, kaiming_rows


class LayerProbe:
    """Sums for one layer while a probe is open: squared per-sample gradients, and how many samples they came from.

    Sums and counts stay apart until the end, so that micro-batches and the ranks of a distributed run add up exactly.
    """

    def __init__(self, expansion, expected):
        self.expansion = expansion  # K, (in, k): one tested row a column
        self.expected = expected
        self.sums = torch.zeros(2, dtype=torch.float64, device=expansion.device)  # of the adapter, of what K would add
        self.count = 0

    def gradients(self, x, g, dh, A, first):
        """The adapter's gradients, and on the way the squares of each sample's own.

        Args: x (B, L, in); g = scale dy (B, L, out); dh = g B (B, L, rank); A (rank, in); first: K is tested here (a
            layer of several blocks passes here once a block).
        Returns: dA (rank, in), dB (out, rank), summed over the batch.
        """
        own, rank = len(x), len(A)
        rows = torch.cat([A, self.expansion.t()]).to(x.dtype)  # (rank + k, in)
        dA = dh.transpose(1, 2) @ x  # (B, rank, in) = B^T G_i
        dB = g.transpose(1, 2) @ (x @ rows.t())  # (B, out, rank + k) = G_i [A^T, K]
        # The loss is a mean over the batch: a sample's own gradient is B times what it contributes to it.
        self.sums[0] += own**2 * (_squares(dA) + _squares(dB[..., :rank]))
        if first:
            self.count += own
            self.sums[1] += own**2 * (
                _weight_gradient_norm(x, g) / (3 * x.shape[-1]) * self.expansion.shape[1]
                if self.expected
                else _squares(dB[..., rank:])
            )
        return dA.sum(0), dB[..., :rank].sum(0)

    def score(self):
        """(original, expanded): the layer's Fisher score as it is, and with the tested rows added."""
        original, added = (self.sums / max(self.count, 1)).tolist()
        return original, original + added


def _squares(tensor):
    return tensor.double().square().sum()


def _weight_gradient_norm(x, g):
    """Sum over the batch of ||G_i||_F^2, G_i = sum over tokens g x^T, by the cheaper of two ways: itself, or
    sum over pairs of tokens (g_l . g_m)(x_l . x_m)."""
    length, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
    if length * (d_in + d_out) < d_in * d_out:
        return ((g @ g.transpose(1, 2)).double() * (x @ x.transpose(1, 2)).double()).sum()  # (B, L, L) each
    return _squares(g.transpose(1, 2) @ x)


class FisherProbe:
    """What `fisher_probe` measured. Module paths are those of the files, with ``unet.`` or ``text_encoder.``."""

    def __init__(self, probes):
        self.probes = probes

    def scores(self):
        """{module path: (original, expanded)}; expanded / original is SeLoRA's ratio."""
        return {path: probe.score() for path, probe in self.probes.items()}

    def expansion(self, path):
        """The tested K of a layer, (in, k): what growth inserts."""
        return self.probes[path].expansion


@contextlib.contextmanager
def fisher_probe(model, generator=None, expected=False):
    """Measure while one ordinary forward and backward (or several, whose samples add up) run inside the block.

    Args:
        generator: draws the tested rows; None = seeded 0.
        expected: the expectation over all rows that could be drawn instead of the row that was: no luck in the test.
    Yields: FisherProbe. The loss must be a mean over the batch's samples; its scale cancels in the ratio.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    for layer in layers.values():
        row = kaiming_rows(1, layer.base.in_features, generator).to(layer.base.weight.device)
        layer.probe = LayerProbe(row.t(), expected)
    try:
        yield FisherProbe({path: layer.probe for path, layer in layers.items()})
    finally:
        for layer in layers.values():
            layer.probe = None
