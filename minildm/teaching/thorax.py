"""The anatomy of the chest phantom: labels and seeds -> line integrals of attenuation -> films.

The thorax is a set of round bodies, shells and tubes in centimetres, and each pixel is a ray through them: chords of
soft tissue, lung, air, bone and metal add up to a path, and ``xray.expose`` turns the path into a film. Coordinates:
x to the picture's right (the patient's left), y down, z towards the sternum; the origin lies in the middle of the
chest at the level of the carina. Proportions are those of anatomy and radiology textbooks (Moore, Clinically Oriented
Anatomy; Goodman, Felson's Principles of Chest Roentgenology), tuned by eye until the pictures look right: lengths
without a source are such choices. Left out: the head, bowel, fissures, bronchi beyond the trachea.
"""

import math

import numpy as np

from minildm.teaching.xray import (
    BONE,
    LUNG,
    SOFT,
    Draws,
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

LOBES = {  # centre x, y in a frontal view, z, and the radii of a consolidation that fills the lobe
    "right upper lobe": (-6.8, -5.2, 0.5, 4.0, 4.4),
    "right middle lobe": (-6.8, 3.0, 5.5, 4.2, 3.0),
    "right lower lobe": (-8.2, 5.0, -5.0, 4.2, 4.2),
    "left upper lobe": (7.0, -4.4, 3.0, 4.0, 5.0),
    "left lower lobe": (9.2, 5.0, -5.0, 3.8, 4.4),
}
# Strokes (start, end) of the side markers, in cm; L's unused ones have no length.
LETTER_R = np.float32(
    [[(0, 0.9), (0, -0.9)], [(0, -0.9), (0.9, -0.8)], [(0.9, -0.8), (0.9, 0)], [(0.9, 0), (0, 0)], [(0.2, 0), (1, 0.9)]]
)
LETTER_L = np.float32([[(0, -0.9), (0, 0.9)], [(0, 0.9), (1, 0.9)]] + [[(0, 0), (0, 0)]] * 3)


class Thorax:
    """A few patients with one finding, all frontal or all lateral; arrays (B, H or 1, W or 1) float32, lengths cm."""

    def __init__(self, batch, seeds, size):
        def column(values):
            return np.array(list(values), np.float32).reshape(-1, 1, 1)

        self.finding, self.lateral, self.size = batch[0].finding, batch[0].view == "lateral", size
        self.sources = generators(seeds, 1)
        self.u = u = Draws(self.sources, 64)
        self.chance = Draws(self.sources, 3 * 16 * 24).columns.reshape(len(seeds), 3, -1)  # for the vessels
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
        self.field = u(33.0, 38.0)  # of body across the picture
        self.cm = self.field / size  # of body across a pixel
        self.finest = 33.0 / size
        self.shift_x, self.shift_y = u(-0.8, 0.8), u(0.2, 1.6)
        self.tilt, self.turn = u(-0.03, 0.03), u(-0.05, 0.05) * (1 + self.ap)
        grid = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]
        self.Y = self.field * grid[:, :, None] + self.shift_y  # (B, H, 1)
        self.X = self.field * grid[:, None, :] + self.shift_x + self.tilt * self.Y  # (B, H, W)
        # Tube to mid-body: 1.65 m for PA (tube behind the patient), 0.95 m for AP (tube in front).
        self.tube = 165 - 260 * self.ap
        self.rib_slope, self.rib_spacing = u(3.6, 5.0), u(2.25, 2.6)
        self.calcium = BONE * (0.75 - 0.22 * self.age * (1 + self.female) / 2)  # bones lose mineral, women's more

    def film(self):
        """The path of the view, then the picture of it: uint8 (B, size, size)."""
        if self.lateral:
            self.lateral_view()
        else:
            self.frontal_view()
        return self.develop()

    # ---- geometry
    # -----------------------------------------------------------------------------------------------------------

    def plane(self, z):
        """Body coordinates at depth z of the rays through each pixel: (x, y), magnified by the cone of the beam."""
        scale = 1 + z / self.tube
        return self.X * scale - self.turn * z, self.Y * scale

    def pixels(self, x, y, z=0.0):
        """Where body points x, y (B, N, K) at depth z fall in the picture, in pixels."""
        scale = 1 + z / self.tube
        x, y = (x + self.turn * z) / scale, y / scale
        x = x - self.tilt * y - self.shift_x
        return x / self.cm + self.size / 2, (y - self.shift_y) / self.cm + self.size / 2

    def wires(self, curves, longest):
        """Add smooth tubes: rows of (control points [(x, y), ...], radius cm, strength 1/cm, depth z, hollow share).

        Points and strengths are numbers or (B, 1, 1); longest is a length in cm that no curve much exceeds.
        """
        n, count = len(self.sources), int(longest / (0.6 * self.finest)) + 4
        zero, splines = np.zeros((n, 1, 1), np.float32), []
        for points, *_ in curves:
            ends = [
                points[0],
                points[0],
                *points,
                points[-1],
                points[-1],
            ]  # the spline begins and ends in its end points
            splines.append([np.concatenate([zero + p[k] for p in ends], 2) for k in (0, 1)])
        places, radii, strengths, hollows = [], [], [], []
        for (x, y), (_, radius, strength, z, hollow) in zip(splines, curves):
            weights = spline_weights(x.shape[2], count).T
            places.append(self.pixels(x @ weights, y @ weights, z))
            radii.append(np.broadcast_to(radius / self.cm[:, 0], (n, count)))
            strengths.append((np.float32(strength) * self.cm)[:, 0])
            hollows.append(np.full((n, 1), hollow, np.float32))
        px, py = (np.concatenate([place[k][:, 0] for place in places]) for k in (0, 1))
        owner = np.tile(np.arange(n), len(curves))
        widest = max(radius for _, radius, *_ in curves) / self.finest
        radii, strengths, hollows = (np.concatenate(v) for v in (radii, strengths, hollows))
        tubes(self.path, owner, px, py, radii, strengths, widest, hollows)

    def vessels(self, roots, scatter):
        """Arteries of the lungs as trees of tapering tubes: a (B, H, W) path of their own.

        roots: rows (x, y, direction) of the first branches, (R, 3), direction in radians; scatter: how far patients
        differ, cm.
        """
        n, size = len(self.sources), self.size
        canvas = np.zeros((n, size, size), np.float32)
        start = self.chance[:, :, -len(roots) :] * 2 - 1
        x, y, angle = (roots[:, k] + start[:, k] * (0.15 if k == 2 else scatter) for k in range(3))  # (B, R)
        radius, length, used = 0.5, 3.2, 0
        for _ in range(4):
            a, b, c = self.chance[:, :, used : used + x.shape[1]].transpose(1, 0, 2) * 2 - 1
            used += x.shape[1]
            points = max(4, int(length * 1.1 / self.finest))
            t = np.linspace(0, 1, points, dtype=np.float32)
            aim = angle + 0.35 * a
            bend = (
                angle[..., None] + (aim - angle)[..., None] * t
            )  # (B, N, K): each branch turns from its parent's direction
            ds = (length * (1 + 0.35 * b))[..., None] / points
            px, py = x[..., None] + np.cumsum(np.cos(bend), 2) * ds, y[..., None] + np.cumsum(np.sin(bend), 2) * ds
            width = radius * (1 + 0.3 * c[..., None]) * (1 - 0.3 * t) / self.cm
            owner = np.repeat(np.arange(n), x.shape[1])
            strength = ((SOFT - LUNG) * self.cm)[owner, 0]
            px_py_width = (v.reshape(-1, points) for v in (*self.pixels(px, py), width))
            tubes(canvas, owner, *px_py_width, strength, 1.3 * radius / self.finest)
            fork = 0.42 + 0.2 * c
            x, y = np.repeat(px[..., -1], 2, 1), np.repeat(py[..., -1], 2, 1)
            angle = np.stack([aim - fork, aim + fork * 0.8], 2).reshape(n, -1)
            radius, length = radius * 0.68, length * 0.8
        return canvas

    def ribs(self, y, u, front):
        """Bone along rays that meet the rib cage at u (-1 to 1 across it), on its back half or its front half.

        Rib i is the curve y = i * spacing + drop(phi), phi the angle round the chest from the spine; a ray sees its
        hollow section, stretched where it meets the cage at a slant.
        """
        cosine = root(1 - u * u)
        side = np.abs(
            u * (1 + (8.0 if front else -8.0) * cosine / self.tube)
        )  # the beam's cone, where the ray meets the cage
        if front:  # steeper, wider, and gone where cartilage takes over
            drop = self.rib_slope * (1 + 0.5 * cosine) + 5.5 * (1 - side)
            half, last, present = 0.9, 6, 0.55 * ramp(side, 0.36, 0.5) * (side < 1)
        else:
            drop, half, last, present = self.rib_slope * (1 - cosine), 0.8, 10, side < 1
        index = (y - drop + 11.6) * (1 / self.rib_spacing)
        nearest = np.clip(np.rint(index), 1, last)
        d = (index - nearest) * (self.rib_spacing / half)
        d *= d
        bone = (0.75 * root(1 - d) - 0.35 * root(1 - 1.6 * d)) * (1.25 - 0.05 * nearest)
        return bone * present / np.maximum(cosine, 0.4)

    # ---- the frontal views
    # --------------------------------------------------------------------------------------------------

    def frontal_view(self):
        finding = self.finding
        bend = self.u(-0.25, 0.25) * np.sin(self.Y * 0.16)
        if finding == "scoliosis":  # an S of two curves; ribs and mediastinum go along in part
            way = np.sign(0.7 - self.u(0, 1))
            bend = bend + self.extent * way * np.sin((self.Y + 3) * (2 * math.pi / 30) + 0.9)
        self.bend = bend
        x, y = self.X - 0.5 * bend, self.Y
        side = np.sign(x[:, :1])  # (B, 1, W): -1 the patient's right
        across = np.abs(x)
        self.cavity(x, y, across, side)
        heart = self.heart()
        border = 1.5 + 4.2 * np.exp((self.top - y) * (1 / 1.6))  # the apex is round on its inner side too
        lung = np.maximum(2 * self.depth - self.abdomen - heart, 0) * ramp(across, border - 1.0, border + 1.0)
        angles = np.radians(np.float32([-105, -84, -62, -40, -18, 4, 25, 45, 62, 76, 90]))
        roots = [
            (3.4 * s - 0.3, 0.7 - 0.5 * s + 2.4 * math.sin(angle), angle if s > 0 else math.pi - angle)
            for s in (-1, 1)
            for angle in angles
        ]
        vessels = 1.5 * self.vessels(np.float32(roots), 0.5)
        vessels += ellipsoid(across, y, 4.0, 1.2 - 0.5 * side, 1.8, 3.6, 0.9, -0.2) ** 2 * (
            0.6 * (SOFT - LUNG)
        )  # the hila
        if finding == "pleural effusion":
            lung = lung * (1 - self.effusion(across, y, side))
        elif finding == "consolidation":
            lung = lung * (1 - 0.8 * self.consolidation(x, y, side))
        extra = 0
        if finding == "pneumothorax":
            inside, pleura = self.pneumothorax(across, y, side)
            vessels = vessels * inside
            squeezed = inside * (side == self.side)
            extra = LUNG * lung * (0.3 * squeezed - (1 - inside)) + 0.13 * pleura * np.minimum(lung, 1)
        extra = extra + vessels * np.minimum(lung * 0.2, 1)
        body, air = self.torso(across, y), self.frontal_air(x, y)
        air_and_lung = SOFT * np.minimum(air, body) + (SOFT - LUNG) * np.minimum(
            lung * (1 + 0.03 * self.clouds), 0.95 * body
        )
        self.path = SOFT * body * (1 + 0.01 * self.clouds) - air_and_lung + extra
        self.frontal_bones()
        if finding in ("nodule", "calcified granuloma"):
            cx, cy, *_ = self.lobe
            self.nodule(self.X, self.Y, cx + self.u(-1.6, 1.6), cy + self.u(-1.8, 1.8))
        if finding == "pacemaker":
            self.pacemaker()

    def cavity(self, x, y, across, side):
        """The chest's inside: half-width, half-depth along the ray, and what the abdomen takes under two domes."""
        self.top = self.u(-13.4, -12.6)
        self.widest = (13.6 - 1.0 * self.female) * self.u(0.95, 1.05)
        cap = np.clip(1 - (y - self.top) * (1 / 14), 0, 1)
        cap = np.sqrt(1 - cap**2.5)
        self.width = self.widest * cap * (0.95 + 0.005 * (y + 5))  # (B, H, 1)
        q = x * (1 / np.maximum(self.width, 0.3))
        q *= q
        self.depth = ((8.6 + 1.5 * self.age) * (0.1 + 0.9 * cap)) * root(1 - q * q)
        self.dome = 8.6 - 1.6 * self.ap + self.u(-1.2, 1.0)  # the right one is the higher
        dome = self.dome + np.maximum(side, 0) * self.u(0.7, 1.7)
        dx = (across - (6.6 + 0.4 * np.maximum(side, 0))) * (1 / 7.0)
        dx = np.maximum(dx, -0.5 * dx)  # steep to the outer angle, flat towards the heart
        dx *= dx
        under = (y - dome) - dx * (3.3 + 1.1 * dx) + 1.6 * ramp(across, 6, 1)
        half = root(under * 60)  # a round dome, its top 2 cm before the middle
        self.abdomen = np.maximum(np.minimum(2 + half, self.depth) - np.maximum(2 - half, -self.depth), 0)

    def heart(self):
        """Chord of heart and great vessels; the heart is scaled so that, as projected, it is ctr times the thorax."""
        x, y = self.plane(4.0)
        x = x - 0.5 * self.bend
        h = self.ctr * 2 * self.widest * (1 + 4 / self.tube) / 13.05
        base, old = self.dome + 1.0, 0.9 * self.age
        self.heart_scale = h
        parts = (
            ellipsoid(x, y, 2.6 * h, base - 3.6 * h, 6.4 * h, 4.6 * h, 8.5 * h, 0.61),  # ventricles
            ellipsoid(x, y, -1.4 * h, base - 4.0 * h, 3.2 * h, 4.8 * h, 7.5 * h),  # right atrium
            ellipsoid(x, y, 0.9 + 0.7 * old, -3.8 - old, 2.6 + 0.4 * old, 3.0 + 0.4 * old, 7),  # aortic knob
            ellipsoid(x, y, -0.4, -2.5, 2.9 + 0.5 * old, 11.0, 5),  # superior vena cava, ascending aorta
            ellipsoid(x, y, 0.8, base - 7.6 * h, 3.9 * h + 0.3, 6.8, 8, -0.22),  # pulmonary trunk, left atrium
        )
        return np.maximum.reduce(parts)

    def torso(self, across, y):
        """Thickness of the body: trunk, neck, arms, and breasts (women) or pectoral muscles (men)."""
        ap, female, fat = self.ap, self.female, self.fat
        wall = self.widest + 3.0 + 4.0 * fat + 1.8 * np.exp(-(((y + 3) * (1 / 5)) ** 2))
        square = across * across
        shoulder = (-18.6 + 2.2 * (1 - ap)) - 2.5 * np.exp(square * (-1 / 40)) + (0.021 - 0.006 * ap) * square
        below = np.maximum(y - shoulder, 0)
        trunk = square * (1 / (wall * wall))
        trunk = (21 + 3 * fat) * root(1 - trunk * trunk) * np.sqrt(np.minimum(below * 0.12, 1))
        neck = root(1 - square * (1 / (5.8 - 0.6 * female) ** 2)) * (12 * ramp(y, -4, -13))
        self.arm = arm = across - (17.4 + 2.2 * (1 - ap) + (0.22 - 0.12 * ap) * (y + 9))
        arm = 2 * root(4.6**2 - arm * arm) * np.sqrt(np.minimum(below * 0.16, 1))
        body = np.maximum(np.maximum(trunk, neck), arm)
        x, y = self.plane(9.0)
        x = np.abs(x)
        cup, droop = self.u(5.4, 7.2) + 1.2 * fat, 3.6 + 3.0 * self.age
        out, up = (x - (9.0 + 0.15 * cup)) * (1 / cup), (y - droop) * (1 / cup)
        breast = np.maximum(1 - out * out - np.maximum(up, -0.55 * up) ** 2, 0)
        breast += (np.sqrt(breast) - breast) * ramp(up, -0.5, 0.5)  # an edge below, none above
        body += breast * ((3.0 + 2.0 * fat) * female)
        return body + ellipsoid(x, y, 9.5, -4, 6, 5.5, 0.6 * (1 - female))

    def frontal_air(self, x, y):
        """Chord of air in the trachea and, most often, in the stomach: a bubble with a level when upright."""
        air = 2 * root(0.85**2 - (x - 0.3) ** 2) * ramp(y, -0.6, -1.4)
        gx, gy = 7.2 + self.u(-0.8, 0.8), self.dome + 3.4 + self.u(0, 0.8)
        present, flat = self.u(0, 1) < 0.8, gy + 6 * self.ap
        bubble = ellipsoid(x, y, gx, gy, self.u(1.8, 3.2), self.u(1.0, 1.8), 3.0 * present)
        return air + bubble * ramp(y, flat + 0.9, flat + 0.6)

    def frontal_bones(self):
        calcium, ap, size = self.calcium, self.ap, self.size
        u = (self.X - 0.5 * self.bend) / np.maximum(self.width + 0.6, 1)
        x, y = self.plane(-8.0)
        inside = (
            calcium * ramp(self.width, 2, 8) * (1 - 0.5 * ramp(self.Y - self.dome, 0, 5))
        )  # the first two ribs are hidden by the shoulders
        self.path += inside * (self.ribs(y, u, False) + self.ribs(self.plane(8.0)[1], u, True))
        # Spine, in the middle columns alone: vertebral bodies with bright end plates, pedicles, spinous processes.
        middle = np.s_[:, :, int(0.3 * size) : int(0.7 * size)]
        x = (x - self.bend)[middle]
        f = (y + 12) * (1 / 2.35)
        f = np.abs(f - np.rint(f)) * 2  # 0 in the middle of a vertebra, 1 in the middle of a disc
        half = 1.45 + 0.03 * (y + 8) + 0.2 * f * f
        grain = 0.9 - 0.5 * ramp(f, 0.75, 0.9) + 0.35 * ramp(f, 0.55, 0.7) * ramp(f, 0.85, 0.75)
        spine = ramp(np.abs(x), half + 0.15, half - 0.15) * grain
        spine += ramp((np.abs(x) - 1.15) ** 2 + (1.6 * f - 0.2) ** 2, 0.3, 0.05) * 0.6
        spine += ramp(x * x * 6 + (f - 0.6) ** 2 * 4, 1, 0.3) * 0.8
        self.path[middle] += 0.7 * calcium * spine
        # Scapulae: turned out of the lungs by the PA pose, over them in AP. Collarbones, arms.
        x, y = self.plane(-9.0)
        x = np.abs(x)
        out, reach = 2.6 * (1 - ap) + self.u(-0.5, 0.5), 2.2 * (1 - ap)
        blade = plate(x, y, [(9.6 + out, -9.6), (15.6, -11.6), (16.8, -9.2), (12.4 + out, 1.6), (11.4 + out, 1.6)])
        self.path += calcium * (0.22 * ramp(blade, 0.1, -0.1) + 0.7 * ramp(np.abs(blade + 0.35), 0.45, 0.1))
        self.path += ellipsoid(x, y, 17.9 + 0.5 * reach, -9.6, 2.4, 2.6, 1.0 * calcium)  # heads of the humeri
        shaft = root(1.25**2 - self.arm * self.arm) - root(0.85**2 - self.arm * self.arm)
        self.path += (1.6 * calcium * ramp(y, -10, -8)) * shaft
        drop, bones = self.u(-0.8, 0.8) + 0.4 * ap, []
        for s in (-1, 1):
            collar = [(s * 1.6, -8.8), (s * 5, -9.9 - 0.2 * drop), (s * 9.5, -11.0 - drop), (s * 16.6, -12.0 - drop)]
            ridge = [(s * (11 + out), -7.8), (s * 14.5, -10.2), (s * 18.2, -12.2)]
            bones += [(collar, 0.68, calcium * 1.2, 7.0, 0.6), (ridge, 0.55, calcium, -9.0, 0.6)]
        self.wires(bones, 18)

    # ---- findings
    # -----------------------------------------------------------------------------------------------------------

    def effusion(self, across, y, side):
        """Share of lung replaced by fluid: a level with a meniscus that climbs the chest wall."""
        wall = np.maximum(self.width - across, 0)
        rise = (2.6 + 1.5 * self.extent) * np.exp(wall * (-1 / 3.0)) + 1.2 * np.exp(across * (-1 / 2.0))
        depth = y - (15.0 - self.extent * 22) + rise  # below the fluid's upper edge
        soft = 0.35 + 0.9 * self.ap  # lying patients: the fluid spreads behind the lung, its edge is a veil
        fluid = ramp(depth, -soft, 0.8 * soft) + 0.2 * self.ap * ramp(y, -8, 8)
        return np.minimum(fluid, 1) * (side == self.side)

    def consolidation(self, x, y, side):
        """Share of the lobe's air replaced: patchy, cut sharply by the fissure between upper and middle lobe."""
        cx, cy, _, rx, ry = self.lobe
        dx, dy = (x - cx) / (rx * self.extent), (y - cy) / (ry * self.extent)
        patch = ramp(1.1 - dx * dx - dy * dy + 0.35 * self.patches, 0, 1.5) * (0.8 + 0.08 * self.patches)
        fissure = y + 0.4 + 0.08 * (x + 7)
        bound = np.where(cy < 0, ramp(fissure, 0.15, -0.15), np.where(cy < 4, ramp(fissure, -0.15, 0.15), 1))
        return patch * np.where(cx < 0, bound, 1) * (side == np.sign(cx))

    def pneumothorax(self, across, y, side):
        """(1 where lung remains, the visceral pleura's line): the lung's outline shrunk from apex and side wall."""
        cap = np.clip(1 - (y - self.top - 1.3 * self.extent) * (1 / 14), 0, 1)
        edge = self.widest * np.sqrt(1 - cap**2.5) * (0.95 + 0.005 * (y + 5)) - self.extent * 0.75
        thin = np.maximum(0.1, 0.45 * self.cm)
        gone = across - edge
        inside = np.where(side == self.side, ramp(gone, thin, -thin), np.float32(1))
        return inside, np.exp(-((gone / thin) ** 2)) * ((side == self.side) & (across > 3))

    def nodule(self, x, y, cx, cy):
        ball = ellipsoid(x, y, cx, cy, self.extent, self.extent * self.u(0.85, 1), self.extent)
        self.path += ball * (SOFT - LUNG + (1.6 * BONE if self.finding == "calcified granuloma" else 0.05))

    def pacemaker(self):
        """A can under the left collarbone (rarely the right), one or two leads through the vena cava to the heart."""
        h, base = self.heart_scale, self.dome + 1.0
        s = np.sign(self.u(0, 1) - 0.12)
        bx, by, turned = s * (9.6 + self.u(-1, 1)), -7.6 + self.u(-1, 1), self.u(-0.4, 0.4)
        x, y = self.plane(9.0)
        dx, dy = (x - bx) + turned * (y - by), (y - by) - turned * (x - bx)
        can = (dx * (1 / 2.5)) ** 2 * (dx * (1 / 2.5)) ** 2 + (dy * (1 / 2.1)) ** 2 * (dy * (1 / 2.1)) ** 2
        self.path += ramp(can, 1.15, 0.85) * (1.2 + 2.2 * (dy > -1.2))  # above: the header, less dense
        vein = [
            (bx - s * 1.5, by - 1.6),
            (bx - s * 4.5, by - 3.2),
            (s * 2.5, -9.2),
            (-1.0, -7.0),
            (-2.4, -3.0),
            (-2.9, 1.5),
        ]
        ventricle = [*vein, (-2.2, base - 2.5), (1.5, base - 1.2), (5.2 * h, base - 1.6)]
        atrium = [*vein, (-3.3, 3.6), (-4.0, 2.6), (-3.6, 1.4)]
        second = 3.0 * (self.u(0, 1) < 0.6)
        self.wires([(ventricle, 0.11, 3.0, 3.0, 0.0), (atrium, 0.11, second, 3.0, 0.0)], 50)

    # ---- the lateral view
    # ---------------------------------------------------------------------------------------------------

    def lateral_view(self):
        """The patient faces the picture's left, so z = -X; rays run through both lungs."""
        u, age, finding = self.u, self.age, self.finding
        z, y = -self.X - 0.06 * self.Y + 1.0, self.Y
        round_chest = 1 + 0.12 * age
        top = u(-12.6, -11.6)
        spine = -5.6 * round_chest - (2.0 + 2.5 * age) * (
            1 - ((y + 1) * (1 / 15)) ** 2
        )  # middle of the vertebral bodies
        breastbone = (7.6 + 0.3 * (y + 8) - 0.012 * (y + 8) ** 2) * round_chest + 0.8  # its inner side
        rear = spine - 4.4
        middle, half = (breastbone + rear) * 0.5, (breastbone - rear) * 0.5
        cap = np.sqrt(1 - np.clip(1 - (y - top) * (1 / 7), 0, 1) ** 2.2)
        q = (z - (middle + 1.5 * (1 - cap))) * (1 / np.maximum(half * cap, 0.3))
        q *= q
        lungs = (22.0 * (0.3 + 0.7 * cap)) * root(1 - q * q)
        # Two domes, deepest at the back, the left one lower.
        dome = 8.3 + u(-0.8, 0.8)
        sink = (z - 2.5) ** 2 * (0.0375 - 0.0075 * np.sign(z - 2.5))
        for lower in (0.0, u(0.7, 1.6)):
            lungs = lungs - np.minimum(lungs, np.minimum(root((y - dome - lower - sink) * 30), 11.0) * (lungs > 0))
        # Heart, ascending aorta, arch, descending aorta, hila: all between the lungs.
        h = self.ctr * 2.05
        heart = ellipsoid(z, y, 4.0 * round_chest, dome + 1.6 - 3.5 * h, 6.4 * h, 5.0 * h, 4.5 * h, -0.6)
        heart = np.maximum(heart, ellipsoid(z, y, 2.0 * round_chest, -1.0, 2.4, 6.5, 1.8, 0.25))
        heart = (
            heart + ellipsoid(z, y, -1.8, -3.6 - age, 3.2, 1.7, 1.3, 0.5) + ellipsoid(z, y, -0.4, 0.8, 1.7, 2.3, 1.2)
        )
        heart = heart + 2 * root(1.3**2 - (z - spine - 2.2) ** 2) * (ramp(y, -2, 1) * (0.4 + age))
        if finding == "pleural effusion":
            meniscus = 4.0 * np.exp(np.maximum(z - rear, 0) * (-1 / 3.5)) + 1.5 * np.exp(
                np.maximum(breastbone - z, 0) * -0.5
            )
            lungs = lungs * (1 - 0.5 * ramp(y - (15.0 - self.extent * 16) + meniscus, -0.4, 0.4))
        elif finding == "consolidation":
            _, cy, cz, rx, ry = self.lobe
            dz, dy = (z - cz) / (rx * self.extent), (y - cy) / (ry * self.extent)
            lungs = lungs * (1 - 0.45 * ramp(1.1 - dz * dz - dy * dy + 0.35 * self.patches, 0, 1.5))
        lungs = np.maximum(lungs - heart, 0)
        angles = np.radians(np.arange(0, 360, 15, dtype=np.float32))
        roots = [(0.4 + 0.4 * math.cos(angle), 0.8 + 0.8 * math.sin(angle), angle) for angle in angles]
        vessels = self.vessels(np.float32(roots), 1.4) * np.minimum(lungs * 0.05, 1)
        body, air = self.profile(z, y, spine, breastbone), self.lateral_air(z, y, dome)
        air_and_lung = SOFT * np.minimum(air, body) + (SOFT - LUNG) * np.minimum(
            lungs * (1 + 0.03 * self.clouds), 0.93 * body
        )
        self.path = SOFT * body * (1 + 0.01 * self.clouds) - air_and_lung + 1.6 * vessels
        self.lateral_bones(z, y, spine, breastbone, rear)
        if finding in ("nodule", "calcified granuloma"):
            _, cy, cz, *_ = self.lobe
            self.nodule(z, y, cz + self.u(-1.2, 1.2), cy + self.u(-1.8, 1.8))
        if finding == "pacemaker":  # the can edge-on behind the skin, the lead curving to the heart's floor
            front = (breastbone + 1.6).mean(1, keepdims=True) - 3.2
            can = [(-front - 0.3, -7.0), (-front - 0.1, -5.0), (-front + 0.2, -3.0)]
            lead = [(-front, -7.0), (-2.0, -8.5), (-1.0, -4.0), (-2.0, 2.0), (-4.0, dome - 0.5), (-7.0, dome - 0.8)]
            self.wires([(can, 0.45, 2.5, 0.0, 0.0), (lead, 0.11, 3.0, 0.0, 0.0)], 35)

    def profile(self, z, y, spine, breastbone):
        """Thickness from side to side: trunk, neck, a woman's breasts, shoulders and raised arms."""
        fat = self.fat
        front, back = breastbone + 2.0 + 1.5 * fat, spine - 6.2 - fat
        neck = ramp(y, -11, -17)
        q = (z - (front + back) * 0.5 + 1.5 * neck) * (1 / ((front - back) * 0.5 * (1 - 0.35 * neck)))
        q *= q
        body = (31 * (1 - 0.4 * neck)) * root(1 - q * q)
        cup, droop = self.u(3.0, 4.6) + 1.2 * fat, 4.5 + 2.0 * self.age
        out, up = (z - (front - 2.5)) * (1 / cup), (y - droop) * (1 / cup)
        body = np.maximum(body, (19 * self.female) * root(1 - out * out - np.maximum(up, -0.4 * up) ** 2))
        arms = ellipsoid(z + 0.4 * (y + 19), y, 5, -18, 14, 7.5, 8)
        return np.maximum(body, arms) + 0.6 * np.minimum(body, arms) + (body > 4) * (8 * ramp(y, -5, -12))

    def lateral_air(self, z, y, dome):
        air = 1.2 * root(1 - ((z + 0.4 + 0.08 * (y + 8)) * (1 / 0.85)) ** 2) * (ramp(y, 1.0, 0.0) * ramp(y, -16, -12))
        gz, gy, present = 3.5 + self.u(-1, 1), dome + 4.0, self.u(0, 1) < 0.7
        return air + ellipsoid(z, y, gz, gy, self.u(1.8, 3.2), self.u(1.0, 1.8), 4.0 * present) * ramp(
            y, gy + 0.8, gy + 0.5
        )

    def lateral_bones(self, z, y, spine, breastbone, rear):
        calcium = self.calcium * 1.5
        for scale in (1.0, 1.06):  # ribs; the side away from the detector is the larger
            u = (z - (breastbone + rear) * 0.5) * (scale / ((breastbone - rear) * 0.5 + 0.6))
            drop = self.rib_slope * (1 + u) + 2.5 * ramp(u, 0.0, 1.0)
            index = (y * scale - drop + 11.6) * (1 / self.rib_spacing)
            d = ((index - np.clip(np.rint(index), 1, 10)) * (self.rib_spacing / 0.6)) ** 2
            bone = 0.45 * root(1 - d) - 0.28 * root(1 - 1.9 * d)
            self.path += calcium * bone * ramp(u, 0.8, 0.3) / np.maximum(root(1 - u * u), 0.4) * (u > -1)
        # Vertebrae: bodies with bright end plates, dark foramina, arches and spinous processes behind.
        across = z - spine
        f = (y + 12) * (1 / 2.35) + 0.03 * across
        f = np.abs(f - np.rint(f)) * 2
        body = ramp(np.abs(across), 1.8, 1.5) * (
            0.75 - 0.55 * ramp(f, 0.78, 0.9) + 0.5 * ramp(f, 0.6, 0.72) * ramp(f, 0.86, 0.76)
        )
        arch = ramp(np.abs(across + 3.1), 1.7, 0.9) * (0.35 + 0.35 * ramp(f, 0.9, 0.4))
        breast_plate = ramp(np.abs(z - breastbone - 0.6), 0.55, 0.35) * (ramp(y, -9.5, -9) * ramp(y, 7.5, 7))
        self.path += calcium * (1.3 * (body + arch * 0.8) + breast_plate)
        bones = []
        for shift in (0.0, 1.6):  # scapulae and raised arms
            bones.append(([(6.5 - shift, -9.0), (7.6 - shift, -4.0), (9.0 - shift, 1.0)], 0.5, calcium, 0.0, 0.5))
            bones.append(
                ([(-4.0 - shift, -13.0), (-10.0, -15.0 - shift), (-20.0, -16.5 - 1.5 * shift)], 1.25, calcium, 0.0, 0.7)
            )
        self.wires(bones, 20)

    # ---- film
    # ---------------------------------------------------------------------------------------------------------------

    def develop(self):
        """Lead letter on one side, exposure, and the black frame of the collimator."""
        u, size = self.u, self.size
        left = u(0, 1) < 0.75  # which letter, on its own side of the patient
        edge, height = self.field * 0.5 - u(1.6, 3.2), self.shift_y - self.field * 0.5 + u(1.8, 4.0)
        x = self.shift_x + edge * (-1 if self.lateral else 2 * left - 1)
        strokes = np.where(left[..., None], LETTER_L, LETTER_R)  # (B, N, 2 ends, 2)
        t = np.linspace(0, 1, max(4, int(2.5 / self.finest)), dtype=np.float32)
        lines = strokes[:, :, :1] + (strokes[:, :, 1:] - strokes[:, :, :1]) * t[:, None]  # (B, N, K, 2)
        px, py = (v.reshape(-1, len(t)) for v in self.pixels(x + lines[..., 0], height + lines[..., 1]))
        owner = np.repeat(np.arange(len(left)), strokes.shape[1])
        thickness = np.broadcast_to((0.17 / self.cm)[owner, 0], px.shape)
        tubes(self.path, owner, px, py, thickness, (6 * self.cm)[owner, 0], 0.17 / self.finest)
        black = 0.2 + u(0, 1) * (0.4 - 0.14 * self.lateral)
        white = u(0.71, 0.86) + 0.3 * (black - 0.36) - 0.08 * self.ap - 0.05 * self.lateral
        images = expose(self.path, self.sources, self.cm, 2e7, 0.3 + 0.2 * self.ap, black, white)
        margins = [np.where(u(0, 1) < 0.25, u(0.0, 0.05), np.float32(-1)) for _ in range(4)]
        grid, soft = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, :, None], 0.6 / size
        sides = [ramp(g, m - soft, m + soft) for g, m in zip((grid, 1 - grid, grid, 1 - grid), margins)]
        lit = (sides[0] * sides[1]) * (sides[2] * sides[3]).transpose(0, 2, 1)
        return (images * lit + 0.5).astype(np.uint8)
