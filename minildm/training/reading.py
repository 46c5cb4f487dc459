"""Before the denoising (--read-captions): the text encoder learns words that it has never seen, by predicting an
image's code (its latent) from its caption. It is pretraining's second stage, for the text encoder or its adapter.

Denoising teaches it few words, because the noisy image gives most of the answer away (docs/pretraining.md has the
experiments). Here only the words carry information: least squares between the image's code and what a `CaptionReader`,
which is then discarded, predicts from the context.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from minildm.distributed import alone, is_first, sum_over_processes
from minildm.errors import InputError
from minildm.layers import Attention, FeedForward, to_map
from minildm.optimizer import AdamW, clip_gradients
from minildm.progress import Progress
from minildm.seeds import seeded, to_device
from minildm.training.loss import MOST_PAIRS, sample_randomness

RATE, WARMUP = 1e-3, 50  # the reader's highest learning rate, which then falls by a cosine; steps until it is reached
VALIDATIONS = 10
ADAPTER_FACTOR = 10  # adapters learn faster by this factor, because B starts at zero


class CaptionReader(nn.Module):
    """Predict an image's code from its caption: context (B, 77, D) -> (B, 4, side, side).

    A learned query for each of at most 8 x 8 patches attends to the words; its output is the patch's code. The reader
    trains the text encoder and is then discarded, like the image half of CLIP.
    """

    def __init__(self, dim, n_heads, side, n_layers=2):
        super().__init__()
        self.side, self.patch = side, math.ceil(side / 8)
        self.grid = math.ceil(side / self.patch)
        self.queries = nn.Parameter(torch.randn(self.grid**2, dim))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim),
                    "attention": Attention(dim, n_heads, dim),
                    "norm2": nn.LayerNorm(dim),
                    "mlp": FeedForward(dim),
                }
            )
            for _ in range(n_layers)
        )
        self.out = nn.Linear(dim, 4 * self.patch**2)

    def forward(self, context):
        x = self.queries.expand(len(context), -1, -1)  # (B, patches, D)
        for layer in self.layers:
            x = x + layer["attention"](layer["norm1"](x), context)
            x = x + layer["mlp"](layer["norm2"](x))
        code = F.pixel_shuffle(to_map(self.out(x), self.grid, self.grid), self.patch)
        return code[:, :, : self.side, : self.side]


def read_captions(task, method, steps):
    """Train the method's parameters in the text encoder for ``steps`` batches of the task; print how it went.

    With images to validate on, the values with the lowest held-out error are kept: on a few hundred images that error
    soon rises. Of several processes the first one reads, and the others receive what it has learned.
    """
    trained = [parameter for name, parameter in method.trained().items() if name.startswith("text_encoder.")]
    if is_first():
        with alone():
            _read(task, trained, 1 if method.float32_weights else ADAPTER_FACTOR, steps)
    else:
        torch._foreach_zero_([parameter.data for parameter in trained])
    sum_over_processes([parameter.data for parameter in trained])


def _read(task, trained, factor, steps):
    reader = _new_reader(task)
    parameters = [*trained, *reader.parameters()]
    optimizer = AdamW(parameters, [factor] * len(trained) + [1] * (len(parameters) - len(trained)))
    best, best_step, kept = math.inf, 0, None
    for step, batch in enumerate(Progress("reading captions", "step", steps, task.batches(0, steps))):
        u = sample_randomness(task.config.seed, "caption", batch["id"], (1, 1, 1), 1).caption
        rows = task.captions.rows(batch["index"], u, task.config)
        _errors(task, reader, batch, task.captions, rows).mean().backward()
        clip_gradients(parameters, 1.0)
        optimizer.step(RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for parameter in parameters:
            parameter.grad = None
        if task.validation_pairs and ((step + 1) % max(1, steps // VALIDATIONS) == 0 or step + 1 == steps):
            error = _held_out_error(task, reader)
            if error < best:
                best, best_step, kept = error, step + 1, [parameter.detach().clone() for parameter in trained]
    if kept is not None:
        torch._foreach_copy_([parameter.data for parameter in trained], kept)
        print(
            f"captions read: held-out squared error of the code {best:.4f}, best after {best_step:,} of {steps:,} steps"
        )
    if not all(parameter.isfinite().all() for parameter in trained):
        raise InputError("the text encoder's weights are not finite after --read-captions; use --dtype float32")


def _new_reader(task):
    config = task.model.text_encoder.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(task.config.seed, "weights", "caption reader").initial_seed())
        return CaptionReader(config.width, config.n_heads, task.latent_shape[-1]).to(task.model.device)


def _errors(task, reader, batch, captions, rows):
    """(B,): the mean squared error of each sample's predicted code."""
    code = to_device(batch["mean"] * task.model.config.vae.scaling_factor, task.model.device)
    with task.products():
        predicted = reader(captions(batch, rows).float())
    return (predicted.float() - code).square().mean((1, 2, 3))


@torch.no_grad()
def _held_out_error(task, reader):
    pairs, size, total = task.validation_pairs, task.batch_size, 0.0
    count = min(len(pairs), MOST_PAIRS)
    for first in range(0, count, size):
        batch = default_collate([pairs[i] for i in range(first, min(first + size, count))])
        total += _errors(task, reader, batch, task.validation_captions, batch["index"]).sum().item()
    return total / count
