"""The frontal chest view (PA or AP): cavity, heart, lungs, body, bones, and the findings as this view shows them.

``side`` is -1 in the patient's right half and 1 in the left, ``across`` the distance from the midline in cm.
"""

import math

import numpy as np

from minildm.teaching.thorax import Thorax
from minildm.teaching.xray import LUNG, SOFT, ellipsoid, plate, ramp, root


class Frontal(Thorax):
    """Patients seen from the front or the back, their right on the image's left."""

    def trace(self):
        finding = self.finding
        bend = self.u(-0.25, 0.25) * np.sin(self.Y * 0.16)
        if finding == "scoliosis":  # an S of two curves, which ribs and mediastinum follow in part
            way = np.sign(0.7 - self.u(0, 1))
            bend = bend + self.extent * way * np.sin((self.Y + 3) * (2 * math.pi / 30) + 0.9)
        self.bend = bend
        x, y = self.X - 0.5 * bend, self.Y
        side = np.sign(x[:, :1])  # (B, 1, W)
        across = np.abs(x)
        self.cavity(x, y, across, side)
        heart = self.heart()
        border = 1.5 + 4.2 * np.exp((self.top - y) * (1 / 1.6))  # the apex is round on its inner side too
        lung = np.maximum(2 * self.depth - self.abdomen - heart, 0) * ramp(across, border - 1.0, border + 1.0)
        vessels = self.lung_vessels(across, y, side)
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
        body, air = self.torso(across, y), self.air(x, y)
        texture = 1 + 0.03 * self.clouds
        air_and_lung = SOFT * np.minimum(air, body) + (SOFT - LUNG) * np.minimum(lung * texture, 0.95 * body)
        self.path = SOFT * body * (1 + 0.01 * self.clouds) - air_and_lung + extra
        self.bones()
        if finding in ("nodule", "calcified granuloma"):
            cx, cy, *_ = self.lobe
            self.nodule(self.X, self.Y, cx + self.u(-1.6, 1.6), cy + self.u(-1.8, 1.8))
        if finding == "pacemaker":
            self.pacemaker()

    def cavity(self, x, y, across, side):
        """Set the inside of the chest: ``width`` (half) and ``depth`` (half, along the ray), and the chord that the
        ``abdomen`` takes from it below the two domes of the diaphragm."""
        self.top = self.u(-13.4, -12.6)
        self.widest = (13.6 - 1.0 * self.female) * self.u(0.95, 1.05)
        cap = np.clip(1 - (y - self.top) * (1 / 14), 0, 1)
        cap = np.sqrt(1 - cap**2.5)
        self.width = self.widest * cap * (0.95 + 0.005 * (y + 5))  # (B, H, 1)
        q = x * (1 / np.maximum(self.width, 0.3))
        q *= q
        self.depth = ((8.6 + 1.5 * self.age) * (0.1 + 0.9 * cap)) * root(1 - q * q)
        self.dome = 8.6 - 1.6 * self.ap + self.u(-1.2, 1.0)  # the right dome is higher than the left
        dome = self.dome + np.maximum(side, 0) * self.u(0.7, 1.7)
        dx = (across - (6.6 + 0.4 * np.maximum(side, 0))) * (1 / 7.0)
        dx = np.maximum(dx, -0.5 * dx)  # steep towards the outer angle, flat towards the heart
        dx *= dx
        under = (y - dome) - dx * (3.3 + 1.1 * dx) + 1.6 * ramp(across, 6, 1)
        half = root(under * 60)  # a round dome, its top 2 cm before the middle
        self.abdomen = np.maximum(np.minimum(2 + half, self.depth) - np.maximum(2 - half, -self.depth), 0)

    def heart(self):
        """Chord of the heart and the great vessels, scaled so that the projected heart is ``ctr`` times the thorax."""
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

    def lung_vessels(self, across, y, side):
        """The path through the arterial trees of both lungs and through the hila."""
        angles = np.radians(np.float32([-105, -84, -62, -40, -18, 4, 25, 45, 62, 76, 90]))
        roots = [
            (3.4 * s - 0.3, 0.7 - 0.5 * s + 2.4 * math.sin(angle), angle if s > 0 else math.pi - angle)
            for s in (-1, 1)
            for angle in angles
        ]
        vessels = 1.5 * self.vessels(np.float32(roots), 0.5)
        hila = ellipsoid(across, y, 4.0, 1.2 - 0.5 * side, 1.8, 3.6, 0.9, -0.2)
        vessels += hila**2 * (0.6 * (SOFT - LUNG))
        return vessels

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
        breast += (np.sqrt(breast) - breast) * ramp(up, -0.5, 0.5)  # a sharp edge below, none above
        body += breast * ((3.0 + 2.0 * fat) * female)
        return body + ellipsoid(x, y, 9.5, -4, 6, 5.5, 0.6 * (1 - female))

    def air(self, x, y):
        """Chord of air in the trachea and, in four of five patients, the stomach: a bubble, level when upright."""
        trachea = 2 * root(0.85**2 - (x - 0.3) ** 2) * ramp(y, -0.6, -1.4)
        gx, gy = 7.2 + self.u(-0.8, 0.8), self.dome + 3.4 + self.u(0, 0.8)
        present, flat = self.u(0, 1) < 0.8, gy + 6 * self.ap
        bubble = ellipsoid(x, y, gx, gy, self.u(1.8, 3.2), self.u(1.0, 1.8), 3.0 * present)
        return trachea + bubble * ramp(y, flat + 0.9, flat + 0.6)

    # --- bones -------------------------------------------------------------------------------------------------------

    def bones(self):
        """Add ribs, spine, shoulder blades, collarbones and the bones of the upper arms."""
        calcium, ap = self.calcium, self.ap
        u = (self.X - 0.5 * self.bend) / np.maximum(self.width + 0.6, 1)
        x, y = self.plane(-8.0)
        # The shoulders hide the first two ribs.
        inside = calcium * ramp(self.width, 2, 8) * (1 - 0.5 * ramp(self.Y - self.dome, 0, 5))
        self.path += inside * (self.ribs(y, u, False) + self.ribs(self.plane(8.0)[1], u, True))
        self.add_spine(x, y)
        x, y = self.plane(-9.0)
        x = np.abs(x)
        # Shoulder blades: the PA pose turns them out of the lungs, in AP they lie over them.
        out, reach = 2.6 * (1 - ap) + self.u(-0.5, 0.5), 2.2 * (1 - ap)
        blade = plate(x, y, [(9.6 + out, -9.6), (15.6, -11.6), (16.8, -9.2), (12.4 + out, 1.6), (11.4 + out, 1.6)])
        self.path += calcium * (0.22 * ramp(blade, 0.1, -0.1) + 0.7 * ramp(np.abs(blade + 0.35), 0.45, 0.1))
        self.path += ellipsoid(x, y, 17.9 + 0.5 * reach, -9.6, 2.4, 2.6, 1.0 * calcium)  # heads of the humeri
        shaft = root(1.25**2 - self.arm * self.arm) - root(0.85**2 - self.arm * self.arm)
        self.path += (1.6 * calcium * ramp(y, -10, -8)) * shaft
        drop, curves = self.u(-0.8, 0.8) + 0.4 * ap, []
        for s in (-1, 1):
            collar = [(s * 1.6, -8.8), (s * 5, -9.9 - 0.2 * drop), (s * 9.5, -11.0 - drop), (s * 16.6, -12.0 - drop)]
            ridge = [(s * (11 + out), -7.8), (s * 14.5, -10.2), (s * 18.2, -12.2)]
            curves += [(collar, 0.68, calcium * 1.2, 7.0, 0.6), (ridge, 0.55, calcium, -9.0, 0.6)]
        self.wires(curves, 18)

    def ribs(self, y, u, front):
        """Bone along rays that meet the rib cage at u (-1 to 1 across it), on its back half or its front half.

        Rib i is the curve y = i * spacing + drop(phi), phi the angle round the chest from the spine. A ray sees its
        hollow cross-section, stretched where the ray meets the cage at a slant.
        """
        cosine = root(1 - u * u)
        side = np.abs(u * (1 + (8.0 if front else -8.0) * cosine / self.tube))  # with the cone of the beam
        if front:  # steeper and wider, and absent where cartilage takes over
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

    def add_spine(self, x, y):
        """Add vertebral bodies with bright end plates, pedicles and spinous processes, in the middle columns only."""
        middle = np.s_[:, :, int(0.3 * self.size) : int(0.7 * self.size)]
        x = (x - self.bend)[middle]
        f = (y + 12) * (1 / 2.35)
        f = np.abs(f - np.rint(f)) * 2  # 0 in the middle of a vertebra, 1 in the middle of a disc
        half = 1.45 + 0.03 * (y + 8) + 0.2 * f * f
        grain = 0.9 - 0.5 * ramp(f, 0.75, 0.9) + 0.35 * ramp(f, 0.55, 0.7) * ramp(f, 0.85, 0.75)
        spine = ramp(np.abs(x), half + 0.15, half - 0.15) * grain
        spine += ramp((np.abs(x) - 1.15) ** 2 + (1.6 * f - 0.2) ** 2, 0.3, 0.05) * 0.6
        spine += ramp(x * x * 6 + (f - 0.6) ** 2 * 4, 1, 0.3) * 0.8
        self.path[middle] += 0.7 * self.calcium * spine

    # --- findings ----------------------------------------------------------------------------------------------------

    def effusion(self, across, y, side):
        """Share of the lung replaced by fluid: a level with a meniscus that climbs the chest wall."""
        wall = np.maximum(self.width - across, 0)
        rise = (2.6 + 1.5 * self.extent) * np.exp(wall * (-1 / 3.0)) + 1.2 * np.exp(across * (-1 / 2.0))
        depth = y - (15.0 - self.extent * 22) + rise  # below the upper edge of the fluid
        soft = 0.35 + 0.9 * self.ap  # in a patient lying down the fluid spreads behind the lung and its edge is a veil
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
        """(1 where lung remains, line of the visceral pleura): the lung's outline shrunk from apex and side wall."""
        cap = np.clip(1 - (y - self.top - 1.3 * self.extent) * (1 / 14), 0, 1)
        edge = self.widest * np.sqrt(1 - cap**2.5) * (0.95 + 0.005 * (y + 5)) - self.extent * 0.75
        thin = np.maximum(0.1, 0.45 * self.cm)
        gone = across - edge
        inside = np.where(side == self.side, ramp(gone, thin, -thin), np.float32(1))
        return inside, np.exp(-((gone / thin) ** 2)) * ((side == self.side) & (across > 3))

    def pacemaker(self):
        """Add a can under the left collarbone (rarely the right), and one or two leads through the vena cava."""
        h, base = self.heart_scale, self.dome + 1.0
        s = np.sign(self.u(0, 1) - 0.12)
        bx, by, turned = s * (9.6 + self.u(-1, 1)), -7.6 + self.u(-1, 1), self.u(-0.4, 0.4)
        x, y = self.plane(9.0)
        dx, dy = (x - bx) + turned * (y - by), (y - by) - turned * (x - bx)
        can = (dx * (1 / 2.5)) ** 2 * (dx * (1 / 2.5)) ** 2 + (dy * (1 / 2.1)) ** 2 * (dy * (1 / 2.1)) ** 2
        self.path += ramp(can, 1.15, 0.85) * (1.2 + 2.2 * (dy > -1.2))  # the upper part is the less dense header
        entry = [(bx - s * 1.5, by - 1.6), (bx - s * 4.5, by - 3.2), (s * 2.5, -9.2)]
        vein = [*entry, (-1.0, -7.0), (-2.4, -3.0), (-2.9, 1.5)]
        ventricle = [*vein, (-2.2, base - 2.5), (1.5, base - 1.2), (5.2 * h, base - 1.6)]
        atrium = [*vein, (-3.3, 3.6), (-4.0, 2.6), (-3.6, 1.4)]
        second = 3.0 * (self.u(0, 1) < 0.6)
        self.wires([(ventricle, 0.11, 3.0, 3.0, 0.0), (atrium, 0.11, second, 3.0, 0.0)], 50)
