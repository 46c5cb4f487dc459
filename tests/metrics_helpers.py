"""Shared by the tests of the metrics: random weights in the published file's layout, pytorch-fid on the same weights,
folders of images and a cheap extractor."""

import functools
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from minildm.metrics.extractors import Extractor
from minildm.metrics.sources import as_tensor


def smooth_noise(n, side, seed):
    """(n, 3, side, side) in [0, 1]: noise of several scales, as different from each other as images are."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(torch.randn(n, 3, s, s, generator=generator), (side, side), mode="bicubic") / s**0.5
        for s in (2, 4, 8, 16, 32, 64)
    ]
    return (0.5 + 0.3 * sum(layers)).clamp(0, 1)


def reference_network():
    """pytorch-fid's patched Inception-v3 as one module, with torchvision's initial values."""
    from pytorch_fid import inception

    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        return inception.fid_inception_v3()


@functools.cache
def random_weights():
    """A state dict in the published layout whose activations are O(1) at every depth and whose batch norms see
    variances near their eps of 1e-3, so that a wrong eps, pooling or padding shows. Do not change it.

    Biases of 1 keep most ReLUs open. With biases of 0 such a network is chaotic, and float32 itself (pytorch-fid's too)
    is 5e-5 away from float64; with biases of 1 it is 3e-6 away.
    """
    torch.manual_seed(0)
    network = reference_network()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.15 * module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, mean=1.0, std=0.2)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(2 * smooth_noise(8, 299, seed=0) - 1)  # sets the running statistics
    return {name: value.clone() for name, value in network.eval().state_dict().items()}


def reference_inception(state):
    """pytorch-fid's InceptionV3 with ``state``: images in [0, 1] -> maps at 64, 192, 768 and 2048."""
    from pytorch_fid import inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        return inception.InceptionV3([0, 1, 2, 3]).eval()


def reference_fid(real, fake, state, dims, batch_size=1):
    """FID of two folders by pytorch-fid from start to end."""
    from pytorch_fid import fid_score, inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        return fid_score.calculate_fid_given_paths([str(real), str(fake)], batch_size, "cpu", dims, num_workers=0)


def reference_fid_in_span(real, fake, state, dims):
    """The same for few images of many dims: pytorch-fid's features and distance, in coordinates of the space that the
    features span. The distance is the same, but the matrix square root has n + m instead of 2048 dims, which saves 20 s
    and some rounding."""
    from pytorch_fid import fid_score, inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
    a, b = (
        fid_score.get_activations(sorted(folder.iterdir()), network, 1, dims, num_workers=0) for folder in (real, fake)
    )
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0]  # (dims, n + m)
    a, b = a @ basis, b @ basis
    return fid_score.calculate_frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def write_images(folder, n, seed, sizes=((80, 64), (128, 128), (40, 200)), modes=("RGB", "L")):
    """n images of several sizes, grey and colour, PNG and JPEG; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, noise in enumerate(smooth_noise(n, 200, seed)):
        width, height = sizes[i % len(sizes)]
        pixels = (noise[:, :height, :width].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).convert(modes[i % len(modes)]).save(folder / f"{i:03d}.{'png' if i % 3 else 'jpg'}")
    return folder


def grid_extractor(cells=8):
    """A cheap encoder for whatever does not depend on the network: the grey levels on a grid of cells x cells."""

    def prepare(image):
        return as_tensor(image.resize((2 * cells, 2 * cells))).float() / 255

    def network(inputs):
        return {cells**2: F.avg_pool2d(inputs, 2).mean(1).flatten(1)}

    return Extractor("FD-grid", (cells**2,), prepare, network)
