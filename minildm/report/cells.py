"""The cells of a comparison: which runs it takes, and how each is trained and sampled.

A cell is a run folder, ``DIR/cells/VARIANT-seedN``, made by train.py and sample.py in processes of their own: the peak
memory of each is its own, and what one of them does cannot change another. Each step of a cell is skipped where its
files are complete and continued where they are not, so a comparison may be killed at any moment.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from minildm.errors import InputError
from minildm.files import written_beside
from minildm.loading import PACKAGE
from minildm.report.read_run import read_run
from minildm.torchrun import shows_progress, without_torchrun
from minildm.training.command_line import sampling_flags

ROOT = PACKAGE.parent  # where train.py and sample.py are
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


@dataclass(frozen=True)
class Variant:
    """A method with its settings: a row of the tables."""

    label: str  # "lora r = 4"
    folder: str  # "lora-rank4"
    flags: tuple[str, ...]  # of train.py
    rank: int | None = None  # of a LoRA in the rank sweep


@dataclass(frozen=True)
class Cell:
    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self):
        return f"{self.variant.label}, seed {self.seed}"


def variants(methods, ranks=(), thresholds=()):
    """The Variants of a comparison: LoRA once per rank, SeLoRA once per threshold, the others once."""
    found = []
    for method in dict.fromkeys(methods):
        flags = ("--adapter", method)
        if method == "lora" and ranks:
            found += [
                Variant(f"lora r = {r}", f"lora-rank{r}", (*flags, "--rank", str(r)), r) for r in dict.fromkeys(ranks)
            ]
        elif method == "selora" and thresholds:
            found += [
                Variant(f"selora λ = {t:g}", f"selora-lambda{t:g}", (*flags, "--expand-threshold", f"{t!r}"))
                for t in dict.fromkeys(thresholds)
            ]
        else:
            found.append(Variant(method, method, flags))
    return found


def cells_of(variants, seeds, out):
    """All cells, seed by seed, so that a comparison's first seeds are complete early."""
    folder = Path(out) / "cells"
    return [
        Cell(variant, seed, folder / f"{variant.folder}-seed{seed}")
        for seed in dict.fromkeys(seeds)
        for variant in variants
    ]


def share(cells, only):
    """The cells of the I-th of N machines, from "I/N"; None: all."""
    if only is None:
        return list(cells)
    try:
        i, n = (int(part) for part in only.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise InputError(f"--only must be I/N with 1 <= I <= N, such as 2/4, got {only!r}")
    return cells[i - 1 :: n]


# --- training and sampling -------------------------------------------------------------------------------------------
def train_cell(cell, flags, device=()):
    """Train the cell's run, or continue it; nothing where it is complete. Args: flags: common to all cells."""
    if (cell.folder / "summary.json").is_file():
        return
    if (cell.folder / "log.jsonl").is_file():
        words = ["--resume", str(cell.folder)]
    else:
        words = [*flags, *cell.variant.flags, "--seed", str(cell.seed), "--out", str(cell.folder)]
    run_script("train.py", [*words, *device], cell)


def sample_cell(cell, prompts, settings, device=()):
    """Generate one image per prompt into the cell's folder ``generated``; nothing where all are there.

    Args: settings: flags of sample.py. The images' seeds are 0, 1, 2, ... in every cell.
    """
    images = generated_paths(cell.folder, len(prompts))
    table, text = cell.folder / "prompts.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    if all(path.is_file() for path in images):
        if not table.is_file() or table.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{images[0].parent} holds images of other prompts, perhaps of an earlier version of minildm; give "
                "another --out, or remove that folder to generate them again"
            )
        return images
    with written_beside(table) as beside:
        beside.write_text(text, encoding="utf-8")
    run = read_run(cell.folder)
    model = cell.folder / "model"
    result = model if model.is_dir() else cell.folder / "adapter.safetensors"
    words = ["--prompts", str(table), "--out", str(images[0].parent), "--seed", "0", *settings]
    run_script("sample.py", [*words, *sampling_flags(run.settings, result, run.found["pixels"]), *device], cell)
    return images


def generated_paths(folder, n):
    """The n images that sample.py makes for a cell."""
    return [folder / "generated" / f"{i:05d}-seed{i}.png" for i in range(n)]


class CellFailed(Exception):
    """A script ended with an error, which it has printed."""


def run_script(script, words, cell):
    """Run train.py or sample.py; what it prints goes to the cell's output.txt, progress and errors to the screen (of
    several processes that share the cells, only the first one's).

    Raises: CellFailed; KeyboardInterrupt after Ctrl-C, when the script has saved its state.
    """
    path = ROOT / script
    if not path.is_file():
        raise InputError(
            f"{path} does not exist, and compare starts it; use a clone of the repository (pip install -e .)"
        )
    cell.folder.mkdir(parents=True, exist_ok=True)
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = without_torchrun(os.environ) | {"PYTHONPATH": search_path}
    with open(cell.folder / "output.txt", "a", encoding="utf-8") as output:
        errors = None if shows_progress() else output
        process = subprocess.Popen(
            [sys.executable, str(path), *words],
            stdout=output,
            stderr=errors,
            env=environment,
            preexec_fn=_end_with_parent,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the script got it, too: it saves its state and ends
            process.wait()
            raise
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        where = "printed above" if errors is None else f"at the end of {cell.folder / 'output.txt'}"
        raise CellFailed(f"{script} ended with code {code}; its error is {where}")


def _end_with_parent():
    """Linux: a script whose comparison is killed gets SIGTERM, at which it saves its state and ends."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
