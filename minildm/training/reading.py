"""Before the denoising (--read-captions): the text encoder learns words that it has never seen, by predicting an
image's code from its caption. It is the second stage of pretraining, for the adapter of the text encoder alone.

A denoising loss hardly teaches it words, because a noisy image mostly shows itself (docs/pretraining.md has the
experiments). Here only the words carry information: least squares between the image's code and what a `CaptionReader`,
which is then discarded, predicts from the context.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minildm.distributed import alone, is_first, sum_over_processes
from minildm.errors import InputError
from minildm.layers import Attention, FeedForward, to_map
from minildm.optimizer import AdamW, clip_gradients
from minildm.progress import Progress
from minildm.seeds import seeded, to_device
from minildm.training.loss import sample_randomness

RATE, WARMUP = 1e-3, 50  # of a cosine schedule: the reader's learning rate; steps
ADAPTER = 10  # an adapter's, and a whole text encoder's, as a multiple of it: B starts at zero


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

    Of several processes the first one reads, and the others receive what it has learned.
    """
    trained = [parameter for name, parameter in method.trained().items() if name.startswith("text_encoder.")]
    if is_first():
        with alone():
            _read(task, trained, steps)
    else:
        torch._foreach_zero_([parameter.data for parameter in trained])
    sum_over_processes([parameter.data for parameter in trained])


def _read(task, trained, steps):
    model, seed = task.model, task.config.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, "weights", "caption reader").initial_seed())
        config = model.text_encoder.config
        reader = CaptionReader(config.width, config.n_heads, task.latent_shape[-1]).to(model.device)
    parameters = [*trained, *reader.parameters()]
    optimizer = AdamW(parameters, [ADAPTER] * len(trained) + [1] * (len(parameters) - len(trained)))

    def errors(batch, captions, rows):
        """(B,): the mean squared error of each sample's predicted code."""
        code = to_device(batch["mean"] * model.config.vae.scaling_factor, model.device)
        with task.products():
            predicted = reader(captions(batch, rows).float())
        return (predicted.float() - code).square().mean((1, 2, 3))

    for step, batch in enumerate(Progress("reading captions", "step", steps, task.batches(0, steps))):
        u = sample_randomness(seed, "caption", batch["id"], (1, 1, 1), 1).caption
        errors(batch, task.captions, task.captions.rows(batch["index"], u, task.config)).mean().backward()
        clip_gradients(parameters, 1.0)
        optimizer.step(RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for parameter in parameters:
            parameter.grad = None
    if not all(parameter.isfinite().all() for parameter in trained):
        raise InputError("the text encoder's weights are not finite after --read-captions; use --dtype float32")
