"""Stage 2: the text encoder learns to predict an image's code from its caption; from then on it is frozen, as CLIP's is
in Stable Diffusion. (The latent diffusion paper trains its own together with the U-Net.)

On procedural images, 6,000 steps of denoising taught a text encoder which colours to draw, but not which of two shapes
is above. In 2,000 steps of this, two minutes, it learns that, and a U-Net uses it as soon as it draws shapes at all. A
likely reason: here only the words carry the information, while a noisy image mostly shows itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from minildm.data.loader import TrainingPairs, training_batches
from minildm.data.splits import classes_of
from minildm.images import FROM_DATA, contact_sheet, save_png
from minildm.latent_diffusion import to_pil
from minildm.layers import Attention, FeedForward, to_map
from minildm.pretraining.stage import low_precision
from minildm.seeds import seeded
from minildm.training.loss import Captions, sample_randomness
from minildm.training.task import Task


class CaptionReader(nn.Module):
    """The image's code that a caption describes: context (B, 77, D) -> (B, 4, side, side).

    A learnt query for each of at most 8 x 8 patches attends to the words and answers with the patch's code. It trains
    the text encoder and is then thrown away, as the image half of CLIP is.
    """

    def __init__(self, dim, n_heads, side, n_layers=2):
        super().__init__()
        self.side, self.patch = side, math.ceil(side / 8)
        self.grid = math.ceil(side / self.patch)
        self.places = nn.Parameter(torch.randn(self.grid**2, dim))
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
        x = self.places.expand(len(context), -1, -1)  # (B, places, D)
        for layer in self.layers:
            x = x + layer["attention"](layer["norm1"](x), context)
            x = x + layer["mlp"](layer["norm2"](x))
        code = F.pixel_shuffle(to_map(self.out(x), self.grid, self.grid), self.patch)
        return code[:, :, : self.side, : self.side]


class CaptionReading(Task):
    """Least squares between an image's code and what a CaptionReader makes of its caption.

    Args: training, held_out: Samples. side: of the latents. dtype: of products.
    ``networks``: the module to train, text encoder (without its word vectors) and reader.
    """

    def __init__(self, model, training, held_out, config, side, dtype, balance=None, workers=0):
        self.model, self.config, self.dtype, self.workers = model, config, dtype, workers
        self.batch_size, self.validation_interval = config.batch_size, config.validation_interval
        encoder = model.text_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(config.seed, "weights", "caption reader").initial_seed())
            self.reader = CaptionReader(encoder.config.width, encoder.config.n_heads, side).to(model.device)
        self.networks = nn.ModuleDict({"text_encoder": encoder, "reader": self.reader}).requires_grad_(True)
        encoder.text_model.embeddings.token_embedding.requires_grad_(False)
        self.training = TrainingPairs(training.records, training.prompts, latents=training.latents)
        self.held_out = TrainingPairs(held_out.records, held_out.prompts, latents=held_out.latents)
        self.captions, self.held_out_captions = Captions(model, training.prompts), Captions(model, held_out.prompts)
        self.classes = None if balance is None else classes_of(training.records, balance)

    def batches(self, first_step, last_step):
        size = self.batch_size
        return training_batches(
            self.training, size, self.config.seed, first_step, last_step, self.workers, self.classes
        )

    def read_codes(self, captions, batch, dropped):
        """(codes as read from the captions, true codes), each (B, 4, h, w), scaled."""
        with low_precision(self.model.device, self.dtype):
            codes = self.reader(captions(batch, dropped))
        return codes.float(), (batch["mean"] * self.model.config.vae.scaling_factor).to(self.model.device)

    def losses(self, batch):
        randomness = sample_randomness(self.config.seed, "caption", batch["id"], (1, 1, 1), 1)
        codes, true = self.read_codes(self.captions, batch, randomness.caption < self.config.caption_dropout)
        return (codes - true).square().mean((1, 2, 3))

    def held_out_codes(self, size, count):
        for first in range(0, count, size):
            batch = default_collate([self.held_out[i] for i in range(first, min(first + size, count))])
            yield self.read_codes(self.held_out_captions, batch, torch.zeros(len(batch["index"]), dtype=torch.bool))

    @torch.no_grad()
    def validate(self):
        size, count = self.config.micro_batch or self.batch_size, len(self.held_out)
        errors = [(codes - true).square().mean((1, 2, 3)).double() for codes, true in self.held_out_codes(size, count)]
        return sum(error.sum().item() for error in errors) / count

    @torch.no_grad()
    def sample_sheet(self, path):
        """Held-out images, each followed by what its caption says."""
        codes, true = next(self.held_out_codes(8, min(8, len(self.held_out))))
        pairs = torch.stack([true, codes], 1).flatten(0, 1)
        images = self.model.decode_latents(pairs)
        save_png(contact_sheet(to_pil(images)), path, f"images and what their captions say, {path.stem}", FROM_DATA)
