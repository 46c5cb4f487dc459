"""The chest phantom's geometry: what its frontal and lateral views share.

In: labels and seeds. Out: uint8 radiographs. The thorax is a set of round bodies, shells and tubes in centimetres. Each
pixel is a ray through them: chords of soft tissue, lung, air, bone and metal add up to a path, which ``frontal`` and
``lateral`` compute and ``xray.expose`` turns into a radiograph. Coordinates: x to the image's right (the patient's
left), y down, z towards the sternum; the origin lies in the middle of the chest at the level of the carina.

Proportions follow textbooks of anatomy and radiology (Moore, Clinically Oriented Anatomy; Goodman, Felson's Principles
of Chest Roentgenology). Lengths without a source were adjusted by eye until the images looked right. Not modelled: the
head, bowel, fissures, bronchi beyond the trachea.
"""

import numpy as np

from minildm.teaching.xray import (
    BONE,
    LUNG,
    SOFT,
    UniformNumbers,
    ellipsoid,
    expose,
    fractal,
    generators,
    ramp,
    spline_weights,
    tubes,
)

LOBES = {  # centre x, y in a frontal view, z, and the radii of a consolidation that fills the lobe
    "right upper lobe": (-6.8, -5.2, 0.5, 4.0, 4.4),
    "right middle lobe": (-6.8, 3.0, 5.5, 4.2, 3.0),
    "right lower lobe": (-8.2, 5.0, -5.0, 4.2, 4.2),
    "left upper lobe": (7.0, -4.4, 3.0, 4.0, 5.0),
    "left lower lobe": (9.2, 5.0, -5.0, 3.8, 4.4),
}
# Strokes (start, end) of the side markers, in cm. L has two; the rest are of zero length.
LETTER_R = np.float32(
    [[(0, 0.9), (0, -0.9)], [(0, -0.9), (0.9, -0.8)], [(0.9, -0.8), (0.9, 0)], [(0.9, 0), (0, 0)], [(0.2, 0), (1, 0.9)]]
)
LETTER_L = np.float32([[(0, -0.9), (0, 0.9)], [(0, 0.9), (1, 0.9)]] + [[(0, 0), (0, 0)]] * 3)


class Thorax:
    """A batch of patients with the same finding in the same kind of view; a subclass adds the anatomy as it sees it.

    Arrays are (B, H or 1, W or 1) float32, lengths in cm. Random numbers are consumed in the order of the calls to
    ``self.u``: moving one changes every image.
    """

    def __init__(self, batch, seeds, size):
        def column(values):
            return np.array(list(values), np.float32).reshape(-1, 1, 1)

        self.finding, self.lateral, self.size = batch[0].finding, batch[0].view == "lateral", size
        self.sources = generators(seeds, 1)
        self.u = u = UniformNumbers(self.sources, 64)
        self.branching = UniformNumbers(self.sources, 3 * 16 * 24).columns.reshape(len(seeds), 3, -1)  # of vessels
        self.patches = fractal(self.sources, size, range(3, 7), 0.5) if self.finding == "consolidation" else None
        self.clouds = fractal(self.sources, size, range(3, 9))
        self.extent, self.ctr = column(label.size for label in batch), column(label.ctr for label in batch)
        self.female = column(label.sex == "female" for label in batch)
        self.age = column((label.age - 18) / 74 for label in batch)  # 0 to 1
        self.ap = column(label.view == "AP" for label in batch)
        self.side = column(-1 if label.place.startswith("right") else 1 for label in batch)  # sign of x
        lobe = [LOBES.get(label.place, (0, 0, 0, 1, 1)) for label in batch]
        self.lobe = [column(values) for values in zip(*lobe)]
        self.fat = u(0, 1)
        self.field = u(33.0, 38.0)  # cm of body across the image
        self.cm = self.field / size  # cm of body across a pixel
        self.finest = 33.0 / size
        self.shift_x, self.shift_y = u(-0.8, 0.8), u(0.2, 1.6)
        self.tilt, self.turn = u(-0.03, 0.03), u(-0.05, 0.05) * (1 + self.ap)
        grid = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]
        self.Y = self.field * grid[:, :, None] + self.shift_y  # (B, H, 1)
        self.X = self.field * grid[:, None, :] + self.shift_x + self.tilt * self.Y  # (B, H, W)
        # X-ray tube to mid-body: 1.65 m for PA (tube behind the patient), 0.95 m for AP (tube in front).
        self.tube = 165 - 260 * self.ap
        self.rib_slope, self.rib_spacing = u(3.6, 5.0), u(2.25, 2.6)
        self.calcium = BONE * (0.75 - 0.22 * self.age * (1 + self.female) / 2)  # bones lose mineral, women's more

    def render(self):
        """The radiographs: uint8 (B, size, size)."""
        self.trace()
        return self.radiograph()

    def trace(self):
        """Compute ``self.path`` (B, H, W), the line integral of the attenuation along each ray."""
        raise NotImplementedError

    def plane(self, z):
        """Body coordinates (x, y) at depth z of the ray through each pixel, magnified by the cone of the beam."""
        scale = 1 + z / self.tube
        return self.X * scale - self.turn * z, self.Y * scale

    def pixels(self, x, y, z=0.0):
        """Pixel coordinates of the body points x, y (B, N, K) at depth z."""
        scale = 1 + z / self.tube
        x, y = (x + self.turn * z) / scale, y / scale
        x = x - self.tilt * y - self.shift_x
        return x / self.cm + self.size / 2, (y - self.shift_y) / self.cm + self.size / 2

    def wires(self, curves, longest):
        """Add smooth tubes to the path.

        Args:
            curves: rows of (control points [(x, y), ...], radius cm, strength 1/cm, depth z, hollow share); points and
                strengths are numbers or (B, 1, 1).
            longest: length in cm that no curve exceeds by much; it sets the number of points per curve.
        """
        n, count = len(self.sources), int(longest / (0.6 * self.finest)) + 4
        zero, splines = np.zeros((n, 1, 1), np.float32), []
        for points, *_ in curves:
            knots = [points[0], points[0], *points, points[-1], points[-1]]  # so that the spline reaches its end points
            splines.append([np.concatenate([zero + p[k] for p in knots], 2) for k in (0, 1)])
        places, radii, strengths, hollows = [], [], [], []
        for (x, y), (_, radius, strength, z, hollow) in zip(splines, curves):
            weights = spline_weights(x.shape[2], count).T
            places.append(self.pixels(x @ weights, y @ weights, z))
            radii.append(np.broadcast_to(radius / self.cm[:, 0], (n, count)))
            strengths.append((np.float32(strength) * self.cm)[:, 0])
            hollows.append(np.full((n, 1), hollow, np.float32))
        px, py = (np.concatenate([place[k][:, 0] for place in places]) for k in (0, 1))
        image_index = np.tile(np.arange(n), len(curves))
        widest = max(radius for _, radius, *_ in curves) / self.finest
        radii, strengths, hollows = (np.concatenate(v) for v in (radii, strengths, hollows))
        tubes(self.path, image_index, px, py, radii, strengths, widest, hollows)

    def vessels(self, roots, scatter):
        """The path through the lungs' arteries, trees of tapering tubes: (B, H, W).

        Args:
            roots: rows (x, y, direction) of the first branches, (R, 3), direction in radians.
            scatter: how far the roots differ between patients, cm.
        """
        n, size = len(self.sources), self.size
        canvas = np.zeros((n, size, size), np.float32)
        start = self.branching[:, :, -len(roots) :] * 2 - 1
        x, y, angle = (roots[:, k] + start[:, k] * (0.15 if k == 2 else scatter) for k in range(3))  # (B, R)
        radius, length, used = 0.5, 3.2, 0
        for _ in range(4):
            a, b, c = self.branching[:, :, used : used + x.shape[1]].transpose(1, 0, 2) * 2 - 1
            used += x.shape[1]
            points = max(4, int(length * 1.1 / self.finest))
            t = np.linspace(0, 1, points, dtype=np.float32)
            aim = angle + 0.35 * a
            # Each branch turns away from its parent's direction: (B, N, K).
            bend = angle[..., None] + (aim - angle)[..., None] * t
            ds = (length * (1 + 0.35 * b))[..., None] / points
            px, py = x[..., None] + np.cumsum(np.cos(bend), 2) * ds, y[..., None] + np.cumsum(np.sin(bend), 2) * ds
            width = radius * (1 + 0.3 * c[..., None]) * (1 - 0.3 * t) / self.cm
            image_index = np.repeat(np.arange(n), x.shape[1])
            strength = ((SOFT - LUNG) * self.cm)[image_index, 0]
            px_py_width = (v.reshape(-1, points) for v in (*self.pixels(px, py), width))
            tubes(canvas, image_index, *px_py_width, strength, 1.3 * radius / self.finest)
            fork = 0.42 + 0.2 * c
            x, y = np.repeat(px[..., -1], 2, 1), np.repeat(py[..., -1], 2, 1)
            angle = np.stack([aim - fork, aim + fork * 0.8], 2).reshape(n, -1)
            radius, length = radius * 0.68, length * 0.8
        return canvas

    def nodule(self, x, y, cx, cy):
        """Add a round lesion of radius ``extent`` at (cx, cy): soft, or a calcified granuloma."""
        ball = ellipsoid(x, y, cx, cy, self.extent, self.extent * self.u(0.85, 1), self.extent)
        self.path += ball * (SOFT - LUNG + (1.6 * BONE if self.finding == "calcified granuloma" else 0.05))

    def radiograph(self):
        """Lead letter on one side, exposure, and the black frame of the collimator: uint8 (B, size, size)."""
        u, size = self.u, self.size
        left = u(0, 1) < 0.75  # which letter; it lies on its own side of the patient
        edge, height = self.field * 0.5 - u(1.6, 3.2), self.shift_y - self.field * 0.5 + u(1.8, 4.0)
        x = self.shift_x + edge * (-1 if self.lateral else 2 * left - 1)
        strokes = np.where(left[..., None], LETTER_L, LETTER_R)  # (B, N, 2 ends, 2)
        t = np.linspace(0, 1, max(4, int(2.5 / self.finest)), dtype=np.float32)
        lines = strokes[:, :, :1] + (strokes[:, :, 1:] - strokes[:, :, :1]) * t[:, None]  # (B, N, K, 2)
        px, py = (v.reshape(-1, len(t)) for v in self.pixels(x + lines[..., 0], height + lines[..., 1]))
        image_index = np.repeat(np.arange(len(left)), strokes.shape[1])
        thickness = np.broadcast_to((0.17 / self.cm)[image_index, 0], px.shape)
        tubes(self.path, image_index, px, py, thickness, (6 * self.cm)[image_index, 0], 0.17 / self.finest)
        black = 0.2 + u(0, 1) * (0.4 - 0.14 * self.lateral)
        white = u(0.71, 0.86) + 0.3 * (black - 0.36) - 0.08 * self.ap - 0.05 * self.lateral
        images = expose(self.path, self.sources, self.cm, 2e7, 0.3 + 0.2 * self.ap, black, white)
        margins = [np.where(u(0, 1) < 0.25, u(0.0, 0.05), np.float32(-1)) for _ in range(4)]
        grid, soft = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, :, None], 0.6 / size
        sides = [ramp(g, m - soft, m + soft) for g, m in zip((grid, 1 - grid, grid, 1 - grid), margins)]
        lit = (sides[0] * sides[1]) * (sides[2] * sides[3]).transpose(0, 2, 1)
        return (images * lit + 0.5).astype(np.uint8)
