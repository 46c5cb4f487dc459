"""KID, CMMD, precision / recall / density / coverage and small-sample statistics, against independent computations."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from minildm.errors import InputError
from minildm.metrics import frechet_distance, frechet_distance_from_features
from minildm.metrics.manifold import precision_recall_density_coverage
from minildm.metrics.mmd import cmmd, kid
from minildm.metrics.small_sample import Resampler, small_sample


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) * scale / np.sqrt(np.arange(1, d + 1)) + shift


def test_kid_equals_the_sum_over_pairs():
    a, b = gaussian(17, 6, 0), gaussian(23, 6, 1, shift=0.4)

    def k(x, y):
        return (float(x @ y) / 6 + 1) ** 3

    within_a = np.mean([k(a[i], a[j]) for i in range(17) for j in range(17) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(23) for j in range(23) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kid(a, b).value == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kid_is_unbiased_where_frechet_is_not_and_its_interval_covers():
    truth = kid(gaussian(3000, 8, 0), gaussian(3000, 8, 1, shift=0.3)).value
    results = [kid(gaussian(40, 8, 2 * s + 10), gaussian(50, 8, 2 * s + 11, shift=0.3)) for s in range(100)]
    values = np.array([r.value for r in results])
    assert abs(values.mean() - truth) < 3 * values.std() / 10
    assert np.mean([r.low <= truth <= r.high for r in results]) > 0.85


def test_large_sets_are_summed_in_blocks():
    a, b = gaussian(700, 5, 0), gaussian(600, 5, 1)
    kernel = [(x @ y.T / 5 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    expected = sum(within) - 2 * kernel[2].mean()
    assert kid(a, b).value == pytest.approx(expected, rel=1e-9)


def test_cmmd_equals_the_published_formula():
    a, b = gaussian(12, 10, 0), gaussian(9, 10, 1)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    gamma = 1 / (2 * 10**2)
    terms = [np.exp(-gamma * cdist(p, q) ** 2).mean() for p, q in ((x, x), (y, y), (x, y))]
    assert cmmd(a, b).value == pytest.approx(1000 * (terms[0] + terms[1] - 2 * terms[2]), rel=1e-6)
    assert cmmd(a, a).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage_match_their_definitions(k):
    real, fake = gaussian(40, 4, 0), gaussian(30, 4, 1, scale=0.7, shift=0.3)
    between = cdist(real, fake)
    real_radius, fake_radius = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake))
    expected = {
        "precision": np.mean([any(between[i, j] < real_radius[i] for i in range(40)) for j in range(30)]),
        "recall": np.mean([any(between[i, j] < fake_radius[j] for j in range(30)) for i in range(40)]),
        "density": sum(between[i, j] < real_radius[i] for i in range(40) for j in range(30)) / (k * 30),
        "coverage": np.mean([any(between[i, j] < real_radius[i] for j in range(30)) for i in range(40)]),
    }
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(expected)
    assert precision_recall_density_coverage(real, real + 100, k) == pytest.approx(dict.fromkeys(expected, 0))


@pytest.mark.parametrize("n, m, d", [(12, 9, 30), (40, 35, 6)])
def test_weighted_distance_equals_that_of_repeated_rows(n, m, d):
    real, fake = gaussian(n, d, 0) + 5, gaussian(m, d, 1, shift=0.2) + 5
    rng, resampler = np.random.default_rng(2), Resampler(real, fake)
    for _ in range(5):
        i, j, l = rng.integers(n, size=n), rng.integers(m, size=m), rng.integers(n, size=n)
        u, v, w = (np.bincount(x, minlength=size).astype(float) for x, size in ((i, n), (j, m), (l, n)))
        assert resampler.fake_to_real(u, v) == pytest.approx(frechet_distance_from_features(real[i], fake[j]), rel=1e-9)
        assert resampler.real_to_real(u, w) == pytest.approx(frechet_distance_from_features(real[i], real[l]), rel=1e-9)


def test_interval_floor_and_limit_are_right_on_gaussians():
    """d = 16, n = 200: the plug-in value is biased, its interval covers its expectation, the limit is near truth."""
    d, n = 16, 200
    sigma = np.diag(1 / np.arange(1, d + 1))
    truth = frechet_distance(np.zeros(d), sigma, np.full(d, 0.1), 1.44 * sigma)
    pairs = [(gaussian(n, d, 3 * s), gaussian(n, d, 3 * s + 1, scale=1.2, shift=0.1)) for s in range(12)]
    expectation = np.mean([frechet_distance_from_features(*pair) for pair in pairs])
    results = [small_sample(*pair, replicates=40, seed=s) for s, pair in enumerate(pairs)]
    assert expectation > 1.1 * truth
    assert np.mean([r.low <= expectation <= r.high for r in results]) >= 0.85
    assert np.mean([r.infinity for r in results]) == pytest.approx(truth, rel=0.12)
    assert all(r.half == 100 and 0 < r.floor < r.distance_at_half for r in results)


def test_the_seed_determines_the_result():
    pair = gaussian(30, 8, 0), gaussian(20, 8, 1)
    assert small_sample(*pair, replicates=5, seed=3) == small_sample(*pair, replicates=5, seed=3)
    assert small_sample(*pair, replicates=5, seed=3) != small_sample(*pair, replicates=5, seed=4)


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="k = 5"):
        precision_recall_density_coverage(gaussian(5, 3, 0), gaussian(9, 3, 1))
    with pytest.raises(InputError, match="n >= 3"):
        kid(gaussian(2, 3, 0), gaussian(9, 3, 1))
