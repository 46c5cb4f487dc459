"""Before the denoising (--read-captions): the text encoder learns words that it has never seen, by predicting an
image's code (its latent) from its caption.

Denoising teaches it few words, because the noisy image gives most of the answer away. Here only the words carry
information. The loss is that of generalized least squares:

    c       the code, averaged over patches to at most 16 x 16, as a vector (n,)
    m, S    mean and covariance of c, from at most 2,000 training images; S = U diag(l) U^T
    z       = (c - m) U / sqrt(l + mean l), times a constant: the whitened code                          `Whitening`
    loss    = |z - reader(context)|^2 / n; reader: one linear layer on the mean of the 77 tokens        `MeanReader`

The reader is discarded in the end. Both choices matter (docs/pretraining.md has the experiments). Whitening: a few
directions in which all chests differ (size, position, exposure) have most of the variance of c; a pacemaker has 2 % of
it, but 6 % of that of z. The linear reader: one that has to find each word by attention learns so slowly that
meanwhile the text encoder forgets words.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from minildm.distributed import alone, is_first, sum_over_processes
from minildm.errors import InputError
from minildm.optimizer import AdamW, clip_gradients
from minildm.progress import Progress
from minildm.seeds import seeded, to_device
from minildm.training.loss import MOST_PAIRS, sample_randomness

RATE, WARMUP = 3e-3, 50  # the highest learning rate, which then falls by a cosine; steps until it is reached
WHOLE_ENCODER = 1 / 3  # factor of the rate for it: adapters learn faster, because B starts at zero
VALIDATIONS = 10
SIDE = 16  # of the averaged code, at most: captions do not describe finer detail
MOST_CODES = 2000  # for the covariance


class Whitening:
    """c -> z of the codes c (N, n): each direction has variance l / (l + mean l), scaled so that their mean is 1.

    Directions of little variance, which are noise and badly estimated, stay small. Those that N codes do not reach are
    left out.
    """

    def __init__(self, codes):
        self.mean = codes.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov((codes - self.mean).t()))  # (n,) ascending, (n, n): columns
        variances = variances.clamp(min=1e-12)  # rounding
        raised = variances + variances.mean()
        self.matrix = directions / (raised * (variances / raised).mean()).sqrt()  # (n, n)
        self.matrix[:, : max(0, len(self.mean) - (len(codes) - 1))] = 0

    def __call__(self, codes):
        return (codes - self.mean) @ self.matrix


class MeanReader(nn.Linear):
    """Context (B, 77, D) -> whitened code (B, n), by a linear layer on the mean token. It predicts 0 at first."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, context):
        return super().forward(context.mean(1))


def read_captions(task, method, steps):
    """Train the method's parameters in the text encoder for ``steps`` batches of the task; print how it went.

    With images to validate on, the values with the lowest held-out error are kept: on a few hundred images that error
    soon rises. Of several processes the first one reads, and the others receive what it has learned.
    """
    trained = [parameter for name, parameter in method.trained().items() if name.startswith("text_encoder.")]
    if is_first():
        with alone():
            _read(task, trained, WHOLE_ENCODER if method.float32_weights else 1, steps)
    else:
        torch._foreach_zero_([parameter.data for parameter in trained])
    sum_over_processes([parameter.data for parameter in trained])


def _read(task, trained, factor, steps):
    whiten = _whitening(task)
    reader = MeanReader(task.model.text_encoder.config.width, len(whiten.mean), device=task.model.device)
    parameters = [*trained, *reader.parameters()]
    optimizer = AdamW(parameters, [factor] * len(trained) + [1] * (len(parameters) - len(trained)))
    before = best = _held_out_error(task, reader, whiten) if task.validation_pairs else math.inf
    best_step, kept = 0, [parameter.detach().clone() for parameter in parameters]
    for step, batch in enumerate(Progress("reading captions", "step", steps, task.batches(0, steps))):
        u = sample_randomness(task.config.seed, "caption", batch["id"], (1, 1, 1), 1).caption
        rows = task.captions.rows(batch["index"], u, task.config)
        _errors(task, reader, whiten, batch, task.captions, rows).mean().backward()
        clip_gradients(parameters, 1.0)
        optimizer.step(RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for parameter in parameters:
            parameter.grad = None
        if task.validation_pairs and ((step + 1) % max(1, steps // VALIDATIONS) == 0 or step + 1 == steps):
            error = _held_out_error(task, reader, whiten)
            if error < best:
                best, best_step, kept = error, step + 1, [parameter.detach().clone() for parameter in parameters]
    if task.validation_pairs:
        torch._foreach_copy_([parameter.data for parameter in parameters], kept)
        print(_outcome(before, best, best_step, steps))
    if not all(parameter.isfinite().all() for parameter in trained):
        raise InputError("the text encoder's weights are not finite after --read-captions; use --dtype float32")


def _outcome(before, best, best_step, steps):
    if best_step == 0:
        return (
            "note: the captions predict nothing about held-out images, so the text encoder stays as it was (a "
            "--text-encoder-rate above 0 trains it with the U-Net)"
        )
    return (
        f"captions read: they explain {100 * (1 - best / before):.1f} % of the variance of held-out whitened codes, "
        f"most after {best_step:,} of {steps:,} steps"
    )


def _code(task, means):
    """Moments' means (B, 4, h, w) -> codes (B, n), float32."""
    means = to_device(means * task.model.config.vae.scaling_factor, task.model.device).float()
    return F.avg_pool2d(means, math.ceil(means.shape[-1] / SIDE), ceil_mode=True).flatten(1)


def _whitening(task):
    order = torch.randperm(len(task.pairs), generator=seeded(task.config.seed, "codes"))[:MOST_CODES]
    return Whitening(torch.cat([_code(task, task.pairs[i]["mean"][None]) for i in order.tolist()]))


def _errors(task, reader, whiten, batch, captions, rows):
    """(B,): the mean squared error of each sample's predicted code."""
    with task.products():
        context = captions(batch, rows)  # (B, 77, D)
    return (reader(context.float()) - whiten(_code(task, batch["mean"]))).square().mean(1)


@torch.no_grad()
def _held_out_error(task, reader, whiten):
    pairs, size, total = task.validation_pairs, task.batch_size, 0.0
    count = min(len(pairs), MOST_PAIRS)
    for first in range(0, count, size):
        batch = default_collate([pairs[i] for i in range(first, min(first + size, count))])
        total += _errors(task, reader, whiten, batch, task.validation_captions, batch["index"]).sum().item()
    return total / count
