"""The tables and figures of a comparison, from its cells' files alone.

The metrics of `measures.metrics_of` are the one list of what methods are compared by: the tables, the paired
differences and the curves all use it.
"""

import itertools
import statistics

from minildm.adapters.inject import NETWORKS
from minildm.report.figures import Curve, curves
from minildm.report.measures import Metric, auc, audit, fidelity, parameters, summary_of
from minildm.report.read_run import Missing
from minildm.report.statistics import holm, interpolate, paired_difference, verdict
from minildm.report.tables import Table, Value, spread

REFERENCE = "real: training images"  # the row that shows what real images reach
LONG_STEP = 5  # times the median
ONE_SEED = Missing("one seed gives no interval and no test; give at least 2 --seeds, better 5")


# --- tables ----------------------------------------------------------------------------------------------------------
def quality_table(rows, metrics):
    """Each variant by each metric: mean and deviation over the seeds; and what real images reach."""
    body = [(row.variant.label, _seeds(row), *(row.value(metric) for metric in metrics)) for row in rows]
    reference = []
    for metric in metrics:
        label, _, dim = metric.name.rpartition("-")
        value = Missing("only distances are measured between real images")
        if label.startswith("F") and dim.isdigit():
            read = fidelity(label, int(dim), part="reference")
            by_seed = {}  # the same for all variants of a seed
            for row in rows:
                found = {seed: read(run) for seed, run in row.runs.items() if run}
                by_seed |= {
                    seed: one for seed, one in found.items() if seed not in by_seed or not isinstance(one, Missing)
                }
            value = spread(list(by_seed.values()), metric.digits, of=metric.name)
        reference.append(value)
    body.append((REFERENCE, "-", *reference))
    sizes = [run.results.get("metrics.json", {}) for row in rows for run in row.runs.values() if run]
    sizes = sorted({(s["request"]["images"], s["held_out"]) for s in sizes if "request" in s})
    notes = [
        "Mean ± standard deviation over seeds. A seed decides the split, too: part of the deviation is that of the "
        "held-out images.",
        *(f"Distances: {n} generated images against {m} held-out real images (validation and test)." for n, m in sizes),
        "FID is only what the published Inception weights give; FD-random (untrained network) and FD-vae are other "
        "numbers, comparable within this table alone.",
    ]
    return Table("Quality", ("method", "seeds", *(m.name for m in metrics)), tuple(body), tuple(notes))


def parameters_table(rows):
    body = []
    for row in rows:
        cells = []
        for network in NETWORKS:
            counts, percents = [], []
            for run in row.runs.values():
                summary = summary_of(run)
                if not summary:
                    counts, percents = [summary], [summary]
                    break
                trained, _, percent = summary["parameters"].get(network, (0, 0, 0.0))
                counts.append(trained)
                percents.append(percent)
            cells += [spread(counts, 0), spread(percents, 4, "%")]
        total = [parameters(run) for run in row.runs.values()]
        body.append((row.variant.label, *cells, spread(total, 0), *_rank_cells(row)))
    columns = ("method", "U-Net", "U-Net, %", "text encoder", "text encoder, %", "both", "mean rank", "largest rank")
    note = (
        "Trained parameters after the last step. Percent = 100 x trained / all, all = base + adapter (PEFT's "
        "convention), for each network by itself."
    )
    return Table("Trainable parameters", columns, tuple(body), (note,))


def _rank_cells(row):
    means, largest = [], []
    for run in row.runs.values():
        ranks = run.ranks() if run else run
        if isinstance(ranks, Missing):
            return ranks, ranks
        means.append(statistics.fmean(ranks[-1][1].values()))
        largest.append(max(ranks[-1][1].values()))
    return spread(means, 2), spread(largest, 1)


def cost_table(rows):
    """Time and memory; for SeLoRA the paper's estimate 1 + 1/t beside the measured ratio to LoRA."""
    time, memory = {}, {}
    for row in rows:
        time[row.variant] = spread([_per_step(run) for run in row.runs.values()], 3, "s")
        memory[row.variant] = spread([_memory(run) for run in row.runs.values()], 2, "GB")
    loras = [time[row.variant] for row in rows if row.variant.flags[1] == "lora" and time[row.variant]]
    body = []
    for row in rows:
        intervals = {run.settings.get("expand_interval") for run in row.runs.values() if run} - {None}
        estimate = f"{1 + 1 / min(intervals):.3f}" if intervals else Missing("the estimate is SeLoRA's")
        ratio = Missing("no LoRA run was measured")
        if loras and time[row.variant]:
            ratio = Value(time[row.variant].mean / statistics.fmean(v.mean for v in loras), digits=3)
        hours = spread([_hours(run) for run in row.runs.values()], 3, "h")
        body.append((row.variant.label, time[row.variant], hours, memory[row.variant], estimate, ratio))
    columns = ("method", "per step", "training", "peak memory", "estimate 1 + 1/t", "measured / LoRA")
    notes = (
        f"Per step: the mean of all steps but those of over {LONG_STEP} times the median, which validated, saved or "
        "were suspended; the training's hours include them. Times vary with whatever else the machine does, so "
        "differences of a few percent mean nothing. 1 + 1/t is the SeLoRA paper's estimate: one more pass every t "
        "steps.",
    )
    return Table("Cost", columns, tuple(body), notes)


def _per_step(run):
    """Mean seconds of an ordinary step, SeLoRA's test included."""
    if not run:
        return run
    clock = [0.0, *run.series("seconds")[1]]
    steps = [after - before for before, after in itertools.pairwise(clock)]
    if not steps:
        return Missing("the log has no entry seconds")
    longest = LONG_STEP * statistics.median(steps)
    return statistics.fmean(seconds for seconds in steps if seconds <= longest)


def _hours(run):
    summary = summary_of(run)
    return summary and summary["seconds"] / 3600


def _memory(run):
    if not run:
        return run
    values = run.series("memory_mb")[1]
    return max(values) / 1000 if values else Missing("the log has no entry memory_mb")


def privacy_table(rows):
    body = []
    for row in rows:
        cells = []
        for view in (0, 1):
            cells.append(row.value(Metric("near-copies", "lower", 1, audit(view, "near_copies"))))
            cells.append(row.value(Metric("share", "lower", 1, audit(view, "share"), 100, "%")))
            cells.append(row.value(Metric("chance", "lower", 1, audit(view, "expected"), 100, "%")))
            p = list(row.values(Metric("p", "lower", 4, audit(view, "p"))).values())
            gaps = [value for value in p if isinstance(value, Missing)]
            cells.append(gaps[0] if gaps else Value(min(p), digits=4))
        body.append((row.variant.label, *cells))
    parts = ("near-copies", "nearer to training", "by chance", "smallest p")
    columns = ("method", *(f"{part} ({by})" for by in ("pixels", "features") for part in parts))
    note = "An audit without near-copies does not prove privacy; docs/metrics.md says what it does not detect."
    return Table("Privacy: memorisation audit", columns, tuple(body), (note,))


def differences_table(rows, metrics):
    """Each variant against the first, paired by seed."""
    first, body = rows[0], []
    for metric in metrics:
        tested = []
        for row in rows[1:]:
            label = f"{row.variant.label} − {first.variant.label}"
            tested.append((label, _paired(row.values(metric), first.values(metric))))
        body += _verdicts(metric, tested)
    return _tested_table(f"Paired differences from {first.variant.label}", body)


def equal_parameters_table(rows, metrics):
    """Each other adapter against LoRA with as many parameters: LoRA's values at its ranks, interpolated."""
    sweep = [row for row in rows if row.variant.rank is not None]
    others = [row for row in rows if row.variant.flags[1] not in ("lora", "full")]
    if len(sweep) < 2 or not others:
        return Missing("needs LoRA at two or more --ranks, and another adapter")
    body = []
    for metric in metrics:
        tested = []
        for row in others:
            at_equal = {seed: _lora_at(run, seed, sweep, metric) for seed, run in row.runs.items()}
            tested.append((f"{row.variant.label} − lora, equal parameters", _paired(row.values(metric), at_equal)))
        body += _verdicts(metric, tested)
    notes = []
    for row in others:
        counts = [parameters(run) for run in row.runs.values() if summary_of(run)]
        ranks = [(r.variant.rank, parameters(run)) for r in sweep for run in r.runs.values() if summary_of(run)]
        if counts and ranks:
            mean = statistics.fmean(counts)
            rank, n = min(ranks, key=lambda pair: abs(pair[1] - mean))
            notes.append(f"{row.variant.label}: {mean:,.0f} parameters; nearest LoRA: rank {rank} with {n:,}.")
    notes.append("LoRA at equal parameters: a straight line in log(parameters) between its ranks, for each seed.")
    return _tested_table("Equal parameters: against LoRA with as many", body, tuple(notes))


def _lora_at(run, seed, sweep, metric):
    if not summary_of(run):
        return summary_of(run)
    x, y = [], []
    for row in sweep:
        other, value = row.runs[seed], row.values(metric)[seed]
        if isinstance(value, Missing):
            return value
        x.append(parameters(other))
        y.append(value)
    return interpolate(x, y, parameters(run))


def _paired(a, b):
    """The Difference of {seed: number or Missing} and another; Missing with the first reason."""
    gaps = [values[seed] for seed in a for values in (a, b) if isinstance(values[seed], Missing)]
    return gaps[0] if gaps else paired_difference(list(a.values()), [b[seed] for seed in a])


def _verdicts(metric, tested):
    """Rows of a table of differences; p adjusted for the number of comparisons by this metric."""
    known = [difference for _, difference in tested if not isinstance(difference, Missing) and difference.n > 1]
    adjusted = iter(holm([difference.p for difference in known]))
    for label, d in tested:
        if isinstance(d, Missing):
            yield (label, metric.name, d, d, d, "not tested")
            continue
        mean = Value(metric.scale * d.mean, digits=metric.digits, unit=metric.unit)
        if d.n == 1:
            yield (label, metric.name, mean, ONE_SEED, ONE_SEED, "not tested with 1 seed")
            continue
        p, low, high = next(adjusted), metric.scale * d.low, metric.scale * d.high
        interval = f"{low:,.{metric.digits}f} to {high:,.{metric.digits}f}"
        yield (label, metric.name, mean, interval, Value(p, digits=4), verdict(d, p, metric.better))


def _tested_table(title, body, notes=()):
    notes = (
        *notes,
        "95 % intervals of the mean difference over seeds (Student's t, paired); p adjusted by Holm for the "
        "comparisons by one metric.",
    )
    return Table(title, ("difference", "metric", "mean", "95 % interval", "p", "verdict"), tuple(body), notes)


def utility_table(rows):
    """AUC of a classifier on real images, by what it was trained on."""
    body = []
    for row in rows:
        for training in ("real", "synthetic", "real + synthetic"):
            metric = Metric("AUC", "higher", 3, auc(training))
            intervals = []
            for seed, run in row.runs.items():
                found = run.result("utility") if run else run
                if not isinstance(found, Missing):
                    entry = found["auc"][training]
                    intervals.append(f"{entry['low']:.3f} to {entry['high']:.3f} (seed {seed})")
            found = "; ".join(intervals) or Missing("not measured")
            body.append((row.variant.label, training, row.value(metric), found))
    note = "Bootstrap intervals over the held-out real images of each seed. docs/compare.md describes the classifier."
    return Table("Usefulness", ("method", "trained on", "AUC on real images", "95 % interval"), tuple(body), (note,))


def _seeds(row):
    return str(sum(not isinstance(run, Missing) for run in row.runs.values()))


# --- figures ---------------------------------------------------------------------------------------------------------
def against_parameters(rows, metric, id):
    """A metric against the number of trained parameters: LoRA's ranks as a line, other methods as points."""
    points = []
    for row in rows:
        counts = [parameters(run) for run in row.runs.values()]
        value = row.value(metric)
        if isinstance(value, Missing) or any(isinstance(count, Missing) for count in counts):
            continue
        points.append((row.variant, statistics.fmean(counts), value.mean, value.deviation or 0.0))
    if not points:
        return Missing(f"no method has both its {metric.name} and its parameters")
    sweep = sorted(point[1:] for point in points if point[0].rank is not None)
    drawn = []
    if sweep:
        counts, means, deviations = map(list, zip(*sweep))
        drawn.append(Curve("lora, by rank", counts, means, 0, True, deviations))
    for variant, count, mean, deviation in points:
        if variant.rank is None:
            drawn.append(Curve(variant.label, [count], [mean], len(drawn), True, [deviation]))
    title = f"{metric.name} against trained parameters"
    return curves(id, title, "trained parameters", metric.name, drawn, log_x=True)
