"""Full disks, small limits, locks, leftovers and two processes at once: one line, nothing lost."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import made_data
import numpy as np
import pytest
import torch
from made_runs import factors, short_run
from metrics_helpers import write_images
from peers import assert_says, random_model, write_folder
from PIL import Image

from minildm import files
from minildm.config import ModelConfig, VAEConfig
from minildm.data.cache import Rows, latent_cache
from minildm.data.open import open_data_set
from minildm.data.reading import Transform
from minildm.errors import InputError, exit_cleanly, is_out_of_memory
from minildm.files import locked, read_json, temporary_path, written_beside
from minildm.images import save_png
from minildm.loading import EMBEDDED_ADAPTER
from minildm.metrics.frechet import SavedStatistics
from minildm.sampling import PlannedImage, save_planned
from minildm.training.command_line import parse
from minildm.training.run import Run
from minildm.vae import VAE

ROOT = Path(__file__).resolve().parent.parent


FEATURES = ["--features", "random", "--dims", "64"]


@contextmanager
def full_disk(room):
    """Inside, no file of this process can have more than ``room`` bytes: the system refuses the write, as a disk that
    is full does, with another errno."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run that has ended."""
    *_, run, _ = short_run(tmp_path_factory.mktemp("finished") / "run", steps=4)
    return run.folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- full disks ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, seed in (("real", 0), ("fake", 1), ("train", 2)):
        write_images(root / name, 10, seed, sizes=((40, 40),), modes=("L",))
    made_data.folder(root / "captioned", 6)
    return root


def fid(images, out):
    from minildm.metrics.fid_score import main

    main([str(images / "real"), str(images / "fake"), *FEATURES, "--out", str(out / "f.json")])


def statistics(images, out):
    from minildm.metrics.fid_score import main

    arguments = [*FEATURES, "--out", str(out / "f.json"), "--save-stats", str(out / "s.npz")]
    main([str(images / "real"), str(images / "fake"), *arguments])


def audit(images, out):
    from minildm.metrics.audit import main

    sources = ["--train", str(images / "train"), "--holdout", str(images / "real")]
    main([str(images / "fake"), *sources, "--features", "random", "--out", str(out)])


def check(images, out):
    from minildm.data.check import main

    main([f"folder:{images / 'captioned'}", "--size", "64", "--out", str(out)])


def sheet(images, out):
    save_png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)), out / "sheet.png", "sheet")


def cache(images, out):
    rows = Rows(out, "x", (64,))
    rows.add([b"k" * 32], torch.ones(1, 64))


def adapter(images, out):
    from made_runs import small_model

    from minildm.adapters import add_adapter, save_adapter

    model = small_model()
    add_adapter(model, "lora", rank=1)
    save_adapter(model, out / "adapter.safetensors")


def converted(images, out):
    from minildm.tools.convert import main

    main([str(EMBEDDED_ADAPTER), "--to", "kohya", "--out", str(out / "a.safetensors")])


def shrunk(images, out):
    from minildm.tools.shrink import main

    main([str(EMBEDDED_ADAPTER), "--rank", "1", "--out", str(out / "a.safetensors")])


def checkpoint(images, out):
    from minildm.checkpoint import NETWORKS, save_folder

    model = random_model(ModelConfig.tiny())
    save_folder({name: getattr(model, name) for name in NETWORKS}, model.config, out / "model")


@pytest.mark.parametrize(
    "write",
    [
        fid,
        statistics,
        pytest.param(audit, marks=pytest.mark.slow),
        check,
        sheet,
        cache,
        adapter,
        converted,
        shrunk,
        checkpoint,
    ],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(write, images, tmp_path, capsys):
    (tmp_path / "sheet.png").write_bytes(b"older")
    with pytest.raises(SystemExit) as end, full_disk(100):
        exit_cleanly(write, images, tmp_path)
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and error[-1].startswith("error: could not write ") and "File too large" in error[-1]
    assert "Traceback" not in "".join(error)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(name.startswith(".minildm") for name in left) and (tmp_path / "sheet.png").read_bytes() == b"older"


def test_a_run_on_a_full_disk_keeps_its_state_and_resumes_to_the_same_bits(tmp_path):
    (model, *_) = short_run(tmp_path / "whole")
    for room in (20_000, 300_000):  # in the first result, in a state
        folder = tmp_path / f"full{room}"
        with pytest.raises(InputError) as error, full_disk(room):
            short_run(folder)
        assert_says(error, "could not write", "too large", "continue with")
        assert not list(folder.rglob(".minildm-*"))
        resumed, *_ = short_run(folder, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(factors(model), factors(resumed), strict=True))


def test_output_into_a_full_disk_is_one_line():
    """Standard output itself: a redirection to a file system without room."""
    code = "from minildm.errors import exit_cleanly; exit_cleanly(lambda: print('x' * 10000))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "No space left on device" in result.stderr


def test_a_name_longer_than_the_file_system_allows_is_one_line(tmp_path, capsys):
    with written_beside(tmp_path / ("n" * 251 + ".txt")) as path:  # as long as names can be: the temporary one is short
        path.write_text("whole")
    assert os.listdir(tmp_path) == ["n" * 251 + ".txt"]
    with pytest.raises(SystemExit):
        exit_cleanly(sheet, None, tmp_path / ("n" * 300))
    assert capsys.readouterr().err.startswith("error: could not use ")


# --- the machine's limits --------------------------------------------------------------------------------------------
def test_a_cpu_without_memory_is_one_line(capsys):
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert is_out_of_memory(error.value) and not is_out_of_memory(RuntimeError("sizes must match"))
    with pytest.raises(SystemExit) as end:
        exit_cleanly(torch.empty, 1 << 50)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory; lower --batch-size")


def test_a_folder_that_refuses_chmod_and_fsync_loses_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(files.os, "fsync", refuse)
    with written_beside(tmp_path / "a") as path:
        path.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_a_disk_that_fails_at_fsync_replaces_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a").write_text("older")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"), written_beside(tmp_path / "a") as path:
        path.write_text("newer")
    assert contents(tmp_path) == {Path("a"): b"older"}


def test_a_file_system_without_locks_is_said_and_works(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks; start only one process"):
        Run(tmp_path / "run", {}).begin()
    with pytest.warns(UserWarning, match="has no locks"), Rows(tmp_path, "x", (1,)).locked("a", wait=True) as held:
        assert held


def test_a_file_system_without_hard_links_still_replaces_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    with written_beside(tmp_path / "a", replace=False) as path:
        path.write_text("first")
    with pytest.raises(FileExistsError), written_beside(tmp_path / "a", replace=False) as path:
        path.write_text("second")
    assert contents(tmp_path) == {Path("a"): b"first"}


# --- what killed writers leave ---------------------------------------------------------------------------------------
def test_what_a_killed_writer_leaves_is_removed_by_the_next_one_and_nothing_else(tmp_path):
    code = (
        "import os, sys; from minildm.files import written_beside\n"
        "with written_beside(sys.argv[1]) as path: path.write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "state.pt")], cwd=ROOT)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(f".minildm-{files.MACHINE}-")
    folder = tmp_path / f".minildm-{files.MACHINE}-999999999-merged"
    folder.mkdir()
    (folder / "half").write_text("")
    kept = [
        temporary_path(tmp_path / "mine.txt"),
        tmp_path / f".minildm-{files.MACHINE}-1-of_a_living_process",
        tmp_path / ".minildm-00000000-999999999-of_another_machine",
        tmp_path / ".state.12.pt",
        tmp_path / ".minildm-notes",
    ]
    for path in kept:
        path.write_text("")
    files.TIDIED.clear()
    with written_beside(tmp_path / "other.txt") as path:
        path.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"other.txt", *(path.name for path in kept)}
    os.utime(kept[2], (0, 0))
    files.TIDIED.clear()
    with written_beside(tmp_path / "other.txt") as path:
        path.write_text("whole")
    assert not kept[2].exists() and kept[1].exists()


# --- two processes ---------------------------------------------------------------------------------------------------
def save_images(folder, name, barrier, n):
    image = Image.new("L", (4, 4))
    barrier.wait()
    for i in range(n):
        save_planned(PlannedImage("p", 0, folder / "00000-seed0.png"), False, image, f"{name} {i}")


def begin(folder, barrier, results):
    run = Run(folder, {})
    barrier.wait()
    try:
        run.begin()
        results.put("begun")
        barrier.wait()  # holds the lock until the other has tried
    except InputError:
        results.put("refused")
        barrier.wait()


def add_rows(folder, name, barrier, n):
    rows = Rows(folder, "x", (4,))
    barrier.wait()
    for i in range(n):
        rows.add([bytes([name, i]) * 16], torch.full((1, 4), float(i)))


def run_both(target, each):
    """``each(number, barrier)`` gives the arguments of two processes, which are started and joined."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2, timeout=60)
    workers = [context.Process(target=target, args=each(i, barrier)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def assert_that_no_image_is_lost(folder, n):
    folder.mkdir(exist_ok=True)
    run_both(save_images, lambda i, barrier: (folder, "ab"[i], barrier, n))
    texts = {Image.open(path).info["parameters"] for path in folder.iterdir()}
    assert texts == {f"{name} {i}" for name in "ab" for i in range(n)}


def assert_that_one_begins_the_run(folder):
    results = multiprocessing.get_context("fork").Queue()
    run_both(begin, lambda i, barrier: (folder, barrier, results))
    assert sorted(results.get(timeout=10) for _ in range(2)) == ["begun", "refused"]
    read_json(folder / "config.json")


def assert_that_no_row_is_lost(folder, n):
    run_both(add_rows, lambda i, barrier: (folder, i, barrier, n))
    rows = Rows(folder, "x", (4,))
    assert len(rows.locations) == 2 * n and all(rows[bytes([i, k]) * 16][0] == k for i in range(2) for k in range(n))


def test_two_processes_that_save_images_at_once_lose_none(tmp_path):
    assert_that_no_image_is_lost(tmp_path, 20)


def test_of_two_processes_that_begin_a_run_at_once_one_is_refused(tmp_path):
    for i in range(5):
        assert_that_one_begins_the_run(tmp_path / str(i))


def test_two_processes_that_fill_a_cache_at_once_lose_nothing(tmp_path):
    assert_that_no_row_is_lost(tmp_path, 10)


def test_a_run_that_began_and_ended_meanwhile_is_not_overwritten(finished, tmp_path):
    late = Run(tmp_path / "run", {})
    shutil.copytree(finished, tmp_path / "run", dirs_exist_ok=True)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match="holds a run already"):
        late.begin()
    assert contents(tmp_path / "run") == before


def test_a_fixed_name_that_others_took_must_hold_the_same_image(tmp_path):
    png, image = PlannedImage("p", 0, tmp_path / "00000-seed0.png"), Image.new("L", (4, 4))
    save_png(image, png.path, "p\nSteps: 2")
    assert save_planned(png, True, image, "p\nSteps: 2") == png
    with pytest.raises(InputError, match=r"made with other settings \(Steps: 2\) than this command's \(Steps: 3\)"):
        save_planned(png, True, image, "p\nSteps: 3")


# --- damaged runs, caches, statistics --------------------------------------------------------------------------------
@pytest.mark.parametrize("change", ["deleted", "shortened", "state says 0", "state says more", "no end of line"])
def test_a_log_that_is_not_the_states_is_kept_and_said(change, run_folder):
    log, state = run_folder / "log.jsonl", run_folder / "last" / "state.pt"
    whole, saved = log.read_bytes(), torch.load(state, weights_only=True)
    if change == "deleted":
        log.unlink()
    elif change == "shortened":
        log.write_bytes(whole[:100])
    elif change == "no end of line":
        log.write_bytes(whole[:-1])
    else:
        torch.save(saved | {"log_bytes": 0 if change.endswith("0") else 10**6}, state)
    before = log.read_bytes() if log.exists() else b""
    for _ in range(1 if change == "no end of line" else 2):
        run = Run(run_folder, {"seed": 0}, resume=True)
        with pytest.warns(UserWarning, match="is not the log that the state was saved with"):
            run.load_state()
        run.log(step=99, loss=1.0)
        lines = log.read_bytes()
        assert lines.startswith(before) and b"\0" not in lines and lines.endswith(b"\n")
        assert run.log_bytes == len(lines)
        before = lines


def test_a_damaged_line_of_the_log_is_left_out_and_counted(run_folder):
    run = Run(run_folder, {"seed": 0}, resume=True)
    n = len(run.entries())
    with open(run.folder / "log.jsonl", "ab") as file:
        file.write(b'{"step": 1\n\xff\n[1]\n' + b"[" * 5000 + b"\n" + b'{"a": ' + b"1" * 5000 + b"}\n")
    with pytest.warns(UserWarning, match=r"5 damaged lines of the log are left out, the first: .*log.jsonl, line \d+"):
        assert len(run.entries()) == n


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda record: [], "expected a JSON object"),
        (lambda record: record | {"settings": []}, "settings is [], expected an object"),
        (lambda record: record | {"settings": record["settings"] | {"lr": [1]}}, "--lr must be"),
        (lambda record: record | {"settings": record["settings"] | {"adapter": "x"}}, "--adapter must be one of"),
        (lambda record: record | {"settings": record["settings"] | {"adapter": ["lora"]}}, "--adapter must be one of"),
    ],
)
def test_a_damaged_config_of_a_run_is_named(damage, words, tmp_path):
    record = {"settings": parse(["--adapter", "lora"]).settings, "found": {}}
    (tmp_path / "config.json").write_text(json.dumps(damage(record)))
    with pytest.raises(InputError) as error:
        parse(["--resume", str(tmp_path)])
    assert_says(error, words)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: [1],
        lambda state: {},
        lambda state: state | {"step": "x"},
        lambda state: state | {"step": -1},
        lambda state: state | {"trained": dict(list(state["trained"].items())[1:])},
        lambda state: state | {"trained": {name: torch.zeros(1) for name in state["trained"]}},
        lambda state: state | {"method": {"ranks": dict.fromkeys(state["method"]["ranks"], 10**9)}},
        lambda state: state | {"optimizer": {"ages": [], "means": [], "squares": []}},
    ],
)
def test_a_state_of_another_structure_is_named(damage, run_folder):
    path = run_folder / "last" / "state.pt"
    torch.save(damage(torch.load(path, weights_only=True)), path)
    with pytest.raises(InputError) as error:
        short_run(run_folder, resume=True, steps=4)
    assert_says(error, f"{path} is damaged", "--out")


@pytest.mark.parametrize(
    ("rows", "keys", "dtype"), [((4, 3), 4, torch.float16), ((4, 2), 4, torch.float32), ((3, 2), 4, torch.float16)]
)
def test_cached_rows_of_another_form_are_refused(rows, keys, dtype, tmp_path):
    from safetensors.torch import save_file

    folder = Rows(tmp_path, "x", (2,)).folder
    save_file(
        {"keys": torch.zeros(keys, 32, dtype=torch.uint8), "rows": torch.zeros(rows, dtype=dtype)},
        folder / "a.safetensors",
    )
    with pytest.raises(InputError, match=r"is not a complete cache file .* delete it"):
        Rows(tmp_path, "x", (2,))


def test_a_cached_row_that_is_not_finite_is_refused_when_it_is_read(tmp_path):
    from safetensors.torch import save_file

    keys = torch.full((1, 32), ord("k"), dtype=torch.uint8)
    rows = torch.tensor([[1.0, float("nan")]]).half()
    save_file({"keys": keys, "rows": rows}, Rows(tmp_path, "x", (2,)).folder / "a.safetensors")
    with pytest.raises(InputError, match="row 0 holds NaN or infinite numbers; delete it"):
        Rows(tmp_path, "x", (2,))[b"k" * 32]


def test_damaged_hashes_of_a_cache_are_found_out_again(tmp_path):
    vae = VAE(VAEConfig.tiny()).eval()
    data_set = open_data_set(f"folder:{made_data.folder(tmp_path / 'data', 3)}")
    latents = latent_cache(data_set.records, Transform(64), vae, tmp_path / "cache")
    (hashes,) = (tmp_path / "cache").rglob("*.json")
    for text in ("", "[]", '{"a": 1}', '{"a": "xyz"}', "[" * 5000):
        hashes.write_text(text)
        again = latent_cache(data_set.records, Transform(64), vae, tmp_path / "cache")
        assert torch.equal(again.moments(2)[0], latents.moments(2)[0])


def test_what_is_no_statistics_file_is_named(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.zeros(2), sigma=np.eye(2), n=5)
    data = (tmp_path / "whole.npz").read_bytes()
    for i, damage in enumerate((b"", data[:50], data[:-30], b"PK\x03\x04" * 30, data.replace(b"descr", b"dxscr"))):
        (tmp_path / f"{i}.npz").write_bytes(damage)
        with pytest.raises(InputError, match=rf"{i}\.npz cannot be read as statistics"):
            SavedStatistics(tmp_path / f"{i}.npz")


def test_one_process_can_lock_a_file_only_once_at_a_time(tmp_path):
    first = locked(tmp_path / "lock")
    assert first is not None and locked(tmp_path / "lock") is None
    first.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        locked(tmp_path / "lock").close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a user who may mount a file system")
def test_sampling_on_a_really_full_disk_is_one_line(tmp_path):
    """A file system of 64 kB in a mount namespace of its own."""
    write_folder(random_model(ModelConfig.tiny()), tmp_path / "base")
    (tmp_path / "small").mkdir()
    command = [sys.executable, "sample.py", "a", "-n", "30", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    command += ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "small" / "out")]
    mount = f'mount -t tmpfs -o size=64k none {tmp_path / "small"} && exec "$@"'
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", mount, "bash", *command], cwd=ROOT, capture_output=True, text=True
    )
    if "mount:" in result.stderr or "unshare:" in result.stderr:
        pytest.skip("no file system can be mounted here")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "No space left on device" in result.stderr.splitlines()[-1]
