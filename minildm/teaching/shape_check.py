"""The shape checker: does an image show what a shape prompt asks for? Judged from the pixels alone.

In: an RGB image uint8 (H, W, 3) and a prompt such as 'a red circle above a blue square' or 'three green stars'. Out:
a ``ShapeCheck``. Each pixel gets the nearest of the palette's colours and the border's colour; the large connected
areas of a colour are its shapes; an area has the shape whose outline, stretched to the area's bounding box, overlaps
it best. Not checked: the background, and shapes in colours the prompt does not name.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from minildm.errors import InputError
from minildm.teaching.shapes import COLOURS, RELATIONS, SHAPES, shape_distance

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SMALLEST_AREA = 0.006  # share of the image; smaller areas are noise
SHAPE_PROMPT = re.compile(
    r"(?:a (?:picture|drawing) of )?(?P<n>an?|one|two|three|four)? ?(?P<c1>{c}) (?P<s1>{s})(?:e?s)?"
    r"(?: (?P<relation>above|below|over|under|(?:to the )?(?:left|right) of) an? (?P<c2>{c}) (?P<s2>{s}))?"
    r"(?: on an? (?P<background>[a-z ]+) background)?".format(c="|".join(COLOURS), s="|".join(SHAPES))
)


@dataclass(frozen=True)
class ShapeCheck:
    """Whether an image shows a shape prompt. What the prompt leaves open (the order of a single shape) is True."""

    colour: bool  # each colour asked for is there, as often as asked for
    shape: bool  # ... and has its shape
    order: bool  # ... and the first lies where the prompt says

    @property
    def right(self):
        return self.colour and self.shape and self.order


def check_shapes(image, prompt):
    """Compare an RGB image uint8 (H, W, 3) with a shape prompt: ShapeCheck.

    Raises: InputError for another kind of prompt, a prompt without one answer, or another kind of image.
    """
    match = SHAPE_PROMPT.fullmatch(prompt.strip().lower())
    if match is None:
        raise InputError(
            f"cannot check the prompt {prompt!r}; expected '[number] colour shape [relation a colour shape]', "
            f"colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)} and relations {', '.join(RELATIONS)}"
        )
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"the shape checker needs an RGB uint8 image (H, W, 3), got {image.dtype} {image.shape}")
    count = NUMBERS[match["n"] or "a"]
    if match["relation"] and (count > 1 or (match["c1"], match["s1"]) == (match["c2"], match["s2"])):
        raise InputError(
            f"cannot check the prompt {prompt!r}: it does not say which of several equal shapes lies where; "
            "expected a relation between two different shapes"
        )
    wanted = [(match["c1"], match["s1"])] * count
    if match["relation"]:
        wanted.append((match["c2"], match["s2"]))
    areas = _areas(image, {colour for colour, _ in wanted})
    if not all(len(areas[c]) == sum(w == c for w, _ in wanted) for c, _ in wanted):
        return ShapeCheck(False, False, False)
    seen = {colour: sorted(shape for shape, *_ in found) for colour, found in areas.items()}
    shapes = all(seen[c] == sorted(s for w, s in wanted if w == c) for c, _ in wanted)
    order = True
    if match["relation"]:
        dx, dy = direction(match["relation"])
        first, second = _pair(areas, wanted)
        ahead = (first[1] - second[1]) * dx + (first[2] - second[2]) * dy
        aside = abs((first[1] - second[1]) * dy) + abs((first[2] - second[2]) * dx)
        order = bool(ahead > max(aside, 0.08))
    return ShapeCheck(True, shapes, order)


def direction(words):
    """Where the first of two shapes lies, y down: "to the left of" -> (-1, 0)."""
    return RELATIONS[{"over": "above", "under": "below"}.get(words, words.removeprefix("to the "))]


def _pair(areas, wanted):
    """The areas of the first and the second shape of a prompt; if both have one colour, told apart by shape."""
    (c1, s1), (c2, _) = wanted
    if c1 != c2:
        return areas[c1][0], areas[c2][0]
    return sorted(areas[c1], key=lambda area: area[0] != s1)


def _areas(image, colours):
    """{colour: [(shape, centre x, centre y)]} of the areas larger than SMALLEST_AREA, as fractions of the image."""
    a = ndimage.uniform_filter(image.astype(np.float32), (3, 3, 1))
    border = [strip.reshape(-1, 3) for strip in (a[:3], a[-3:], a[:, :3], a[:, -3:])]
    palette = np.float32([np.median(np.concatenate(border), 0), *COLOURS.values()])
    # Nearest by squared distance; the square of the pixel itself is the same for all colours and is left out.
    label = ((palette * palette).sum(1) - 2 * (a @ palette.T)).argmin(-1)
    height, width = label.shape
    areas = {}
    for colour in colours:
        index = 1 + list(COLOURS).index(colour)
        part, n = ndimage.label(label == index)
        sizes = ndimage.sum_labels(np.ones_like(part), part, range(1, n + 1))
        areas[colour] = []
        for k, box in enumerate(ndimage.find_objects(part)):
            if sizes[k] > SMALLEST_AREA * label.size:
                cy, cx = ((s.start + s.stop) / 2 for s in box)
                areas[colour].append((_name_shape(part[box] == k + 1), cx / width, cy / height))
    return areas


def _name_shape(mask, side=32):
    """The shape closest to a mask, cut to its bounding box, by intersection over union."""
    mask = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)) > 127
    scores = {shape: (mask & t).sum() / (mask | t).sum() for shape, t in _templates(side).items()}
    return max(scores, key=scores.get)


@functools.lru_cache(maxsize=2)
def _templates(side):
    """{shape: its mask, cut to its bounding box and resized to (side, side)}"""
    t = (np.arange(8 * side) + 0.5) / (4 * side) - 1
    templates = {}
    for shape in SHAPES:
        mask = shape_distance(shape, t[None, :], t[:, None]) < 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        mask = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8) * 255)
        templates[shape] = np.asarray(mask.resize((side, side), Image.Resampling.BOX)) > 127
    return templates
