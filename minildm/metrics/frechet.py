"""Frechet distance between two sets of features, each modelled as a Gaussian (Heusel et al. 2017, arXiv:1706.08500).

    d^2 = |mu1 - mu2|^2 + Tr(Sigma1 + Sigma2 - 2 (Sigma1 Sigma2)^(1/2))

All in float64, without a matrix square root. Write each covariance as Sigma = F^T F with F (r, d) of full row rank. The
non-zero eigenvalues of Sigma1 Sigma2 are those of (F1 F2^T)(F1 F2^T)^T, so

    Tr (Sigma1 Sigma2)^(1/2) = sum of the singular values of F1 F2^T, an (r1, r2) matrix.

For n images F is the centred features divided by sqrt(n - 1). At n = 132 and d = 2048 that is a 132 x 132 problem,
real and finite at any rank, whereas the 2048 x 2048 product is singular and its square root needs an epsilon.
"""

import numpy as np
import torch

from minildm.errors import InputError, is_out_of_memory
from minildm.files import written_beside


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance between N(mu1, sigma1) and N(mu2, sigma2).

    Args: means (d,) and covariances (d, d), numpy or torch, any float type.
    Returns: float >= 0 up to rounding. Raises: InputError for unequal dims, NaN or a matrix that is no covariance.
    """
    mu1, mu2 = (_array(mu, "a mean").reshape(-1) for mu in (mu1, mu2))
    sigma1, sigma2 = (np.atleast_2d(_array(sigma, "a covariance")) for sigma in (sigma1, sigma2))
    for mu, sigma in ((mu1, sigma1), (mu2, sigma2)):
        if sigma.shape != (len(mu), len(mu)):
            raise InputError(f"a mean of {len(mu)} numbers needs a {len(mu)} x {len(mu)} covariance, got {sigma.shape}")
    return _distance(mu1, covariance_factor(sigma1), mu2, covariance_factor(sigma2))


def frechet_distance_from_features(a, b):
    """Squared Frechet distance between features a (n, d) and b (m, d); exact also where n or m <= d."""
    a, b = _array(a, "features"), _array(b, "features")
    return _distance(a.mean(axis=0), features_factor(a), b.mean(axis=0), features_factor(b))


def _distance(mu1, factor1, mu2, factor2):
    if len(mu1) != len(mu2):
        raise InputError(f"features of {len(mu1)} and of {len(mu2)} dims cannot be compared; extract both alike")
    mean_term = np.square(mu1 - mu2).sum()
    traces = np.square(factor1).sum() + np.square(factor2).sum()
    return float(mean_term + traces - 2 * nuclear_norm(factor1 @ factor2.T))


def nuclear_norm(matrix):
    """Sum of the singular values."""
    return torch.linalg.svdvals(torch.from_numpy(matrix)).sum().item()


def features_factor(features):
    """F (min(n, d), d) with F^T F the covariance (divisor n - 1) of features (n, d)."""
    n, d = _at_least_two(features).shape
    factor = (features - features.mean(axis=0)) / np.sqrt(n - 1)
    return factor if n <= d else torch.linalg.qr(torch.from_numpy(factor), mode="r").R.numpy()


def covariance_factor(sigma):
    """F (rank, d) with F^T F = sigma, from the eigenvalues that are not rounding errors.

    Eigenvalues below d * 2.2e-16 of the largest are rounding errors, and taking the root would make them matter.
    """
    values, vectors = (x.numpy() for x in torch.linalg.eigh(torch.from_numpy(sigma)))  # reads the lower triangle
    largest = max(values.max(), 0.0)
    if np.abs(sigma - sigma.T).max() > 1e-6 * largest or values.min() < -1e-6 * largest:
        raise InputError("a covariance must be symmetric with eigenvalues >= 0; this matrix is not")
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    factor = vectors.T[kept]
    factor *= np.sqrt(values[kept])[:, None]
    return factor


class Statistics:
    """Mean and covariance of features that arrive batch by batch, in O(d^2) memory.

    Up to d rows are held as they are, which gives the exact factor of a small set. Beyond that, rows are added to the
    scatter matrix in blocks of some hundreds (Chan, Golub and LeVeque 1983, Eq. 2.1).
    """

    def __init__(self, dim):
        self.dim, self.n = dim, 0
        self._rows = []  # float64 (b, d), at most about d rows together
        self._folded, self._mean, self._scatter = 0, np.zeros(dim), None

    def add(self, features):
        """Add features (b, d), torch or numpy; returns self."""
        rows = _array(features, "features")
        if rows.shape[1] != self.dim:
            raise InputError(f"statistics of {self.dim} dims cannot take features of {rows.shape[1]}")
        self._rows.append(rows)
        self.n += len(rows)
        if self.n - self._folded > (self.dim if self._scatter is None else min(self.dim, 512)):
            self._fold()
        return self

    def _fold(self):
        rows, self._rows = np.concatenate(self._rows), []
        m, n = self._folded, len(rows)
        mean = rows.mean(axis=0)
        shift = mean - self._mean
        rows -= mean
        rows = np.concatenate([rows, [shift * np.sqrt(m * n / (m + n))]])  # its outer product: Eq. 2.1's second term
        if self._scatter is None:
            self._scatter = np.zeros((self.dim, self.dim))
        torch.from_numpy(self._scatter).addmm_(torch.from_numpy(rows).T, torch.from_numpy(rows))
        self._mean = self._mean + shift * (n / (m + n))
        self._folded = m + n

    @property
    def mean(self):
        """(d,)"""
        if self._rows:
            rows = np.concatenate(self._rows)
            return (self._mean * self._folded + rows.sum(axis=0)) / self.n
        return self._mean

    @property
    def covariance(self):
        """(d, d), divisor n - 1"""
        if self._scatter is None:
            factor = self.factor()
            return factor.T @ factor
        if self._rows:
            self._fold()
        return self._scatter / (self.n - 1)

    def factor(self):
        """F (r, d) with F^T F the covariance."""
        if self._scatter is None:
            return features_factor(np.concatenate(self._rows or [np.zeros((0, self.dim))]))
        return covariance_factor(self.covariance)

    def distance(self, other):
        """Squared Frechet distance to another Statistics or SavedStatistics."""
        return _distance(self.mean, self.factor(), other.mean, other.factor())

    def save(self, path):
        """Write ``mu`` and ``sigma`` as pytorch-fid does, and ``n``, which pytorch-fid ignores."""
        with written_beside(path) as beside:
            np.savez_compressed(beside, mu=self.mean, sigma=self.covariance, n=self.n)


class SavedStatistics:
    """Mean and covariance from an .npz file, ours or pytorch-fid's. ``n`` is None if the file does not give it."""

    def __init__(self, path):
        try:
            with np.load(path, allow_pickle=False) as file:
                self.mean, self.covariance = _array(file["mu"], path).reshape(-1), _array(file["sigma"], path)
                self.n = int(file["n"]) if "n" in file else None
        except (FileNotFoundError, InputError):
            raise
        except Exception as error:  # of a dozen types: zip, zlib, header, dtype
            if is_out_of_memory(error):
                raise InputError(f"{path} asks for more memory than there is; get it again") from None
            raise InputError(
                f"{path} cannot be read as statistics: expected an .npz with mu (d,) and sigma (d, d)"
            ) from None
        self.dim = len(self.mean)
        if self.covariance.shape != (self.dim, self.dim):
            raise InputError(f"{path}: mu has {self.dim} numbers, sigma is {self.covariance.shape}; they must agree")

    def factor(self):
        return covariance_factor(self.covariance)

    distance = Statistics.distance


def _array(x, what):
    array = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise InputError(
            f"{what} of shape {array.shape} holds {(~np.isfinite(array)).sum()} NaN or infinite numbers; "
            "check the images and the weights they come from"
        )
    return array


def _at_least_two(features):
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"a covariance needs features (n, d) with n >= 2, got {features.shape}; give more images")
    return features
