"""What a comparison will take, from a few measured steps and images of each method."""

import re
import tempfile
import time
from pathlib import Path

from minildm.errors import InputError
from minildm.progress import Progress
from minildm.report.cells import Cell, CellFailed, sample_cell, train_cell
from minildm.report.evaluate import RunData
from minildm.report.read_run import read_run

STEPS, IMAGES, LIMIT = 4, 4, 40  # of the measurement; the first step, which warms up, does not count


def forecast(variants, train_flags, sampling, device, steps, samples, n_seeds, limit):
    """Lines that say how long the comparison takes and what it writes. Evaluation is not included.

    Args: steps, samples: of each cell.
    """
    lines, seconds, size = [], 0.0, 0
    short = [*train_flags, "--steps", str(STEPS), "--warmup", "1", "--limit", str(min(limit or LIMIT, LIMIT))]
    short += ["--sample-interval", "0"]
    for variant in Progress("measuring", "method", iterable=variants):
        with tempfile.TemporaryDirectory() as folder:
            cell = Cell(variant, 0, Path(folder) / "cell")
            try:
                begun = time.perf_counter()
                train_cell(cell, short, device)
                run = read_run(cell.folder)
                times = run.series("seconds")[1]
                step = (times[-1] - times[0]) / (len(times) - 1)
                starting = time.perf_counter() - begun - times[-1]
                begun = time.perf_counter()
                sample_cell(cell, RunData(run).prompts(IMAGES), sampling, device)
                image = sampling_seconds(cell) / IMAGES
                starting += time.perf_counter() - begun - IMAGES * image
            except CellFailed as error:
                raise InputError(f"{variant.label} cannot be trained as planned ({error})") from None
            files = sum(path.stat().st_size for path in cell.folder.rglob("*") if path.is_file())
            images = sum(path.stat().st_size for path in cell.folder.rglob("*-seed*.png"))
        once = starting + steps * step + samples * image
        disk = files + images / IMAGES * samples
        seconds, size = seconds + n_seeds * once, size + n_seeds * disk
        lines.append(
            f"{variant.label}: {step:.2f} s per step, {image:.2f} s per image, {once / 60:.1f} min and "
            f"{disk / 1e6:.0f} MB per cell"
        )
    lines.append(
        f"together about {seconds / 3600:.2f} h and {size / 1e9:.2f} GB, without caching images, validation during "
        "training, and evaluation"
    )
    return lines


def sampling_seconds(cell):
    """How long sample.py was busy with the images, without its start: it says so itself."""
    return float(re.findall(r"images in .*, ([0-9.]+) s; contact sheet", (cell.folder / "output.txt").read_text())[-1])
