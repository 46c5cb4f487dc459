"""Coloured shapes and how they lie relative to each other: the drawing, the captions and the prompts.

In: a NumPy generator. Out: an RGB image uint8 (size, size, 3) and its caption. ``shape_check`` tells from the pixels
whether an image shows what a shape prompt asks for. Coordinates are fractions of the image, y down.
"""

import math

import numpy as np

from minildm.teaching.xray import generators

COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 150, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 215, 40),
    "purple": (140, 45, 165),
    "orange": (240, 130, 25),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
BACKGROUNDS = {
    "gray": (128, 128, 128),
    "light gray": (195, 195, 195),
    "beige": (214, 202, 172),
    "light blue": (168, 200, 222),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
# Where the first shape lies as seen from the second, y down.
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}


def shape_prompt(seed):
    """A prompt for two shapes and their relation, such as 'a red circle above a blue square'."""
    (rng,) = generators([seed], 1)
    (c1, c2), (s1, s2) = rng.choice(list(COLOURS), 2, replace=False), rng.choice(SHAPES, 2, replace=False)
    return f"{with_article(c1)} {s1} {rng.choice(list(RELATIONS))} {with_article(c2)} {s2}"


def paint_shapes(rng, size):
    """An image of two shapes, one shape or several equal ones, and its caption."""
    canvas, background = plain_background(rng, size)
    plan = rng.choice(("pair", "single", "count"), p=(0.78, 0.13, 0.09))
    c1, c2 = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    s1, s2 = (str(s) for s in rng.choice(SHAPES, 2))
    if plan == "pair":
        caption = _paint_pair(canvas, rng, (c1, s1), (c2, s2))
    elif plan == "single":
        paint(canvas, s1, tint(rng, c1), *rng.uniform(0.38, 0.62, 2), rng.uniform(0.16, 0.33))
        caption = f"{with_article(c1)} {s1}"
    else:
        caption = _paint_several(canvas, rng, c1, s1)
    if rng.random() < 0.25:
        caption += f" on {with_article(background)} background"
    caption = str(rng.choice(("", "a picture of ", "a drawing of "), p=(0.8, 0.1, 0.1))) + caption
    return finish(canvas, rng), caption


def _paint_pair(canvas, rng, first, second):
    (c1, s1), (c2, s2) = first, second
    relation = str(rng.choice(list(RELATIONS)))
    dx, dy = RELATIONS[relation]
    gap, jitter = rng.uniform(0.23, 0.26), rng.uniform(-0.07, 0.07, 2)
    for sign, colour, shape, wobble in ((1, c1, s1, jitter[0]), (-1, c2, s2, jitter[1])):
        cx, cy = 0.5 + sign * dx * gap + wobble * abs(dy), 0.5 + sign * dy * gap + wobble * abs(dx)
        paint(canvas, shape, tint(rng, colour), cx, cy, rng.uniform(0.17, 0.23))
    words = f"to the {relation}" if dx and rng.random() < 0.4 else relation
    if not dx and rng.random() < 0.15:
        words = {"above": "over", "below": "under"}[relation]
    return f"{with_article(c1)} {s1} {words} {with_article(c2)} {s2}"


def _paint_several(canvas, rng, colour, shape):
    count = int(rng.integers(2, 5))
    cells = rng.permutation(4)[:count]
    half = rng.uniform(0.1, 0.17)
    for cell in cells:
        cx, cy = 0.27 + 0.46 * (cell % 2), 0.27 + 0.46 * (cell // 2)
        paint(canvas, shape, tint(rng, colour), *(np.array([cx, cy]) + rng.uniform(-0.04, 0.04, 2)), half)
    plural = shape + ("es" if shape == "cross" else "s")
    return f"{('two', 'three', 'four')[count - 2]} {colour} {plural}"


# --- drawing ---------------------------------------------------------------------------------------------------------


def shape_distance(shape, x, y):
    """Approximate signed distance to a shape of half-size 1 at the origin (y down): negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9
    if shape == "triangle":
        return np.maximum(y - 0.8, (1.8 * np.abs(x) - y - 1) / 2.06)
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1) / math.sqrt(2)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - 0.32, b - 0.95), np.maximum(a - 0.95, b - 0.32))
    fifth = 2 * math.pi / 5  # a star: one edge from a tip to its notch, mirrored and repeated ten times
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    r = np.hypot(x, y)
    px, py = r * np.cos(angle), r * np.sin(angle)
    ex, ey = 0.42 * math.cos(fifth / 2) - 1, 0.42 * math.sin(fifth / 2)
    return ((px - 1) * ey - py * ex) / math.hypot(ex, ey) * (1 if ex < 0 else -1)


def grid(size):
    """Pixel centres x (1, size) and y (size, 1) in [0, 1], y down."""
    t = (np.arange(size, dtype=np.float32) + 0.5) / size
    return t[None, :], t[:, None]


def paint(canvas, shape, colour, cx, cy, half):
    """Draw a shape, with edges smoothed over one pixel, onto a float canvas (size, size, 3).

    Args: cx, cy: centre. half: half-size.
    """
    x, y = grid(len(canvas))
    distance = shape_distance(shape, (x - cx) / half, (y - cy) / half) * (half * len(canvas))
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas += cover * (np.float32(colour) - canvas)


def plain_background(rng, size):
    """A nearly uniform canvas (size, size, 3) float32, and the name of its colour."""
    name = str(rng.choice(list(BACKGROUNDS)))
    x, y = grid(size)
    slope = rng.uniform(-14, 14, 2)
    shade = ((x - 0.5) * slope[0] + (y - 0.5) * slope[1])[..., None].astype(np.float32)
    return np.float32(BACKGROUNDS[name]) + shade, name


def tint(rng, name):
    """A random variation of a named colour."""
    return np.clip(np.float32(COLOURS[name]) + rng.uniform(-10, 10, 3), 0, 255)


def finish(canvas, rng):
    """Add noise and round to uint8."""
    noise = rng.standard_normal(canvas.shape[:2], dtype=np.float32)[..., None] * rng.uniform(0, 3)
    return (np.clip(canvas + noise, 0, 255) + 0.5).astype(np.uint8)


# --- words -----------------------------------------------------------------------------------------------------------


def with_article(word):
    """orange -> an orange."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def listed(things):
    """["a", "b", "c"] -> "a, b and c"."""
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
