"""A table, and its four forms: Markdown, LaTeX, CSV and (by the page's template) HTML.

A cell is a text, a `Value` or `Missing`. Each is written by the same rules in every form, so the forms cannot differ.
"""

import csv
import io
import math
import statistics
from dataclasses import dataclass

from minildm.report.read_run import Missing, is_number

CSV_HEADER = ("table", "row", "column", "value", "deviation", "n", "text")


@dataclass(frozen=True)
class Value:
    """A number: the mean of ``n`` numbers, with their standard deviation where n > 1."""

    mean: float
    deviation: float | None = None
    n: int = 1
    digits: int = 3  # after the point
    unit: str = ""  # "%", "s", ...

    def __post_init__(self):
        for number in (self.mean, 0.0 if self.deviation is None else self.deviation):
            if not is_number(number):
                raise TypeError(f"a Value must be a number, got {number!r}")

    def __str__(self):
        mean = f"{self.mean:,.{self.digits}f}"
        mean = mean.removeprefix("-") if not mean.strip("-0.") else mean  # no minus before a zero
        spread = "" if self.deviation is None else f" ± {self.deviation:,.{self.digits}f}"
        return f"{mean}{spread}{' ' * bool(self.unit)}{self.unit}"


def spread(values, digits=3, unit="", of=None):
    """The Value of numbers; Missing if there is none, or if one is `Missing` (its reason), or not finite.

    Args: of: what the numbers are, for the reason.
    """
    gaps = [value for value in values if isinstance(value, Missing)]
    if gaps:
        more = f" ({len(gaps)} of {len(values)} runs)" if len(values) > 1 else ""
        return Missing(gaps[0].reason + more)
    if not values:
        return Missing(f"no {of or 'value'}")
    if not all(math.isfinite(value) for value in values):
        return Missing("not finite")
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Value(statistics.fmean(values), deviation, len(values), digits, unit)


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]  # of the rows' cells; the first column names the row
    rows: tuple[tuple, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        assert all(len(row) == len(self.columns) for row in self.rows), self.title

    def reasons(self):
        """{reason: number} of the missing cells, in order: cells show the number, a note below the table the reason."""
        found = dict.fromkeys(cell.reason for row in self.rows for cell in row if isinstance(cell, Missing))
        return {reason: number for number, reason in enumerate(found, 1)}

    def text(self, cell):
        """A cell as text: "missing [1]" for what is missing."""
        return f"missing [{self.reasons()[cell.reason]}]" if isinstance(cell, Missing) else str(cell)

    def all_notes(self):
        """The notes below the table, with the reasons of missing cells."""
        return [*self.notes, *(f"[{number}] missing: {reason}" for reason, number in self.reasons().items())]

    def markdown(self):
        lines = [f"### {_markdown(self.title)}", "", _row(self.columns), _row("---" for _ in self.columns)]
        lines += [_row(self.text(cell) for cell in row) for row in self.rows]
        lines += ["", *(line for note in self.all_notes() for line in (f"{_markdown(note)}  ",))]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self):
        """A table environment that needs no package."""
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}", r"\hline"]
        lines += [" & ".join(map(_latex, self.columns)) + r" \\", r"\hline"]
        lines += [" & ".join(_latex(self.text(cell)) for cell in row) + r" \\" for row in self.rows]
        lines += [r"\hline", r"\end{tabular}"]
        lines += [rf"\par {{\footnotesize {_latex(note)}}}" for note in self.all_notes()]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def records(self):
        """One tuple per cell, as in CSV_HEADER."""
        for row in self.rows:
            for column, cell in zip(self.columns[1:], row[1:]):
                numbers = (cell.mean, cell.deviation, cell.n) if isinstance(cell, Value) else (None, None, None)
                text = f"missing: {cell.reason}" if isinstance(cell, Missing) else str(cell)
                yield (self.title, str(row[0]), column, *numbers, text)


def csv_text(tables):
    """All tables as one CSV, a row per cell; numbers unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for table in tables:
        writer.writerows(table.records())
    return out.getvalue()


def _row(cells):
    return "| " + " | ".join(_markdown(cell) if cell != "---" else cell for cell in map(str, cells)) + " |"


def _markdown(text):
    text = " ".join(str(text).split())
    for character in "\\`*_[]<>|":
        text = text.replace(character, "\\" + character)
    return text


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "λ": r"$\lambda$", "×": r"$\times$", "≥": r"$\geq$"}
LATEX |= {character: "\\" + character for character in "&%$#_{}"}


def _latex(text):
    return "".join(LATEX.get(character, character) for character in " ".join(str(text).split()))
