"""FID side by side with pytorch-fid and scipy: time of the distance, images per second end to end, peak memory.

    python tests/benchmarks/bench_fid.py [distance] [folders] [memory]

The weights are random, in the published layout; the times do not depend on their values.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from metrics_helpers import random_weights, smooth_noise

from minildm.metrics import frechet_distance, frechet_distance_from_features
from minildm.metrics.extractors import Extractor, inception_extractor
from minildm.metrics.features import collect
from minildm.metrics.sources import as_tensor, list_images

warnings.simplefilter("ignore")


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def bench_distance(d=2048):
    from pytorch_fid.fid_score import calculate_frechet_distance

    print(f"distance, d = {d}: seconds, from features (ours), from mean and covariance (ours), scipy.linalg.sqrtm")
    mixing = np.random.default_rng(0).standard_normal((d, d)) / np.arange(1, d + 1)[:, None]
    for n in (132, 500, 3000):
        a, b = (np.abs(np.random.default_rng(s).standard_normal((n, d)) @ mixing + 0.1 * s) for s in (1, 2))
        value, ours = timed(frechet_distance_from_features, a, b)
        moments = (a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
        _, from_moments = timed(frechet_distance, *moments)
        expected, theirs = timed(calculate_frechet_distance, *moments)
        print(
            f"  n = {n:4}: {ours:7.3f}  {from_moments:7.3f}  {theirs:7.3f}  ratio {theirs / ours:7.1f} and "
            f"{theirs / from_moments:4.1f}, relative difference {abs(value / expected - 1):.1e}"
        )


def bench_folders(n=64, side=512):
    from pytorch_fid import fid_score, inception

    state = random_weights()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        torch.save(state, root / "weights.pth")
        for seed, name in enumerate(("real", "fake")):
            (root / name).mkdir()
            for i, noise in enumerate(smooth_noise(n, side, seed)):
                pixels = (noise.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / f"{i}.png")

        def ours(dims):
            extractor = inception_extractor(root / "weights.pth", dims)
            return [collect(list_images(root / name), extractor, keep=0) for name in ("real", "fake")]

        def theirs(dim):
            network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dim]])
            return [
                fid_score.calculate_activation_statistics(
                    sorted((root / name).iterdir()), network, 50, dim, "cpu", os.cpu_count()
                )
                for name in ("real", "fake")
            ]

        print(f"folders of {n} and {n} PNG of {side} px, {torch.get_num_threads()} threads")
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
            (real, fake), seconds = timed(ours, (2048,))
            value, distance = timed(real.statistics[2048].distance, fake.statistics[2048])
            moments, their_seconds = timed(theirs, 2048)
            expected, their_distance = timed(fid_score.calculate_frechet_distance, *moments[0], *moments[1])
            _, all_depths = timed(ours, (2048, 192, 64))
            their_other_depths = sum(timed(theirs, dim)[1] for dim in (192, 64))
    print(
        f"  images/s at 2048 dims, loading included: ours {2 * n / seconds:.2f}, pytorch-fid "
        f"{2 * n / their_seconds:.2f}, ratio {their_seconds / seconds:.2f}"
    )
    our_total, their_total = seconds + distance, their_seconds + their_distance
    print(
        f"  end to end with the distance: ours {our_total:.1f} s, pytorch-fid {their_total:.1f} s, ratio "
        f"{their_total / our_total:.2f}"
    )
    print(
        f"  features at 2048, 192 and 64: ours (one pass) {all_depths:.1f} s, pytorch-fid (three) "
        f"{their_seconds + their_other_depths:.1f} s, ratio {(their_seconds + their_other_depths) / all_depths:.2f}"
    )
    print(f"  relative difference of the values: {abs(value / expected - 1):.1e}")


def bench_memory():
    """Peak resident memory of one pass over 1,000 to 10,000 images, 2048 dims, each in a fresh process."""
    print("peak memory of a pass, 2048 dims (a cheap encoder in place of Inception: the same reading and statistics)")
    for n in (1000, 3000, 10_000):
        peak = subprocess.run([sys.executable, __file__, f"_memory:{n}"], capture_output=True, text=True, check=True)
        print(f"  {n:6} images: {peak.stdout.strip()} MiB")


def _memory(n):
    projection = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0)) / 32
    extractor = Extractor(
        "FD-projection",
        (2048,),
        lambda image: as_tensor(image)[:1].float() / 255,
        lambda inputs: {2048: (inputs.flatten(1) @ projection).relu()},
    )
    with tempfile.TemporaryDirectory() as folder:
        for i, noise in enumerate(np.random.default_rng(0).integers(256, size=(n, 32, 32), dtype=np.uint8)):
            Image.fromarray(noise).save(Path(folder) / f"{i:05d}.png")
        features = collect(list_images(folder), extractor, keep=1000)
    features.statistics[2048].distance(features.statistics[2048])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


PARTS = {"distance": bench_distance, "folders": bench_folders, "memory": bench_memory}

if __name__ == "__main__":
    names = sys.argv[1:] or list(PARTS)
    if names[0].startswith("_memory:"):
        _memory(int(names[0].split(":")[1]))
    else:
        for name in names:
            PARTS[name]()
