"""The lateral chest view: both lungs, the heart between them, body and bones seen from the patient's side.

The patient faces the image's left, so the depth z is -X.
"""

import math

import numpy as np

from minildm.teaching.thorax import Thorax
from minildm.teaching.xray import LUNG, SOFT, ellipsoid, ramp, root


class Lateral(Thorax):
    """Patients seen from the side; each ray runs through both lungs."""

    def trace(self):
        finding = self.finding
        z, y = -self.X - 0.06 * self.Y + 1.0, self.Y
        lungs = self.cavity(z, y)
        spine, breastbone, dome = self.spine, self.breastbone, self.dome
        heart = self.heart(z, y)
        if finding == "pleural effusion":
            rear_rise = 4.0 * np.exp(np.maximum(z - self.rear, 0) * (-1 / 3.5))
            meniscus = rear_rise + 1.5 * np.exp(np.maximum(breastbone - z, 0) * -0.5)
            lungs = lungs * (1 - 0.5 * ramp(y - (15.0 - self.extent * 16) + meniscus, -0.4, 0.4))
        elif finding == "consolidation":
            _, cy, cz, rx, ry = self.lobe
            dz, dy = (z - cz) / (rx * self.extent), (y - cy) / (ry * self.extent)
            lungs = lungs * (1 - 0.45 * ramp(1.1 - dz * dz - dy * dy + 0.35 * self.patches, 0, 1.5))
        lungs = np.maximum(lungs - heart, 0)
        angles = np.radians(np.arange(0, 360, 15, dtype=np.float32))
        roots = [(0.4 + 0.4 * math.cos(angle), 0.8 + 0.8 * math.sin(angle), angle) for angle in angles]
        vessels = self.vessels(np.float32(roots), 1.4) * np.minimum(lungs * 0.05, 1)
        body, air = self.torso(z, y, spine, breastbone), self.air(z, y, dome)
        texture = 1 + 0.03 * self.clouds
        air_and_lung = SOFT * np.minimum(air, body) + (SOFT - LUNG) * np.minimum(lungs * texture, 0.93 * body)
        self.path = SOFT * body * (1 + 0.01 * self.clouds) - air_and_lung + 1.6 * vessels
        self.bones(z, y)
        if finding in ("nodule", "calcified granuloma"):
            _, cy, cz, *_ = self.lobe
            self.nodule(z, y, cz + self.u(-1.2, 1.2), cy + self.u(-1.8, 1.8))
        if finding == "pacemaker":  # the can edge-on behind the skin, the lead curving down to the apex of the heart
            front = (breastbone + 1.6).mean(1, keepdims=True) - 3.2
            can = [(-front - 0.3, -7.0), (-front - 0.1, -5.0), (-front + 0.2, -3.0)]
            lead = [(-front, -7.0), (-2.0, -8.5), (-1.0, -4.0), (-2.0, 2.0), (-4.0, dome - 0.5), (-7.0, dome - 0.8)]
            self.wires([(can, 0.45, 2.5, 0.0, 0.0), (lead, 0.11, 3.0, 0.0, 0.0)], 35)

    def cavity(self, z, y):
        """Chord through both lungs. Sets the z of ``spine`` (middle of the vertebral bodies), ``breastbone`` (its inner
        side) and ``rear`` (back of the cavity), and the y of the diaphragm's ``dome``."""
        u, age = self.u, self.age
        self.round_chest = 1 + 0.12 * age
        top = u(-12.6, -11.6)
        self.spine = -5.6 * self.round_chest - (2.0 + 2.5 * age) * (1 - ((y + 1) * (1 / 15)) ** 2)
        self.breastbone = (7.6 + 0.3 * (y + 8) - 0.012 * (y + 8) ** 2) * self.round_chest + 0.8
        self.rear = self.spine - 4.4
        middle, half = (self.breastbone + self.rear) * 0.5, (self.breastbone - self.rear) * 0.5
        cap = np.sqrt(1 - np.clip(1 - (y - top) * (1 / 7), 0, 1) ** 2.2)
        q = (z - (middle + 1.5 * (1 - cap))) * (1 / np.maximum(half * cap, 0.3))
        q *= q
        lungs = (22.0 * (0.3 + 0.7 * cap)) * root(1 - q * q)
        # The two domes of the diaphragm are lowest at the back; the left one is lower than the right.
        self.dome = 8.3 + u(-0.8, 0.8)
        sink = (z - 2.5) ** 2 * (0.0375 - 0.0075 * np.sign(z - 2.5))
        for lower in (0.0, u(0.7, 1.6)):
            abdomen = np.minimum(root((y - self.dome - lower - sink) * 30), 11.0)
            lungs = lungs - np.minimum(lungs, abdomen * (lungs > 0))
        return lungs

    def heart(self, z, y):
        """Chord of everything between the lungs: heart, ascending aorta, aortic arch, hila, descending aorta."""
        h = self.ctr * 2.05
        heart = ellipsoid(z, y, 4.0 * self.round_chest, self.dome + 1.6 - 3.5 * h, 6.4 * h, 5.0 * h, 4.5 * h, -0.6)
        heart = np.maximum(heart, ellipsoid(z, y, 2.0 * self.round_chest, -1.0, 2.4, 6.5, 1.8, 0.25))
        heart = heart + ellipsoid(z, y, -1.8, -3.6 - self.age, 3.2, 1.7, 1.3, 0.5)
        heart = heart + ellipsoid(z, y, -0.4, 0.8, 1.7, 2.3, 1.2)
        return heart + 2 * root(1.3**2 - (z - self.spine - 2.2) ** 2) * (ramp(y, -2, 1) * (0.4 + self.age))

    def torso(self, z, y, spine, breastbone):
        """Thickness from side to side: trunk, neck, breasts (women), shoulders and raised arms."""
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

    def air(self, z, y, dome):
        """Chord of air in the trachea and, in seven of ten patients, the stomach."""
        trachea = 1.2 * root(1 - ((z + 0.4 + 0.08 * (y + 8)) * (1 / 0.85)) ** 2)
        trachea = trachea * (ramp(y, 1.0, 0.0) * ramp(y, -16, -12))
        gz, gy, present = 3.5 + self.u(-1, 1), dome + 4.0, self.u(0, 1) < 0.7
        bubble = ellipsoid(z, y, gz, gy, self.u(1.8, 3.2), self.u(1.0, 1.8), 4.0 * present)
        return trachea + bubble * ramp(y, gy + 0.8, gy + 0.5)

    def bones(self, z, y):
        """Add ribs, spine, breastbone, shoulder blades and the bones of the raised arms."""
        spine, breastbone, rear, calcium = self.spine, self.breastbone, self.rear, self.calcium * 1.5
        for scale in (1.0, 1.06):  # the ribs of the two sides; those far from the detector are the larger
            u = (z - (breastbone + rear) * 0.5) * (scale / ((breastbone - rear) * 0.5 + 0.6))
            drop = self.rib_slope * (1 + u) + 2.5 * ramp(u, 0.0, 1.0)
            index = (y * scale - drop + 11.6) * (1 / self.rib_spacing)
            d = ((index - np.clip(np.rint(index), 1, 10)) * (self.rib_spacing / 0.6)) ** 2
            bone = 0.45 * root(1 - d) - 0.28 * root(1 - 1.9 * d)
            self.path += calcium * bone * ramp(u, 0.8, 0.3) / np.maximum(root(1 - u * u), 0.4) * (u > -1)
        # Vertebrae: bodies with bright end plates, dark foramina, arches and spinous processes behind them.
        across = z - spine
        f = (y + 12) * (1 / 2.35) + 0.03 * across
        f = np.abs(f - np.rint(f)) * 2
        plates = 0.5 * ramp(f, 0.6, 0.72) * ramp(f, 0.86, 0.76)
        body = ramp(np.abs(across), 1.8, 1.5) * (0.75 - 0.55 * ramp(f, 0.78, 0.9) + plates)
        arch = ramp(np.abs(across + 3.1), 1.7, 0.9) * (0.35 + 0.35 * ramp(f, 0.9, 0.4))
        sternum = ramp(np.abs(z - breastbone - 0.6), 0.55, 0.35) * (ramp(y, -9.5, -9) * ramp(y, 7.5, 7))
        self.path += calcium * (1.3 * (body + arch * 0.8) + sternum)
        curves = []
        for shift in (0.0, 1.6):  # shoulder blades and raised arms
            blade = [(6.5 - shift, -9.0), (7.6 - shift, -4.0), (9.0 - shift, 1.0)]
            arm = [(-4.0 - shift, -13.0), (-10.0, -15.0 - shift), (-20.0, -16.5 - 1.5 * shift)]
            curves += [(blade, 0.5, calcium, 0.0, 0.5), (arm, 1.25, calcium, 0.0, 0.7)]
        self.wires(curves, 20)
