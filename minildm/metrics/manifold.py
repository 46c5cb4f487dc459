"""Precision, recall, density and coverage: are the fakes realistic, and are the real images covered?

The manifold of a set is the union of balls around its points, each reaching to the point's k-th nearest neighbour in
its own set. Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991), Eq. 1-3. Density and coverage: Naeem et
al. 2020 (arXiv:2002.09797), Eq. 4 and 5. On small sets recall and coverage saturate: compare only at equal n and k.
"""

import numpy as np
import torch

from minildm.errors import InputError


def precision_recall_density_coverage(real, fake, k=5):
    """The four numbers as a dict, from features real (n, d) and fake (m, d). All but density lie in [0, 1]."""
    real, fake = (torch.from_numpy(np.asarray(x, np.float64)) for x in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise InputError(f"{len(real)} real, {len(fake)} fake images: k = {k} neighbours need more than {k} of each")
    real_radius, fake_radius = _neighbour_distance(real, k), _neighbour_distance(fake, k)
    distance = _distances(real, fake)  # (n, m)
    inside_real = distance < real_radius[:, None]  # fake j within the ball of real i
    inside_fake = distance < fake_radius[None, :]  # real i within the ball of fake j
    return {
        "precision": inside_real.any(0).double().mean().item(),
        "recall": inside_fake.any(1).double().mean().item(),
        "density": inside_real.sum(0).double().mean().item() / k,
        "coverage": (distance.min(1).values < real_radius).double().mean().item(),
    }


def _neighbour_distance(x, k):
    """Distance of each point to its k-th nearest other point, (n,)."""
    return _distances(x, x).fill_diagonal_(0).kthvalue(k + 1, dim=1).values  # the first is the point itself


def _distances(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # exact: near-copies have tiny distances
