"""Stage 2: the text encoder learns to predict an image's code from its caption. It is then frozen, as CLIP's is in
Stable Diffusion. (The latent diffusion paper trains its text encoder together with the U-Net.)

On procedural images, 6,000 steps of denoising taught a text encoder which colours to generate, but not which of two
shapes is above. In 2,000 steps of this stage, two minutes, it learns that, and a U-Net uses it as soon as it generates
shapes at all. A likely reason: here only the words carry information, while a noisy image mostly shows itself.
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
from minildm.seeds import seeded, to_device
from minildm.training.loss import Captions, sample_randomness
from minildm.training.task import Task


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


class CaptionReading(Task):
    """Least squares between an image's code and a CaptionReader's prediction from its caption.

    Args:
        training, held_out: Samples. dtype: of products.
        balance: a caption field whose classes come equally often, or None. workers: processes that read ahead.
    Attributes:
        networks: the module to train: the text encoder, without its word vectors, and the reader.
    """

    def __init__(self, model, training, held_out, config, dtype, balance=None, workers=0):
        self.model, self.config, self.dtype, self.workers = model, config, dtype, workers
        self.batch_size, self.validation_interval = config.batch_size, config.validation_interval
        self.training = TrainingPairs(training.records, training.prompts, latents=training.latents)
        self.held_out = TrainingPairs(held_out.records, held_out.prompts, latents=held_out.latents)
        self.captions, self.held_out_captions = Captions(model, training.prompts), Captions(model, held_out.prompts)
        self.classes = None if balance is None else classes_of(training.records, balance)
        encoder, side = model.text_encoder, self.training[0]["mean"].shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(config.seed, "weights", "caption reader").initial_seed())
            self.reader = CaptionReader(encoder.config.width, encoder.config.n_heads, side).to(model.device)
        self.networks = nn.ModuleDict({"text_encoder": encoder, "reader": self.reader}).requires_grad_(True)
        encoder.text_model.embeddings.token_embedding.requires_grad_(False)

    def batches(self, first_step, last_step):
        seed, size = self.config.seed, self.batch_size
        return training_batches(self.training, size, seed, first_step, last_step, self.workers, self.classes)

    def predict(self, captions, batch, rows):
        """(predicted codes, true codes), each (B, 4, h, w), scaled."""
        true = to_device(batch["mean"] * self.model.config.vae.scaling_factor, self.model.device)
        with low_precision(self.model.device, self.dtype):
            codes = self.reader(captions(batch, rows))
        return codes.float(), true

    def losses(self, batch):
        randomness = sample_randomness(self.config.seed, "caption", batch["id"], (1, 1, 1), 1)
        codes, true = self.predict(
            self.captions, batch, self.captions.rows(batch["index"], randomness.caption, self.config)
        )
        return (codes - true).square().mean((1, 2, 3))

    @torch.no_grad()
    def held_out_codes(self, batch_size, count):
        """Batches of (predicted codes, true codes) of the first ``count`` held-out samples."""
        for first in range(0, count, batch_size):
            batch = default_collate([self.held_out[i] for i in range(first, min(first + batch_size, count))])
            yield self.predict(self.held_out_captions, batch, batch["index"])

    def validate(self):
        batch_size, count = self.config.micro_batch or self.batch_size, len(self.held_out)
        batches = self.held_out_codes(batch_size, count)
        return sum((codes - true).square().mean((1, 2, 3)).double().sum().item() for codes, true in batches) / count

    def sample_sheet(self, path):
        """Held-out images, decoded from their codes, each followed by the image predicted from its caption."""
        codes, true = next(self.held_out_codes(8, min(8, len(self.held_out))))
        pairs = torch.stack([true, codes], 1).flatten(0, 1)
        images = self.model.decode_latents(pairs)
        title = f"reconstructed images and predictions from their captions, {path.stem}"
        save_png(contact_sheet(to_pil(images)), path, title, FROM_DATA)
