"""``python -m minildm compare``: methods against each other on one data set, as the tables and figures of a paper.

    plan       every method (LoRA at each rank, SeLoRA at each threshold) with every seed is a cell     cells.py
    train      each cell is a run of train.py in a folder of its own; interrupted ones continue
    sample     the held-out images' prompts, with the same seeds in every cell                          sample.py
    evaluate   fidelity, agreement with the prompts, privacy, usefulness -> metrics.json                evaluate.py
    compare    tables, paired differences, figures -> compare.md, .tex, .csv, .html                     comparison.py

What is complete is not made again, so the same command continues an interrupted comparison, and cells made on several
machines (``--only I/N``) are merged by running it once more on the shared folder. Under torchrun each process takes its
turns of the cells, on a GPU of its own.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minildm import distributed
from minildm.adapters import METHODS
from minildm.errors import InputError
from minildm.files import read_json, shown, writable_folder, written_beside
from minildm.metrics.sources import read_as_training, write_json
from minildm.report import comparison, figures
from minildm.report.cells import CellFailed, cells_of, generated_paths, sample_cell, share, train_cell, variants
from minildm.report.evaluate import Evaluator, RunData
from minildm.report.forecast import forecast
from minildm.report.measures import Row, metrics_of
from minildm.report.page import (
    IMAGE_PIXELS,
    WITHHELD,
    compared,
    data_uri,
    image_uri,
    rank_tables,
    render,
    setting_texts,
    write_report,
)
from minildm.report.read_run import Missing, read_run
from minildm.report.tables import csv_text
from minildm.settings import Parser, Settings, add_flags, at_least, from_flags, setting
from minildm.torchrun import own_device
from minildm.training.command_line import parse as parse_training

LONGEST = 30 * 24 * 3600.0  # seconds that processes wait for each other's cells
GRID_ROWS = 6  # prompts of the qualitative grid


@dataclass(frozen=True)
class CompareSettings(Settings):
    """What all cells share; a comparison that continues must have the same."""

    data: str = setting("phantom", "phantom, folder:..., padchest:..., as in train.py", metavar="NAME:PATH")
    base: str | None = setting(None, "base model, as in train.py", metavar="PATH")
    steps: int = setting(300, "training steps of each cell", at_least=1)
    limit: int | None = setting(None, "use N images, sampled with each seed", at_least=1, metavar="N")
    samples: int = setting(100, "generated images of each cell", at_least=2)
    sampler: str = setting("dpm++", "sampler of the generated images", choices=("ddim", "ddpm", "dpm++", "plms"))
    sampling_steps: int = setting(20, "its steps", at_least=1)
    guidance: float | None = setting(None, "its guidance (default: the model's usual one)", at_least=0)
    replicates: int = setting(100, "bootstrap resamples of each distance", at_least=1, metavar="N")
    utility: str | None = setting(
        None, "train a classifier of this caption field on generated images, test it on real ones", metavar="FIELD"
    )


def parse(arguments):
    """(the command's arguments, CompareSettings, further flags of train.py: those after "--")."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, further = arguments[:at], tuple(arguments[at + 1 :])
    parser = Parser(
        prog="python -m minildm compare",
        description="Train, sample and evaluate methods on one data set, and write the tables and figures of a paper.",
        epilog="Flags after -- go to train.py in every cell, such as: -- --size 224 --lr 1e-4 --batch-size 8",
    )
    add = parser.add_argument_group("what is compared").add_argument
    add("--methods", nargs="+", default=["selora", "lora"], choices=tuple(METHODS), help="the first is the reference")
    add("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], metavar="N", help="a cell for each; 5 are better")
    add("--ranks", nargs="+", type=at_least(1), default=[], metavar="R", help="ranks of lora (default: its own)")
    add("--thresholds", nargs="+", type=float, default=[], metavar="L", help="lambdas of selora (default: its own)")
    add_flags(parser, CompareSettings, "each cell")
    add = parser.add_argument_group("this call").add_argument
    add("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="folder of cells, tables and figures")
    add("--only", metavar="I/N", help="make the I-th of N shares of the cells, as in a job array")
    add("--dry-run", action="store_true", help="print the plan and forecast time and disk from a few steps")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--with-images", action="store_true", help="put images in compare.html, also those that may show patients")
    args = parser.parse_args(own)
    for name, method, values in (("ranks", "lora", args.ranks), ("thresholds", "selora", args.thresholds)):
        if values and method not in args.methods:
            raise InputError(f"--{name} are those of {method}, which is not among --methods; add it, or leave them out")
    return args, from_flags(CompareSettings, args), further


def main(arguments):
    args, settings, further = parse(arguments)
    distributed.join(LONGEST)  # the other processes, if torchrun has started several
    rows = variants(args.methods, args.ranks, args.thresholds)
    cells = cells_of(rows, args.seeds, args.out)
    mine = share(cells, args.only)
    flags = train_flags(settings, further)
    for variant in rows:  # mistakes in the flags show before anything is trained
        plan = parse_training([*flags, *variant.flags, "--out", str(args.out)])
        if plan.dreambooth.instance_prompt is not None:
            raise InputError("compare needs captions, and --instance-prompt gives all images one prompt; leave it out")
    if distributed.count() > 1 and torch.cuda.is_available():
        args.device = own_device(args.device or "cuda")
    device = ("--device", args.device) if args.device else ()
    n_seeds = len(set(args.seeds))
    print(f"{len(rows)} methods x {n_seeds} seeds: {len(cells)} cells of {settings.steps} steps, in {shown(args.out)}")
    if args.dry_run and not distributed.is_first():
        return 0
    if args.dry_run:
        print("\n".join(f"  {cell.name}: {cell.folder}{'' if cell in mine else ' (another share)'}" for cell in cells))
        words = sampling_words(settings)
        lines = forecast(rows, flags, words, device, settings.steps, settings.samples, n_seeds, settings.limit)
        print("\n".join(lines))
        return 0
    writable_folder(args.out)
    distributed.from_first(lambda: remember(args.out / "plan.json", settings, further))
    own = distributed.turns(mine)
    try:
        with distributed.alone():
            failed = make_cells(own, flags, settings, args.device, device)
    except KeyboardInterrupt:
        print("stopped; the same command continues the comparison")
        raise
    failed = distributed.gather_to_first(failed)
    if failed is None:
        return 0
    failed = {folder: reason for part in failed for folder, reason in part.items()}
    command = shlex.join(["python", "-m", "minildm", "compare", *arguments])
    write_comparison(args.out, rows, cells, settings, command, args.with_images, failed)
    for reason in failed.values():
        print(f"error: {reason}", file=sys.stderr)
    missing = sum(not (cell.folder / "metrics.json").is_file() for cell in cells)
    complete = f"{len(cells) - missing} of {len(cells)} cells are complete"
    print(f"wrote {shown(args.out)}/compare.md, .tex, .csv and .html; {complete}")
    if missing:
        print("next: the same command continues with what is missing")
    return 1 if failed else 0


def train_flags(settings, further):
    """Flags of train.py that all cells share."""
    words = ["--data", settings.data, "--steps", str(settings.steps), "--sample-interval", "0"]
    words += ["--base", settings.base] if settings.base else []
    words += ["--limit", str(settings.limit)] if settings.limit else []
    if "--read-captions" not in further:  # a preset would have some methods read and not the others
        words += ["--read-captions", "0"]
    return [*words, *further]


def sampling_words(settings):
    """Flags of sample.py that all cells share."""
    words = ["--sampler", settings.sampler, "--steps", str(settings.sampling_steps)]
    return words + (["--guidance", str(settings.guidance)] if settings.guidance is not None else [])


def remember(path, settings, further):
    """Write what all cells share to plan.json; refuse another plan for the cells that are there."""
    plan = settings.as_json() | {"train.py": list(further)}
    if path.is_file():
        before = read_json(path)
        for name in ("utility", "replicates"):  # evaluation: done anew where it changes
            before[name] = plan[name]
        for name in sorted({*before, *plan}):
            if before.get(name) != plan.get(name):
                raise InputError(
                    f"{path.parent} was begun with {name} = {before.get(name)!r}, not {plan.get(name)!r}; leave it as "
                    "it was, or give another --out"
                )
    write_json(path, plan)


def make_cells(cells, flags, settings, device_name, device):
    """Train, sample and evaluate the cells. Returns: {folder: why it failed}."""
    failed, evaluator = {}, None
    for number, cell in enumerate(cells, 1):
        print(f"cell {number} of {len(cells)}: {cell.name}", flush=True)
        try:
            train_cell(cell, flags, device)
            data = RunData(read_run(cell.folder))
            generated = sample_cell(cell, data.prompts(settings.samples), sampling_words(settings), device)
        except CellFailed as error:
            failed[cell.folder] = f"{cell.name}: {error}"
            continue
        evaluator = evaluator or Evaluator(
            cell.folder.parent.parent / "features", settings.base, device_name, settings.replicates, settings.utility
        )
        evaluator.measure(cell, data, generated)
        write_report([cell.folder], cell.folder / "report.html")
    return failed


# --- results ---------------------------------------------------------------------------------------------------------
def write_comparison(out, variants, cells, settings, command, with_images, failed):
    """Write compare.md, .tex, .csv and .html from the cells' files."""
    rows = [Row(v, {cell.seed: _run_of(cell, failed) for cell in cells if cell.variant == v}) for v in variants]
    runs = [run for row in rows for run in row.runs.values() if run]
    if not runs:
        return
    require_alike(runs)
    metrics = metrics_of(rows)
    tables = [
        comparison.quality_table(rows, metrics),
        comparison.parameters_table(rows),
        comparison.differences_table(rows, metrics) if len(rows) > 1 else Missing("there is one method only"),
        comparison.equal_parameters_table(rows, metrics),
        comparison.privacy_table(rows),
        comparison.utility_table(rows)
        if settings.utility
        else Missing("usefulness was not measured (--utility FIELD)"),
        comparison.cost_table(rows),
    ]
    shown_metrics = [m for m in metrics if any(not isinstance(row.value(m), Missing) for row in rows)]
    plots = [
        *(comparison.against_parameters(rows, m, f"quality-{i}") for i, m in enumerate(shown_metrics[:4])),
        figures.validation_loss(runs),
        figures.rank_growth(runs),
        figures.memory(runs),
        figures.training_time(runs),
    ]
    maps = {row.variant.label: rank_tables(run) for row in rows for run in list(row.runs.values())[:1] if run}
    written = [table for table in tables if not isinstance(table, Missing)]
    title = f"Comparison of {', '.join(v.label for v in variants)} on {settings.data}"
    seeds = ", ".join(str(seed) for seed in rows[0].runs)
    about = f"Seeds {seeds}; {settings.steps} steps; minildm {runs[0].version}. Not for clinical use."
    markdown = [f"# {title}", about, f"    {command}", *(table.markdown() for table in written)]
    markdown += [f"Not in the tables: {table.reason}." for table in tables if isinstance(table, Missing)]
    page = render(
        "compare.html",
        title=title,
        about=about,
        command=command,
        with_images=with_images,
        tables=tables,
        plots=plots,
        rank_maps=maps,
        grid=qualitative_grid(rows, settings, with_images),
        runs=runs,
        settings=compared(runs, {run.name: setting_texts(run) for run in runs}),
    )
    texts = {
        "compare.md": "\n\n".join(markdown) + "\n",
        "compare.tex": "\n".join(table.latex() for table in written),
        "compare.csv": csv_text(written),
        "compare.html": page,
    }
    for name, text in texts.items():
        with written_beside(out / name) as beside:
            beside.write_text(text, encoding="utf-8")


def require_alike(runs):
    """Raise InputError for runs on different bases, or for different images with the same seed: where several machines
    made the cells, each has looked for its own."""
    for name in ("base", "vae", "pixels", "data"):
        seen = {}
        for run in runs:
            seed = run.settings.get("seed") if name == "data" else None
            other = seen.setdefault(seed, run)
            if run.found.get(name) != other.found.get(name):
                raise InputError(
                    f"{other.folder} and {run.folder} differ in their {name}, and cannot be compared; delete one of "
                    "them, and run this command again where --base and --data are those of the other"
                )


def _run_of(cell, failed):
    if cell.folder in failed:
        return Missing(f"failed: {failed[cell.folder]}")
    if not (cell.folder / "summary.json").is_file():
        return Missing(f"{cell.name} has not been trained to its end yet")
    return read_run(cell.folder)


def qualitative_grid(rows, settings, with_images):
    """(column names, [(prompt, [(text alternative, data URI), ...])]): a real image beside each method's, the same
    prompt and seed; Missing without images."""
    seed, first = next(((s, run) for row in rows for s, run in row.runs.items() if run), (None, None))
    if not (with_images or first.shows_no_patient):
        return WITHHELD
    columns = [(row.variant.label, row.runs[seed]) for row in rows if row.runs[seed]]
    try:
        data = RunData(first)
    except (InputError, OSError) as error:
        return Missing(f"the data cannot be opened here ({error})")
    asked = list(zip(data.requests(settings.samples), data.prompts(settings.samples)))
    lines = []
    for i, (record, prompt) in enumerate(asked[: min(GRID_ROWS, len(data.held_out.images))]):
        cells = [("real image", image_uri(read_as_training(record, data.transform), IMAGE_PIXELS))]
        for label, run in columns:
            path = generated_paths(run.folder, settings.samples)[i]
            cells.append((label, data_uri(path, IMAGE_PIXELS) if path.is_file() else Missing("not generated yet")))
        lines.append((prompt, cells))
    return ["real image", *(label for label, _ in columns)], lines
