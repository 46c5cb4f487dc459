"""The phantom measured: speed, similarity to real radiographs, accuracy of its ruler and of the shape checker.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_phantom.py [--sheet docs/phantom_sheet.png]

Real radiographs come from the folder in MINILDM_SHARED_DATA (default ../shared/data): ``cxr/metadata.csv`` with the
columns file and view. Without it, that part is skipped with a message.
"""

import csv
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minildm.settings import Parser
from minildm.teaching import phantom, procedural, ruler
from minildm.teaching.shape_check import check_shapes

ROOT = Path(__file__).resolve().parents[2]
VIEWS = {"PA": ("PA",), "AP": ("AP", "AP Supine"), "lateral": ("L",)}
SHEET = (
    *(("PA", finding) for finding in ("normal", "cardiomegaly", "pleural effusion", "pneumothorax")),
    *(("PA", finding) for finding in ("nodule", "calcified granuloma", "consolidation", "scoliosis")),
    *(("AP", finding) for finding in ("normal", "pacemaker", "pleural effusion", "consolidation")),
    *(("lateral", finding) for finding in ("normal", "pleural effusion", "cardiomegaly", "nodule")),
)


def speed():
    seeds = [(5, i) for i in range(512)]
    batch = [phantom.labels(seed) for seed in seeds]
    for size, count in ((128, 512), (512, 24)):
        phantom.render_batch(batch[:8], seeds[:8], size)
        wall, cpu = time.perf_counter(), time.process_time()
        phantom.render_batch(batch[:count], seeds[:count], size)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"phantoms, {size} px: {count / wall:.0f} per second ({count / cpu:.0f} per second of processor time)")
    for kind in procedural.IMAGE_KINDS:
        start = time.process_time()
        procedural.render_batch(seeds[:200], 128, kind)
        print(f"procedural {kind}, 128 px: {200 / (time.process_time() - start):.0f} per second of processor time")


def radial_spectrum(images):
    """Mean power by radial frequency (cycles per image, 0 to half the side) of windowed images (B, n, n)."""
    n = images.shape[-1]
    window = np.hanning(n)[:, None] * np.hanning(n)
    power = np.abs(np.fft.fft2((images - images.mean((1, 2), keepdims=True)) * window)) ** 2
    f = np.fft.fftfreq(n) * n
    ring = np.hypot(f[:, None], f).round().astype(int).ravel()
    return (np.bincount(ring, power.mean(0).ravel()) / np.bincount(ring))[: n // 2]


def similarity(size=128):
    folder = Path(os.environ.get("MINILDM_SHARED_DATA", ROOT.parent / "shared" / "data")) / "cxr"
    if not (folder / "metadata.csv").exists():
        print(f"similarity: skipped, no real radiographs in {folder} (set MINILDM_SHARED_DATA)")
        return
    with open(folder / "metadata.csv", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    for view, names in VIEWS.items():
        files = [folder / row["file"] for row in rows if row["view"] in names]
        real = np.stack([np.asarray(ImageOps.fit(Image.open(f).convert("L"), (size, size)), float) for f in files])
        seeds = [(6, i) for i in range(150)]
        labels = [phantom.labels(seed, view=view) for seed in seeds]
        ours = phantom.render_batch(labels, seeds, size).astype(float)
        a, b = (np.histogram(x, 32, (0, 256))[0] / x.size for x in (real, ours))
        difference = np.log10(radial_spectrum(ours)[1:]) - np.log10(radial_spectrum(real)[1:])
        print(
            f"{view}: {len(real)} real, {len(ours)} phantoms. Histograms: variation {np.abs(a - b).sum() / 2:.3f}, "
            f"earth mover's {np.abs(np.cumsum(a) - np.cumsum(b)).sum() * 8:.1f} greys; mean grey "
            f"{real.mean():.0f} / {ours.mean():.0f}, spread of means {real.mean((1, 2)).std():.0f} / "
            f"{ours.mean((1, 2)).std():.0f}, contrast {real.std((1, 2)).mean():.0f} / {ours.std((1, 2)).mean():.0f}. "
            f"Spectrum: log10 ratio, mean {difference.mean():+.2f}, rms {np.sqrt((difference**2).mean()):.2f}"
        )


def accuracy():
    for size, count, blemished in ((128, 800, False), (128, 800, True), (512, 200, False)):
        seeds = [(77, i) for i in range(count)]
        batch = [phantom.labels(seed) for seed in seeds]
        images = phantom.render_batch(batch, seeds, size)
        if blemished:
            images = np.stack([ruler.blemish(image, np.random.default_rng(i)) for i, image in enumerate(images)])
        readings = ruler.measure(images)
        pairs = [(a, b) for a, b in zip(batch, readings) if "lateral" not in (a.view, b.view)]
        view = np.mean([a.view == b.view for a, b in zip(batch, readings)])
        sex = np.mean([a.sex == b.sex for a, b in zip(batch, readings)])
        ctr = np.mean([abs(a.ctr - b.ctr) for a, b in pairs])
        fluid = [(a.size, b.effusion_size) for a, b in pairs if a.finding == "pleural effusion" and b.effusion]
        print(f"\nruler, {count} held-out phantoms, {size} px{', blurred and noisy' if blemished else ''}")
        print(f"  view {view:.3f}, sex {sex:.3f}, cardiothoracic ratio +-{ctr:.3f}, ", end="")
        print(f"effusion size +-{np.mean([abs(a - b) for a, b in fluid]):.3f}")
        for finding, field in (
            ("cardiomegaly", "cardiomegaly"),
            ("pacemaker", "pacemaker"),
            ("scoliosis", "scoliosis"),
            ("pleural effusion", "effusion"),
            ("pneumothorax", "pneumothorax"),
            ("consolidation", "consolidation"),
            ("calcified granuloma", "granuloma"),
        ):
            ill = [(a, getattr(b, field)) for a, b in pairs if a.finding == finding]
            well = [getattr(b, field) for a, b in pairs if a.finding != finding]
            placed = [a.place == seen for a, seen in ill if seen and a.place]
            line = f"  {finding}: found {np.mean([bool(s) for _, s in ill]):.3f} of {len(ill)}, "
            line += f"false alarms {np.mean([bool(s) for s in well]):.3f}"
            print(line + (f", place right {np.mean(placed):.3f}" if placed else ""))


def checker():
    images, captions = procedural.render_batch([(88, i) for i in range(1000)], 128, "shapes")
    right = [check_shapes(image, text).right for image, text in zip(images, captions)]
    wrong = [check_shapes(image, text).right for image, text in zip(images, captions[1:] + captions[:1])]
    print(f"\nshape checker: accepts {np.mean(right):.3f} of the captions, {np.mean(wrong):.3f} of the next image's")


def sheet(path, size=384):
    """The 4 x 4 sheet of the documentation."""
    seeds = [(2024, i) for i in range(16)]
    batch = [phantom.labels(seed, view=view, finding=finding) for seed, (view, finding) in zip(seeds, SHEET)]
    tiles = phantom.render_batch(batch, seeds, size).reshape(4, 4, size, size)
    Image.fromarray(tiles.transpose(0, 2, 1, 3).reshape(4 * size, 4 * size)).save(path, optimize=True)
    print(f"wrote {path}:", "; ".join(f"{label.view} {label.finding} {label.place}".strip() for label in batch))


if __name__ == "__main__":
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--sheet", type=Path, help="write the 4 x 4 sheet to this file and stop")
    arguments = parser.parse_args()
    if arguments.sheet:
        sheet(arguments.sheet)
    else:
        for part in (speed, similarity, accuracy, checker):
            part()
