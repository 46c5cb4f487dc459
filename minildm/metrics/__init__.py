"""Metrics: FID and what a small test set can honestly say.

In: folders of pictures. Out: the Frechet distance at the depths of Inception-v3, KID, precision / recall / density /
coverage, CMMD, CLIP score, an audit for memorised pictures, and how far each number can be trusted at this n.
"""

from minildm.metrics.fid_score import fid
from minildm.metrics.frechet import frechet_distance, frechet_distance_from_features
from minildm.metrics.inception import InceptionV3

__all__ = ["InceptionV3", "fid", "frechet_distance", "frechet_distance_from_features"]
