"""The physics of a radiograph: from the attenuation along each ray to the grey values of the image.

In: ``path`` (B, size, size) float32, the line integral of the attenuation coefficient (1/cm times cm, so
dimensionless) from the X-ray tube to each detector pixel. Out: uint8 images. ``thorax`` builds the path of a chest,
``objects`` that of bottles and hands.

Beer-Lambert law: primary radiation = exp(-path). The attenuation coefficients are those at the mean energy of a
120 kVp beam, about 60 keV (Hubbell and Seltzer, NISTIR 5632, tables of mass attenuation). Not modelled: beam
hardening, the heel effect, the shadow of the anti-scatter grid.
"""

import math
from functools import lru_cache

import numpy as np

# Linear attenuation near 60 keV in 1/cm.
SOFT, LUNG = 0.205, 0.056  # lung: soft tissue at a quarter of its density
BONE = 0.38  # cortical bone, *in addition to* the soft tissue it displaces


def generators(seeds, stream):
    """One NumPy generator per image.

    Args: seeds: numbers or tuples such as (set, index). stream: an integer; each purpose has its own.
    """
    return [np.random.default_rng([*(seed if isinstance(seed, tuple) else (seed,)), stream]) for seed in seeds]


class UniformNumbers:
    """Uniform random numbers for a batch, one column per call. Image b depends on ``sources[b]`` alone."""

    def __init__(self, sources, count):
        self.columns = np.stack([source.random(count, dtype=np.float32) for source in sources])
        self.used = 0

    def __call__(self, low, high):
        """The next number of each image, uniform in [low, high): (B, 1, 1)."""
        self.used += 1
        assert self.used <= self.columns.shape[1], f"only {self.columns.shape[1]} numbers per image were sampled"
        return (low + (high - low) * self.columns[:, self.used - 1]).reshape(-1, 1, 1)


def root(a):
    """sqrt(max(a, 0)): half the chord of a ray through a round body, and 0 where the ray misses it."""
    a = np.maximum(a, 0)
    return np.sqrt(a, out=a) if isinstance(a, np.ndarray) else np.sqrt(a)


def ramp(a, low, high):
    """Smooth step from 0 at ``low`` to 1 at ``high``. With ``high`` < ``low`` it falls instead of rising."""
    t = np.clip((a - low) * (1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def ellipsoid(x, y, centre_x, centre_y, radius_x, radius_y, radius_z, angle=0.0):
    """Chords (cm) of rays along z through an ellipsoid rotated by ``angle`` (radians) in the image plane."""
    dx, dy = x - centre_x, y - centre_y
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = dx * (cos / radius_x), dy * (cos / radius_y)
    if angle:
        along, across = along + dy * (sin / radius_x), across - dx * (sin / radius_y)
    return (2 * radius_z) * root(1 - along * along - across * across)


@lru_cache(maxsize=64)
def spline_weights(knots, size):
    """(size, knots): cubic B-spline weights that interpolate a coarse lattice at ``size`` pixels; rows sum to 1."""
    t = (np.arange(size) + 0.5) / size * (knots - 3) + 1
    distance = np.abs(t[:, None] - np.arange(knots))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def plate(x, y, corners):
    """Signed distance (cm, negative inside) to a convex polygon. corners: [(x, y), ...] clockwise, y down."""
    distance = None
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        d = (x - x0) * ((y1 - y0) / length) - (y - y0) * ((x1 - x0) / length)
        distance = d if distance is None else np.maximum(distance, d)
    return distance


def blur(images, knots):
    """Low-pass filter: down to a lattice of ``knots`` per axis and back up, as small matrix products."""
    up = spline_weights(knots, images.shape[-1])
    down = (up / up.sum(0)).T
    return up @ (down @ images @ down.T) @ up.T


def fractal(sources, size, octaves, persistence=0.7):
    """Power-law clouds, (B, size, size), of about unit variance.

    Octave k has 2^k cells per side and amplitude persistence^k. The texture of anatomy has a power spectrum near
    1/f^3 (Burgess et al. 2001, Med. Phys. 28, 419), which persistence 2^(1 - 3/2) = 0.7 gives. Octaves too fine for
    the pixels are skipped and the coarse ones are sampled first, so the pattern does not depend on the size.
    """
    knots = [2**k + 3 for k in octaves if 2 ** (k + 1) <= size]
    amplitude = [persistence**k for k in range(len(knots))]
    unit = math.sqrt(0.23 * sum(a * a for a in amplitude))  # a B-spline lattice keeps 0.23 of its variance
    noise = np.stack([source.standard_normal(sum(n * n for n in knots), dtype=np.float32) for source in sources])
    clouds = 0.0
    for n, a in zip(knots, amplitude):
        lattice, noise = noise[:, : n * n].reshape(-1, n, n), noise[:, n * n :]
        weights = spline_weights(n, size)
        clouds = clouds + weights @ ((a / unit) * lattice) @ weights.T
    return clouds


def tubes(canvas, image_index, x, y, radius, strength, widest, hollow=0.0):
    """Add curved tubes (vessels, wires, long bones) to ``canvas`` (B, size, size), as bundles of thin fibres.

    Args:
        image_index: (N,) the image that each tube belongs to.
        x, y: (N, K) points along the centre lines, in pixels.
        radius: (N, K) in pixels. A tube thinner than a pixel keeps its true mass.
        strength: (N, 1) path per pixel of chord: attenuation (1/cm) times the pixel size (cm).
        widest: an upper bound of the radii in pixels. It sets the number of fibres, so it must not depend on the batch.
        hollow: radius of the marrow cavity as a fraction of the tube's.
    """
    size = canvas.shape[-1]
    dx, dy = x[:, 1:] - x[:, :-1], y[:, 1:] - y[:, :-1]
    dx, dy = np.concatenate([dx[:, :1], dx], 1), np.concatenate([dy[:, :1], dy], 1)
    step = np.maximum(np.sqrt(dx * dx + dy * dy), 1e-6)
    count = math.ceil(2.5 * widest) + 1
    offset = ((np.arange(count, dtype=np.float32) + 0.5) * (2 / count) - 1)[:, None, None]  # (F, 1, 1) in [-1, 1]
    chord = 2 * root(1 - offset**2) - 2 * root(hollow**2 - offset**2)
    mass = (strength * radius * radius * step * (2 / count)) * chord  # (F, N, K)
    side = radius / step
    px, py = x - (side * dy) * offset, y + (side * dx) * offset
    # Whatever falls outside the image lands on a rim one pixel wide, which is cut off at the end.
    px, py = np.clip(px + 0.5, 0, size + 0.99), np.clip(py + 0.5, 0, size + 0.99)
    ix, iy = px.astype(np.int64), py.astype(np.int64)
    fx, fy = px - ix.astype(np.float32), py - iy.astype(np.float32)
    rim = size + 2
    first = image_index[:, None] * (rim * rim) + iy * rim + ix
    low, right = mass * fy, mass * fx
    both = low * fx
    index = np.stack([first, first + 1, first + rim, first + (rim + 1)])
    weight = np.stack([mass - low - right + both, right - both, low - both, both])
    total = np.bincount(index.ravel(), weight.ravel(), len(canvas) * rim * rim).reshape(len(canvas), rim, rim)
    canvas += total[:, 1:-1, 1:-1].astype(np.float32)


def expose(path, sources, pixel, photons, scatter, black, white, squash=0.35, sharpen=0.25, present=0.8):
    """The radiograph of a path, uint8 (B, size, size): scatter, quantum noise, logarithm, processing, display curve.

    Args (numbers or (B, 1, 1)):
        pixel: side of a pixel in cm. photons: per square cm, at the detector in open air.
        scatter: ratio of scattered to primary radiation behind a patient.
        black, white: grey (0 to 1) of the 12th and the 93rd percentile of the body's density (automatic windowing).
        squash: share of the lowest frequencies removed. sharpen: share of the fine detail added. Both imitate the
            processing of a digital system.
        present: a path above this is body, below it air.
    """
    primary = np.exp(-path)
    # Scatter is a wide veil produced by the body, and absent where the beam meets no body (Seibert and Boone 2005,
    # J. Nucl. Med. Technol. 33, 3: scatter-to-primary ratios of the regions of the chest).
    signal = primary + scatter * blur(primary * (1 - primary), 9)
    # Photon counts are Poisson; above about thirty per pixel that is a normal distribution with variance = mean.
    noise = np.stack([source.standard_normal(path.shape[1:], dtype=np.float32) for source in sources])
    signal = signal + noise * np.sqrt(signal * (1 / (photons * pixel * pixel)))
    density = -np.log(np.maximum(signal, 1e-4))
    wide = blur(density, 7)
    density = density + sharpen * (density - blur(density, 35)) - squash * wide * ramp(path, 0, 1)
    stride = max(1, path.shape[1] // 32)  # some 1,000 pixels are enough for percentiles
    subset, body = density[:, ::stride, ::stride], path[:, ::stride, ::stride] > present
    ranked = [np.sort(d[b]) if b.any() else np.float32((0, 1)) for d, b in zip(subset, body)]
    lungs, solid = (np.stack([d[int(share * len(d))] for d in ranked])[:, None, None] for share in (0.12, 0.93))
    grey = black + (density - lungs) * ((white - black) / np.maximum(solid - lungs, 0.1))
    # The characteristic curve of photographic film: straight in the middle, flat at both ends.
    grey = 0.5 + 0.5 * np.tanh(1.25 * (2 * grey - 1)) / math.tanh(1.25)
    return (np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8)
