"""``python -m minildm report RUN [RUN ...]``: one HTML file about one or several runs, which needs nothing else.

Numbers come from the runs' files (read_run.py), figures from figures.py. Every text is escaped by the template engine.
Images and captions of data that can show patients enter only with --with-images, and the page then says so.
"""

import base64
import functools
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from minildm import __version__
from minildm.adapters.rank_map import kinds_of, rank_table
from minildm.files import shown, writable_file, written_beside
from minildm.images import read_text, split_parameters
from minildm.report import figures
from minildm.report.energy import EnergySettings, energy_line
from minildm.report.read_run import Missing, is_number, read_runs, step_of
from minildm.report.results import metrics_table
from minildm.report.tables import Table
from minildm.settings import Parser, add_flags, from_flags

TEMPLATES = Path(__file__).parent
SHEET_PIXELS, IMAGE_PIXELS = 1000, 320  # a side, at most, on the page
MOST_SHEETS, MOST_GENERATED = 6, 12  # of a run; of many runs there are fewer sheets
WITHHELD = Missing(
    "images are left out, because those of this data or base may show patients or resemble them; --with-images puts "
    "them in"
)


def render(template, **content):
    """The page of a template in this folder."""
    return _environment().get_template(template).render(**content)


@functools.cache
def _environment():
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.finalize = _printable
    environment.globals.update(
        Missing=Missing, grouped=grouped, version=__version__, css=Markup((TEMPLATES / "page.css").read_text())
    )
    environment.tests["missing"] = lambda thing: isinstance(thing, Missing)
    environment.filters["svg"] = Markup  # made by figures.py, whose texts matplotlib has escaped
    return environment


def _printable(thing):
    """Texts without control characters, which HTML does not allow."""
    if not isinstance(thing, str) or isinstance(thing, Markup):
        return thing
    return "".join(c if c.isprintable() or c in " \n" else f"\\u{ord(c):04x}" for c in thing)


def write_report(folders, out, with_images=False, energy=None):
    """Write the report on the runs in ``folders`` to ``out``. Returns: its path."""
    runs = read_runs(folders)
    page = render("report.html", **contents(runs, with_images, EnergySettings() if energy is None else energy))
    with written_beside(out) as beside:
        beside.write_text(page, encoding="utf-8")
    return Path(out)


def contents(runs, with_images, energy):
    """What the template report.html shows."""
    return {
        "title": f"Report on {runs[0].name}" if len(runs) == 1 else f"Report on {len(runs)} runs",
        "runs": runs,
        "with_images": with_images,
        "facts": compared(runs, {run.name: facts(run) for run in runs}),
        "outcome": compared(runs, {run.name: outcome(run, energy) for run in runs}),
        "settings": compared(runs, {run.name: setting_texts(run) for run in runs}),
        "figures": all_figures(runs),
        "rank_maps": {run.name: rank_tables(run) for run in runs},
        "metrics": metrics_table(runs),
        "sheets": {run.name: sheets(run, with_images, max(2, 24 // len(runs))) for run in runs},
        "generated": {run.name: generated(run, with_images) for run in runs},
        "audits": {run.name: audits(run, with_images) for run in runs},
        "forgetting": {run.name: forgetting(run, with_images) for run in runs},
        "sessions": sessions_table(runs),
        "commands": {run.name: command(run) for run in runs},
    }


# --- facts and settings ----------------------------------------------------------------------------------------------
def compared(runs, facts):
    """Rows (name, the runs' texts, whether they differ) of {run: {name: text or Missing}}."""
    names = dict.fromkeys(name for of_run in facts.values() for name in of_run)
    rows = []
    for name in names:
        cells = [facts[run.name].get(name, Missing("not a setting of this run")) for run in runs]
        known = {cell for cell in cells if not isinstance(cell, Missing)}
        rows.append((name, cells, len(known) > 1 or (len(known) == 1 and len(cells) > cells.count(*known))))
    return rows


def grouped(cells, runs):
    """[(a text or Missing, names of the runs that have it)], the commonest first: a row of `compared`, where a column
    for each of many runs would be wider than a page."""
    names = {}
    for cell, run in zip(cells, runs):
        names.setdefault(cell, []).append(run.name)
    return sorted(names.items(), key=lambda pair: -len(pair[1]))


def facts(run):
    """What was trained on what: {name: text or Missing}."""
    settings, sizes = run.settings, run.split_sizes()
    result = {
        "method": _text(settings.get("adapter")),
        "base": f"{_text(settings.get('base'))}, hash {str(run.found.get('base'))[:10]}",
        "data": _text(settings.get("data")),
        "images": ", ".join(f"{n:,} {name}" for name, n in sizes.items()) or Missing("config.json names no splits"),
        "steps": f"{run.last_step:,} of {_text(settings.get('batch_size'))} samples",
        "pixels": _text(run.found.get("pixels")),
        "precision": _text(run.found.get("dtype")),
        "seed": _text(settings.get("seed")),
    }
    return result | ({"scale = alpha / rank": f"{run.adapter['scale']:g}"} if run.adapter else {})


def outcome(run, energy):
    """What the run reached and what it took: {name: text or Missing}."""
    best, summary = run.best(), run.summary
    seconds, memory = run.series("seconds")[1], run.series("memory_mb")[1]
    result = {"lowest validation loss": f"{best[0]:.4f} at step {best[1]}" if best else best}
    for network in ("unet", "text_encoder"):
        counts = summary["parameters"].get(network) if summary else None
        text = f"{counts[0]:,} of {counts[1]:,} ({counts[2]:.3f} % of base + adapter)" if counts else None
        result[f"parameters trained, {network}"] = text or ("none" if summary else summary)
    result["time of training"] = f"{seconds[-1]:,.1f} s" if seconds else Missing("the log has no entry seconds")
    result["peak memory"] = f"{max(memory) / 1000:.2f} GB" if memory else Missing("the log has no entry memory_mb")
    return result | {"energy": energy_line(run, energy)}


def sessions_table(runs):
    """When and where each process trained; Missing where no run says."""
    rows = []
    for run in runs:
        for session in run.sessions:
            machine, versions = (session.get(key) for key in ("machine", "versions"))
            machine, versions = (part if isinstance(part, dict) else {} for part in (machine, versions))
            where = f"{machine.get('name')} ({machine.get('device')}, {machine.get('threads')} threads)"
            software = ", ".join(f"{name} {version}" for name, version in versions.items())
            rows.append((run.name, _text(session.get("started")), where, f"{software}, Python {session.get('python')}"))
    if not rows:
        return Missing("no run has a sessions.jsonl: it was trained by an older version, or from Python")
    return Table("Environment", ("run", "started", "machine", "versions"), tuple(rows))


def command(run):
    """The command line that repeats the run."""
    commands = [session["command"] for session in run.sessions if isinstance(session.get("command"), str)]
    return commands[0] if commands else Missing("the run does not record its command (no sessions.jsonl)")


def setting_texts(run):
    """{setting: text}, without the cache's folder, which says nothing about the run."""
    return {name: _text(value) for name, value in run.settings.items() if name != "cache"}


def _text(value):
    if value is None or value == "":
        return "not set" if value is None else "(empty)"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- figures and rank maps -------------------------------------------------------------------------------------------
def all_figures(runs):
    """[(heading, [Figure, ...] or Missing)]"""
    parts = (
        ("Training loss", figures.training_loss),
        ("Validation loss", figures.validation_loss),
        ("Learning rate", figures.learning_rate),
        ("Rank growth", figures.rank_growth),
        ("Fisher ratios", figures.fisher_ratios),
        ("Validation loss by rank", figures.loss_by_rank),
        ("Time", figures.training_time),
        ("Memory", figures.memory),
    )
    results = [(heading, figure(runs)) for heading, figure in parts]
    return [(heading, [found] if isinstance(found, figures.Figure) else found) for heading, found in results]


def rank_tables(run):
    """[(network, kinds of layer, [(block, [mean rank or None, ...])], largest mean)], at the end of training."""
    ranks = run.ranks()
    if isinstance(ranks, Missing):
        return ranks
    tables = []
    for network, rows in rank_table(ranks[-1][1]).items():
        kinds = kinds_of(rows)
        cells = [(block, [row.get(kind) for kind in kinds]) for block, row in rows.items()]
        tables.append((network, kinds, cells, max(max(row.values()) for row in rows.values())))
    return tables


# --- images ----------------------------------------------------------------------------------------------------------
def _images(run, paths, with_images, labels, none, pixels=SHEET_PIXELS):
    """[(label, data URI)] of images; Missing where there are none, or where they might show patients."""
    if not paths:
        return Missing(none)
    if not (with_images or run.shows_no_patient):
        return WITHHELD
    return [(label, data_uri(path, pixels)) for path, label in zip(paths, labels)]


def sheets(run, with_images, most=MOST_SHEETS):
    """Sheets of sample images over training, of fixed prompts and seeds; at most ``most``, evenly spread."""
    paths = [path for path in run.images("samples/step-*.png") if step_of(path) is not None]
    n = min(most, MOST_SHEETS, len(paths))
    kept = [paths[round(i * (len(paths) - 1) / max(n - 1, 1))] for i in range(n)]
    labels = [f"step {step_of(path)}" for path in kept]
    return _images(run, kept, with_images, labels, "the run made no sheets of sample images (--sample-interval)")


def generated(run, with_images):
    """The first generated images in the run's folder, with their prompts."""
    paths = (run.images("generated/*-seed*.png") + run.images("samples/*-seed*.png"))[:MOST_GENERATED]
    labels = []
    if with_images or run.shows_no_patient:
        labels = [split_parameters(read_text(path).get("parameters", "no prompt"))[0] for path in paths]
    return _images(
        run, paths, with_images, labels, "no generated images in the run's folder (sample.py --out RUN/generated)"
    )


def audits(run, with_images):
    """The audits' figures, which show training images: never without --with-images."""
    paths = [
        run.folder / path.replace("audit.json", "audit.png") for path in run.results if path.endswith("audit.json")
    ]
    paths = [path for path in paths if path.is_file()]
    if paths and not with_images:
        return Missing("the audit's figure shows training images and is left out; --with-images puts it in")
    return _images(run, paths, with_images, ["most suspicious images"] * len(paths), "no audit of this run's images")


def forgetting(run, with_images):
    """The forgetting probe: (its numbers in words, its images)."""
    names = ("drift", "unrelated", "prompts")
    entries = [entry for entry in run.entries if all(is_number(entry.get(name)) for name in names)]
    if not entries:
        return Missing("not measured (--forgetting-probe)")
    entry = entries[-1]
    words = (
        f"{entry['prompts']} unrelated prompts: the latents drift by {entry['drift']:.3f}; unrelated images differ by "
        f"{entry['unrelated']:.3f}."
    )
    if "right_before" in entry:
        words += f" Right by the shape checker: {entry['right_before']} before, {entry['right_after']} after."
    paths = run.images("samples/forgetting.png")
    return words, _images(run, paths, with_images, ["before and after training"], "samples/forgetting.png is missing")


def data_uri(path, pixels):
    """The image of a file as in `image_uri`, without the texts in the file."""
    with Image.open(path) as image:
        return image_uri(image.convert("RGB"), pixels)


def image_uri(image, pixels):
    """A Pillow RGB image as a data URI: a JPEG of at most ``pixels`` a side. The image is made smaller in place."""
    image.thumbnail((pixels, pixels))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


# --- the command -----------------------------------------------------------------------------------------------------
def main(arguments):
    parser = Parser(prog="python -m minildm report", description="One HTML file about one or several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html; of several runs ./report.html)"
    )
    parser.add_argument(
        "--with-images", action="store_true", help="put images and captions in, also those that may show patients"
    )
    add_flags(parser, EnergySettings, "energy")
    args = parser.parse_args(arguments)
    default = Path(args.runs[0]) / "report.html" if len(args.runs) == 1 else Path("report.html")
    for folder in args.runs:
        read_runs([folder])  # a mistake shows before a folder is made for --out
    out = writable_file(default if args.out is None else args.out)
    write_report(args.runs, out, args.with_images, from_flags(EnergySettings, args))
    print(f"wrote {shown(out)} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser")
    if args.with_images:
        print("it contains images and captions: keep it as safe as the data they come from")
    return 0
