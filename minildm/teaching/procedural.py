"""Captioned pictures that are not chests: what the embedded base model is pretrained on, and a checker of its answers.

In: seeds. Out: RGB pictures uint8 (B, size, size, 3) with a caption each: coloured shapes and how they lie relative to
each other, textures, simple scenes, and radiographs of other objects by the same physics as the chest phantom's
(``xray``), so that a model knows words, layout and film greys but no thorax. ``check_shapes`` tells by pixels whether a
picture shows what a shape prompt asked for.
"""

import functools
import math
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image
from scipy import ndimage

from minildm.errors import InputError
from minildm.teaching.xray import (
    BONE,
    SOFT,
    ellipsoid,
    expose,
    fractal,
    generators,
    plate,
    ramp,
    root,
    spline_weights,
    tubes,
)

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
RELATIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}  # where the first one lies, y down
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
IMAGE_KINDS = {"shapes": 0.66, "textures": 0.08, "scenes": 0.04, "radiographs": 0.22}


def render_batch(seeds, size=128, kind=None):
    """Pictures and their captions, one a seed (a number or a tuple such as (set, index)): (uint8 (B, size, size, 3),
    [text]).

    kind: one of IMAGE_KINDS for all of them, or None to draw each at its share.
    """
    if kind is not None and kind not in IMAGE_KINDS:
        raise InputError(f"no kind of procedural picture is called {kind!r}; choose one of {', '.join(IMAGE_KINDS)}")
    if size < 32:
        raise InputError(f"a procedural picture's size must be 32 pixels or more, got {size}")
    rendered, captions = [], []
    for rng in generators(seeds, 0):
        drawn = kind or str(rng.choice(list(IMAGE_KINDS), p=list(IMAGE_KINDS.values())))
        image, caption = _PAINTERS[drawn](rng, size)
        rendered.append(image if image.ndim == 3 else np.repeat(image[..., None], 3, 2))
        captions.append(caption)
    return np.stack(rendered), captions


def shape_prompt(seed):
    """A prompt of two shapes and their relation, such as 'a red circle above a blue square'."""
    (rng,) = generators([seed], 1)
    (c1, c2), (s1, s2) = rng.choice(list(COLOURS), 2, replace=False), rng.choice(SHAPES, 2, replace=False)
    return f"{_a(c1)} {s1} {rng.choice(list(RELATIONS))} {_a(c2)} {s2}"


# ---- shapes
# -----------------------------------------------------------------------------------------------------------------


def shape_distance(shape, x, y):
    """Signed distance, near enough, to a shape of half-size 1 at the origin (y down): negative inside."""
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
    fifth = 2 * math.pi / 5  # a star: one edge from a tip to its notch, folded ten times
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    r = np.hypot(x, y)
    px, py = r * np.cos(angle), r * np.sin(angle)
    ex, ey = 0.42 * math.cos(fifth / 2) - 1, 0.42 * math.sin(fifth / 2)
    return ((px - 1) * ey - py * ex) / math.hypot(ex, ey) * (1 if ex < 0 else -1)


def _grid(size):
    t = (np.arange(size, dtype=np.float32) + 0.5) / size
    return t[None, :], t[:, None]  # x, y in [0, 1], y down


def _paint(canvas, shape, colour, cx, cy, half):
    """Draw a shape (centre, half-size: fractions of the picture) onto a float canvas, edges smoothed over a pixel."""
    x, y = _grid(len(canvas))
    distance = shape_distance(shape, (x - cx) / half, (y - cy) / half) * (half * len(canvas))
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas += cover * (np.float32(colour) - canvas)


def _a(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _plain(rng, size, avoid=()):
    name = str(rng.choice([name for name in BACKGROUNDS if name not in avoid]))
    x, y = _grid(size)
    slope = rng.uniform(-14, 14, 2)
    return np.float32(BACKGROUNDS[name]) + ((x - 0.5) * slope[0] + (y - 0.5) * slope[1])[..., None].astype(
        np.float32
    ), name


def _tint(rng, name):
    return np.clip(np.float32(COLOURS[name]) + rng.uniform(-10, 10, 3), 0, 255)


def _shapes(rng, size):
    canvas, background = _plain(rng, size)
    plan = rng.choice(("pair", "single", "count"), p=(0.78, 0.13, 0.09))
    c1, c2 = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    s1, s2 = (str(s) for s in rng.choice(SHAPES, 2))
    if plan == "pair":
        relation = str(rng.choice(list(RELATIONS)))
        dx, dy = RELATIONS[relation]
        gap, jitter = rng.uniform(0.23, 0.26), rng.uniform(-0.07, 0.07, 2)
        for sign, colour, shape, wobble in ((1, c1, s1, jitter[0]), (-1, c2, s2, jitter[1])):
            cx, cy = 0.5 + sign * dx * gap + wobble * abs(dy), 0.5 + sign * dy * gap + wobble * abs(dx)
            _paint(canvas, shape, _tint(rng, colour), cx, cy, rng.uniform(0.17, 0.23))
        words = f"to the {relation}" if dx and rng.random() < 0.4 else relation
        if not dx and rng.random() < 0.15:
            words = {"above": "over", "below": "under"}[relation]
        text = f"{_a(c1)} {s1} {words} {_a(c2)} {s2}"
    elif plan == "single":
        _paint(canvas, s1, _tint(rng, c1), *rng.uniform(0.38, 0.62, 2), rng.uniform(0.16, 0.33))
        text = f"{_a(c1)} {s1}"
    else:
        count = int(rng.integers(2, 5))
        cells = rng.permutation(4)[:count]
        half = rng.uniform(0.1, 0.17)
        for cell in cells:
            cx, cy = 0.27 + 0.46 * (cell % 2), 0.27 + 0.46 * (cell // 2)
            _paint(canvas, s1, _tint(rng, c1), *(np.array([cx, cy]) + rng.uniform(-0.04, 0.04, 2)), half)
        plural = s1 + ("es" if s1 == "cross" else "s")
        text = f"{('two', 'three', 'four')[count - 2]} {c1} {plural}"
    if rng.random() < 0.25:
        text += f" on {_a(background)} background"
    text = str(rng.choice(("", "a picture of ", "a drawing of "), p=(0.8, 0.1, 0.1))) + text
    return _finish(canvas, rng), text


def _finish(canvas, rng):
    noise = rng.standard_normal(canvas.shape[:2], dtype=np.float32)[..., None] * rng.uniform(0, 3)
    return (np.clip(canvas + noise, 0, 255) + 0.5).astype(np.uint8)


# ---- the checker
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeCheck:
    """Whether a picture shows a shape prompt. What the prompt does not say (the order of a single shape) is True."""

    colour: bool  # every colour asked for is there, as often as asked for
    shape: bool  # ... and has its shape
    order: bool  # ... and the first lies where the prompt says

    @property
    def right(self):
        return self.colour and self.shape and self.order


SHAPE_PROMPT = re.compile(
    r"(?:a (?:picture|drawing) of )?(?P<n>an?|one|two|three|four)? ?(?P<c1>{c}) (?P<s1>{s})(?:e?s)?"
    r"(?: (?P<relation>above|below|over|under|(?:to the )?(?:left|right) of) an? (?P<c2>{c}) (?P<s2>{s}))?"
    r"(?: on an? (?P<background>[a-z ]+) background)?".format(c="|".join(COLOURS), s="|".join(SHAPES))
)


def direction(words):
    """Where the first of two shapes lies, y down: "to the left of" -> (-1, 0)."""
    return RELATIONS[{"over": "above", "under": "below"}.get(words, words.removeprefix("to the "))]


def check_shapes(image, prompt):
    """Compare an RGB picture (H, W, 3) uint8 with a shape prompt ('a red circle above a blue square', 'three green
    stars'): ShapeCheck.

    A pixel belongs to the nearest of the palette and the border's own colour; each colour's largest connected areas
    are its shapes; an area has the shape whose outline, stretched to the same box, it covers best. What nobody asked
    for it does not see: shapes of further colours, the background.
    """
    match = SHAPE_PROMPT.fullmatch(prompt.strip().lower())
    if match is None:
        raise InputError(
            f"cannot check the prompt {prompt!r}; expected '[number] colour shape [relation a colour shape]', "
            f"colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)} and relations {', '.join(RELATIONS)}"
        )
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"the shape checker needs an RGB uint8 picture (H, W, 3), got {image.dtype} {image.shape}")
    count = NUMBERS[match["n"] or "a"]
    if match["relation"] and (count > 1 or (match["c1"], match["s1"]) == (match["c2"], match["s2"])):
        raise InputError(
            f"cannot check the prompt {prompt!r}: which of several like shapes lies where has no answer; "
            "expected one shape and another that differs"
        )
    wanted = [(match["c1"], match["s1"])] * count
    if match["relation"]:
        wanted.append((match["c2"], match["s2"]))
    areas = _areas(image, {colour for colour, _ in wanted})
    colours = all(len(areas[c]) == sum(w == c for w, _ in wanted) for c, _ in wanted)
    if not colours:
        return ShapeCheck(False, False, False)
    left = {colour: sorted(shape for shape, *_ in found) for colour, found in areas.items()}
    shapes = all(left[c] == sorted(s for w, s in wanted if w == c) for c, _ in wanted)
    order = True
    if match["relation"]:
        dx, dy = direction(match["relation"])
        first, second = _pair(areas, wanted)
        ahead = (first[1] - second[1]) * dx + (first[2] - second[2]) * dy
        aside = abs((first[1] - second[1]) * dy) + abs((first[2] - second[2]) * dx)
        order = bool(ahead > max(aside, 0.08))
    return ShapeCheck(True, shapes, order)


def _pair(areas, wanted):
    """The areas of the first and the second thing asked for; of one colour twice, told apart by shape."""
    (c1, s1), (c2, _) = wanted
    if c1 != c2:
        return areas[c1][0], areas[c2][0]
    return sorted(areas[c1], key=lambda area: area[0] != s1)


def _areas(image, colours):
    """{colour: [(shape, centre x, centre y)]} of the areas over 0.6 % of the picture, as fractions of it."""
    a = ndimage.uniform_filter(image.astype(np.float32), (3, 3, 1))
    ground = np.median(
        np.concatenate(
            [a[:3].reshape(-1, 3), a[-3:].reshape(-1, 3), a[:, :3].reshape(-1, 3), a[:, -3:].reshape(-1, 3)]
        ),
        0,
    )
    palette = np.float32([ground, *COLOURS.values()])
    label = ((palette * palette).sum(1) - 2 * (a @ palette.T)).argmin(
        -1
    )  # nearest by squared distance, less a's own square
    height, width = label.shape
    areas = {}
    for colour in colours:
        index = 1 + list(COLOURS).index(colour)
        part, n = ndimage.label(label == index)
        sizes = ndimage.sum_labels(np.ones_like(part), part, range(1, n + 1))
        areas[colour] = []
        for k, box in enumerate(ndimage.find_objects(part)):
            if sizes[k] > 0.006 * label.size:
                cy, cx = ((s.start + s.stop) / 2 for s in box)
                areas[colour].append((_name_shape(part[box] == k + 1), cx / width, cy / height))
    return areas


def _name_shape(mask, side=32):
    """The shape that a mask, cut to its box, is nearest to by intersection over union."""
    mask = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)) > 127
    scores = {shape: (mask & t).sum() / (mask | t).sum() for shape, t in _templates(side).items()}
    return max(scores, key=scores.get)


@functools.lru_cache(maxsize=2)
def _templates(side):
    t = (np.arange(8 * side) + 0.5) / (4 * side) - 1
    templates = {}
    for shape in SHAPES:
        mask = shape_distance(shape, t[None, :], t[:, None]) < 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        mask = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8) * 255)
        templates[shape] = np.asarray(mask.resize((side, side), Image.Resampling.BOX)) > 127
    return templates


# ---- textures and scenes
# ------------------------------------------------------------------------------------------------------


def _textures(rng, size):
    x, y = _grid(size)
    c1, c2 = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    kinds = {"stripes": 0.12, "checks": 0.12, "dots": 0.12, "clouds": 0.16, "gradient": 0.12, "gray": 0.36}
    kind = rng.choice(list(kinds), p=list(kinds.values()))
    if kind == "stripes":
        way, (a, b) = list({"horizontal": (0, 1), "vertical": (1, 0), "diagonal": (0.7, 0.7)}.items())[rng.integers(3)]
        wave = np.sin((a * x + b * y) * 2 * math.pi * rng.integers(3, 9) + rng.uniform(0, 6))
        mix, text = np.clip(0.5 + wave * 8, 0, 1), f"{way} {c1} and {c2} stripes"
    elif kind == "checks":
        n = rng.integers(3, 8)
        mix = np.clip(0.5 + 12 * np.sin(x * math.pi * n) * np.sin(y * math.pi * n), 0, 1)
        text = f"{_a(c1)} and {c2} checkerboard"
    elif kind == "dots":
        n = rng.integers(3, 8)
        mix = np.clip((0.3 - np.hypot(x * n % 1 - 0.5, y * n % 1 - 0.5)) * size / n + 0.5, 0, 1)
        text = f"{c1} dots on {c2}"
    elif kind == "gradient":
        way, t = list({"left to right": x + 0 * y, "top to bottom": y + 0 * x}.items())[rng.integers(2)]
        mix, text = 1 - t, f"a gradient from {c1} to {c2}, {way}"
    else:
        rough = rng.random() < 0.5
        clouds = fractal([rng], size, range(2, 8), 0.75 if rough else 0.45)[0]
        mix = np.clip(0.5 + 0.35 * clouds, 0, 1)
        text = f"{'rough' if rough else 'soft'} {c1} and {c2} clouds"
        if kind == "gray":
            middle, depth = rng.uniform(70, 180), rng.uniform(15, 140)
            grey = middle + (mix - 0.5) * depth
            return _finish(np.repeat(grey[..., None], 3, 2), rng), f"{'rough' if rough else 'soft'} gray clouds"
    canvas = _tint(rng, c2) + mix[..., None] * (_tint(rng, c1) - _tint(rng, c2))
    return _finish(canvas.astype(np.float32), rng), text


def _scenes(rng, size):
    x, y = _grid(size)
    night = rng.random() < 0.3
    sky = np.float32((25, 30, 70) if night else (150, 200, 240))
    canvas = sky + (y * (20 if night else 60))[..., None] * np.float32((1, 0.8, 0.3)) + 0 * x[..., None]
    ground = rng.uniform(0.62, 0.78)
    hills = rng.random() < 0.5
    top = ground - (0.1 * np.sin(x * rng.uniform(5, 9) + rng.uniform(0, 6)) + 0.05 if hills else 0)
    cover = np.clip((y - top) * size + 0.5, 0, 1)[..., None]
    canvas = (canvas + cover * (np.float32((40, 90, 50) if night else (90, 160, 70)) - canvas)).astype(np.float32)
    sx = rng.uniform(0.15, 0.85)
    _paint(
        canvas,
        "circle",
        (235, 235, 220) if night else (250, 220, 60),
        sx,
        rng.uniform(0.12, 0.25),
        rng.uniform(0.06, 0.1),
    )
    things = ["the moon" if night else "the sun"]
    slots = list(rng.permutation([0.22, 0.5, 0.78]))
    for thing in ("house", "tree", "tent"):
        if rng.random() < 0.55 and slots:
            cx, s = slots.pop(), rng.uniform(0.8, 1.2)
            colour = str(rng.choice([c for c in COLOURS if c != "white"]))
            if thing == "house":
                _paint(canvas, "square", COLOURS[colour], cx, ground, 0.11 * s)
                _paint(canvas, "triangle", (110, 60, 40), cx, ground - 0.17 * s, 0.14 * s)
                _paint(canvas, "square", (60, 45, 35), cx, ground + 0.06 * s, 0.035 * s)
            elif thing == "tree":
                _paint(canvas, "square", (100, 70, 40), cx, ground + 0.04, 0.03 * s)
                _paint(canvas, "square", (100, 70, 40), cx, ground - 0.01, 0.03 * s)
                _paint(canvas, "circle", (30, 110, 45), cx, ground - 0.13 * s, 0.11 * s)
            else:
                _paint(canvas, "triangle", COLOURS[colour], cx, ground, 0.12 * s)
                _paint(canvas, "triangle", (40, 35, 30), cx, ground + 0.05 * s, 0.05 * s)
            things.append(_a(thing if thing == "tree" else f"{colour} {thing}"))
    if hills:
        things.append("hills")
    return _finish(canvas, rng), f"{'a night scene' if night else 'a landscape'} with {_listed(things)}"


# ---- radiographs of other things
# ----------------------------------------------------------------------------------------------


def _radiographs(rng, size):
    """Line integrals through an object on a 20 cm plate: the greys of a film, and nothing of a chest."""
    x, y = ((t - 0.5)[None] * 20 for t in _grid(size))  # (1, 1, W), (1, H, 1), cm
    angle = rng.uniform(-0.3, 0.3)
    x, y = (
        x * math.cos(angle) + y * math.sin(angle) + rng.uniform(-1, 1),
        y * math.cos(angle) - x * math.sin(angle) + rng.uniform(-1, 1),
    )
    objects = (_bottle, _hand, _toolbox, _fruit, _cylinders, _blobs, _roots, _wedge, _lattice, _shells)
    path, thing = objects[rng.integers(len(objects))](rng, x, y, 20 / size)
    bath = rng.random() < 0.6  # a bath as deep as it is wide gives the greys of a body instead of air around the object
    if bath:
        path = path + SOFT * rng.uniform(3, 12) * (1 + 0.1 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) / 10)
        thing += str(rng.choice((" in water", " in a tank of water")))
    words = str(rng.choice(("an x-ray of {}", "x-ray of {}", "a radiograph of {}", "a radiograph showing {}")))
    path = path * (1 + 10 ** rng.uniform(-2.2, -1.2) * fractal([rng], size, range(3, 8)))
    black, white = rng.uniform(0.15, 0.5), rng.uniform(0.74, 0.92)
    image = expose(path.astype(np.float32), [rng], 20 / size, 1e7, rng.uniform(0.1, 0.4), black, white, present=0.06)[0]
    return image, words.format(thing)


def _bottle(rng, x, y, cm):
    wide, level = rng.uniform(2.2, 3.6), rng.uniform(-2, 4)
    outer = np.where(y > -3.5, wide, 1.0 + (wide - 1.0) * ramp(y, -6, -3.5)) * ramp(y, 7.6, 7.4) * (y > -8.5)
    inner = np.maximum(outer - 0.35, 0)
    path = 0.35 * 2 * (root(outer**2 - x * x) - root(inner**2 - x * x))
    full = rng.random() < 0.6
    if full:
        path = path + SOFT * 2 * root(inner**2 - x * x) * (y > level)
    return path, f"a bottle{' with liquid' if full else ', empty'}"


def _wires(path, cm, curves):
    """Add smooth tubes to path (1, size, size): rows of (control points in cm, radius in cm, strength in 1/cm)."""
    curves = [(np.float32([points[0], points[0], *points, points[-1], points[-1]]), *rest) for points, *rest in curves]
    longest = max(np.hypot(*np.diff(points, axis=0).T).sum() for points, *_ in curves)
    count = int(longest / (0.7 * cm)) + 6
    places = np.stack([spline_weights(len(points), count) @ points for points, *_ in curves])  # (N, K, 2)
    px, py = (places[..., k] / np.float32(cm) + path.shape[-1] / 2 for k in (0, 1))
    radius = np.float32([[r / cm] for _, r, _ in curves])
    strength = np.float32([[s * cm] for *_, s in curves])
    tubes(
        path, np.zeros(len(curves), np.int64), px, py, np.broadcast_to(radius, px.shape), strength, float(radius.max())
    )


def _empty(x, y):
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)


def _hand(rng, x, y, cm):
    path, flesh, bones = _empty(x, y), ellipsoid(x, y, 0, 4.2, 4.2, 4.8, 1.3), []
    for k, spread in enumerate(np.linspace(-0.55, 0.55, 5) + rng.uniform(-0.05, 0.05, 5)):
        reach = (7.5, 9.8, 10.4, 9.8, 8.2)[k] * rng.uniform(0.93, 1.05)
        at = [
            ((3 + 5 * part) * math.sin(spread), 5.5 - part * reach * math.cos(spread))
            for part in (0.2, 0.5, 0.72, 0.88, 1)
        ]
        bones.append(([at[0], at[2], at[4]], 0.9, 0.8 * SOFT))
        for (x0, y0), (x1, y1) in pairwise(at):
            bones.append(([(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (0.1, 0.5, 0.9)], 0.38, BONE))
    for _ in range(7):
        flesh = flesh + 1.2 * ellipsoid(x, y, rng.uniform(-1.6, 1.6), rng.uniform(5, 7.5), 0.65, 0.65, 0.5)
    _wires(path, cm, bones)
    return path + SOFT * flesh, "a hand"


def _toolbox(rng, x, y, cm):
    wide, high = rng.uniform(6, 7.5), rng.uniform(4, 6)
    box = np.maximum(np.abs(x) - wide, np.abs(y) - high)
    path = (0.35 * ramp(box, 0.05, -0.05) + 0.9 * ramp(np.abs(box + 0.25), 0.3, 0.1)).astype(np.float32)
    names, metal = (
        [
            str(n)
            for n in rng.choice(("key", "hammer", "screw", "spring", "coin", "ring"), rng.integers(1, 4), replace=False)
        ],
        3.0,
    )
    for name in names:
        cx, cy, turn = rng.uniform(-3.5, 3.5), rng.uniform(-2.2, 2.2), rng.uniform(0, 6.3)
        if name == "coin":
            path += 1.2 * ramp(np.hypot(x - cx, y - cy), 1.15, 1.05)
        elif name == "ring":
            path += 2.0 * ramp(np.abs(np.hypot(x - cx, y - cy) - 0.9), 0.25, 0.15)
        else:
            parts = {
                "key": (
                    ([(-2 + 0.9 * math.cos(a), 0.9 * math.sin(a)) for a in np.linspace(0, 6.3, 9)], 0.25),
                    ([(-1.1, 0), (1, 0), (2.6, 0)], 0.25),
                    ([(2.2, 0), (2.2, 0.4), (2.2, 0.8)], 0.25),
                ),
                "hammer": (([(-3, 0), (0, 0), (3, 0)], 0.4), ([(2.6, -1.2), (2.6, 0), (2.6, 1.2)], 0.6)),
                "screw": (([(-1.5, 0), (0, 0), (1.5, 0)], 0.22), ([(-1.5, -0.5), (-1.5, 0), (-1.5, 0.5)], 0.25)),
                "spring": (([(u, 0.7 * (-1) ** k) for k, u in enumerate(np.linspace(-2, 2, 15))], 0.12),),
            }[name]
            c, s = math.cos(turn), math.sin(turn)
            _wires(
                path, cm, [([(cx + u * c - v * s, cy + u * s + v * c) for u, v in line], r, metal) for line, r in parts]
            )
    return path, "a box with " + _listed([_a(name) for name in names])


def _listed(things):
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


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
        path += (0.8 * ramp(np.abs(np.abs(x) - half), 0.5, 0.2) + 0.25 * root(1 - (x / half) ** 2)) * ramp(
            np.abs(y), 7.6, 7.4
        )
    ends, radius, branches = (
        [(rng.uniform(-2, 2), -7.0, math.pi / 2 + rng.uniform(-0.3, 0.3))],
        rng.uniform(0.4, 0.8),
        [],
    )
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
    return 0.8 * bars * ramp(np.maximum(np.abs(x), np.abs(y)), 8.1, 7.9) + 0.15 * ellipsoid(
        x, y, 0, 0, 9, 9, 2
    ), "a wire mesh"


def _shells(rng, x, y, cm):
    r = rng.uniform(5, 7.5)
    path = 0.3 * (ellipsoid(x, y, 0, 0, r, r, r) - ellipsoid(x, y, 0, 0, 0.88 * r, 0.88 * r, 0.88 * r))
    inside = str(rng.choice(("water", "a pyramid", "nothing", "a smaller ball")))
    if inside == "water":
        path = path + SOFT * ellipsoid(x, y, 0, 0, 0.88 * r, 0.88 * r, 0.88 * r) * (y > rng.uniform(-2, 2))
    elif inside == "a pyramid":
        block = plate(x, y, [(0.0, -0.5 * r), (0.5 * r, 0.4 * r), (-0.5 * r, 0.4 * r)])
        path = path + np.clip(-block, 0, None) * 0.6
    elif inside == "a smaller ball":
        path = path + 0.3 * ellipsoid(x, y, rng.uniform(-1, 1), rng.uniform(-1, 1), 0.4 * r, 0.4 * r, 0.4 * r)
    return path, "a hollow ball" if inside == "nothing" else f"a hollow ball with {inside} inside"


_PAINTERS = {"shapes": _shapes, "textures": _textures, "scenes": _scenes, "radiographs": _radiographs}
