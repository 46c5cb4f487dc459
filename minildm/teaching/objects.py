"""Radiographs of bottles, hands, tools and fruit, by the same physics as the chest phantom's, and their captions.

Each object is a function of (rng, x, y, cm) that returns the path (line integral of the attenuation) on the grid x, y
and the words for what it shows. Lengths in cm on a detector of 20 cm, y down; ``cm`` is the side of a pixel.
"""

import math
from itertools import pairwise

import numpy as np

from minildm.teaching.shapes import grid, listed, with_article
from minildm.teaching.xray import BONE, SOFT, ellipsoid, expose, fractal, plate, ramp, root, spline_weights, tubes

DETECTOR = 20  # cm a side
METAL = 3.0  # 1/cm


def paint_radiograph(rng, size):
    """The radiograph of a random object, uint8 (size, size), and its caption."""
    x, y = ((t - 0.5)[None] * DETECTOR for t in grid(size))  # (1, 1, W), (1, H, 1)
    angle = rng.uniform(-0.3, 0.3)
    x, y = (
        x * math.cos(angle) + y * math.sin(angle) + rng.uniform(-1, 1),
        y * math.cos(angle) - x * math.sin(angle) + rng.uniform(-1, 1),
    )
    objects = (_bottle, _hand, _toolbox, _fruit, _cylinders, _blobs, _roots, _wedge, _lattice, _shells)
    path, thing = objects[rng.integers(len(objects))](rng, x, y, DETECTOR / size)
    if rng.random() < 0.6:  # water around the object gives the greys of a body instead of those of open air
        path = path + SOFT * rng.uniform(3, 12) * (1 + 0.1 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) / 10)
        thing += str(rng.choice((" in water", " in a tank of water")))
    words = str(rng.choice(("an x-ray of {}", "x-ray of {}", "a radiograph of {}", "a radiograph showing {}")))
    path = path * (1 + 10 ** rng.uniform(-2.2, -1.2) * fractal([rng], size, range(3, 8)))
    black, white, scatter = rng.uniform(0.15, 0.5), rng.uniform(0.74, 0.92), rng.uniform(0.1, 0.4)
    path = path.astype(np.float32)
    return expose(path, [rng], DETECTOR / size, 1e7, scatter, black, white, present=0.06)[0], words.format(thing)


def _empty(x, y):
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)


def _wires(path, cm, curves):
    """Add smooth tubes to path (1, size, size): rows of (control points in cm, radius in cm, strength in 1/cm)."""
    curves = [(np.float32([points[0], points[0], *points, points[-1], points[-1]]), *rest) for points, *rest in curves]
    longest = max(np.hypot(*np.diff(points, axis=0).T).sum() for points, *_ in curves)
    count = int(longest / (0.7 * cm)) + 6
    places = np.stack([spline_weights(len(points), count) @ points for points, *_ in curves])  # (N, K, 2)
    px, py = (places[..., k] / np.float32(cm) + path.shape[-1] / 2 for k in (0, 1))
    radius = np.float32([[r / cm] for _, r, _ in curves])
    strength = np.float32([[s * cm] for *_, s in curves])
    image_index = np.zeros(len(curves), np.int64)
    tubes(path, image_index, px, py, np.broadcast_to(radius, px.shape), strength, float(radius.max()))


def _bottle(rng, x, y, cm):
    wide, level = rng.uniform(2.2, 3.6), rng.uniform(-2, 4)
    outer = np.where(y > -3.5, wide, 1.0 + (wide - 1.0) * ramp(y, -6, -3.5)) * ramp(y, 7.6, 7.4) * (y > -8.5)
    inner = np.maximum(outer - 0.35, 0)
    path = 0.35 * 2 * (root(outer**2 - x * x) - root(inner**2 - x * x))
    full = rng.random() < 0.6
    if full:
        path = path + SOFT * 2 * root(inner**2 - x * x) * (y > level)
    return path, f"a bottle{' with liquid' if full else ', empty'}"


def _hand(rng, x, y, cm):
    path, flesh, bones = _empty(x, y), ellipsoid(x, y, 0, 4.2, 4.2, 4.8, 1.3), []
    for k, spread in enumerate(np.linspace(-0.55, 0.55, 5) + rng.uniform(-0.05, 0.05, 5)):
        reach = (7.5, 9.8, 10.4, 9.8, 8.2)[k] * rng.uniform(0.93, 1.05)
        joints = [
            ((3 + 5 * part) * math.sin(spread), 5.5 - part * reach * math.cos(spread))
            for part in (0.2, 0.5, 0.72, 0.88, 1)
        ]
        bones.append(([joints[0], joints[2], joints[4]], 0.9, 0.8 * SOFT))
        for (x0, y0), (x1, y1) in pairwise(joints):
            bones.append(([(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (0.1, 0.5, 0.9)], 0.38, BONE))
    for _ in range(7):
        flesh = flesh + 1.2 * ellipsoid(x, y, rng.uniform(-1.6, 1.6), rng.uniform(5, 7.5), 0.65, 0.65, 0.5)
    _wires(path, cm, bones)
    return path + SOFT * flesh, "a hand"


# Each tool: rows of (points in cm along a wire, its radius).
TOOLS = {
    "key": (
        ([(-2 + 0.9 * math.cos(a), 0.9 * math.sin(a)) for a in np.linspace(0, 6.3, 9)], 0.25),
        ([(-1.1, 0), (1, 0), (2.6, 0)], 0.25),
        ([(2.2, 0), (2.2, 0.4), (2.2, 0.8)], 0.25),
    ),
    "hammer": (([(-3, 0), (0, 0), (3, 0)], 0.4), ([(2.6, -1.2), (2.6, 0), (2.6, 1.2)], 0.6)),
    "screw": (([(-1.5, 0), (0, 0), (1.5, 0)], 0.22), ([(-1.5, -0.5), (-1.5, 0), (-1.5, 0.5)], 0.25)),
    "spring": (([(u, 0.7 * (-1) ** k) for k, u in enumerate(np.linspace(-2, 2, 15))], 0.12),),
}


def _toolbox(rng, x, y, cm):
    wide, high = rng.uniform(6, 7.5), rng.uniform(4, 6)
    box = np.maximum(np.abs(x) - wide, np.abs(y) - high)
    path = (0.35 * ramp(box, 0.05, -0.05) + 0.9 * ramp(np.abs(box + 0.25), 0.3, 0.1)).astype(np.float32)
    count = rng.integers(1, 4)
    names = [str(n) for n in rng.choice((*TOOLS, "coin", "ring"), count, replace=False)]
    for name in names:
        cx, cy, turn = rng.uniform(-3.5, 3.5), rng.uniform(-2.2, 2.2), rng.uniform(0, 6.3)
        if name == "coin":
            path += 1.2 * ramp(np.hypot(x - cx, y - cy), 1.15, 1.05)
        elif name == "ring":
            path += 2.0 * ramp(np.abs(np.hypot(x - cx, y - cy) - 0.9), 0.25, 0.15)
        else:
            c, s = math.cos(turn), math.sin(turn)
            turned = [([(cx + u * c - v * s, cy + u * s + v * c) for u, v in line], r) for line, r in TOOLS[name]]
            _wires(path, cm, [(*wire, METAL) for wire in turned])
    return path, "a box with " + listed([with_article(name) for name in names])


def _fruit(rng, x, y, cm):
    kind = str(rng.choice(("an apple", "an orange", "a pear", "a cherry pair")))
    if kind == "a cherry pair":
        path = SOFT * (ellipsoid(x, y, -3, 4, 2.4, 2.4, 2.4) + ellipsoid(x, y, 3, 3.4, 2.4, 2.4, 2.4))
        path = path + 0.25 * (ellipsoid(x, y, -3, 4, 0.9, 0.9, 0.9) + ellipsoid(x, y, 3, 3.4, 0.9, 0.9, 0.9))
        _wires(path, cm, [([(s * 3, 2), (s * 2, -3), (0, -7)], 0.25, SOFT) for s in (-1, 1)])
        return path, "two cherries"
    r = rng.uniform(4.5, 6.5)
    path = 0.9 * SOFT * ellipsoid(x, y, 0, 1, r, r * 0.95, r)
    if kind == "a pear":
        path = np.maximum(path, 0.9 * SOFT * ellipsoid(x, y, 0, -4, 2.8, 4.5, 2.8))
    if kind == "an orange":
        wedge = np.abs(np.sin(5 * np.arctan2(y - 1, x)))
        path = path - 0.12 * ramp(wedge, 0.2, 0.05) * (np.hypot(x, y - 1) < 0.85 * r)
        path = path + 0.25 * ramp(np.abs(np.hypot(x, (y - 1) / 0.95) - 0.9 * r), 0.4, 0.1)
    else:
        for k in range(5):
            path = path + 0.2 * ellipsoid(x, y, 0.8 * math.cos(1.26 * k), 1 + 0.8 * math.sin(1.26 * k), 0.3, 0.5, 0.5)
        path = path - 0.1 * ellipsoid(x, y, 0, 1, 1.5, 1.8, 1.2)
    _wires(path, cm, [([(0, 1 - r * 0.9), (0.4, -r), (1.0, -r - 1.5)], 0.25, SOFT)])
    return path, kind


def _cylinders(rng, x, y, cm):
    n = int(rng.integers(2, 5))
    path = _empty(x, y)
    hollow = rng.random() < 0.5
    for k in range(n):
        cx, r, mu = (k - (n - 1) / 2) * 4.2, rng.uniform(0.9, 1.9), rng.uniform(0.15, 0.5)
        chord = root(r * r - (x - cx) ** 2) - (root((0.65 * r) ** 2 - (x - cx) ** 2) if hollow else 0)
        path = path + 2 * mu * chord * ramp(np.abs(y - rng.uniform(-1, 1)), rng.uniform(5, 8), 4.5)
    return path, f"{('two', 'three', 'four')[n - 2]} {'hollow tubes' if hollow else 'solid cylinders'}"


def _blobs(rng, x, y, cm):
    n = int(rng.integers(2, 7))
    path = 0
    for _ in range(n):
        rx, ry = rng.uniform(1.2, 5.0, 2)
        path = path + SOFT * ellipsoid(x, y, *rng.uniform(-5, 5, 2), rx, ry, min(rx, ry), rng.uniform(0, 3))
    holes = int(rng.integers(0, 3))
    for _ in range(holes):
        path = np.maximum(path - SOFT * ellipsoid(x, y, *rng.uniform(-4, 4, 2), *rng.uniform(0.8, 2, 2), 2), 0)
    return path, f"soft round lumps{' with holes' if holes else ''}"


def _roots(rng, x, y, cm):
    pot = rng.random() < 0.5
    path = _empty(x, y)
    if pot:
        half = 6.5 - 0.2 * y
        walls = 0.8 * ramp(np.abs(np.abs(x) - half), 0.5, 0.2) + 0.25 * root(1 - (x / half) ** 2)
        path += walls * ramp(np.abs(y), 7.6, 7.4)
    ends = [(rng.uniform(-2, 2), -7.0, math.pi / 2 + rng.uniform(-0.3, 0.3))]
    radius, branches = rng.uniform(0.4, 0.8), []
    for _ in range(5):
        tips = []
        for ex, ey, angle in ends:
            for fork in (-1, 1):
                turn, length = angle + fork * rng.uniform(0.1, 0.7), rng.uniform(1.6, 4.0)
                mid = ex + 0.5 * length * math.cos((angle + turn) / 2), ey + 0.5 * length * math.sin((angle + turn) / 2)
                tips.append((ex + length * math.cos(turn), ey + length * math.sin(turn), turn))
                branches.append(([(ex, ey), mid, tips[-1][:2]], radius, 1.2 * SOFT))
        ends, radius = [tips[k] for k in rng.permutation(len(tips))[:8]], radius * 0.72
    _wires(path, cm, branches)
    return path, "the roots of a plant" + (" in a pot" if pot else "")


def _wedge(rng, x, y, cm):
    n = int(rng.integers(4, 9))
    step = np.clip(np.floor((x + 8) / 16 * n), 0, n - 1) + 1
    path = (step * rng.uniform(0.2, 0.5)) * ramp(np.abs(x), 8.05, 7.95) * ramp(np.abs(y), rng.uniform(3, 6), 2.9)
    return path, f"a step wedge of {('four', 'five', 'six', 'seven', 'eight')[n - 4]} steps"


def _lattice(rng, x, y, cm):
    n = rng.uniform(1.2, 2.5)
    bars = ramp(np.abs((x / n) % 1 - 0.5), 0.14, 0.08) + ramp(np.abs((y / n) % 1 - 0.5), 0.14, 0.08)
    inside = ramp(np.maximum(np.abs(x), np.abs(y)), 8.1, 7.9)
    return 0.8 * bars * inside + 0.15 * ellipsoid(x, y, 0, 0, 9, 9, 2), "a wire mesh"


def _shells(rng, x, y, cm):
    r = rng.uniform(5, 7.5)
    cavity = ellipsoid(x, y, 0, 0, 0.88 * r, 0.88 * r, 0.88 * r)
    path = 0.3 * (ellipsoid(x, y, 0, 0, r, r, r) - cavity)
    inside = str(rng.choice(("water", "a pyramid", "nothing", "a smaller ball")))
    if inside == "water":
        path = path + SOFT * cavity * (y > rng.uniform(-2, 2))
    elif inside == "a pyramid":
        block = plate(x, y, [(0.0, -0.5 * r), (0.5 * r, 0.4 * r), (-0.5 * r, 0.4 * r)])
        path = path + np.clip(-block, 0, None) * 0.6
    elif inside == "a smaller ball":
        path = path + 0.3 * ellipsoid(x, y, rng.uniform(-1, 1), rng.uniform(-1, 1), 0.4 * r, 0.4 * r, 0.4 * r)
    return path, "a hollow ball" if inside == "nothing" else f"a hollow ball with {inside} inside"
