"""One pass over a set of images: statistics of all features, and a bounded sample of the features themselves."""

import contextlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from minildm.distributed import gather_to_first, share_size, turns
from minildm.errors import InputError
from minildm.metrics.frechet import Statistics
from minildm.metrics.sources import image_name, open_rgb
from minildm.progress import Progress


@dataclass
class FeatureSet:
    """The result of one pass over a set of images. Memory does not grow with n."""

    n: int | None  # None: statistics from a file that does not say
    statistics: dict  # {dim: Statistics or SavedStatistics}
    rows: dict  # {dim: float32 (k, dim)}, k <= keep: the features of all images, or of a uniform sample
    images: list  # paths or records; empty for statistics from a file

    @property
    def complete(self):
        """Whether ``rows`` has the features of every image, which intervals need."""
        return bool(self.rows) and all(len(rows) == self.n for rows in self.rows.values())


def collect(images, extractor, keep=2000, batch_size=16, seed=0, progress=None, prepare=None):
    """Extract features: the statistics of all images, and the features of at most ``keep`` of them, chosen at random.

    Args: prepare: as in `batches`.
    Raises: InputError naming the image that cannot be read or whose features are not finite.
    """
    require_several(images)
    kept = np.random.default_rng(seed).permutation(len(images))[:keep]
    row_of = {int(index): k for k, index in enumerate(np.sort(kept))}  # image index -> row
    rows = {dim: np.empty((len(row_of), dim), np.float32) for dim in extractor.dims}
    statistics = {dim: Statistics(dim) for dim in extractor.dims}
    for start, batch in batches(images, extractor, batch_size, progress, prepare):
        for dim, values in batch.items():
            statistics[dim].add(values)
            for offset, features in enumerate(values):
                if start + offset in row_of:
                    rows[dim][row_of[start + offset]] = features
    return FeatureSet(len(images), statistics, rows if keep else {}, list(images))


def require_several(images):
    """Raise InputError for a single image."""
    if len(images) < 2:
        raise InputError(f"{image_name(images[0])} is the only image: a distribution needs at least 2; give more")


def batches(images, extractor, batch_size=16, progress=None, prepare=None):
    """Yield (index of the first image, {dim: features (b, dim) numpy}). Threads decode and resize two batches ahead.

    Of several processes that work together each computes its turns; the first yields all batches in their order, as one
    process would, and the others yield none.
    Args: prepare: image -> network input; overrides how an image is opened and prepared.
    """
    starts = range(0, len(images), batch_size)
    with contextlib.closing(_computed(images, turns(starts), extractor, batch_size, progress, prepare)) as computed:
        for _ in range(share_size(len(starts))):
            for batch in gather_to_first(next(computed, None)) or ():
                if batch is not None:
                    yield batch


def _computed(images, starts, extractor, batch_size, progress, prepare):
    """`batches` of the images that begin at ``starts``."""
    prepare = prepare or (lambda image: extractor.prepare(open_rgb(image)))
    workers = min(8, os.cpu_count() or 1)
    n_images = sum(len(images[start : start + batch_size]) for start in starts)
    bar = Progress(progress, "image", n_images, hidden=progress is None)
    with ThreadPoolExecutor(workers) as pool, bar:
        ahead = deque()
        todo = iter(starts)
        try:
            for start in starts:
                while len(ahead) < 3 and (upcoming := next(todo, None)) is not None:
                    ahead.append([pool.submit(prepare, image) for image in images[upcoming : upcoming + batch_size]])
                inputs = torch.stack([future.result() for future in ahead.popleft()])
                with torch.inference_mode():
                    batch = {dim: values.float().cpu().numpy() for dim, values in extractor.network(inputs).items()}
                for values in batch.values():
                    broken = ~np.isfinite(values).all(axis=1)
                    if broken.any():
                        first = image_name(images[start + int(broken.argmax())])
                        raise InputError(
                            f"{first} gives NaN or infinite features; look at the image, or at the weights if every "
                            "image does"
                        )
                yield start, batch
                bar.update(len(inputs))
        finally:
            pool.shutdown(cancel_futures=True)
