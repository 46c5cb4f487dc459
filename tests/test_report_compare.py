"""Comparisons: plans, tables that follow from the cells' files, pages; and one that is killed and continued."""

import csv
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import folder
from made_runs import short_run, small_model
from peers import assert_says, edit_json, write_folder
from PIL import Image
from scipy import stats
from test_report import check_page, set_settings

from minildm.data.open import open_data_set
from minildm.data.reading import Transform
from minildm.errors import InputError
from minildm.images import save_png
from minildm.report import comparison, figures, forecast, measures
from minildm.report.cells import CellFailed, cells_of, generated_paths, sample_cell, share, variants
from minildm.report.compare import CompareSettings, main, parse, remember, write_comparison
from minildm.report.evaluate import Evaluator, spread_out
from minildm.report.read_run import Missing, read_run
from minildm.training.command_line import parse as parse_training

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
COUNTS = {"selora": 2000, "lora-rank1": 1000, "lora-rank4": 4000, "adalora": 9000}


# --- the cells --------------------------------------------------------------------------------------------------------
def test_images_of_other_prompts_are_not_taken_for_these(tmp_path):
    (cell,) = cells_of(variants(["lora"]), [0], tmp_path)
    images = generated_paths(cell.folder, 2)
    images[0].parent.mkdir(parents=True)
    for image in images:
        image.touch()
    (cell.folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert sample_cell(cell, ["a", "b"], []) == images
    with pytest.raises(InputError, match="images of other prompts"):
        sample_cell(cell, ["a", "c"], [])


# --- the plan --------------------------------------------------------------------------------------------------------
def test_every_method_rank_and_threshold_is_a_variant():
    found = variants(["selora", "lora", "full"], ranks=[1, 8], thresholds=[1.0, 1.3])
    assert [v.label for v in found] == ["selora λ = 1", "selora λ = 1.3", "lora r = 1", "lora r = 8", "full"]
    assert found[0].flags == ("--adapter", "selora", "--expand-threshold", "1.0")
    assert len({v.folder for v in found}) == 5 and found[3].rank == 8
    assert [v.label for v in variants(["lora", "lora"])] == ["lora"]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_shares_are_a_partition(tmp_path, n):
    cells = cells_of(variants(["selora", "lora", "adalora"]), (0, 1, 1, 2), tmp_path)
    parts = [share(cells, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(cell.name for part in parts for cell in part) == sorted(cell.name for cell in cells)
    assert len(cells) == 9


@pytest.mark.parametrize("only", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none_is_refused(tmp_path, only):
    with pytest.raises(InputError) as error:
        share([], only)
    assert_says(error, "--only must be I/N", only)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "selora", "--ranks", "2"], "--ranks are those of lora"),
        (["--methods", "lora", "--thresholds", "1.1"], "--thresholds are those of selora"),
        (["--methods", "selora", "--thresholds", "0.5"], "--expand-threshold must be"),
        (["--methods", "lora", "--", "--lr", "-1"], "--lr must be"),
        (["--methods", "lora", "selora", "--", "--rank", "2", "--max-rank", "8"], "--max-rank is a setting of"),
        (["--methods", "lora", "--", "--instance-prompt", "sks"], "compare needs captions"),
        (["--samples", "1"], "--samples must be"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        main(["--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_flags_after_two_dashes_are_train_pys(tmp_path):
    args, settings, further = parse(["--seeds", "4", "--steps", "7", "--", "--lr", "1e-3", "--seeds"])
    assert args.seeds == [4] and settings.steps == 7 and further == ("--lr", "1e-3", "--seeds")


def test_a_comparison_continues_only_as_it_was_begun(tmp_path):
    settings = CompareSettings(steps=5)
    remember(tmp_path / "plan.json", settings, ())
    remember(tmp_path / "plan.json", dataclasses.replace(settings, utility="view"), ())
    with pytest.raises(InputError) as error:
        remember(tmp_path / "plan.json", dataclasses.replace(settings, steps=6), ())
    assert_says(error, "begun with steps = 5, not 6")
    with pytest.raises(InputError, match=r"train.py = \[\], not \['--lr', '1'\]"):
        remember(tmp_path / "plan.json", settings, ("--lr", "1"))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_damaged_plan_is_an_error_in_one_line(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError) as error:
        remember(tmp_path / "plan.json", CompareSettings(), ())
    assert_says(error, "plan.json", "JSON")


# --- tables from files -----------------------------------------------------------------------------------------------
def write_metrics(cell, rng):
    """A metrics.json as evaluation writes it, with random numbers."""
    distance = {str(dim): {"distance": float(rng.uniform(1, 9))} for dim in (2048, 64)}
    content = {
        "request": {"images": 40},
        "held_out": 30,
        "fidelity": [{"label": "FD-random", "dims": distance, "n_fake": 40, "n_real": 30}],
        "reference": [{"label": "FD-random", "dims": {"2048": {"distance": 0.5}, "64": {"distance": 0.25}}}],
        "clip_score": {"missing": "no CLIP weights"},
        "adherence": {"fields": {"view": {"share": float(rng.uniform()), "chance": 0.5, "n": 40}}},
        "audit": {"missing": "8 held-out images are too few"},
        "utility": {"missing": "not asked for"},
    }
    (cell / "metrics.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made_cells(tmp_path_factory):
    """The finished cells of four variants and three seeds: copies of two runs with other numbers."""
    out = tmp_path_factory.mktemp("compare") / "out"
    rng = np.random.default_rng(0)
    for adapter in ("selora", "lora"):
        short_run(out.parent / adapter, adapter=adapter)
        set_settings(out.parent / adapter, adapter=adapter, data="phantom", on_top_of=[], expand_interval=40, seed=0)
    for variant, count in COUNTS.items():
        for seed in SEEDS:
            cell = out / "cells" / f"{variant}-seed{seed}"
            shutil.copytree(out.parent / ("selora" if variant == "selora" else "lora"), cell)
            lines = [json.loads(line) for line in (cell / "log.jsonl").read_text().splitlines()]
            for entry in lines:
                if "validation" in entry:
                    entry["validation"] = float(rng.uniform(0.4, 0.8))
                if "seconds" in entry:
                    entry["seconds"] = 0.5 * entry["step"]
            (cell / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
            best = min([entry["validation"], entry["step"]] for entry in lines if "validation" in entry)
            counts = {"unet": [count, 10**6, count / 10**4]}
            edit_json(cell / "summary.json", parameters=counts, seconds=12.0, best=best)
            write_metrics(cell, rng)
    return out


@pytest.fixture
def out(made_cells, tmp_path):
    return shutil.copytree(made_cells, tmp_path / "out")


@pytest.fixture(autouse=True)
def no_data_and_no_drawing(request, monkeypatch):
    """The made-up runs have no data, and drawing takes most of the time; a test about the page draws."""

    def absent(run):
        raise InputError("the data is not here")

    monkeypatch.setattr("minildm.report.compare.RunData", absent)
    monkeypatch.setattr("minildm.report.read_run.embedded_hash", lambda: None)  # these runs record no base
    if "page" not in request.node.name:

        def undrawn(id, title, across, up, curves, words=None, log_x=False):
            return figures.Figure(title, "<svg></svg>", figures.describe(up, across, curves), id)

        monkeypatch.setattr(figures, "curves", undrawn)
        monkeypatch.setattr(comparison, "curves", undrawn)


def compare(out, with_images=False, seeds=SEEDS, failed=None, **changes):
    """Write the comparison of the cells. Returns: {(table, row, column): row of the CSV}, by short names of tables."""
    rows = variants(["selora", "lora", "adalora"], ranks=[1, 4])
    settings = CompareSettings(**({"steps": 12, "samples": 4} | changes))
    write_comparison(out, rows, cells_of(rows, seeds, out), settings, "the command", with_images, failed or {})
    lines = csv.DictReader(io.StringIO((out / "compare.csv").read_text()))
    return {(line["table"].split()[0], line["row"], line["column"]): line for line in lines}


def numbers(out, variant, read):
    return [read(read_run(out / "cells" / f"{variant}-seed{seed}")) for seed in SEEDS]


def test_means_and_deviations_are_those_of_the_files(out):
    found = compare(out)
    losses = numbers(out, "lora-rank4", lambda run: min(run.series("validation")[1]))
    cell = found["Quality", "lora r = 4", "validation loss"]
    assert float(cell["value"]) == pytest.approx(np.mean(losses)) and cell["n"] == "3"
    assert float(cell["deviation"]) == pytest.approx(np.std(losses, ddof=1))
    views = numbers(out, "selora", lambda run: run.results["metrics.json"]["adherence"]["fields"]["view"]["share"])
    assert float(found["Quality", "selora", "view as asked"]["value"]) == pytest.approx(100 * np.mean(views))
    assert float(found["Quality", comparison.REFERENCE, "FD-random-2048"]["value"]) == 0.5
    assert float(found["Trainable", "adalora", "both"]["value"]) == 9000
    assert found["Quality", "selora", "CLIP score"]["text"] == "missing: no CLIP weights (3 of 3 runs)"
    assert found["Cost", "selora", "estimate 1 + 1/t"]["text"] == "1.025"
    assert found["Cost", "selora", "measured / LoRA"]["text"] == "1.000"


def rows_of(text, title):
    """Cells of a Markdown table by its title."""
    part = text.split(f"### {title}", 1)[1].split("\n###", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line[:1] == "|"][
        2:
    ]


def test_paired_differences_match_scipy(out):
    compare(out)
    read = measures.fidelity("FD-random", 64)
    p_values = {}
    for variant in ("lora-rank1", "lora-rank4", "adalora"):
        pair = numbers(out, variant, read), numbers(out, "selora", read)
        p_values[variant] = stats.ttest_rel(*pair).pvalue, np.mean(pair[0]) - np.mean(pair[1])
    in_order = sorted(p_values, key=lambda name: p_values[name][0])
    largest, holm = 0, {}
    for k, name in enumerate(in_order):
        largest = holm[name] = max(largest, min(1, (3 - k) * p_values[name][0]))
    found = {
        row[0].split(" −")[0]: row
        for row in rows_of((out / "compare.md").read_text(), "Paired differences from selora")
        if row[1] == "FD-random-64"
    }
    for name, label in (("lora-rank1", "lora r = 1"), ("lora-rank4", "lora r = 4"), ("adalora", "adalora")):
        assert float(found[label][2]) == pytest.approx(p_values[name][1], abs=6e-4)
        assert float(found[label][4]) == pytest.approx(holm[name], abs=6e-5)
        significant = holm[name] < 0.05
        assert ("not significant with 3 seeds" in found[label][5]) == (not significant)


def test_equal_parameters_interpolates_lora_between_its_ranks(out):
    compare(out)
    read = measures.validation
    at = np.log(2000 / 1000) / np.log(4000 / 1000)
    low, high, own = (np.array(numbers(out, name, read)) for name in ("lora-rank1", "lora-rank4", "selora"))
    expected = np.mean(own - ((1 - at) * low + at * high))
    rows = rows_of((out / "compare.md").read_text(), "Equal parameters")
    first = next(row for row in rows if row[0].startswith("selora") and row[1] == "validation loss")
    assert float(first[2]) == pytest.approx(expected, abs=6e-5)
    outside = next(row for row in rows if row[0].startswith("adalora") and row[1] == "validation loss")
    assert "missing" in outside[2] and "9,000 parameters lie outside" in (out / "compare.md").read_text()


def test_one_seed_is_not_tested(out):
    compare(out, seeds=(0,))
    text = (out / "compare.md").read_text()
    assert "not tested with 1 seed" in text and "one seed gives no interval" in text and "nan" not in text


def test_cells_that_are_missing_or_failed_are_said_in_every_form(out):
    shutil.rmtree(out / "cells" / "adalora-seed1")
    failed = {out / "cells" / "lora-rank1-seed0": "lora r = 1, seed 0: train.py ended with code 2"}
    compare(out, failed=failed)
    for form in ("md", "tex", "csv", "html"):
        text = (out / f"compare.{form}").read_text()
        assert "adalora, seed 1 has not been trained to its end yet" in text, form
        assert "ended with code 2" in text, form


def test_a_copied_comparison_gives_the_same_files(out, made_cells):
    compare(out)
    compare(made_cells)
    for form in ("md", "tex", "csv", "html"):
        assert (out / f"compare.{form}").read_bytes() == (made_cells / f"compare.{form}").read_bytes()


def test_the_page_of_a_comparison_is_sound_and_small(out):
    compare(out, seeds=(0,))
    text = (out / "compare.html").read_text(encoding="utf-8")
    page = check_page(text)
    assert len(text) < 1e6  # of 4 runs; the limit is 10 MB for 15 runs
    assert [tag for tag, _ in page.tags].count("svg") >= 6
    assert "In words" in page.texts and "the data cannot be opened here" in text


def test_images_and_captions_need_the_flag_unless_the_data_is_procedural(out, monkeypatch):
    cell, caption = out / "cells" / "selora-seed0", '<script>x</script> "private"'
    (cell / "generated").mkdir()
    for i in range(4):
        save_png(Image.new("RGB", (32, 32)), cell / "generated" / f"{i:05d}-seed{i}.png", caption)

    class Opened:
        """In place of the run's data, which these made-up runs do not have."""

        def __init__(self, run):
            record = cell / "generated" / "00000-seed0.png"
            self.transform, self.held_out = None, type("Part", (), {"images": (record,) * 4})
            self.requests, self.prompts = (lambda n: [record] * n), (lambda n: [caption] * n)

    monkeypatch.setattr("minildm.report.compare.RunData", Opened)
    compare(out)
    page = check_page((out / "compare.html").read_text())
    assert caption in page.texts and any(href.startswith("data:image") for href in page.hrefs)
    for seed in SEEDS:
        for variant in COUNTS:
            set_settings(out / "cells" / f"{variant}-seed{seed}", data="folder:/patients")
    compare(out)
    text = (out / "compare.html").read_text()
    assert "private" not in text and "data:image" not in text and "images are left out" in text
    compare(out, with_images=True)
    assert caption in check_page((out / "compare.html").read_text()).texts


def test_the_validation_loss_is_that_of_the_weights_that_were_kept(out):
    """AdaLoRA's lowest loss may come before its ranks are decided, from weights that it may not keep."""
    edit_json(out / "cells" / "adalora-seed0" / "summary.json", best=[0.9, 12])
    assert measures.validation(read_run(out / "cells" / "adalora-seed0")) == 0.9


@pytest.mark.parametrize("name", ["base", "pixels", "data"])
def test_cells_on_different_bases_or_data_are_not_compared(name, out):
    path = out / "cells" / "lora-rank4-seed1" / "config.json"
    edit_json(path, found=json.loads(path.read_text())["found"] | {name: "other"})
    with pytest.raises(InputError, match=f"lora-rank4-seed1 differ in their {name}"):
        compare(out)


def test_prompts_and_reference_are_spread_over_images_sorted_by_class():
    items = [f"{kind}{i}" for kind in "ab" for i in range(5)]
    assert spread_out(items, 4) == ["a0", "a2", "b0", "b2"]
    assert spread_out(items, 12) == [*items, "a0", "a1"]


def test_the_forecasts_flags_suit_a_split_without_validation(monkeypatch):
    def only_parse(cell, flags, device):
        parse_training([*flags, *cell.variant.flags, "--out", str(cell.folder)])
        raise CellFailed("parsed")

    monkeypatch.setattr(forecast, "train_cell", only_parse)
    flags = ["--data", "phantom", "--split", "80/20"]
    with pytest.raises(InputError, match=r"cannot be trained as planned \(parsed\)"):
        forecast.forecast(variants(["lora"]), flags, [], (), 10, 4, 1, None)


def test_a_suspended_machine_changes_no_time_per_step(out):
    cell = out / "cells" / "lora-rank4-seed0"
    steps = [0.2, 0.2, 0.4, 600.0, 0.2, 2.1]  # one tests, one is suspended, the last validates
    clock = np.cumsum(steps)
    entries = [{"step": i, "seconds": float(at)} for i, at in enumerate(clock, 1)]
    (cell / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert comparison._per_step(read_run(cell)) == pytest.approx(0.25)


# --- evaluation ------------------------------------------------------------------------------------------------------
class Brightness:
    """An extractor of two depths that counts what it describes, and stops like a killed process after ``limit``."""

    label, dims, facts = "FD-brightness", (3, 1), {"weights": "none"}

    def __init__(self, limit=math.inf):
        self.described, self.limit = 0, limit

    def prepare(self, image):
        return torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 3

    def network(self, x):
        self.described += len(x)
        if self.described > self.limit:
            raise KeyboardInterrupt
        mean = x.mean((2, 3))
        return {3: mean, 1: mean.sum(1, keepdim=True)}


def evaluator(tmp_path, monkeypatch, extractor):
    one = Evaluator(tmp_path / "features", device="cpu", batch_size=4)
    monkeypatch.setattr(one, "extractors", [extractor], raising=False)
    return one


def test_real_images_are_described_once_whatever_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("minildm.report.evaluate.ROWS_PER_SHARD", 8)
    records, transform = open_data_set("phantom:20").records, Transform(size=64)
    whole = evaluator(tmp_path / "whole", monkeypatch, Brightness())
    whole.describe_real(records, transform)
    ended = evaluator(tmp_path, monkeypatch, Brightness(limit=12))
    with pytest.raises(KeyboardInterrupt):
        ended.describe_real(records, transform)
    again = evaluator(tmp_path, monkeypatch, Brightness())
    again.describe_real(list(reversed(records)), transform)
    assert whole.extractors[0].described == len(records) and again.extractors[0].described == len(records) - 8
    for dim in (3, 1):
        for record in records:
            ours, theirs = (one.rows["FD-brightness", dim][record.name] for one in (again, whole))
            assert np.array_equal(ours, theirs) and ours.shape == (dim,)


def test_features_on_disk_are_those_of_this_image_and_reading(tmp_path, monkeypatch):
    folder(tmp_path / "data", 3)
    spec = f"folder:{tmp_path / 'data'}"

    def described(size=64):
        one = evaluator(tmp_path, monkeypatch, Brightness())
        one.describe_real(open_data_set(spec).records, Transform(size=size))
        return one.extractors[0].described

    assert described() == 3 and described() == 0 and described(size=32) == 3
    record = open_data_set(spec).records[0]
    Image.new("RGB", (64, 64), "white").save(record.path)
    assert described() == 1


# --- killed and continued --------------------------------------------------------------------------------------------
def command(place, out):
    words = ["--data", f"folder:{place / 'data'}", "--base", str(place / "base"), "--methods", "lora", "selora"]
    words += ["--seeds", "0", "--steps", "12", "--samples", "3", "--sampling-steps", "2"]
    words += ["--replicates", "5", "--device", "cpu", "--out", str(out), "--", "--cache", str(place / "cache")]
    words += ["--split", "70/10/20", "--batch-size", "4", "--save-interval", "4", "--validation-interval", "6"]
    return [sys.executable, "-m", "minildm", "compare", *words]


@pytest.mark.stress
def test_kill_9_at_any_moment_changes_no_table(tmp_path):
    write_folder(small_model(), tmp_path / "base")
    folder(tmp_path / "data", 20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.run(command(tmp_path, whole), capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    for seconds in (6, 11, 16):
        process = subprocess.Popen(
            command(tmp_path, killed), env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = subprocess.run(command(tmp_path, killed), capture_output=True, text=True, env=environment)
    assert last.returncode == 0, last.stderr

    def lines(out):
        rows = csv.DictReader(io.StringIO((out / "compare.csv").read_text()))
        return [row for row in rows if row["table"] != "Cost"]

    assert lines(whole) == lines(killed) and len(lines(whole)) > 20
    check_page((killed / "compare.html").read_text())
    assert "2 of 2 cells are complete" in last.stdout
    assert not isinstance(read_run(killed / "cells" / "selora-seed0").ranks(), Missing)
