"""Figures of runs as SVG that a page takes in whole: its colours follow the page's (light, dark, print), and each has a
text that says what it shows.

Every figure is a function of a list of RunFiles. It gives a `Figure`, or `Missing` where no run has the numbers.
"""

import io
import math
import re
from dataclasses import dataclass

import numpy as np

from minildm.adapters.rank_map import BLOCK_NAME
from minildm.report.read_run import Missing

POINTS = 300  # of a curve at most; more are averaged in groups
N_COLOURS = 5  # of the page's style sheet, --series-1 ...; then dashes tell curves apart
DASHES = ("-", "--", ":", "-.")
# Colours that matplotlib writes into the SVG, where they become the page's.
INK, GRID = "#0a0b01", "#0a0b02"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(N_COLOURS))
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "grid.color": GRID,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label")},
    "axes.titlecolor": INK,
}


@dataclass(frozen=True)
class Figure:
    title: str
    svg: str
    description: str  # the text alternative
    id: str


@dataclass(frozen=True)
class Curve:
    label: str
    x: list
    y: list
    style: int  # which colour and dashes
    marks: bool = False
    error: list | None = None  # half heights of error bars


def curves(id, title, across, up, curves, words=None, log_x=False):
    """A Figure of Curves.

    Args: across, up: what the axes show. words: the text alternative; None: made from the curves.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = [curve for curve in curves if len(curve.x)]
    with rc_context(STYLE):
        rows = math.ceil(len(curves) / 2) if len(curves) > 1 else 0
        canvas = Canvas(figsize=(6.4, 3.3 + 0.2 * rows), layout="constrained")
        axes = canvas.subplots()
        for curve in curves:
            colour = SERIES[curve.style % N_COLOURS]
            options = {"color": colour, "linestyle": DASHES[curve.style // N_COLOURS % len(DASHES)]}
            marker = "o" if curve.marks or len(curve.x) < 3 else None
            x, y = average_in_groups(curve.x, curve.y)
            label = curve.label.replace("_", " _", 1) if curve.label[:1] == "_" else curve.label  # "_x": not in legends
            axes.plot(x, y, label=label, marker=marker, markersize=4, **options)
            if curve.error is not None:
                axes.errorbar(curve.x, curve.y, curve.error, fmt="none", ecolor=colour, capsize=3)
        axes.set(xlabel=across, ylabel=up)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if rows:
            canvas.legend(loc="outside lower left", ncols=2)
        svg = _svg(canvas, id)
    return Figure(title, svg, words or describe(up, across, curves), id)


def average_in_groups(x, y, points=POINTS):
    """At most ``points`` points: the means of groups of neighbours."""
    if len(x) <= points:
        return list(x), list(y)
    groups = np.array_split(np.arange(len(x)), points)
    x, y = np.asarray(x, float), np.asarray(y, float)
    return [x[group].mean() for group in groups], [y[group].mean() for group in groups]


def describe(up, across, curves):
    """The text alternative: where each curve begins, ends and is extreme."""
    sentences = [f"{up} by {across}, {len(curves)} {'curve' if len(curves) == 1 else 'curves'}."]
    for curve in curves:
        numbers = [(y, x) for x, y in zip(curve.x, curve.y) if math.isfinite(y)]
        if not numbers:
            sentences.append(f"{curve.label}: no finite value.")
            continue
        (first, at_first), (last, at_last) = numbers[0], numbers[-1]
        (low, at_low), (high, at_high) = min(numbers), max(numbers)
        text = f"{curve.label}: {first:.4g} at {at_first:g}"
        if len(numbers) > 1:
            text += f", {last:.4g} at {at_last:g}, lowest {low:.4g} at {at_low:g}, highest {high:.4g} at {at_high:g}"
        sentences.append(text + ".")
    return " ".join(sentences)


def _svg(canvas, id):
    """The figure as an <svg> element: no fixed size, the page's colours, names that are unique on the page."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": id}):
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for i, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{i + 1})")
    text = re.sub(r'\bid="', f'id="{id}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{id}-', text)
    return re.sub(r"url\(#", f"url(#{id}-", text)


# --- the figures of runs ---------------------------------------------------------------------------------------------
def of_log(id, title, key, up, scale=1.0, marks=False):
    """The function (runs -> Figure) that shows the log's entry ``key`` times ``scale`` over the steps."""

    def figure(runs):
        drawn = []
        for i, run in enumerate(runs):
            steps, values = run.series(key)
            drawn.append(Curve(run.name, steps, [scale * value for value in values], i, marks))
        if not any(curve.x for curve in drawn):
            return Missing(f"the log has no entry {key}")
        return curves(id, title, "step", up, drawn)

    return figure


training_loss = of_log("loss", "Training loss", "loss", "loss")
validation_loss = of_log("validation", "Validation loss", "validation", "validation loss", marks=True)
learning_rate = of_log("rate", "Learning rate", "lr", "learning rate")
training_time = of_log("time", "Time", "seconds", "minutes of training", 1 / 60)
memory = of_log("memory", "Peak memory", "memory_mb", "GB", 1e-3)


def rank_growth(runs):
    """The mean rank of each network's layers over the steps."""
    drawn, reasons = [], []
    for run in runs:
        ranks = run.ranks()
        if isinstance(ranks, Missing):
            reasons.append(ranks.reason)
            continue
        for network in dict.fromkeys(path.split(".")[0] for path in ranks[0][1]):
            means = [
                np.mean([rank for path, rank in layers.items() if path.split(".")[0] == network]) for _, layers in ranks
            ]
            label = network if len(runs) == 1 else f"{run.name}, {network}"
            drawn.append(Curve(label, [step for step, _ in ranks], means, len(drawn)))
    if not drawn:
        return Missing(reasons[0])
    return curves("growth", "Mean rank", "step", "mean rank of the layers", drawn)


def fisher_ratios(runs):
    """The mean Fisher ratio of each block's layers at each test, of each run that has any: a list of Figures."""
    figures = []
    for number, run in enumerate(runs):
        steps, ratios = run.layers("fisher_ratios")
        blocks = {}
        for step, layers in zip(steps, ratios):
            at_step = {}
            for path, ratio in layers.items():
                if ratio is not None:
                    block = f"{path.split('.')[0]} {BLOCK_NAME.search(path)[1]}"
                    at_step.setdefault(block, []).append(ratio)
            for block, values in at_step.items():
                blocks.setdefault(block, []).append((step, float(np.mean(values))))
        if blocks:
            drawn = [
                Curve(block, *map(list, zip(*points)), i, marks=len(points) < 40)
                for i, (block, points) in enumerate(blocks.items())
            ]
            title = "Fisher ratio by block" if len(runs) == 1 else f"Fisher ratio by block, {run.name}"
            figures.append(curves(f"fisher-{number}", title, "step", "mean Fisher ratio", drawn))
    return figures or Missing("no run measured Fisher ratios: only SeLoRA does, at each test")


def loss_by_rank(runs):
    """DyLoRA's validation loss at each rank, after the last step."""
    drawn = []
    for i, run in enumerate(runs):
        found = [entry["validation_by_rank"] for entry in run.entries if "validation_by_rank" in entry]
        points = [(int(rank), loss) for rank, loss in found[-1].items()] if found else []
        if points:
            drawn.append(Curve(run.name, *map(list, zip(*sorted(points))), i, True))
    if not drawn:
        return Missing("no run measured it: only DyLoRA does, at the end")
    return curves("by-rank", "Validation loss by rank", "rank", "validation loss", drawn)
