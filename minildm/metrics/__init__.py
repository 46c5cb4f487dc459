"""Metrics: FID, and what a small test set can honestly say.

In: folders of images. Out: the Frechet distance at several depths of Inception-v3, KID, precision / recall / density /
coverage, CMMD, CLIP score, prompt adherence, an audit for memorised training images, and how far to trust each number
at this n.
"""

from minildm.metrics.fid_score import fid
from minildm.metrics.frechet import frechet_distance, frechet_distance_from_features
from minildm.metrics.inception import InceptionV3

__all__ = ["InceptionV3", "fid", "frechet_distance", "frechet_distance_from_features"]
