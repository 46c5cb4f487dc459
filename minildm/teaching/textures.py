"""Grey textures at the scale of ribs and vessels, without an anatomy, from which the embedded model's decoder learns to
show fine detail.

In: seeds. Out: grey images uint8 (B, size, size), without captions: soft and hard-edged masses in front of each other,
filled with bent stripes, crossed by thin arcs. The codes of the autoencoder hold such detail, but a decoder that has
only seen flat shapes smooths it away. Coordinates and lengths are fractions of the image.
"""

import math

import numpy as np

from minildm.teaching.shapes import grid
from minildm.teaching.xray import fractal, generators, ramp


def render_batch(seeds, size=128):
    """One texture per seed (numbers or tuples such as (set, index)): uint8 (B, size, size)."""
    return np.stack([paint_texture(rng, size) for rng in generators(seeds, 2)])


def paint_texture(rng, size):
    """A texture, uint8 (size, size)."""
    x, y = (t + np.zeros((size, size), np.float32) for t in grid(size))
    clouds = fractal([rng] * 3, size, range(1, 5), 0.6)  # they bend borders and stripes, and shade the background
    grey = rng.uniform(40, 215) + rng.uniform(0, 40) * clouds[0]
    for _ in range(rng.integers(2, 6)):
        u, v = _turned(x - rng.uniform(0, 1), y - rng.uniform(0, 1), rng.uniform(0, math.pi))
        inside = _mass(rng, u, v, clouds[1])
        grey += rng.uniform(-110, 110) * inside
        for _ in range(rng.integers(0, 3)):
            contrast = math.exp(rng.uniform(math.log(2), math.log(25)))
            where = 1 if rng.random() < 0.3 else inside
            grey += contrast * where * _stripes(rng, u, v, clouds[2])
    for _ in range(rng.integers(0, 14)):
        grey += rng.uniform(-60, 60) * _arc(rng, x, y)
    low, high = rng.uniform(0, 30), rng.uniform(215, 255)
    if rng.random() < 0.5:
        grey = np.clip(grey, low, high)
    else:  # the display curve of a radiograph
        grey = low + (high - low) / (1 + np.exp((128 - grey) / rng.uniform(35, 60)))
    grey += rng.uniform(0, 3) * rng.standard_normal(grey.shape, dtype=np.float32)
    return np.clip(grey, 0, 255).round().astype(np.uint8)


def _turned(x, y, angle):
    """The coordinates (x, y) in axes turned by ``angle`` (radians)."""
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _mass(rng, u, v, clouds):
    """1 within a superellipse round (0, 0) with a wavy border, soft or sharp; 0 outside."""
    power, (a, b), soft = rng.uniform(2, 5), rng.uniform(0.1, 0.6, 2), rng.uniform(0.01, 0.15)
    distance = (np.abs(u / a) ** power + np.abs(v / b) ** power) ** (1 / power) + 0.06 * clouds
    return ramp(distance, 1 + soft, 1 - soft)


def _stripes(rng, u, v, clouds):
    """Bent stripes in [-1, 1] with a period of 1/30 to 1/6 of the image, sine waves or nearly rectangular."""
    period = math.exp(rng.uniform(math.log(1 / 30), math.log(1 / 6)))
    across, along = _turned(u, v, rng.uniform(0, math.pi))
    phase = 2 * math.pi / period * (across + rng.uniform(-1.2, 1.2) * along * along + 0.02 * clouds)
    return np.tanh(rng.uniform(0.5, 3) * (np.sin(phase + rng.uniform(0, 6)) + rng.uniform(-0.7, 0.7)))


def _arc(rng, x, y):
    """A thin arc of a circle that fades out towards both ends, from 0 to 1."""
    angle, radius, width = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 2), rng.uniform(0.006, 0.02)
    px, py = rng.uniform(0, 1, 2)  # its middle
    dx, dy = x - px, y - py
    along, across = _turned(dx, dy, angle)
    across = np.hypot(along, across + radius) - radius  # the distance from the circle
    return np.exp(-0.5 * (across / width) ** 2 - 0.5 * (along / rng.uniform(0.05, 0.25)) ** 2) * (
        np.hypot(dx, dy) < 0.7
    )
