"""The metrics' result files as rows of one table: what was measured, its value and interval, on how many images."""

from minildm.report.read_run import Missing
from minildm.report.tables import Table, Value

COLUMNS = ("run", "metric", "value", "95 % interval", "images", "measured by")
NO_INTERVAL = Missing("no interval was computed for it")


def metrics_table(runs):
    """All results of the runs; Missing where no command has measured anything."""
    rows = []
    for run in runs:
        for path, content in run.results.items():
            try:
                rows += [(run.name, *row) for row in _rows(path, content)]
            except (KeyError, TypeError, ValueError, AttributeError):
                odd = Missing(f"{path} has another form than this version writes")
                rows.append((run.name, "result", odd, odd, odd, path))
    if not rows:
        return Missing(
            "no metric was measured; sample images, then: python -m minildm fid REAL FOLDER, audit, clip-score, "
            "adherence (results in the run's folder are found)"
        )
    return Table("Metrics", COLUMNS, tuple(rows))


def _rows(path, content):
    """Rows (metric, value, interval, images, measured by) of one file."""
    name = path.rpartition("/")[2]
    if name == "metrics.json":  # of a comparison's cell: several results in one file
        for part, of_part in _READERS.items():
            found = content.get(part)
            for result in found if isinstance(found, list) else [found]:
                if isinstance(result, dict):
                    missing = result.get("missing")
                    yield from [(part, *[Missing(missing)] * 3, path)] if missing else of_part(result, path)
        return
    reader = {"fid.json": _fidelity, "clip_score.json": _clip, "audit.json": _audit, "adherence.json": _adherence}[name]
    yield from reader(content, path)


def _fidelity(result, path):
    manifest = f"{path}: {_manifest(result.get('features', {}))}, seed {result.get('seed', 'unknown')}"
    images = f"{result.get('n_fake') or 'unknown'} against {result.get('n_real') or 'unknown'} real"
    label = result.get("label", "distance")
    for dim, entry in result.get("dims", {}).items():
        yield f"{label}, {dim} dims", Value(entry["distance"]), _interval(entry), images, manifest
        if "floor" in entry:
            half = f"{entry['half']} against {entry['half']} real"
            yield f"{label}, {dim} dims, at half", Value(entry["distance_at_half"]), NO_INTERVAL, half, manifest
            yield "the same, real against real (floor)", Value(entry["floor"]), NO_INTERVAL, half, manifest
    if "kid" in result:
        scaled = {key: 1e3 * result["kid"][key] for key in ("value", "low", "high")}
        yield f"KID x 1000 of {label}'s network", Value(scaled["value"]), _interval(scaled), images, manifest
    for name, value in result.get("prdc", {}).items():
        yield f"{name}, k = 5", Value(value), NO_INTERVAL, images, manifest
    if "cmmd" in result:
        yield "CMMD", Value(result["cmmd"]["value"]), _interval(result["cmmd"]), images, manifest


def _clip(result, path):
    manifest = f"{path}: {result.get('model')}, {result.get('pretrained')}"
    others = result["mismatched"]
    others = Missing("all prompts are the same") if others is None else Value(others)
    yield "CLIP score", Value(result["score"]), _interval(result), str(result.get("n")), manifest
    yield "the same, other images' prompts", others, NO_INTERVAL, str(result.get("n")), manifest


def _audit(result, path):
    images = str(len({entry["generated"] for entry in result.get("pictures", [])}))
    manifest = f"{path}: {_manifest(result.get('features', {}))}, seed {result.get('seed', 'unknown')}"
    for view in result.get("views", []):
        name = view["view"]
        yield (
            f"near-copies of training images ({name})",
            Value(view["near_copies"], digits=0),
            NO_INTERVAL,
            images,
            manifest,
        )
        chance = f"nearer to training images ({name}; by chance {100 * view['expected']:.1f} %, p = {view['p']:.4f})"
        yield chance, Value(100 * view["share"], digits=1, unit="%"), NO_INTERVAL, images, manifest


def _adherence(result, path):
    for name, entry in result.get("fields", {}).items():
        chance = "unknown" if entry["chance"] is None else f"{100 * entry['chance']:.1f} %"
        metric = f"prompt adherence, {name} (by chance {chance})"
        scaled = {key: 100 * entry[key] for key in ("low", "high") if key in entry}
        value = Value(100 * entry["share"], digits=1, unit="%")
        yield metric, value, _interval(scaled, 1), str(entry["n"]), f"{path}: {result.get('ruler', 'unknown ruler')}"


def _utility(result, path):
    manifest = f"{path}: {result.get('classifier', 'unknown classifier')}"
    for training, entry in result.get("auc", {}).items():
        metric = f"AUC for {result.get('field')} on real images, trained on {training}"
        yield metric, Value(entry["auc"]), _interval(entry), f"{entry['n_test']} real", manifest


_READERS = {"fidelity": _fidelity, "clip_score": _clip, "adherence": _adherence, "audit": _audit, "utility": _utility}


def _interval(entry, digits=3):
    if entry.get("low") is None:
        return NO_INTERVAL
    return f"{entry['low']:,.{digits}f} to {entry['high']:,.{digits}f}"


def _manifest(features):
    """The features' weights, as their result file states them."""
    digest = features.get("sha256")
    return f"{features.get('weights', 'unknown weights')}" + (f" (sha256 {digest[:10]})" if digest else "")
