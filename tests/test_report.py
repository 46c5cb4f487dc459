"""Reports on runs: every number from a file, nothing of a patient unasked, texts as texts, pages that parse."""

import html.parser
import itertools
import json
import random
import re
import shutil

import pytest
from made_runs import short_run
from peers import assert_says
from PIL import Image
from safetensors.torch import load_file, save_file

from minildm.errors import InputError
from minildm.images import save_png
from minildm.report import figures
from minildm.report.energy import EnergySettings, energy, energy_line
from minildm.report.figures import Curve, average_in_groups, describe
from minildm.report.page import main, write_report
from minildm.report.read_run import Missing, read_run, read_runs

VOID = {"meta", "img", "br", "hr", "link", "input", "col"}
SCRIPT = '<script>alert("1 & 2")</script>'


class Checker(html.parser.HTMLParser):
    """Collects what a page holds, and what is wrong with its structure."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.tags, self.ids, self.hrefs, self.texts = [], [], [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += [f"{tag} is not closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.hrefs += [value for name, value in attributes.items() if name in ("href", "xlink:href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def check_page(text):
    """The page's Checker, after checks that hold for every page."""
    page = Checker(text)
    assert page.wrong == []
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    for href in page.hrefs:  # nothing is fetched from anywhere
        assert href.startswith("data:") or (href.startswith("#") and href[1:] in page.ids), href
    assert "script" not in [tag for tag, _ in page.tags]
    for tag, attributes in page.tags:
        assert tag != "img" or attributes["alt"]
        assert attributes.get("role") != "img" or len(attributes["aria-label"]) > 20
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
    return page


def set_settings(folder, **changes):
    record = json.loads((folder / "config.json").read_text())
    record["settings"] |= changes
    (folder / "config.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def made_runs(tmp_path_factory):
    """Folders of two short runs: SeLoRA and DyLoRA."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    for adapter in ("selora", "dylora"):
        *_, run, _ = short_run(folder / adapter, adapter=adapter, sample_interval=6, samples=2)
        run.start_session(
            command=f"python train.py --adapter {adapter}", machine={"name": "CPU"}, versions={"torch": "2"}
        )
        set_settings(folder / adapter, adapter=adapter, data="phantom", on_top_of=[])
    return folder


@pytest.fixture(autouse=True)
def quick_figures(request, monkeypatch):
    """Figures without their drawing, which takes most of a report's time, but for tests that look at it."""
    if request.node.name not in ("test_a_report_shows_the_runs_numbers", "test_html_in_texts_appears_as_text"):

        def undrawn(id, title, across, up, curves, words=None, log_x=False):
            return figures.Figure(title, "<svg></svg>", words or figures.describe(up, across, curves), id)

        monkeypatch.setattr(figures, "curves", undrawn)


@pytest.fixture
def runs(made_runs, tmp_path):
    return shutil.copytree(made_runs, tmp_path / "runs")


def page_of(folders, tmp_path, **options):
    return write_report(folders, tmp_path / "page.html", **options).read_text(encoding="utf-8")


def test_a_report_shows_the_runs_numbers(runs, tmp_path):
    text = page_of([runs / "selora", runs / "dylora"], tmp_path)
    page = check_page(text)
    run = read_run(runs / "selora")
    shown = "".join(page.texts)
    assert f"{run.best()[0]:.4f} at step {run.best()[1]}" in shown
    for trained, total, _ in run.summary["parameters"].values():
        assert f"{trained:,} of {total:,}" in shown
    assert "python train.py --adapter dylora" in shown
    assert len([tag for tag, _ in page.tags if tag == "svg"]) >= 7
    assert len(text) < 1e6


def test_a_copied_run_gives_the_same_report(runs, made_runs, tmp_path):
    here, there = (page_of([folder / "selora"], tmp_path) for folder in (runs, made_runs))
    assert here == there


def test_every_number_comes_from_the_files(runs, tmp_path):
    before = page_of([runs / "selora"], tmp_path)
    log = (runs / "selora" / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in log]
    for key in ("validation", "loss", "seconds", "memory_mb", "lr"):
        changed = [json.dumps(e | ({key: 7.25 * e[key]} if key in e else {})) for e in entries]
        (runs / "selora" / "log.jsonl").write_text("\n".join(changed) + "\n")
        assert page_of([runs / "selora"], tmp_path) != before, key
    (runs / "selora" / "log.jsonl").write_text("\n".join(log) + "\n")
    assert page_of([runs / "selora"], tmp_path) == before
    summary = json.loads((runs / "selora" / "summary.json").read_text())
    summary["parameters"]["unet"][0] = 123_456_789
    (runs / "selora" / "summary.json").write_text(json.dumps(summary))
    assert "123,456,789" in page_of([runs / "selora"], tmp_path)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("summary.json", "the run has not ended"),
        ("sessions.jsonl", "no sessions.jsonl"),
        ("log.jsonl", "the log has no entry loss"),
    ],
)
def test_what_is_missing_is_said_with_its_reason(runs, tmp_path, file, reason):
    (runs / "selora" / file).unlink()
    page = check_page(page_of([runs / "selora"], tmp_path))
    assert reason in "".join(page.texts)


def test_without_an_adapter_there_is_no_rank_map(runs, tmp_path):
    (runs / "dylora" / "adapter.safetensors").unlink()
    assert isinstance(read_run(runs / "dylora").ranks(), Missing)
    assert "no adapter.safetensors" in page_of([runs / "dylora"], tmp_path)


def test_half_a_line_of_a_killed_run_is_left_out_and_said(runs, tmp_path):
    with open(runs / "selora" / "log.jsonl", "a") as log:
        log.write('{"step": 12, "lo')
    assert "1 of " in page_of([runs / "selora"], tmp_path) and "lines of log.jsonl" in page_of(
        [runs / "selora"], tmp_path
    )


def test_html_in_texts_appears_as_text(runs, tmp_path):
    odd = runs / "selora <b>&amp; $x_1$"
    (runs / "selora").rename(odd)
    set_settings(odd, prompt_template=SCRIPT, data="phantom")
    (odd / "generated").mkdir()
    save_png(Image.new("RGB", (32, 32)), odd / "generated" / "00000-seed0.png", f"{SCRIPT}\nSteps: 2")
    page = check_page(page_of([odd], tmp_path, with_images=True))
    assert sum(SCRIPT in text for text in page.texts) >= 2  # the setting and the caption
    assert "b" not in [tag for tag, _ in page.tags]


def test_images_of_patients_need_the_flag(runs, tmp_path, monkeypatch):
    run = runs / "selora"
    base = json.loads((run / "config.json").read_text())["found"].get("base")
    monkeypatch.setattr("minildm.report.read_run.embedded_hash", lambda: base)
    (run / "generated").mkdir()
    save_png(Image.new("RGB", (32, 32)), run / "generated" / "00000-seed0.png", "a private caption\nSteps: 2")
    assert "a private caption" in page_of([run], tmp_path)  # of procedural data: no patient
    for change in ({"data": "folder:/patients"}, {"on_top_of": ["other"]}, {}):
        set_settings(run, **{"data": "phantom", "on_top_of": []} | change)
        if not change:
            monkeypatch.setattr("minildm.report.read_run.embedded_hash", lambda: "another base's")
        text = page_of([run], tmp_path)
        assert "data:image" not in text and "a private caption" not in text
        assert "images are left out" in text and "contains images" not in text
        text = page_of([run], tmp_path, with_images=True)
        assert "data:image" in text and "a private caption" in text and "contains images and captions" in text


def test_an_audit_figure_needs_the_flag_whatever_the_data(runs, tmp_path):
    (runs / "selora" / "audit").mkdir()
    (runs / "selora" / "audit" / "audit.json").write_text('{"views": [], "pictures": []}')
    Image.new("RGB", (32, 32)).save(runs / "selora" / "audit" / "audit.png")
    assert "figure shows training images" in page_of([runs / "selora"], tmp_path)
    assert "most suspicious images" in page_of([runs / "selora"], tmp_path, with_images=True)


def test_an_image_carries_no_text_into_the_page(runs, tmp_path):
    save_png(Image.new("RGB", (32, 32)), runs / "selora" / "samples" / "step-000003.png", "secret words")
    assert "secret" not in page_of([runs / "selora"], tmp_path, with_images=True)


def test_results_of_the_metrics_are_found_and_shown(runs, tmp_path):
    folder = runs / "selora"
    fid = {"label": "FD-random", "n_real": 50, "n_fake": 40, "seed": 3, "features": {"weights": "random, seed 0"}}
    fid |= {
        "dims": {"64": {"distance": 1.2345, "low": 1.0, "high": 1.5}},
        "kid": {"value": 0.01, "low": -0.01, "high": 0.02},
    }
    (folder / "samples" / "fid.json").write_text(json.dumps(fid))
    clip = {
        "score": 21.5,
        "low": 20.0,
        "high": 23.0,
        "mismatched": 21.0,
        "n": 40,
        "cut": 0,
        "model": "ViT",
        "pretrained": "x",
    }
    (folder / "clip_score.json").write_text(json.dumps(clip))
    shown = "".join(check_page(page_of([folder], tmp_path)).texts)
    for text in (
        "FD-random, 64 dims",
        "1.234",
        "1.000 to 1.500",
        "40 against 50 real",
        "21.500",
        "random, seed 0, seed 3",
    ):
        assert text in shown, text


def test_differing_settings_are_marked(runs, tmp_path):
    set_settings(runs / "selora", lr=0.5, batch_size=4)
    set_settings(runs / "dylora", lr=0.25, batch_size=4)
    text = page_of([runs / "selora", runs / "dylora"], tmp_path)
    assert "≠ lr" in text and "≠ batch_size" not in text


def test_runs_of_one_name_are_told_apart(tmp_path, runs):
    shutil.copytree(runs / "selora", tmp_path / "other" / "selora")
    names = [run.name for run in read_runs([runs / "selora", tmp_path / "other" / "selora"])]
    assert names == ["runs/selora", "other/selora"]
    with pytest.raises(InputError, match="named twice"):
        read_runs([runs / "selora", runs / "selora"])


def test_many_points_are_averaged_and_words_describe_them():
    x, y = average_in_groups(list(range(1000)), [2.0 * i for i in range(1000)], points=10)
    assert len(x) == 10 and x[0] == 49.5 and y[0] == 99.0 and sum(x) / 10 == 499.5
    curves = [Curve("a", [0, 1, 2], [3.0, float("nan"), 1.0], 0), Curve("b", [], [], 1)]
    words = describe("loss", "step", curves)
    assert "a: 3 at 0, 1 at 2, lowest 1 at 2, highest 3 at 0." in words and "b: no finite value." in words


def test_energy_and_carbon_of_forty_hours_of_a_v100(runs):
    assert energy(40 * 3600, 300) == pytest.approx(12) and energy(40 * 3600, 300) * 0.3 == pytest.approx(3.6)
    run = read_run(runs / "selora")
    run.summary["seconds"] = 40 * 3600
    assert "3.6 kg CO2" in energy_line(run, EnergySettings(power=300, intensity=0.3))
    assert "--power" in energy_line(run, EnergySettings()).reason
    assert "give --intensity" in energy_line(run, EnergySettings(power=300))
    run.sessions[-1]["machine"]["power_limit_watts"] = 300
    assert energy_line(run, EnergySettings()).startswith("12 kWh")
    run.sessions[-1]["processes"] = 4  # trained together, each on a device of its own
    assert energy_line(run, EnergySettings()).startswith("48 kWh")
    assert energy_line(run, EnergySettings(power=300)).startswith("48 kWh")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not valid JSON"), ("[]", "expected a JSON object"), ("{}", "has no settings")]
)
def test_a_damaged_run_is_an_error_in_one_line(runs, content, message):
    (runs / "selora" / "config.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_run(runs / "selora")
    assert_says(error, message)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]"])
def test_damaged_metadata_of_an_adapter_are_an_error_in_one_line(runs, text):
    path = runs / "selora" / "adapter.safetensors"
    save_file(load_file(path), path, {"minildm": text})
    with pytest.raises(InputError) as error:
        read_run(runs / "selora")
    assert_says(error, f"{path}: metadata minildm", "JSON")


def test_the_command(runs, tmp_path, capsys):
    assert main([str(runs / "selora")]) == 0
    assert (runs / "selora" / "report.html").is_file() and "open it in a browser" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="holds no run"):
        main([str(tmp_path), "--out", str(tmp_path / "new" / "page.html")])
    assert not (tmp_path / "new").exists()


def test_files_with_odd_values_give_a_report_or_an_error_in_one_line(runs, tmp_path):
    """Any value in any of a run's JSON files may be of any type: written by another version, or edited."""
    rng, folder = random.Random(0), runs / "selora"
    fid = {"label": "FD", "n_real": 5, "n_fake": 4, "seed": 3, "features": {"weights": "w"}, "prdc": {"recall": 0.5}}
    fid |= {"dims": {"64": {"distance": 1.5, "low": 1.0, "high": 2.0}}, "kid": {"value": 1.0, "low": 0.0, "high": 2.0}}
    audit = {"views": [{"view": "pixels", "share": 0.5, "expected": 0.5, "p": 1.0, "near_copies": 0}], "pictures": []}
    adherence = {"fields": {"view": {"share": 0.5, "chance": 0.5, "n": 4, "low": 0.1, "high": 0.9}}, "ruler": "r"}
    for name, content in (("fid.json", fid), ("audit.json", audit), ("adherence.json", adherence)):
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.json").write_text(json.dumps({"fidelity": [fid], "audit": audit, "adherence": adherence}))
    files = ["config.json", "summary.json", "sessions.jsonl", "log.jsonl", "fid.json", "audit.json", "adherence.json"]
    before = {name: (folder / name).read_text() for name in [*files, "metrics.json"]}
    reports = 0
    for _ in range(120):
        name = rng.choice(list(before))
        lines = before[name].splitlines() if name.endswith("l") else [before[name]]
        which = rng.randrange(len(lines))
        lines[which] = json.dumps(mutated(json.loads(lines[which]), rng))
        (folder / name).write_text("\n".join(lines))
        try:
            page_of([folder], tmp_path)
            reports += 1
        except InputError as error:
            assert_says(error, name)
        (folder / name).write_text(before[name])
    assert reports > 80


def mutated(content, rng):
    """JSON content with one value, at any depth, replaced by one of another type, or removed."""
    content, at, key = json.loads(json.dumps([content])), None, None
    value = content
    while isinstance(value, (dict, list)) and value and (at is None or rng.random() < 0.8):
        at, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = at[key]
    if rng.random() < 0.2:
        del at[key]
    else:
        at[key] = rng.choice([None, "x", [], {}, -1, 1e300, True, {"x": []}, ["x"], float("nan")])
    return content[0] if content else None
