"""KID and CMMD: squared maximum mean discrepancies between two sets of features, with an interval.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                     (Gretton et al. 2012, JMLR 13, Eq. 3)

KID (Binkowski et al. 2018, arXiv:1801.01401, section 4): k(x, y) = (x.y / d + 1)^3 and the unbiased estimate, whose
expectation, unlike FID's, does not depend on n. The published form averages over random subsets, which estimates what
is computed here from all pairs.
CMMD (Jayasumana et al. 2024, arXiv:2401.09603): Gaussian kernel of sigma 10 on unit-length CLIP embeddings, the biased
estimate (the diagonal counts), times 1000.
"""

from dataclasses import dataclass

import numpy as np

from minildm.errors import InputError

LARGEST_MEAN_SQUARE = 10.0  # of features for KID; Inception's have about 0.4


@dataclass(frozen=True)
class Discrepancy:
    value: float
    low: float  # 95 % interval, jackknife
    high: float


def kid(a, b):
    """Kernel Inception Distance between features a (n, d) and b (m, d): Discrepancy, which may be negative near 0."""
    return _mmd(a, b, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, biased=False)


def suits_kid(features):
    """Whether KID's kernel makes sense for features (n, d). Its 1 is meant for x.y / d of about 1, as Inception's
    are; of features a hundred times larger only the cube of a few images counts."""
    return float(np.square(features, dtype=np.float64).mean()) <= LARGEST_MEAN_SQUARE


def cmmd(a, b, sigma=10.0, scale=1000.0):
    """CLIP-MMD between CLIP embeddings a (n, d) and b (m, d), each row normalised to unit length: Discrepancy."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.asarray(a), np.asarray(b)))

    def gaussian(x, y):
        squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
        return scale * np.exp(-squares.clip(0) / (2 * sigma**2))

    return _mmd(a, b, gaussian, biased=True)


def _mmd(a, b, kernel, biased):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 3:
        raise InputError(f"features must be (n >= 3, d) and (m >= 3, d) with the same d, got {a.shape} and {b.shape}")
    n, m = len(a), len(b)
    aa, bb = _row_sums(kernel, a, a, biased), _row_sums(kernel, b, b, biased)
    ab, ba = _row_sums(kernel, a, b, True), _row_sums(kernel, b, a, True)

    def estimate(n, m, aa, bb, ab):  # from sums over all pairs
        pairs = (n * n, m * m) if biased else (n * (n - 1), m * (m - 1))
        return aa / pairs[0] + bb / pairs[1] - 2 * ab / (n * m)

    value = estimate(n, m, aa.sum(), bb.sum(), ab.sum())
    # Leave one image out: its row and its column leave the sums (the diagonal, if counted, leaves once).
    diagonal_a = np.array([kernel(x[None], x[None])[0, 0] for x in a]) if biased else 0
    diagonal_b = np.array([kernel(x[None], x[None])[0, 0] for x in b]) if biased else 0
    without_a = estimate(n - 1, m, aa.sum() - 2 * aa + diagonal_a, bb.sum(), ab.sum() - ab)  # (n,)
    without_b = estimate(n, m - 1, aa.sum(), bb.sum() - 2 * bb + diagonal_b, ab.sum() - ba)  # (m,)
    variance = (n - 1) * without_a.var() + (m - 1) * without_b.var()  # jackknife (Efron and Stein 1981), two samples
    half = 1.96 * np.sqrt(variance)
    return Discrepancy(float(value), float(value - half), float(value + half))


def _row_sums(kernel, x, y, diagonal, block=512):
    """Sum over y of k(x_i, y_j) for each i, in blocks of rows; without j = i unless ``diagonal``."""
    sums = np.empty(len(x))
    for start in range(0, len(x), block):
        k = kernel(x[start : start + block], y)
        sums[start : start + block] = k.sum(1) if diagonal else k.sum(1) - np.diagonal(k, start)
    return sums
