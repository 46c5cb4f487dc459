"""The physics of a radiograph: from the attenuation along each ray to the grey values of a film.

In: ``path`` (B, size, size) float32, the line integral of the attenuation coefficient (1/cm times cm, so without
unit) from the tube to each detector pixel. Out: uint8 pictures. ``phantom`` builds the path of a thorax,
``procedural`` that of bottles and hands.

Beer-Lambert: primary = exp(-path). Attenuation coefficients are those of a 120 kVp beam's mean energy, near 60 keV
(Hubbell & Seltzer, NISTIR 5632, tables of mass attenuation). Not modelled: beam hardening, the heel effect, the
anti-scatter grid's own shadow.
"""

import math
from functools import lru_cache

import numpy as np

# Linear attenuation near 60 keV in 1/cm.
SOFT, LUNG = 0.205, 0.056  # lung: soft tissue at a quarter of its density
BONE = 0.38  # cortical bone, *in addition to* the soft tissue it displaces


def generators(seeds, stream):
    """One source of random numbers a picture; a seed is a number or a tuple, such as (set, index); a stream one use."""
    return [np.random.default_rng([*(seed if isinstance(seed, tuple) else (seed,)), stream]) for seed in seeds]


class Draws:
    """Uniform numbers for a batch, handed out column by column: picture b depends on ``sources[b]`` alone."""

    def __init__(self, sources, count):
        self.columns = np.stack([source.random(count, dtype=np.float32) for source in sources])
        self.used = 0

    def __call__(self, low, high):
        """The next number of each picture, uniform in [low, high): (B, 1, 1)."""
        self.used += 1
        assert self.used <= self.columns.shape[1], f"only {self.columns.shape[1]} numbers were drawn"
        return (low + (high - low) * self.columns[:, self.used - 1]).reshape(-1, 1, 1)


def root(a):
    """sqrt(max(a, 0)): half the chord of a ray through a round body, zero beside it."""
    a = np.maximum(a, 0)
    return np.sqrt(a, out=a) if isinstance(a, np.ndarray) else np.sqrt(a)


def ramp(a, low, high):
    """Smooth step from 0 at ``low`` to 1 at ``high`` (which may be the smaller: then it falls)."""
    t = np.clip((a - low) * (1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def ellipsoid(x, y, centre_x, centre_y, radius_x, radius_y, radius_z, angle=0.0):
    """Chord (cm) of rays along z through an ellipsoid that is turned by ``angle`` in the picture's plane."""
    dx, dy = x - centre_x, y - centre_y
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = dx * (cos / radius_x), dy * (cos / radius_y)
    if angle:
        along, across = along + dy * (sin / radius_x), across - dx * (sin / radius_y)
    return (2 * radius_z) * root(1 - along * along - across * across)


@lru_cache(maxsize=64)
def spline_weights(knots, size):
    """(size, knots): cubic B-spline weights that spread a coarse lattice over ``size`` pixels; rows sum to 1."""
    t = (np.arange(size) + 0.5) / size * (knots - 3) + 1
    distance = np.abs(t[:, None] - np.arange(knots))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def plate(x, y, corners):
    """Signed distance (cm, negative inside) to a convex polygon; corners [(x, y), ...] clockwise, y down."""
    distance = None
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        d = (x - x0) * ((y1 - y0) / length) - (y - y0) * ((x1 - x0) / length)
        distance = d if distance is None else np.maximum(distance, d)
    return distance


def blur(images, knots):
    """Low-pass by going down to a lattice of ``knots`` and back: small matrix products along each axis."""
    up = spline_weights(knots, images.shape[-1])
    down = (up / up.sum(0)).T
    return up @ (down @ images @ down.T) @ up.T


def fractal(sources, size, octaves, persistence=0.7):
    """Power-law clouds, (B, size, size), about unit variance: octave k has 2^k cells a side and amplitude
    persistence^k.

    Anatomy's texture has a power spectrum near 1/f^3 (Burgess et al. 2001, Med. Phys. 28, 419), which persistence
    2^(1 - 3/2) = 0.7 gives. Octaves too fine for the pixels are left out, coarse ones drawn first: size changes no
    shape.
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


def tubes(canvas, picture, x, y, radius, strength, widest, hollow=0.0):
    """Add curved tubes (vessels, wires, long bones) to ``canvas`` (B, size, size), as bundles of thin fibres.

    Args:
        picture: (N,) which canvas each tube goes to.
        x, y: (N, K) points along the centre lines, in pixels.
        radius: (N, K) in pixels; any thinness keeps its true mass.
        strength: (N, 1) path per pixel of chord: attenuation (1/cm) times the pixel's size (cm).
        widest: in pixels, at least every radius; it sets the count of fibres, so no batch may change it.
        hollow: radius of the marrow space as a fraction.
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
    px, py = (
        np.clip(px + 0.5, 0, size + 0.99),
        np.clip(py + 0.5, 0, size + 0.99),
    )  # a rim of one pixel takes what falls outside
    ix, iy = px.astype(np.int64), py.astype(np.int64)
    fx, fy = px - ix.astype(np.float32), py - iy.astype(np.float32)
    rim = size + 2
    first = picture[:, None] * (rim * rim) + iy * rim + ix
    low, right = mass * fy, mass * fx
    both = low * fx
    index = np.stack([first, first + 1, first + rim, first + (rim + 1)])
    weight = np.stack([mass - low - right + both, right - both, low - both, both])
    total = np.bincount(index.ravel(), weight.ravel(), len(canvas) * rim * rim).reshape(len(canvas), rim, rim)
    canvas += total[:, 1:-1, 1:-1].astype(np.float32)


def expose(path, sources, pixel, photons, scatter, black, white, squash=0.35, sharpen=0.25, present=0.8):
    """Film of a path: scatter veil, quantum noise, logarithm, tone and edge processing, display curve -> uint8 (B,
    size, size).

    Args (numbers or (B, 1, 1)):
        pixel: its side in cm; photons: at the detector in open air, per square cm.
        scatter: scattered over primary radiation behind a patient.
        black, white: grey (0 to 1) given to the 12th and to the 93rd percentile of the body's density, as automatic
        windowing does. present: a path above this is body, not air. squash, sharpen: share of the lowest frequencies
        taken away, and of the fine ones added, as a digital system does.
    """
    primary = np.exp(-path)
    # The veil is what the body makes of the beam: wide, and nothing where the beam meets no body. (J. A. Seibert & J.
    # M. Boone 2005, J. Nucl. Med. Technol. 33, 3: scatter-to-primary ratio of chest regions.)
    signal = primary + scatter * blur(primary * (1 - primary), 9)
    # Counts in a pixel are Poisson; above some thirty of them that is the normal law with variance = mean.
    noise = np.stack([source.standard_normal(path.shape[1:], dtype=np.float32) for source in sources])
    signal = signal + noise * np.sqrt(signal * (1 / (photons * pixel * pixel)))
    density = -np.log(np.maximum(signal, 1e-4))
    wide = blur(density, 7)
    density = density + sharpen * (density - blur(density, 35)) - squash * wide * ramp(path, 0, 1)
    some = max(1, path.shape[1] // 32)
    few, body = density[:, ::some, ::some], path[:, ::some, ::some] > present
    ranked = [np.sort(d[b]) if b.any() else np.float32((0, 1)) for d, b in zip(few, body)]
    lungs, solid = (np.stack([d[int(share * len(d))] for d in ranked])[:, None, None] for share in (0.12, 0.93))
    shown = black + (density - lungs) * ((white - black) / np.maximum(solid - lungs, 0.1))
    # A film's characteristic curve: straight in the middle, slow at both ends.
    shown = 0.5 + 0.5 * np.tanh(1.25 * (2 * shown - 1)) / math.tanh(1.25)
    return (np.clip(shown, 0, 1) * 255 + 0.5).astype(np.uint8)
