"""What methods are compared by: the metrics, each read from a run's files, and a method's values over its seeds."""

from dataclasses import dataclass
from typing import NamedTuple

from minildm.adapters.inject import NETWORKS
from minildm.report.read_run import Missing
from minildm.report.tables import spread


class Metric(NamedTuple):
    name: str
    better: str  # "lower" or "higher"
    digits: int
    read: object  # RunFiles -> number or Missing
    scale: float = 1.0
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """A variant and the runs of its complete cells by seed."""

    variant: object  # cells.Variant
    runs: dict  # {seed: RunFiles or Missing}

    def values(self, metric):
        """{seed: number or Missing}"""
        return {seed: metric.read(run) if not isinstance(run, Missing) else run for seed, run in self.runs.items()}

    def value(self, metric):
        values = [v if isinstance(v, Missing) else metric.scale * v for v in self.values(metric).values()]
        return spread(values, metric.digits, metric.unit, metric.name)


# --- what is read from a run -----------------------------------------------------------------------------------------
def validation(run):
    """Of the saved result. The log may hold a lower one, of weights that could not be kept (`Method.may_be_best`)."""
    summary = summary_of(run)
    if not summary:
        return summary
    best = summary.get("best")
    return best[0] if best else Missing("no validation loss was finite, or there was no validation")


def fidelity(label, dim, key="distance", part="fidelity"):
    def read(run):
        found = run.result(part)
        if isinstance(found, Missing):
            return found
        for result in found:
            if result["label"] == label:
                if key == "kid":
                    return result["kid"]["value"] if "kid" in result else Missing("KID needs 6 images on either side")
                return result["dims"][str(dim)][key]
        return Missing(f"not measured by {label}")

    return read


def adherence(field):
    def read(run):
        found = run.result("adherence")
        if isinstance(found, Missing):
            return found
        fields = found["fields"]
        return fields[field]["share"] if field in fields else Missing(f"no prompt asks for {field}")

    return read


def clip(run):
    found = run.result("clip_score")
    return found if isinstance(found, Missing) else found["score"]


def audit(view, key):
    def read(run):
        found = run.result("audit")
        return found if isinstance(found, Missing) else found["views"][view][key]

    return read


def auc(training):
    def read(run):
        found = run.result("utility")
        return found if isinstance(found, Missing) else found["auc"][training]["auc"]

    return read


def summary_of(run):
    """summary.json of a RunFiles; Missing where there is no run or no summary."""
    return run and run.summary  # Missing is false


def parameters(run, network=None):
    """Trained parameters of a network, or of both."""
    if not summary_of(run):
        return summary_of(run)
    counts = run.summary["parameters"]
    names = NETWORKS if network is None else (network,)
    return sum(counts[name][0] for name in names if name in counts)


def metrics_of(rows):
    """The Metrics that at least one run has a number for, and those that say why not."""
    runs = [run for row in rows for run in row.runs.values() if not isinstance(run, Missing)]
    labels = {}  # {label: dims}, as found
    for run in runs:
        found = run.result("fidelity")
        for result in [] if isinstance(found, Missing) else found:
            labels.setdefault(result["label"], [int(dim) for dim in result["dims"]])
    found = [Metric("validation loss", "lower", 4, validation)]
    if not labels:
        found.append(Metric("FD", "lower", 2, fidelity("FD", 0)))
    for label, dims in labels.items():
        found += [Metric(f"{label}-{dim}", "lower", 2 if dim > 64 else 3, fidelity(label, dim)) for dim in dims]
        if label == "FID":  # on other networks' features its size says nothing
            found.append(Metric("KID x 1000", "lower", 3, fidelity(label, None, "kid"), 1e3))
    found.append(Metric("CLIP score", "higher", 2, clip))
    asked = {field for run in runs for field in (run.result("adherence") or {}).get("fields", {})}
    for field in [name for name in ("view", "sex", "diagnosis", "loc") if name in asked] or ["prompt"]:
        found.append(Metric(f"{field} as asked", "higher", 1, adherence(field), 100, "%"))
    trainings = {training for run in runs for training in (run.result("utility") or {}).get("auc", {})}
    found += [Metric(f"AUC, trained on {name}", "higher", 3, auc(name)) for name in sorted(trainings) if name != "real"]
    return found
