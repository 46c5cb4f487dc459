"""A procedural chest radiograph with exact labels: the data set that every clone carries.

In: labels and a seed. Out: uint8 pictures (size, size), bones white, the patient's right on the left of a frontal view.

The thorax is a set of round bodies, shells and tubes in centimetres, and each pixel is a ray through them: chords of soft tissue,
lung, air, bone and metal add up to a path, and ``xray.expose`` turns the path into a film. Coordinates: x to the picture's right
(the patient's left), y down, z towards the sternum; the origin lies in the middle of the chest at the level of the carina.
Proportions from ordinary anatomy (Moore, Clinically Oriented Anatomy; Felson's Principles of Chest Roentgenology), not from any
picture. Left out: the head, children, bowel, old fractures, tubes other than pacemaker leads. Not for clinical use.
"""

import math
from dataclasses import dataclass

import numpy as np

from minildm.data.xray import (
    BONE,
    LUNG,
    SOFT,
    Draws,
    ellipsoid,
    expose,
    fractal,
    generator,
    plate,
    ramp,
    root,
    spline_weights,
    tubes,
)
from minildm.errors import InputError

VIEWS = ("PA", "AP", "lateral")
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
# Each finding: its share, the places it may have, the range of its size and that size's meaning.
FINDINGS = {
    "normal": (0.26, ("",), (0, 0)),
    "cardiomegaly": (0.12, ("",), (0, 0)),  # its extent is the field ctr
    "pleural effusion": (0.15, ("right", "left"), (0.15, 0.6)),  # share of the lung's height under fluid, at the wall
    "pneumothorax": (0.09, ("right", "left"), (1.5, 4.0)),  # cm between chest wall and lung
    "nodule": (0.07, LOBES, (0.7, 1.5)),  # cm, radius
    "calcified granuloma": (0.07, LOBES, (0.35, 0.6)),  # cm, radius
    "consolidation": (0.10, LOBES, (0.8, 1.2)),  # times the lobe's own radius
    "pacemaker": (0.07, ("",), (0, 0)),
    "scoliosis": (0.07, ("",), (1.0, 2.4)),  # cm the spine leaves the midline, to each side
}
FRONTAL_ONLY = ("pneumothorax", "scoliosis")  # what a lateral view does not show
LOBE_CENTRES = {  # x, y in a frontal view, z, and the radii of a consolidation that fills the lobe
    "right upper lobe": (-6.8, -5.2, 0.5, 4.0, 4.4),
    "right middle lobe": (-6.8, 3.0, 5.5, 4.2, 3.0),
    "right lower lobe": (-8.2, 5.0, -5.0, 4.2, 4.2),
    "left upper lobe": (7.0, -4.4, 3.0, 4.0, 5.0),
    "left lower lobe": (9.2, 5.0, -5.0, 3.8, 4.4),
}


@dataclass(frozen=True)
class PhantomLabels:
    """What is true of a picture."""

    age: int  # years, 18 to 92
    sex: str  # male, female
    view: str  # PA, AP (supine or sitting, portable tube), lateral (facing the picture's left)
    finding: str  # a key of FINDINGS
    place: str  # side or lobe, or empty
    size: float  # extent of the finding, in the unit that FINDINGS names
    ctr: float  # cardiothoracic ratio as a frontal view shows it: widest heart over widest inner thorax
    patient: str  # one picture each

    def __post_init__(self):
        if self.view not in VIEWS or self.sex not in ("male", "female") or self.finding not in FINDINGS:
            raise InputError(
                f"no phantom for {self.sex} {self.view} {self.finding!r}; sex is male or female, view one of {', '.join(VIEWS)}, "
                f"finding one of {', '.join(FINDINGS)}"
            )
        if self.place not in FINDINGS[self.finding][1] or (self.view == "lateral" and self.finding in FRONTAL_ONLY):
            raise InputError(
                f"no phantom for {self.finding!r} at {self.place!r} in a {self.view} view; places are "
                f"{FINDINGS[self.finding][1]}, and {' and '.join(FRONTAL_ONLY)} need PA or AP"
            )


def labels(seed, view=None, finding=None):
    """Labels drawn at plausible frequencies; ``seed`` is a number or a tuple such as (set, index). What is given stays fixed."""
    rng = generator(seed, 0)
    view = view or str(rng.choice(VIEWS, p=(0.6, 0.22, 0.18)))
    names = [name for name in FINDINGS if not (view == "lateral" and name in FRONTAL_ONLY)]
    shares = np.array([FINDINGS[name][0] for name in names])
    finding = finding or str(rng.choice(names, p=shares / shares.sum()))
    old = finding in ("cardiomegaly", "pleural effusion", "pacemaker")
    age = int(np.clip(rng.normal(69 if old else 52, 12 if old else 18), 18, 92))
    _, places, (low, high) = FINDINGS[finding]
    big = finding == "cardiomegaly"
    ctr = rng.uniform(0.55, 0.66) if big else rng.uniform(0.39, 0.48)
    if view == "AP":  # the heart lies far from the detector and the diaphragm is high
        ctr += 0.04
    return PhantomLabels(
        age=age,
        sex=str(rng.choice(("male", "female"))),
        view=view,
        finding=finding,
        place=str(rng.choice(places)),
        size=round(float(rng.uniform(low, high)), 3),
        ctr=round(float(ctr), 3),
        patient="-".join(str(part) for part in (seed if isinstance(seed, tuple) else (seed,))),
    )


def fields(labels):
    """The caption fields of a record, named as in every data set here; an empty text is a missing field."""
    return {
        "patient_id": f"phantom-{labels.patient}",
        "age": str(labels.age),
        "sex": labels.sex,
        "view": "LATERAL" if labels.view == "lateral" else labels.view,
        "projection": "L" if labels.view == "lateral" else labels.view,
        "modality": "CR" if labels.view == "AP" else "DX",  # portable cassettes against fixed flat panels
        "diagnosis": labels.finding,
        "loc": labels.place,
    }


def render(labels, seed, size=128):
    """The picture of ``labels``: uint8 (size, size). Another seed is another patient with the same findings."""
    return render_batch([labels], [seed], size)[0]


def render_batch(batch, seeds, size=128, chunk=4):
    """Pictures of many labels: uint8 (B, size, size), each the same whatever else is in the batch."""
    if not isinstance(size, int) or size < 32:
        raise InputError(f"a phantom's size must be a whole number of pixels from 32 up, got {size!r}")
    images = np.empty((len(batch), size, size), np.uint8)
    order = sorted(range(len(batch)), key=lambda i: (batch[i].view == "lateral", batch[i].finding))
    while order:  # pictures of one kind share a code path; a few at a time stay in the processor's cache
        head = batch[order[0]]
        alike = [i for i in order[:chunk] if (batch[i].view == "lateral", batch[i].finding) == (head.view == "lateral", head.finding)]
        order = order[len(alike) :]
        images[alike] = _Thorax([batch[i] for i in alike], [seeds[i] for i in alike], size).film()
    return images


class _Thorax:
    """A few patients with the same finding, all frontal or all lateral. Arrays are (B, H or 1, W or 1) float32."""

    def __init__(self, batch, seeds, size):
        def column(values):
            return np.array(list(values), np.float32).reshape(-1, 1, 1)

        self.seeds, self.size, self.u = seeds, size, Draws(seeds, 1, 96)
        self.finding, self.lateral = batch[0].finding, batch[0].view == "lateral"
        self.extent = column(label.size for label in batch)
        self.female = column(label.sex == "female" for label in batch)
        self.age = column((label.age - 18) / 74 for label in batch)  # 0 to 1
        self.ap = column(label.view == "AP" for label in batch)
        self.side = column(-1 if label.place.startswith("right") else 1 for label in batch)  # sign of x
        self.ctr = column(label.ctr for label in batch)
        self.lobe = column([LOBE_CENTRES.get(label.place, (0, 0, 0, 1, 1)) for label in batch]).reshape(len(batch), 5, 1, 1)
        u = self.u
        self.fat = u(0, 1)
        self.field = u(33.0, 38.0)  # cm of body across the picture
        self.cm = self.field / size
        self.shift_x, self.shift_y = u(-0.8, 0.8), u(0.2, 1.6)
        self.tilt, self.turn = u(-0.03, 0.03), u(-0.05, 0.05) * (1 + self.ap)
        grid = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]
        self.Y = self.field * grid[:, :, None] + self.shift_y  # (B, H, 1)
        self.X = self.field * grid[:, None, :] + self.shift_x + self.tilt * self.Y  # (B, H, W)
        # Tube to mid-body: 1.65 m for PA (tube behind the patient), 0.95 m for AP (tube in front).
        self.tube = np.where(self.ap > 0, np.float32(-95), np.float32(165))

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

    def wire(self, points, radius, strength, z=0.0, hollow=0.0):
        """Add a smooth tube near control points [(x, y), ...] (numbers or (B, 1, 1)); radius in cm, strength in 1/cm."""
        n = len(self.seeds)
        controls = [points[0], points[0], *points, points[-1], points[-1]]  # the spline begins and ends in its end points
        x, y = (np.concatenate([np.broadcast_to(np.float32(p[axis]), (n, 1, 1)) for p in controls], 2) for axis in (0, 1))
        length = (np.hypot(np.diff(x), np.diff(y)).sum(2) / self.cm[:, 0]).max()
        weights = spline_weights(len(controls), int(length / 0.5) + 4).T
        x, y = self.pixels(x @ weights, y @ weights, z)
        radius = np.broadcast_to(np.float32(radius) / self.cm, x.shape)[:, 0]
        tubes(self.path, np.arange(n), x[:, 0], y[:, 0], radius, (strength * self.cm)[:, 0], hollow)

    def vessels(self, roots, scatter):
        """Arteries of the lungs as trees of tapering tubes: a (B, H, W) path of their own.

        roots: rows (x, y, direction) of the first branches, (R, 3), direction in radians; scatter in cm.
        """
        n, size = len(self.seeds), self.size
        canvas = np.zeros((n, size, size), np.float32)
        chance = np.stack([generator(seed, 2).random((3, 16 * len(roots)), dtype=np.float32) for seed in self.seeds])
        start = chance[:, :, -len(roots) :] * 2 - 1
        x, y, angle = roots[:, 0] + start[:, 0] * scatter, roots[:, 1] + start[:, 1] * scatter, roots[:, 2] + 0.15 * start[:, 2]
        radius, length, used = np.float32(0.5), 3.2, 0
        for level in range(4):
            a, b, c = chance[:, :, used : used + x.shape[1]].transpose(1, 0, 2) * 2 - 1
            used += x.shape[1]
            points = max(4, int(length * 1.2 / (0.8 * self.cm.min())))
            t = np.linspace(0, 1, points, dtype=np.float32)
            aim = angle + 0.35 * a
            reach = length * (1 + 0.35 * b)
            bend = angle[..., None] + (aim - angle)[..., None] * t  # (B, N, K): each branch turns from its parent's direction
            ds = reach[..., None] / points
            px, py = x[..., None] + np.cumsum(np.cos(bend), 2) * ds, y[..., None] + np.cumsum(np.sin(bend), 2) * ds
            width = radius * (1 + 0.3 * c[..., None]) * (1 - 0.3 * t) / self.cm
            sx, sy = self.pixels(px, py)
            owner = np.repeat(np.arange(n), x.shape[1])
            strength = ((SOFT - LUNG) * self.cm)[owner, 0]
            tubes(canvas, owner, *(v.reshape(-1, points) for v in (sx, sy, width)), strength)
            fork = np.float32(0.42) + 0.2 * c
            x, y = np.repeat(px[..., -1], 2, 1), np.repeat(py[..., -1], 2, 1)
            angle = np.stack([aim - fork, aim + fork * 0.8], 2).reshape(n, -1)
            radius, length = radius * 0.68, length * 0.8
        return canvas

    def ribs(self, y, u, front):
        """Bone along rays that meet the rib cage at u (-1 to 1 across it), on its back half or its front half.

        Rib i is the curve y = i * spacing + drop(phi), phi the angle round the chest from the spine; a ray sees its hollow section,
        stretched where it meets the cage at a slant.
        """
        cosine = root(1 - u * u)
        u = u * (1 + (8.0 if front else -8.0) * cosine / self.tube)  # the beam's cone, at the depth where the ray meets the cage
        side = np.abs(u)
        if front:  # steeper, wider, and gone where cartilage takes over
            drop = self.rib_slope * (1 + 0.5 * cosine) + 5.5 * (1 - side)
            half, present = 0.8, ramp(side, 0.36, 0.5)
        else:
            drop = self.rib_slope * (1 - cosine)
            half, present = 0.68, 1.0
        index = (y - drop + 11.6) * (1 / self.rib_spacing)
        nearest = np.clip(np.rint(index), 1, 7 if front else 11)
        d = (index - nearest) * (self.rib_spacing / half)
        d *= d
        bone = (0.8 * root(1 - d) - 0.45 * root(1 - 1.7 * d)) * (1.25 - 0.05 * nearest)
        return bone * present * (side < 1) / np.maximum(cosine, 0.4)

    def film(self):
        """Path of the view, then the picture of it."""
        self.rib_slope, self.rib_spacing = self.u(3.6, 5.0), self.u(2.05, 2.3)
        self.calcium = BONE * (0.66 - 0.2 * self.age * (1 + self.female) / 2)  # bones lose mineral, women's more
        self.path = self.lateral_path() if self.lateral else self.frontal_path()
        return self.develop()

    def frontal_path(self):
        u, ap, female, age, fat, finding = self.u, self.ap, self.female, self.age, self.fat, self.finding
        bend = u(-0.25, 0.25) * np.sin(self.Y * 0.16)
        if finding == "scoliosis":  # an S of two curves; ribs and mediastinum go along
            bend = bend + self.extent * np.where(u(0, 1) < 0.7, 1, -1) * np.sin((self.Y + 3) * np.float32(2 * math.pi / 30) + 0.9)
        self.bend = bend
        x, y = self.X - 0.5 * bend, self.Y
        side = np.where(x[:, :1] < 0, np.float32(-1), np.float32(1))  # (B, 1, W)
        across = np.abs(x)
        # --- the chest cavity: half-width W(y), half-depth Z(x, y)
        top = u(-13.4, -12.6)
        self.width = (13.6 - 1.0 * female) * u(0.95, 1.05)
        cap = np.clip(1 - (y - top) * (1 / 14), 0, 1)
        cap = np.sqrt(1 - cap**2.5)
        W = self.width * cap * (0.95 + 0.005 * (y + 5))
        q = x * (1 / np.maximum(W, 0.3))
        q2 = q * q
        Z = (8.6 + 1.5 * age) * (0.1 + 0.9 * cap) * root(1 - q2 * q2)
        # --- diaphragm: two domes, the right one higher
        dome_right = 8.6 - 1.6 * ap + u(-1.2, 1.0)
        dome = np.where(side < 0, dome_right, dome_right + u(0.7, 1.7))
        dx = (across - 6.6 - 0.4 * (side > 0)) * (1 / 7.0)
        dx = np.maximum(dx, -0.5 * dx)  # steep to the outer angle, flat towards the heart
        under = y - dome - 4.4 * dx * dx * (0.75 + 0.25 * dx * dx) + 1.6 * ramp(across, 6, 1)
        half = root(under * 60)
        abdomen = np.clip(np.minimum(2 + half, Z) - np.maximum(2 - half, -Z), 0, None)
        # --- heart, scaled about the diaphragm so that it is ctr times the inner thorax, as projected
        hx, hy = self.plane(4.0)
        hx = hx - 0.5 * bend
        h = self.ctr * 2 * self.width / (13.05 / (1 + 4 / self.tube))
        base = dome_right + 1.0
        heart = ellipsoid(hx, hy, 2.6 * h, base - 3.6 * h, 6.4 * h, 4.6 * h, 8.5 * h, 0.61)
        heart = np.maximum(heart, ellipsoid(hx, hy, -1.4 * h, base - 4.0 * h, 3.2 * h, 4.8 * h, 7.5 * h))
        great = 0.9 * age
        for part in (
            ellipsoid(hx, hy, 1.2 + 0.6 * great, -4.0 - great, 2.6 + 0.4 * great, 2.8 + 0.4 * great, 7),  # aortic knob
            ellipsoid(hx, hy, -0.4, -2.5, 2.9 + 0.5 * great, 11.0, 5),  # superior vena cava and ascending aorta
            ellipsoid(hx, hy, 0.7, base - 7.4 * h, 4.0 * h, 6.4, 8, -0.3),  # pulmonary trunk, left atrial appendage
        ):
            heart = np.maximum(heart, part)
        # --- lung: what is left of the cavity
        lung = 2 * Z - abdomen
        border = 1.5 + 4.2 * np.exp((top - y) * (1 / 1.6))  # the apex is round on its inner side too
        lung = np.maximum(lung - heart, 0) * ramp(across, border - 1.0, border + 1.0)
        clouds = fractal(self.seeds, 3, self.size, range(3, 9), 0.75)
        angles = np.radians(np.float32([-105, -84, -62, -40, -18, 4, 25, 45, 62, 76, 90]))
        roots = [(3.4 * s - 0.3, 0.7 - 0.5 * s + 2.4 * math.sin(a), a if s > 0 else math.pi - a) for s in (-1, 1) for a in angles]
        vessels = self.vessels(np.float32(roots), 0.5)
        hila = ellipsoid(across, y, 4.2, 1.2 - 0.5 * side, 1.4, 3.0, 1.0, -0.2) * (SOFT - LUNG)
        if finding == "pleural effusion":
            lung = lung * (1 - self.effusion(x, y, W, side, dome_right))
        elif finding == "consolidation":
            lung = lung * (1 - 0.8 * self.consolidation(x, y, side))
        collapse = 0
        if finding == "pneumothorax":
            inside, pleura = self.pneumothorax(across, y, W, top, side)
            vessels = vessels * inside
            collapse = (1 - inside) * LUNG * lung - inside * (side == self.side) * 0.25 * LUNG * lung - 0.13 * pleura * np.minimum(lung, 1)
        vessels = (1.5 * vessels + hila) * np.minimum(lung * 0.2, 1)
        # --- torso, shoulders, neck, arms
        wall = self.width + 3.0 + 4.0 * fat + 1.8 * np.exp(-(((y + 3) * (1 / 5)) ** 2))
        shoulder = -18.6 + 2.2 * (1 - ap) - 2.5 * np.exp(across * across * (-1 / 40)) + (0.021 - 0.006 * ap) * x * x
        below = np.maximum(y - shoulder, 0)
        torso = 2 * (10.5 + 1.5 * fat) * root(1 - (self.X * (1 / wall)) ** 4) * np.sqrt(np.minimum(below * 0.12, 1))
        neck = 12.0 * root(1 - (x * (1 / (5.8 - 0.6 * female))) ** 2) * ramp(y, -4, -13)
        arm = across - (17.4 + 2.2 * (1 - ap) + (0.22 - 0.12 * ap) * (y + 9))
        limb = 2 * root(4.6**2 - arm * arm) * np.sqrt(np.minimum(below * 0.16, 1))
        body = np.maximum(np.maximum(torso, neck), limb)
        # --- breasts (women), pectoral muscles (men)
        bx, by = self.plane(9.0)
        cup = u(5.4, 7.2) + 1.2 * fat
        droop = 5.0 + 2.5 * age
        outer = (np.abs(bx) - 9.0 - 0.15 * cup) * (1 / cup)
        up = (by - droop) * (1 / cup)
        breast = np.maximum(1 - outer * outer - np.maximum(up, -0.55 * up) ** 2, 0)
        breast = breast + (np.sqrt(breast) - breast) * ramp(up, -0.5, 0.5)  # an edge below, none above
        body = body + breast * (2.0 + 2.0 * fat) * female
        body = body + (1 - female) * 1.2 * ellipsoid(np.abs(bx), by, 9.5, -4, 7, 5.0, 0.5, -0.5)
        # --- air ways and stomach
        air = 2 * root(0.85**2 - (x - 0.3) ** 2) * ramp(y, -0.6, -1.4)
        gx, gy = 7.2 + u(-0.8, 0.8), dome_right + 3.4 + u(0, 0.8)
        bubble = ellipsoid(x, y, gx, gy, u(1.8, 3.2), u(1.0, 1.8), 3) * ramp(y, gy + 0.9 + 6 * ap, gy + 0.6 + 6 * ap)
        air = air + bubble * (u(0, 1) < 0.8)
        fluff = 1 + 0.03 * clouds
        self.path = SOFT * (body * (1 + 0.01 * clouds) - np.minimum(air, body)) - (SOFT - LUNG) * np.minimum(lung * fluff, 0.95 * body) + vessels - collapse
        self.frontal_bones(W)
        if finding in ("nodule", "calcified granuloma"):
            self.nodule(*self.lobe_point(0.7))
        if finding == "pacemaker":
            self.pacemaker(h, base)
        return self.path

    def effusion(self, x, y, W, side, dome):
        """Share of lung replaced by fluid: a level with a meniscus that climbs the chest wall."""
        height = 13.0 - self.extent * 22
        wall = np.maximum(W - np.abs(x), 0)
        level = height + 2.6 - (2.6 + 1.5 * self.extent) * np.exp(wall * (-1 / 3.0)) - 1.2 * np.exp(np.abs(x) * (-1 / 2.0))
        soft = 0.35 + 0.9 * self.ap  # lying patients: the fluid spreads behind the lung, its edge is a veil
        fluid = ramp(y - level, -soft, 0.8 * soft) + 0.2 * self.ap * ramp(y, -8, 8)
        return np.minimum(fluid, 1) * (side == self.side)

    def consolidation(self, x, y, side):
        """Share of the lobe's air replaced: patchy, and cut sharply by the horizontal fissure."""
        cx, cy, _, rx, ry = (self.lobe[:, k] for k in range(5))
        clouds = fractal(self.seeds, 4, self.size, range(3, 7), 0.5)
        dx, dy = (x - cx) / (rx * self.extent), (y - cy) / (ry * self.extent)
        patch = ramp(1.1 - dx * dx - dy * dy + 0.35 * clouds, 0, 1.5)
        fissure = y + 0.4 + 0.08 * (x + 7)
        bound = np.where(cy < 0, ramp(fissure, 0.15, -0.15), np.where(cy < 4, ramp(fissure, -0.15, 0.15), 1))
        return patch * np.where(cx < 0, bound, 1) * (side == np.sign(cx)) * (0.8 + 0.08 * clouds)

    def pneumothorax(self, across, y, W, top, side):
        """(1 where lung remains, the visceral pleura's line): the lung's outline shrunk from the apex and the side wall."""
        cap = np.clip(1 - (y - top - 1.3 * self.extent) * (1 / 14), 0, 1)
        edge = np.minimum(W, self.width) * 0.0 + self.width * np.sqrt(1 - cap**2.5) * (0.95 + 0.005 * (y + 5)) - self.extent * 0.75
        thin = np.maximum(0.1, 0.45 * self.cm)
        gone = across - edge
        inside = np.where(side == self.side, ramp(gone, thin, -thin), 1)
        return inside, np.exp(-((gone / thin) ** 2)) * (side == self.side) * (across > 3)

    def lobe_point(self, spread):
        """A place in the labelled lobe, in the coordinates of a frontal view, and its depth."""
        cx, cy, cz = (self.lobe[:, k] for k in range(3))
        return cx + self.u(-1, 1) * 2.2 * spread, cy + self.u(-1, 1) * 2.6 * spread, cz

    def nodule(self, cx, cy, cz):
        ball = ellipsoid(self.X, self.Y, cx, cy, self.extent, self.extent * self.u(0.85, 1), self.extent)
        self.path += ball * (SOFT - LUNG + (1.6 * BONE if self.finding == "calcified granuloma" else 0.05))

    def pacemaker(self, h, base):
        """A can under the left collarbone (rarely the right), one or two leads through the vena cava into the right heart."""
        s = np.where(self.u(0, 1) < 0.12, np.float32(-1), np.float32(1))
        bx, by = s * (9.6 + self.u(-1, 1)), -7.6 + self.u(-1, 1)
        fx, fy = self.plane(9.0)
        turned = self.u(-0.4, 0.4)
        dx, dy = (fx - bx) + turned * (fy - by), (fy - by) - turned * (fx - bx)
        can = (dx * (1 / 2.5)) ** 4 + (dy * (1 / 2.1)) ** 4
        self.path += ramp(can, 1.15, 0.85) * (1.2 + 2.2 * (dy > -1.2))
        vein = [(bx - s * 1.5, by - 1.6), (bx - s * 4.5, by - 3.2), (s * 2.5, -9.2), (-1.0, -7.0), (-2.4, -3.0), (-2.9, 1.5)]
        self.wire([*vein, (-2.2, base - 2.5), (1.5, base - 1.2), (5.2 * h, base - 1.6)], 0.11, 3.0, 3.0)
        if self.u(0, 1).mean() < 0.6:
            self.wire([*vein, (-3.3, 3.6), (-4.0, 2.6), (-3.6, 1.4)], 0.11, 3.0, 3.0)

    def frontal_bones(self, W):
        calcium, ap = self.calcium, self.ap
        u = (self.X - 0.5 * self.bend) / np.maximum(W + 0.6, 1)
        bx, by = self.plane(-8.0)
        self.path += calcium * (self.ribs(by, u, False) + 0.55 * self.ribs(self.plane(8.0)[1], u, True))
        # --- spine: bodies, discs, pedicles, spinous processes
        bx = bx - self.bend
        level = (by + 12) * (1 / 2.35)
        f = np.abs(level - np.rint(level)) * 2  # 0 in the middle of a vertebra, 1 in the middle of a disc
        half = 1.45 + 0.03 * (by + 8) + 0.2 * f * f
        column = ramp(np.abs(bx), half + 0.15, half - 0.15) * (0.9 - 0.5 * ramp(f, 0.75, 0.9) + 0.35 * ramp(f, 0.55, 0.7) * ramp(f, 0.85, 0.75))
        pedicles = ramp((np.abs(bx) - 1.15) ** 2 + (1.6 * f - 0.2) ** 2, 0.3, 0.05) * 0.6
        process = ramp(bx * bx * 6 + (f - 0.6) ** 2 * 4, 1, 0.3) * 0.8
        self.path += calcium * (column + pedicles + process)
        # --- scapulae: turned out of the lungs by the PA pose, over them in AP; clavicles; arms
        sx, sy = self.plane(-9.0)
        out = 2.6 * (1 - ap) + self.u(-0.5, 0.5)
        blade = plate(np.abs(sx), sy, [(9.6 + out, -9.6), (15.6, -11.6), (16.8, -9.2), (12.4 + out, 1.6), (11.4 + out, 1.6)])
        self.path += calcium * (0.22 * ramp(blade, 0.1, -0.1) + 0.7 * ramp(np.abs(blade + 0.35), 0.45, 0.1))
        self.path += calcium * 0.45 * ellipsoid(np.abs(sx), sy, 17.9 + 1.2 * (1 - ap), -9.6, 2.4, 2.6, 2.3)
        drop = self.u(-0.8, 0.8) + 0.4 * ap
        reach = 2.2 * (1 - ap)
        for s in (-1, 1):
            collar = [(s * 1.6, -8.8), (s * 5, -9.9 - 0.2 * drop), (s * 9.5, -11.0 - drop), (s * 16.6, -12.0 - drop)]
            self.wire(collar, 0.68, calcium * 0.9, 7.0, 0.6)
            self.wire([(s * (11 + out), -7.8), (s * 14.5, -10.2), (s * 18.2, -12.2)], 0.55, calcium * 0.8, -9.0, 0.6)
            shaft = [(s * (17.6 + 0.5 * reach), -11.0), (s * (18.3 + reach), -4.0), (s * (19.4 + 2 * reach), 20.0)]
            self.wire(shaft, 1.25, calcium * 0.8, -4.0, 0.7)

    def lateral_path(self):
        """The left lateral view: the patient faces the picture's left, so z = -X; rays run through both lungs."""
        u, female, age, fat, finding = self.u, self.female, self.age, self.fat, self.finding
        z, y = -self.X - 0.06 * self.Y + 1.0, self.Y
        depth = 1 + 0.12 * age  # older chests are rounder
        top = u(-12.6, -11.6)
        spine = -5.6 * depth - (2.0 + 2.5 * age) * (1 - ((y + 1) * (1 / 15)) ** 2)  # middle of the vertebral bodies
        breastbone = (7.6 + 0.3 * (y + 8) - 0.012 * (y + 8) ** 2) * depth + 0.8  # its inner side
        rear = spine - 4.4
        middle, half = (breastbone + rear) * 0.5, (breastbone - rear) * 0.5
        cap = np.sqrt(1 - np.clip(1 - (y - top) * (1 / 7), 0, 1) ** 2.2)
        q = (z - middle - 1.5 * (1 - cap)) / np.maximum(half * cap, 0.3)
        q2 = q * q
        lungs = 22.0 * (0.3 + 0.7 * cap) * root(1 - q2 * q2)
        # --- two domes, deepest at the back; the left one lower and hidden in front by the heart
        dome = 8.3 + u(-0.8, 0.8)
        sink = (z - 2.5) ** 2 * np.where(z < 2.5, np.float32(0.045), np.float32(0.03))
        filled = [np.minimum(root((y - dome - lower - sink) * 30), 11.0) / 22.0 for lower in (0.0, u(0.7, 1.6))]
        lungs = lungs * (1 - filled[0] - filled[1])
        # --- heart and great vessels in the middle, about 5 of the 27 cm always closed
        h = self.ctr * 2.05
        base = dome + 1.6
        heart = ellipsoid(z, y, 4.0 * depth, base - 3.5 * h, 6.4 * h, 5.0 * h, 4.5 * h, -0.6)
        heart = np.maximum(heart, ellipsoid(z, y, 2.0 * depth, -1.0, 2.4, 6.5, 1.8, 0.25))  # ascending aorta, pulmonary trunk
        arch = ellipsoid(z, y, -1.8, -3.6 - age, 3.2, 1.7, 1.3, 0.5)
        aorta = 2 * root(1.3**2 - (z - spine - 2.2) ** 2) * ramp(y, -2, 1) * (0.4 + age)
        hila = ellipsoid(z, y, -0.4, 0.8, 1.7, 2.3, 1.2)
        clouds = fractal(self.seeds, 3, self.size, range(3, 9), 0.75)
        angles = np.radians(np.float32(np.arange(0, 360, 15)))
        roots = [(0.4 + 0.4 * math.cos(a), 0.8 + 0.8 * math.sin(a), a) for a in angles]
        if finding == "pleural effusion":
            level = 13.0 - self.extent * 16
            meniscus = level + 2.0 - 4.0 * np.exp(np.maximum(z - rear, 0) * (-1 / 3.5)) - 1.5 * np.exp(np.maximum(breastbone - z, 0) * (-1 / 2.0))
            lungs = lungs * (1 - 0.5 * ramp(y - meniscus, -0.4, 0.4))
        elif finding == "consolidation":
            cy, cz, rx, ry = (self.lobe[:, k] for k in (1, 2, 3, 4))
            soft = fractal(self.seeds, 4, self.size, range(3, 7), 0.5)
            patch = ramp(1.1 - ((z - cz) / (rx * self.extent)) ** 2 - ((y - cy) / (ry * self.extent)) ** 2 + 0.35 * soft, 0, 1.5)
            lungs = lungs * (1 - 0.45 * patch)
        lungs = np.maximum(lungs - heart - arch - aorta - hila, 0)
        vessels = self.vessels(np.float32(roots), 1.4) * np.minimum(lungs * 0.05, 1)
        # --- body
        front = breastbone + 2.0 + 1.5 * fat
        back = spine - 6.2 - fat
        centre, reach = (front + back) * 0.5, (front - back) * 0.5
        neck = ramp(y, -11, -17)
        b = (z - centre + 1.5 * neck) / (reach * (1 - 0.35 * neck))
        body = 31 * root(1 - (b * b) ** 2) * (1 - 0.4 * neck)
        cup = u(3.0, 4.6) + 1.2 * fat
        droop = 4.5 + 2.0 * age
        up = (y - droop) * (1 / cup)
        bulge = 1 - ((z - front + 2.5) * (1 / cup)) ** 2 - np.maximum(up, -0.4 * up) ** 2
        body = np.maximum(body, female * 19 * root(bulge))
        arms = 16 * root(1 - ((z - 5 + 0.4 * (y + 19)) * (1 / 14)) ** 2 - ((y + 18.0) * (1 / 7.5)) ** 2)
        body = np.maximum(body, arms) + np.minimum(body, arms) * 0.6 + 8 * ramp(y, -5, -12) * (body > 4)
        air = 1.2 * root(1 - ((z + 0.4 + 0.08 * (y + 8)) * (1 / 0.85)) ** 2) * ramp(y, 1.0, 0.0) * ramp(y, -16, -12)
        gz, gy = 3.5 + u(-1, 1), dome + 4.0
        air = air + ellipsoid(z, y, gz, gy, u(1.8, 3.2), u(1.0, 1.8), 4) * (u(0, 1) < 0.7) * ramp(y, gy + 0.8, gy + 0.5)
        path = SOFT * (body * (1 + 0.01 * clouds) - np.minimum(air, body)) - (SOFT - LUNG) * np.minimum(lungs * (1 + 0.03 * clouds), 0.93 * body)
        self.path = path + 1.6 * vessels
        self.lateral_bones(z, y, spine, breastbone, rear)
        return self.path

    def lateral_bones(self, z, y, spine, breastbone, rear):
        calcium = self.calcium
        # --- ribs: the cage seen from the side; the half away from the detector is the larger
        for scale in (1.0, 1.06):
            u = (z - (breastbone + rear) * 0.5) * (scale / ((breastbone - rear) * 0.5 + 0.6))
            drop = self.rib_slope * (1 - u * 0) * (1 + u) + 2.5 * ramp(u, 0.0, 1.0)
            index = (y * scale - drop + 11.6) * (1 / self.rib_spacing)
            d = ((index - np.clip(np.rint(index), 1, 10)) * (self.rib_spacing / 0.6)) ** 2
            self.path += calcium * 0.55 * (0.8 * root(1 - d) - 0.5 * root(1 - 1.9 * d)) * (u * u < 1) * ramp(u, 0.8, 0.3) / np.maximum(root(1 - u * u), 0.4)
        # --- vertebrae: bodies with bright end plates, foramina between the pedicles, spinous processes behind
        f = (y + 12) * (1 / 2.35) + 0.03 * (z - spine)
        f = np.abs(f - np.rint(f)) * 2
        across = z - spine
        body = ramp(np.abs(across), 1.8 + 0.2 * f * f, 1.5 + 0.2 * f * f)
        plates = 0.75 - 0.55 * ramp(f, 0.78, 0.9) + 0.5 * ramp(f, 0.6, 0.72) * ramp(f, 0.86, 0.76)
        arch = ramp(np.abs(across + 3.1), 1.7, 0.9) * (0.35 + 0.35 * ramp(f, 0.9, 0.4))
        self.path += calcium * 1.3 * (body * plates + arch)
        self.path += calcium * 1.0 * ramp(np.abs(z - breastbone - 0.6), 0.55, 0.35) * ramp(y, -9.5, -9) * ramp(y, 7.5, 7)
        for shift in (0.0, 1.6):
            self.wire([(6.5 - shift, -9.0), (7.6 - shift, -4.0), (9.0 - shift, 1.0)], 0.5, calcium * 0.8, 0.0, 0.5)
            self.wire([(-4.0 - shift, -13.0), (-10.0, -15.0 - shift), (-20.0, -16.5 - 1.5 * shift)], 1.25, calcium * 0.8, 0.0, 0.7)

    def develop(self):
        """Side marker, film, and the black frame of the collimator."""
        u, size, n = self.u, self.size, len(self.seeds)
        left = u(0, 1) < 0.75  # which letter, on its own side of the patient
        edge, height = self.field * 0.5 - u(1.6, 3.2), self.shift_y - self.field * 0.5 + u(1.8, 4.0)
        x = self.shift_x + np.where(left, edge, -edge) * np.where(self.ap + self.lateral > 1, -1, 1) + self.tilt * 0
        if self.lateral:
            x = self.shift_x - edge
        letters = {True: [(0, -0.9), (0, 0.9), (1.0, 0.9)], False: [(0, 0.9), (0, -0.9), (0.9, -0.8), (0.9, 0.0), (0.1, 0.1), (1.0, 0.9)]}
        for letter, strokes in letters.items():
            if (left == letter).any():
                for (x0, y0), (x1, y1) in zip(strokes, strokes[1:]):
                    ends = [(x + x0, height + y0), (x + (x0 + x1) / 2, height + (y0 + y1) / 2), (x + x1, height + y1)]
                    self.wire(ends, 0.17, 6.0 * (left == letter))
        black = u(0.2, 0.52) + 0.04 * self.ap + 0.1 * self.lateral
        white = u(0.74, 0.86) + 0.3 * (black - 0.36) - 0.06 * self.ap - 0.1 * self.lateral
        images = expose(self.path, self.seeds, self.cm, 2e7, 0.25 + 0.2 * self.ap, black, white)
        grid = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None]
        across, down = grid[:, None, :], grid[:, :, None]
        margins = [np.where(u(0, 1) < 0.25, u(0.0, 0.05), np.float32(-1)) for _ in range(4)]
        soft = 0.6 / size
        lit = ramp(across, margins[0] - soft, margins[0] + soft) * ramp(1 - across, margins[1] - soft, margins[1] + soft)
        lit = lit * ramp(down, margins[2] - soft, margins[2] + soft) * ramp(1 - down, margins[3] - soft, margins[3] + soft)
        return (images * lit + 0.5).astype(np.uint8) if n else images
