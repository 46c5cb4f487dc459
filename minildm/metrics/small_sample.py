"""What a Frechet distance from few images is worth: its spread, its floor and its limit.

The plug-in distance of n images is biased upward by roughly c / n (Chong and Forsyth 2020, arXiv:1911.07023, section
3), so a value says little without the value that real images reach against other real images at the same n.
"""

from dataclasses import dataclass

import numpy as np
import torch

from minildm.progress import Progress


@dataclass(frozen=True)
class SmallSample:
    low: float  # 95 % interval of the distance at this n (bootstrap, spread only)
    high: float
    half: int  # images per side in the next two
    floor: float  # real against other real images
    distance_at_half: float  # fake against real, at the same size
    infinity: float  # extrapolated to n -> infinity
    infinity_error: float  # standard error of that fit; too small, as the subsets overlap


def small_sample(real, fake, replicates=100, seed=0, progress=None):
    """The statistics of features real (n, d) and fake (m, d): SmallSample. Needs at least 8 images per side.

    Args: replicates: bootstrap resamples. progress: title of the progress bar; None shows none.
    """
    rng = np.random.default_rng(seed)
    resampler = Resampler(real, fake)
    with Progress(progress, "resample", replicates + 3 * 10, hidden=progress is None) as bar:
        n, m = resampler.n, resampler.m
        spread = np.array(
            [_tick(bar, resampler.fake_to_real(_bootstrap(rng, n), _bootstrap(rng, m))) for _ in range(replicates)]
        )
        # Resampling repeats images, which by itself raises a Frechet distance: only the spread about its mean counts.
        value = resampler.fake_to_real(np.ones(n), np.ones(m))
        low, high = (value + np.quantile(spread - spread.mean(), (0.025, 0.975))).clip(0)
        half = min(n // 2, m)
        floors, distances = [], []
        for _ in range(10):
            one, other = _two_subsets(rng, n, half)
            floors.append(_tick(bar, resampler.real_to_real(one, other)))
            distances.append(_tick(bar, resampler.fake_to_real(one, _subset(rng, m, half))))
        infinity, error = _extrapolate(resampler, rng, bar)
    return SmallSample(
        float(low), float(high), half, float(np.mean(floors)), float(np.mean(distances)), infinity, error
    )


def _extrapolate(resampler, rng, bar, points=10):
    """FID-infinity (Chong and Forsyth 2020, section 4) and its standard error.

    The intercept of a straight line in 1 / n through the distances of random subsets of n images of *both* sets; the
    smallest subsets are a third of the smaller set.
    """
    largest = min(resampler.n, resampler.m)
    sizes = np.linspace(largest / 3, largest, points).astype(int)
    values = [
        _tick(bar, resampler.fake_to_real(_subset(rng, resampler.n, k), _subset(rng, resampler.m, k))) for k in sizes
    ]
    design = np.stack([np.ones(points), 1 / sizes], axis=1)
    coefficients, residuals, *_ = np.linalg.lstsq(design, values, rcond=None)
    covariance = np.linalg.inv(design.T @ design) * (residuals.sum() / (points - 2))
    return float(coefficients[0]), float(covariance[0, 0] ** 0.5)


class Resampler:
    """Frechet distances of many resamples of the same images, from Gram matrices computed once.

    A resample is a vector of weights: how often each image occurs. Only images that occur enter the singular values.
    """

    def __init__(self, real, fake):
        real, fake = (torch.from_numpy(np.asarray(x, np.float64)) for x in (real, fake))
        centre = real.mean(0)  # does not change the distances, but keeps rounding errors small
        self.real, self.fake = real - centre, fake - centre
        self.n, self.m = len(real), len(fake)
        self.cross, self.within = self.real @ self.fake.T, self.real @ self.real.T  # (n, m), (n, n)

    def fake_to_real(self, real_weights, fake_weights):
        return _weighted_distance(self.real, self.fake, self.cross, real_weights, fake_weights)

    def real_to_real(self, one_weights, other_weights):
        return _weighted_distance(self.real, self.real, self.within, one_weights, other_weights)


def _weighted_distance(a, b, gram, u, v):
    """Frechet distance where row i of a counts u_i times and row j of b v_j times; gram = a b^T.

    With weighted means p and q, the factors are F_a = diag(sqrt(u / (n - 1))) (a - p) and F_b likewise, so that
    F_a F_b^T = diag(..) (a b^T - a q - p b + p q) diag(..): see frechet.py.
    """
    i, j = np.flatnonzero(u), np.flatnonzero(v)
    a, b, gram, u, v = a[i], b[j], gram[i][:, j], torch.from_numpy(u[i]), torch.from_numpy(v[j])
    n, m = u.sum(), v.sum()
    p, q = u @ a / n, v @ b / m  # (d,)
    trace_a = (u @ a.square().sum(1) - n * p @ p) / (n - 1)
    trace_b = (v @ b.square().sum(1) - m * q @ q) / (m - 1)
    if len(u) <= a.shape[1]:
        centred = gram - (a @ q)[:, None] - (b @ p)[None, :] + p @ q  # (n, m)
        product = (u / (n - 1)).sqrt()[:, None] * centred * (v / (m - 1)).sqrt()
    else:  # more images than dims: the same singular values from (d, d) factors
        factor_a, factor_b = (
            torch.linalg.qr((w / (w.sum() - 1)).sqrt()[:, None] * (x - mean), mode="r").R
            for x, w, mean in ((a, u, p), (b, v, q))
        )
        product = factor_a @ factor_b.T
    return ((p - q).square().sum() + trace_a + trace_b - 2 * torch.linalg.svdvals(product).sum()).item()


def _bootstrap(rng, n):
    """Weights of n images sampled with replacement, (n,)."""
    return np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)


def _subset(rng, n, size):
    """Weights of ``size`` of n images, sampled without replacement, (n,)."""
    weights = np.zeros(n)
    weights[rng.choice(n, size, replace=False)] = 1
    return weights


def _two_subsets(rng, n, size):
    """Weights of two disjoint subsets of ``size`` images each, (n,) and (n,)."""
    order = rng.permutation(n)
    one, other = np.zeros(n), np.zeros(n)
    one[order[:size]], other[order[size : 2 * size]] = 1, 1
    return one, other


def _tick(bar, value):
    """Move the progress bar on; returns ``value``."""
    bar.update()
    return value
