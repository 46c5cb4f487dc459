"""Captioned images of anything but chests: what the embedded base model is pretrained on.

In: seeds. Out: RGB images uint8 (B, size, size, 3), each with a caption: coloured shapes and how they lie relative to
each other (``shapes``), textures, simple scenes, and radiographs of objects (``objects``) made by the same physics as
the chest phantom's (``xray``). A model trained on them knows words, layout and the greys of a radiograph but has never
seen a thorax.
"""

import math

import numpy as np

from minildm.errors import InputError
from minildm.teaching.objects import paint_radiograph
from minildm.teaching.shapes import COLOURS, finish, grid, listed, paint, paint_shapes, tint, with_article
from minildm.teaching.xray import fractal, generators

IMAGE_KINDS = {"shapes": 0.66, "textures": 0.08, "scenes": 0.04, "radiographs": 0.22}  # and their shares


def render_batch(seeds, size=128, kind=None):
    """One image and one caption per seed.

    Args:
        seeds: numbers or tuples such as (set, index).
        kind: one of IMAGE_KINDS for all images; None samples the kind of each.
    Returns: uint8 (B, size, size, 3) and a list of strings.
    """
    if kind is not None and kind not in IMAGE_KINDS:
        raise InputError(f"no kind of procedural image is called {kind!r}; choose one of {', '.join(IMAGE_KINDS)}")
    if size < 32:
        raise InputError(f"a procedural image's size must be at least 32 pixels, got {size}")
    images, captions = [], []
    for rng in generators(seeds, 0):
        image_kind = kind or str(rng.choice(list(IMAGE_KINDS), p=list(IMAGE_KINDS.values())))
        image, caption = _PAINTERS[image_kind](rng, size)
        images.append(image if image.ndim == 3 else np.repeat(image[..., None], 3, 2))
        captions.append(caption)
    return np.stack(images), captions


def paint_texture(rng, size):
    """A texture of two colours or of greys, and its caption."""
    x, y = grid(size)
    c1, c2 = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    kinds = {"stripes": 0.12, "checks": 0.12, "dots": 0.12, "clouds": 0.16, "gradient": 0.12, "gray": 0.36}
    kind = rng.choice(list(kinds), p=list(kinds.values()))
    if kind == "stripes":
        way, (a, b) = list({"horizontal": (0, 1), "vertical": (1, 0), "diagonal": (0.7, 0.7)}.items())[rng.integers(3)]
        wave = np.sin((a * x + b * y) * 2 * math.pi * rng.integers(3, 9) + rng.uniform(0, 6))
        mix, caption = np.clip(0.5 + wave * 8, 0, 1), f"{way} {c1} and {c2} stripes"
    elif kind == "checks":
        n = rng.integers(3, 8)
        mix = np.clip(0.5 + 12 * np.sin(x * math.pi * n) * np.sin(y * math.pi * n), 0, 1)
        caption = f"{with_article(c1)} and {c2} checkerboard"
    elif kind == "dots":
        n = rng.integers(3, 8)
        mix = np.clip((0.3 - np.hypot(x * n % 1 - 0.5, y * n % 1 - 0.5)) * size / n + 0.5, 0, 1)
        caption = f"{c1} dots on {c2}"
    elif kind == "gradient":
        way, t = list({"left to right": x + 0 * y, "top to bottom": y + 0 * x}.items())[rng.integers(2)]
        mix, caption = 1 - t, f"a gradient from {c1} to {c2}, {way}"
    else:
        rough = rng.random() < 0.5
        clouds = fractal([rng], size, range(2, 8), 0.75 if rough else 0.45)[0]
        mix = np.clip(0.5 + 0.35 * clouds, 0, 1)
        caption = f"{'rough' if rough else 'soft'} {c1} and {c2} clouds"
        if kind == "gray":
            middle, depth = rng.uniform(70, 180), rng.uniform(15, 140)
            grey = middle + (mix - 0.5) * depth
            return finish(np.repeat(grey[..., None], 3, 2), rng), f"{'rough' if rough else 'soft'} gray clouds"
    canvas = tint(rng, c2) + mix[..., None] * (tint(rng, c1) - tint(rng, c2))
    return finish(canvas.astype(np.float32), rng), caption


def paint_scene(rng, size):
    """A landscape by day or night with a few simple things in it, and its caption."""
    x, y = grid(size)
    night = rng.random() < 0.3
    sky = np.float32((25, 30, 70) if night else (150, 200, 240))
    canvas = sky + (y * (20 if night else 60))[..., None] * np.float32((1, 0.8, 0.3)) + 0 * x[..., None]
    ground = rng.uniform(0.62, 0.78)
    hills = rng.random() < 0.5
    top = ground - (0.1 * np.sin(x * rng.uniform(5, 9) + rng.uniform(0, 6)) + 0.05 if hills else 0)
    cover = np.clip((y - top) * size + 0.5, 0, 1)[..., None]
    canvas = (canvas + cover * (np.float32((40, 90, 50) if night else (90, 160, 70)) - canvas)).astype(np.float32)
    light = (235, 235, 220) if night else (250, 220, 60)
    paint(canvas, "circle", light, rng.uniform(0.15, 0.85), rng.uniform(0.12, 0.25), rng.uniform(0.06, 0.1))
    things = ["the moon" if night else "the sun"]
    slots = list(rng.permutation([0.22, 0.5, 0.78]))
    for thing in ("house", "tree", "tent"):
        if rng.random() < 0.55 and slots:
            things.append(_paint_thing(canvas, rng, thing, slots.pop(), ground))
    if hills:
        things.append("hills")
    return finish(canvas, rng), f"{'a night scene' if night else 'a landscape'} with {listed(things)}"


def _paint_thing(canvas, rng, thing, cx, ground):
    """Draw a house, tree or tent centred at cx on the ground; returns its words."""
    s = rng.uniform(0.8, 1.2)
    colour = str(rng.choice([c for c in COLOURS if c != "white"]))
    if thing == "house":
        paint(canvas, "square", COLOURS[colour], cx, ground, 0.11 * s)
        paint(canvas, "triangle", (110, 60, 40), cx, ground - 0.17 * s, 0.14 * s)
        paint(canvas, "square", (60, 45, 35), cx, ground + 0.06 * s, 0.035 * s)
    elif thing == "tree":
        paint(canvas, "square", (100, 70, 40), cx, ground + 0.04, 0.03 * s)
        paint(canvas, "square", (100, 70, 40), cx, ground - 0.01, 0.03 * s)
        paint(canvas, "circle", (30, 110, 45), cx, ground - 0.13 * s, 0.11 * s)
    else:
        paint(canvas, "triangle", COLOURS[colour], cx, ground, 0.12 * s)
        paint(canvas, "triangle", (40, 35, 30), cx, ground + 0.05 * s, 0.05 * s)
    return with_article(thing if thing == "tree" else f"{colour} {thing}")


_PAINTERS = {"shapes": paint_shapes, "textures": paint_texture, "scenes": paint_scene, "radiographs": paint_radiograph}
