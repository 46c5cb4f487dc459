"""Stages 1 and 4: the autoencoder learns to reconstruct images from codes of 4 numbers per 8 x 8 pixels, and the codes
are whitened. At the end the decoder trains alone, for sharper images from the same codes.

Rombach et al. 2022, arXiv:2112.10752, section 3.1. Left out: the perceptual and the adversarial loss.
"""

import math

import numpy as np
import torch

from minildm.data.loader import training_batches
from minildm.data.splits import classes_of
from minildm.images import FROM_DATA, contact_sheet, save_png
from minildm.latent_diffusion import to_pil
from minildm.pretraining.stage import low_precision
from minildm.seeds import seeded, to_device
from minildm.training.loss import sample_randomness
from minildm.training.task import Task

# Weights of the loss terms beside |d|. Each term is a mean over pixels, the last over the numbers of the code.
EDGES, SQUARES, KL = 1.0, 1.0, 1e-4


def autoencoder_losses(images, reconstructions, code):
    """(B,) losses: the reconstruction error, and the divergence of the code from a standard normal.

        |d| + SQUARES d^2 + EDGES |grad d| + KL divergence      d = x' - x, grad: differences of neighbouring pixels

    The gradient term stands in for the paper's perceptual loss (section 3.1), which needs a trained network. It
    penalises blurred edges, which cost little in the other terms.
    """
    d = reconstructions.float() - images
    edges = (d.diff(dim=2).abs().mean((1, 2, 3)) + d.diff(dim=3).abs().mean((1, 2, 3))) / 2
    mean, logvar = code.mean.float(), code.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3))  # nats per number of the code
    return d.abs().mean((1, 2, 3)) + SQUARES * d.square().mean((1, 2, 3)) + EDGES * edges + KL * kl


class Autoencoding(Task):
    """Encode images, sample from the code, decode.

    Args:
        training, held_out: TrainingPairs of images.
        name: of the stage, which its random numbers depend on.
        crop: side of the random squares to train on, in pixels; ``training``'s own size for whole images.
        dtype: of products.
        balance: a caption field whose classes come equally often, or None. workers: processes that read ahead.
    """

    def __init__(self, vae, training, held_out, config, name, crop, device, dtype, balance=None, workers=0):
        self.vae, self.training, self.held_out, self.config = vae, training, held_out, config
        self.name, self.crop, self.device, self.dtype, self.workers = name, crop, device, dtype, workers
        self.batch_size, self.validation_interval = config.batch_size, config.validation_interval
        self.classes = None if balance is None else classes_of(training.records, balance)

    def batches(self, first_step, last_step):
        seed, size = self.config.seed, self.batch_size
        return training_batches(self.training, size, seed, first_step, last_step, self.workers, self.classes)

    def losses(self, batch):
        seed, side = self.config.seed, self.crop // 8
        images = to_device(random_crops(batch["images"], self.crop, seed, batch["id"]), self.device)
        noise = to_device(sample_randomness(seed, self.name, batch["id"], (4, side, side), 1).noise, self.device)
        with low_precision(self.device, self.dtype):
            code = self.vae.encode(images)
            reconstructions = self.vae.decode(code.mean + (0.5 * code.logvar).exp() * noise)
        return autoencoder_losses(images, reconstructions, code)

    def validate(self):
        return float(np.mean(squared_errors(self.vae, self.held_out, self.device)))

    @torch.no_grad()
    def sample_sheet(self, path):
        """Held-out images, each followed by its reconstruction."""
        images = torch.stack([self.held_out[i]["images"] for i in range(min(8, len(self.held_out)))])
        reconstructions = self.vae.decode(self.vae.encode(images.to(self.device)).mean).float().cpu()
        pairs = torch.stack([images, reconstructions], 1).flatten(0, 1)
        save_png(contact_sheet(to_pil(pairs)), path, f"images and their reconstructions, {path.stem}", FROM_DATA)


def random_crops(images, side, seed, ids):
    """(B, 3, H, W) -> (B, 3, side, side), each at a position that depends only on ``seed`` and its id."""
    crops = []
    for image, sample_id in zip(images, ids):
        generator = seeded(seed, "crop", int(sample_id))
        top, left = (torch.randint(length - side + 1, (), generator=generator).item() for length in image.shape[1:])
        crops.append(image[:, top : top + side, left : left + side])
    return torch.stack(crops)


@torch.no_grad()
def squared_errors(vae, pairs, device, batch_size=8):
    """Mean squared error of each image's reconstruction from the mean of its code; float32, pixels in [-1, 1]."""
    errors = []
    for first in range(0, len(pairs), batch_size):
        images = torch.stack([pairs[i]["images"] for i in range(first, min(first + batch_size, len(pairs)))]).to(device)
        reconstructions = vae.decode(vae.encode(images).mean).clamp(-1, 1)
        errors += (reconstructions - images).square().mean((1, 2, 3)).tolist()
    return errors


def psnr(vae, pairs, device):
    """Mean over images of the peak signal-to-noise ratio, dB: 10 log10(2^2 / mean squared error)."""
    return float(np.mean([10 * math.log10(4 / max(error, 1e-10)) for error in squared_errors(vae, pairs, device)]))


@torch.no_grad()
def whiten_codes(vae, pairs, device, most=1024):
    """Rotate and scale the codes so that their 4 channels are uncorrelated, with mean 0 and standard deviation 1.
    Reconstructions do not change: the 1x1 convolutions around the code absorb the change.

        mean' = A^-1 (mean - m)    z = A z' + m    A = V diag(e)^1/2    V diag(e) V^T = covariance of z

    Nothing in the autoencoder's loss keeps the channels apart. They come out nearly equal, with hue and edges in their
    small differences (e from 45 to 0.02 seen here), where diffusion noise, equally large in all directions, hides them.
    The variances of the posterior become constants, the averages of those of z': rotated, they would not be diagonal.

    Args: pairs: TrainingPairs of images, of which up to ``most`` are used.
    """
    indices, count = range(len(pairs))[:: math.ceil(len(pairs) / most)], 0
    total, products, variances = 0.0, 0.0, 0.0
    for first in range(0, len(indices), 8):
        code = vae.encode(torch.stack([pairs[i]["images"] for i in indices[first : first + 8]]).to(device))
        mean, variance = (x.cpu().double().movedim(1, -1).flatten(0, 2) for x in (code.mean, code.logvar.exp()))
        total, products, variances = total + mean.sum(0), products + mean.T @ mean, variances + variance.sum(0)
        count += len(mean)
    m, noise = total / count, (variances / count).diag()  # (4,), (4, 4)
    e, V = torch.linalg.eigh(products / count - torch.outer(m, m) + noise)
    V = V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()  # each direction's largest entry is positive
    # Rounded to 4 digits, so that a rerun with slightly different sums gives the same codes.
    m, A, noise = (x.clone().apply_(lambda v: float(f"{v:.4g}")) for x in (m, V * e.sqrt(), noise))
    back, n = A.inverse(), len(m)
    into, out = (
        {name: p.cpu().double() for name, p in conv.named_parameters()}
        for conv in (vae.quant_conv, vae.post_quant_conv)
    )
    into["weight"][:n] = torch.einsum("ij,jckl->ickl", back, into["weight"][:n])
    into["weight"][n:] = 0
    into["bias"] = torch.cat([back @ (into["bias"][:n] - m), (back @ noise @ back.T).diag().log()])
    out["bias"] += out["weight"][:, :, 0, 0] @ m
    out["weight"] = torch.einsum("ijkl,jc->ickl", out["weight"], A)
    vae.quant_conv.load_state_dict(into)
    vae.post_quant_conv.load_state_dict(out)


def unit_scale(latents, most=2000):
    """The scaling factor: 1 / the standard deviation of the codes of up to ``most`` images."""
    indices = np.linspace(0, len(latents) - 1, min(most, len(latents))).astype(int)
    total, squares, count = 0.0, 0.0, 0
    for i in indices:
        mean, logvar = (moment.double() for moment in latents.moments(i))
        total, squares = total + mean.sum().item(), squares + (mean.square() + logvar.exp()).sum().item()
        count += mean.numel()
    return float(f"{(squares / count - (total / count) ** 2) ** -0.5:.5g}")
