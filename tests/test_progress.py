"""Progress of long work: plain lines where there is no terminal, a bar where there is one."""

import ast
import io
from pathlib import Path

import pytest

from minildm import progress
from minildm.progress import Progress

PACKAGE = Path(progress.__file__).parent


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in seconds."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_plain_line_is_printed_every_half_minute(clock, capsys):
    with Progress("training", "step", 1500, initial=500) as bar:
        for step in range(1, 1001):
            clock[0] = 4.0 * step
            bar.update(note=f"loss {1 / step:.2f}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4000 // 32  # every eighth step is the first after 30 s
    assert lines[0] == "training: 508 of 1,500 steps (34 %), 00:32 so far, about 1:06:08 left, loss 0.12"
    assert all("\r" not in line for line in lines)


def test_short_work_prints_nothing_without_a_terminal(clock, capsys):
    assert list(Progress("sampling", "step", iterable=range(3))) == [0, 1, 2]
    clock[0] = 29.0
    with Progress("sampling", "step") as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_and_no_line(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0)
    with Progress("sampling", "step", 2) as bar:
        clock[0] = 31.0
        bar.update(note="loss 1")
        bar.update()
    assert "sampling: 100%" in terminal.getvalue() and "so far" not in terminal.getvalue()


def test_amounts_of_bytes_and_of_unknown_totals_are_readable(clock):
    bar = Progress("file", "B", 5_000_000_000, initial=1_000_000_000)
    clock[0] = 10.0
    bar.update(1_000_000_000)
    assert bar.line() == "file: 2,000 of 5,000 MB (40 %), 00:10 so far, about 00:30 left"
    bar.reset()
    assert bar.line() == "file: 0 of 5,000 MB (0 %), 00:00 so far"
    assert Progress("reading", "image").line() == "reading: 0 images, 00:00 so far"
    assert Progress("validating", "batch", 6).line() == "validating: 0 of 6 batches (0 %), 00:00 so far"


def test_all_progress_is_shown_in_one_way():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / name for name in ("sample.py", "train.py"))]
    using = {
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "tqdm"
    }
    assert using == {"progress.py"}
