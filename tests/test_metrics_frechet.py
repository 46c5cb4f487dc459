"""Frechet distance: closed forms, exact arithmetic, pytorch-fid, and the streamed statistics."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_fid.fid_score import calculate_frechet_distance

from minildm.errors import InputError
from minildm.metrics import frechet_distance, frechet_distance_from_features
from minildm.metrics.frechet import SavedStatistics, Statistics


def features(n, d, seed, shift=0.0):
    """Correlated, decaying and not negative, as an Inception network's are."""
    mixing = np.random.default_rng(99).standard_normal((d, d)) / np.arange(1, d + 1)[:, None]
    return np.abs(np.random.default_rng(seed).standard_normal((n, d)) @ mixing + shift)


def test_one_dimension_is_the_difference_of_means_and_deviations():
    assert frechet_distance([1.0], [[4.0]], [3.5], [[9.0]]) == pytest.approx(2.5**2 + (3 - 2) ** 2, rel=1e-12)
    a, b = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [5.0]])
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance_from_features(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [10, 200])
def test_equal_covariances_give_the_squared_distance_of_the_means(n):
    a = features(n, 40, seed=0)
    step = np.linspace(-1, 1, 40)
    assert frechet_distance_from_features(a, a + step) == pytest.approx(step @ step, rel=1e-10)
    sigma = np.cov(a, rowvar=False)
    assert frechet_distance(a.mean(0), sigma, a.mean(0) + step, sigma) == pytest.approx(step @ step, rel=1e-9)


def test_covariances_that_commute_have_a_closed_form():
    values1, values2 = np.arange(1.0, 9.0), np.linspace(3, 0.5, 8)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    expected = np.square(np.sqrt(values1) - np.sqrt(values2)).sum()
    mu, sigma1, sigma2 = np.zeros(8), basis * values1 @ basis.T, basis * values2 @ basis.T
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 30), m=st.integers(2, 30), d=st.integers(1, 20), seed=st.integers(0, 1000))
def test_symmetric_non_negative_and_zero_for_itself(n, m, d, seed):
    a, b = features(n, d, seed), features(m, d, seed + 1, shift=0.3)
    scale = a.var(0).sum() + b.var(0).sum() + 1e-9
    forward = frechet_distance_from_features(a, b)
    assert forward == pytest.approx(frechet_distance_from_features(b, a), abs=1e-10 * scale)
    assert forward > -1e-10 * scale
    assert abs(frechet_distance_from_features(a, a)) < 1e-10 * scale
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    assert frechet_distance_from_features(a @ rotation, b @ rotation) == pytest.approx(forward, abs=1e-9 * scale)


def test_singular_covariances_match_exact_arithmetic():
    """n < d, where a square root of the product in float64 is noise; the reference has 60 digits."""
    a, b = features(5, 8, seed=1), features(6, 8, seed=2, shift=0.2)
    mu1, mu2, sigma1, sigma2 = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    with mpmath.workdps(60):
        centred = [mpmath.matrix((x - x.mean(0)).tolist()) for x in (a, b)]
        gram = centred[0] * centred[1].T / mpmath.sqrt(4 * 5)
        trace = sum(mpmath.sqrt(abs(value)) for value in mpmath.eigsy(gram * gram.T)[0])
        exact = float(mpmath.mpf(np.square(mu1 - mu2).sum()) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)
    assert frechet_distance_from_features(a, b) == pytest.approx(exact, rel=1e-12)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("n, d, tolerance", [(500, 64, 1e-9), (300, 192, 1e-9), (40, 64, 1e-5), (100, 192, 1e-5)])
def test_distance_matches_pytorch_fid(n, d, tolerance):
    a, b = features(n, d, seed=1), features(n + 7, d, seed=2, shift=0.1)
    moments = (a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    expected = calculate_frechet_distance(*moments)
    assert frechet_distance(*moments) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance_from_features(a, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(*moments) == pytest.approx(frechet_distance_from_features(a, b), rel=1e-9)


@pytest.mark.parametrize("n", [2, 30, 47, 48, 49, 95, 96, 97, 400])
def test_streamed_statistics_equal_those_of_all_at_once(n):
    a, b = (features(size, 48, seed=3) + 1000 for size in (n, 60))  # far from zero, where naive sums lose digits
    expected = frechet_distance_from_features(a, b)
    for size in (1, 7, 400):
        statistics = Statistics(48)
        for start in range(0, n, size):
            statistics.add(a[start : start + size])
        assert statistics.n == n
        np.testing.assert_allclose(statistics.mean, a.mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance, np.cov(a, rowvar=False), rtol=1e-8, atol=1e-11)
        assert statistics.distance(Statistics(48).add(b)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_saved_statistics_come_back_and_pytorch_fids_are_read(tmp_path):
    a, b = features(90, 30, seed=5), features(20, 30, seed=6)
    one, other = Statistics(30).add(a), Statistics(30).add(b)
    one.save(tmp_path / "ours.npz")
    np.savez_compressed(tmp_path / "theirs.npz", mu=b.mean(0), sigma=np.cov(b, rowvar=False))
    ours, theirs = SavedStatistics(tmp_path / "ours.npz"), SavedStatistics(tmp_path / "theirs.npz")
    assert (ours.n, theirs.n) == (90, None)
    assert ours.distance(theirs) == pytest.approx(one.distance(other), rel=1e-9)
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid reads it
        np.testing.assert_allclose(file["sigma"], np.cov(a, rowvar=False), rtol=1e-9, atol=1e-12)


def test_wrong_input_is_answered_in_one_line(tmp_path):
    good = features(10, 4, seed=0)
    broken = good.copy()
    broken[3, 2] = np.nan
    (tmp_path / "text.npz").write_text("no statistics")
    np.savez(tmp_path / "keys.npz", mean=good.mean(0))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    calls = [
        (lambda: frechet_distance_from_features(broken, good), "NaN"),
        (lambda: frechet_distance_from_features(good[:1], good), "n >= 2"),
        (lambda: frechet_distance_from_features(good, features(10, 5, seed=1)), "4 and of 5 dims"),
        (lambda: frechet_distance(np.zeros(3), np.eye(4), np.zeros(4), np.eye(4)), "3 x 3"),
        (lambda: frechet_distance(np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "eigenvalues >= 0"),
        (lambda: frechet_distance(np.zeros(2), [[1, 0.5], [0, 1]], np.zeros(2), np.eye(2)), "symmetric"),
        (lambda: SavedStatistics(tmp_path / "text.npz"), "text.npz"),
        (lambda: SavedStatistics(tmp_path / "keys.npz"), "mu (d,)"),
        (lambda: SavedStatistics(tmp_path / "shapes.npz"), "must agree"),
    ]
    for call, message in calls:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
