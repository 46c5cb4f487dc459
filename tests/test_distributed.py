"""Several processes, started by torchrun on this machine with gloo: they do what one does; and when one dies."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import work_together
from made_data import folder as write_data
from made_runs import small_model
from peers import write_folder
from test_training_runs import as_flags, flag_values
from work_together import RUNS, short

import train
from minildm import distributed, torchrun
from minildm.__main__ import main as command
from minildm.errors import InputError
from minildm.training import machine
from minildm.training import run as run_module
from minildm.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, data, and a cache that is filled by the first run."""
    root = tmp_path_factory.mktemp("together")
    write_folder(small_model(), root / "base")
    write_data(root / "data", 20)
    write_data(root / "held-out", 10)
    (root / "prompts.txt").write_text("".join(f"a chest x-ray, number {i}\n" for i in range(5)))
    return root


def flags(place, out, **changes):
    """A batch of 3, which 2 and 4 processes share unevenly, in float32: in bfloat16, the default on some CPUs, another
    order of the same sums gives other weights."""
    return as_flags(flag_values(place) | {"batch_size": 3, "seed": 0, "dtype": "float32", "out": out} | changes)


def start(n, *words, options=(), **environment):
    """torchrun with n processes on this machine, each with one thread. Returns: Popen."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | environment
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", str(n), *options, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    """Wait for it. Returns: what it printed."""
    said = process.communicate(timeout=240)[0]
    assert process.returncode == code, said
    return said


def errors(said):
    """The lines in which a process names itself."""
    return re.findall(r"^(?:\[rank\d+\]: )?(process \d+ of \d+ \(RANK \d+ on .*)$", said, re.MULTILINE)


def workers(process):
    """{RANK: number of the process} of those that torchrun has started."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        entries = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        ranks = [entry.partition("=")[2] for entry in entries if entry.startswith("RANK=")]
        found |= {int(rank): int(child) for rank in ranks}
    return found


def wait_for_steps(run, n, process):
    """Return when the run has logged n steps more."""
    log = run / "log.jsonl"
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines + n):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]


def entries(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_training(run, other, tolerance):
    """The same ranks and, to ``tolerance``, weights, losses, Fisher ratios and validations."""
    ours, theirs = (torch.load(folder / "last" / "state.pt", weights_only=True) for folder in (run, other))
    assert ours["step"] == theirs["step"] and ours["best"][1] == theirs["best"][1]
    for part in ("trained", "average"):
        assert list(ours[part]) == list(theirs[part])
        a, b = (flat(state[part].values()) for state in (ours, theirs))
        assert (a - b).norm() <= tolerance * b.norm()
    logs = [entries(folder) for folder in (run, other)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for name in ("step", "ranks", "grown", "budget", "active_rank"):
            assert a.get(name) == b.get(name), name
        for name in ("loss", "grad_norm", "penalty", "validation"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=tolerance), name
        if "fisher_ratios" in a:
            assert a["fisher_ratios"] == pytest.approx(b["fisher_ratios"], rel=10 * tolerance)


def flat(tensors):
    return torch.cat([torch.empty(0).double(), *(tensor.flatten().double() for tensor in tensors)])


# --- the same training -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: the run of each method, and the first steps of one that others continue."""
    root = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        short(root / name, name)
    return root


def together(n, root):
    short(root / "begun", "selora", steps=3)
    shutil.copytree(root / "begun", root / "resumed")  # this process holds the lock of the other
    finish(start(n, "tests/work_together.py", "everything", root))
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return together(4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_on_an_uneven_batch(name, alone, two):
    assert_same_training(two / name, alone / name, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_four_processes_train_as_one_though_one_has_no_sample(name, alone, four):
    assert_same_training(four / name, alone / name, 1e-5)


def test_a_run_continues_with_another_number_of_processes(alone, two):
    assert_same_training(two / "resumed", alone / "selora", 1e-5)


@pytest.mark.slow
def test_a_run_continues_with_four_processes(alone, four):
    assert_same_training(four / "resumed", alone / "selora", 1e-5)


def test_each_image_and_prompt_is_encoded_by_one_process_and_found_by_all(two):
    counts = [json.loads((two / f"cached-{index}.json").read_text()) for index in (0, 1)]
    images, prompts = ([count[kind] for count in counts] for kind in ("images", "prompts"))
    assert sum(images) == 20 and min(images) == 8  # 5 blocks of 4
    assert sum(prompts) == 11 and min(prompts) >= 3


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(two):
    """That all end with the same weights is asserted by the processes themselves."""
    steps = [entry.get("skipped") for entry in entries(two / "skipped") if "loss" in entry]
    assert steps == [None, None, 1, None, None, None]


def test_the_first_process_alone_writes_the_run(alone, two):
    for name in RUNS:
        files = [
            sorted(p.relative_to(root / name).as_posix() for p in (root / name).rglob("*") if p.is_file())
            for root in (alone, two)
        ]
        assert files[0] == files[1]
        assert len([e for e in entries(two / name) if "loss" in e]) == 6


def test_sums_are_exact_of_every_type_and_in_every_process(two):
    first, second = (torch.load(two / f"sums-{index}.pt") for index in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    halves, small, strided, number = first
    assert torch.equal(halves, torch.full((3, 5), 2.0)) and number == 1
    assert torch.equal(small, torch.full((2,), 3 * 2.0**-200, dtype=torch.float64))
    assert torch.equal(strided, 2 * torch.arange(40.0).view(8, 5))


def test_a_parameter_without_a_gradient_in_any_process_still_has_none(two):
    for index in (0, 1):
        loss, both, one, none = torch.load(two / f"gradients-{index}.pt")
        assert loss == 1 and none is None
        assert torch.equal(both, torch.full((2,), 3.0)) and torch.equal(one, torch.ones(2))


# --- the same images and measures ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_processes_share_images_features_and_audit_and_change_no_number(place, tmp_path):
    work_together.use(place, tmp_path / "one")
    finish(start(2, "tests/work_together.py", "use", place, tmp_path / "two"))
    one, two = tmp_path / "one", tmp_path / "two"
    files = sorted(path.relative_to(one) for path in one.rglob("*.*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*.*") if path.is_file())
    assert len(files) == 5 + 1 + 1 + 2  # images, their sheet, fid.json, audit.json and .png
    for path in files:
        if path.suffix == ".png" and path.parent.name in ("images", "sheets"):
            assert (one / path).read_bytes() == (two / path).read_bytes(), path
    for name in ("fid.json", "audit/audit.json"):
        ours, theirs = (json.loads((root / name).read_text()) for root in (one, two))
        assert ours | {"fake": "", "generated": ""} == theirs | {"fake": "", "generated": ""}


@pytest.mark.slow
def test_processes_share_the_cells_of_a_comparison(place, tmp_path):
    flags = f"--data folder:{place}/data --base {place}/base --methods lora selora --seeds 0 --steps 3 --samples 3"
    words = f"{flags} --sampling-steps 2 --replicates 2 --device cpu".split()
    more = f"-- --cache {place}/cache --batch-size 4 --split 70/10/20".split()
    assert command(["compare", *words, "--out", str(tmp_path / "one"), *more]) == 0
    finish(start(2, "-m", "minildm", "compare", *words, "--out", tmp_path / "two", *more))
    tables = []
    for name in ("one", "two"):
        rows = csv.DictReader(io.StringIO((tmp_path / name / "compare.csv").read_text()))
        tables.append([row for row in rows if row["table"] != "Cost"])
    assert tables[0] == tables[1] and len(tables[0]) > 10
    log = (tmp_path / "two" / "cells" / "selora-seed0" / "sessions.jsonl").read_text()
    assert '"processes"' not in log  # a cell is a run of one process


# --- shares ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [0, 1, 5, 8, 13])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_shares_and_turns_hold_each_item_once(monkeypatch, n, count):
    shares, turns = [], []
    for index in range(count):
        monkeypatch.setitem(distributed.GROUP, "index", index)
        monkeypatch.setitem(distributed.GROUP, "count", count)
        shares.append(distributed.share(range(n)))
        turns.append(distributed.turns(range(n)))
        assert sorted(distributed.own_first(list(range(n)))) == list(range(n))
        assert list(distributed.own_first(list(range(n))))[: len(shares[-1])] == list(shares[-1])
    assert [i for share in shares for i in share] == list(range(n))
    assert sorted(i for turn in turns for i in turn) == list(range(n))
    assert max(map(len, shares)) == distributed.share_size(n) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_buckets_keep_the_order_of_each_type_and_stay_below_their_size():
    a, b, c, d = (torch.zeros(n) for n in (10, 20, 30, 100))
    double = torch.zeros(5, dtype=torch.float64)
    assert [[id(t) for t in bucket] for bucket in distributed.buckets([a, b, double, c, d], 240)] == [
        [id(t) for t in bucket] for bucket in ([a, b, c], [d], [double])
    ]


# --- starts ----------------------------------------------------------------------------------------------------------
ENVIRONMENT = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"}
ENVIRONMENT |= {"MASTER_ADDR": "10.0.0.1", "TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture
def launched(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_the_command_that_continues_a_run_starts_as_many_processes(launched, monkeypatch, tmp_path):
    assert Run(tmp_path / "run", {}).continue_with.startswith("torchrun --nnodes 2 ... --nproc-per-node 4 train.py --r")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert torchrun.launcher() == "torchrun --nproc-per-node 4"
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process is no different from python
    assert torchrun.launcher() == "python" and not torchrun.launched()


def test_each_process_takes_the_gpu_of_its_number(launched, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert torchrun.own_device("cuda") == torchrun.own_device("cuda:1") == "cuda:1" and chosen == [1, 1]
    assert torchrun.own_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device cuda:3 is one GPU for all processes; give --device cuda"):
        torchrun.own_device("cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="4 processes on a machine with 1 GPUs; give torchrun --nproc-per-node 1"):
        torchrun.own_device("cuda")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_no_number_of_seconds_is_named(launched, monkeypatch, text):
    monkeypatch.setenv("MINILDM_TIMEOUT", text)
    with pytest.raises(InputError, match=f"MINILDM_TIMEOUT must be a number of seconds, at least 1, got '{text}'"):
        distributed.join()


# --- train.py, and what goes wrong -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(place):
    """The undisturbed run of one process."""
    assert train.main(flags(place, place / "whole")) == 0
    return place / "whole"


def test_a_killed_process_ends_the_others_with_one_clear_error(place, whole, tmp_path):
    """Processes 1 and 3 wait for process 2, which stands still, and then is killed. The rest of the run is resumed."""
    run = tmp_path / "run"
    process = start(3, "train.py", *flags(place, run))
    wait_for_steps(run, 7, process)
    victim = workers(process)[1]
    os.kill(victim, signal.SIGSTOP)
    time.sleep(0.5)  # the others wait in the next sum
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    said = finish(process, code=1)
    assert time.monotonic() - begun < 30
    assert said.count("memory: about") == 1  # only the first speaks
    found = sorted(errors(said))
    named = [
        line.partition(" (")[0] for line in found
    ]  # torchrun may end one before it has said that the other has gone
    assert named and len(set(named)) == len(named) and {*named} <= {"process 1 of 3", "process 3 of 3"}
    for line in found:
        assert "error: lost the connection to another process, which has ended or cannot be reached" in line
        assert f"continue with: torchrun --nproc-per-node 3 train.py --resume {run}" in line
    assert train.main(["--resume", str(run)]) == 0
    assert_same_training(run, whole, 1e-5)


@pytest.mark.slow
def test_the_process_that_failed_says_so(tmp_path):
    said = finish(start(2, "tests/work_together.py", "fail", tmp_path), code=1)
    assert said.count("ZeroDivisionError: division by zero") == 1  # its traceback
    (line,) = (line for line in errors(said) if line.startswith("process 2 of 2"))
    resume = f"continue with: torchrun --nproc-per-node 2 train.py --resume {tmp_path / 'run'}"
    assert "error: ZeroDivisionError" in line and line.endswith(resume)
    assert all("lost the connection" in other for other in errors(said) if other != line)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one process", "torchrun"])
def test_a_signal_stops_all_processes_after_the_same_step(place, whole, tmp_path, whom):
    """torchrun passes it on to all processes, also to those that read ahead."""
    run = tmp_path / "run"
    process = start(2, "train.py", *flags(place, run, save_interval=100, workers=1))
    wait_for_steps(run, 5, process)
    number = workers(process)[1] if whom == "one process" else process.pid
    os.kill(number, signal.SIGTERM)
    said = finish(process, code=1)
    (step,) = re.findall(r"stopped at step (\d+) of 12; the state is saved. Continue with: torchrun", said)
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    assert state["step"] == int(step) < 12
    assert entries(run)[-1]["step"] == int(step)
    finish(start(2, "train.py", "--resume", run))
    assert_same_training(run, whole, 1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_a_signal_that_torchrun_repeats_is_one(launched, monkeypatch, together):
    if not together:
        monkeypatch.delenv("RANK")
    with machine.stop_requests() as stops:
        signal.raise_signal(signal.SIGTERM)
        if together:
            signal.raise_signal(signal.SIGTERM)
            assert stops
            monkeypatch.setattr(machine, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_another_file_on_another_host_is_refused(monkeypatch, tmp_path):
    new = Run(tmp_path / "run", {})

    def from_first(function):  # only what the two have found is a dict with a base
        told = function()
        return told | {"base": "a"} if "base" in (told or ()) else told

    monkeypatch.setattr(run_module, "from_first", from_first)
    with pytest.raises(InputError, match="this process found base = 'b', the first one 'a'; give all hosts the same"):
        new.begin(base="b", data="c")


def test_other_commands_refuse_torchrun(launched):
    with pytest.raises(InputError, match="prompts works in one process; start it without torchrun"):
        command(["prompts", "phantom"])


@pytest.mark.parametrize("mistake", [{"base": "nowhere"}, {"adapter": "nowhere"}])
def test_a_mistake_of_the_user_is_printed_once(mistake, place, tmp_path):
    said = finish(start(2, "train.py", *flags(place, tmp_path / "run", **mistake)), code=1)
    assert len(errors(said)) == 1 and "nowhere" in errors(said)[0]


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_given_up_after_the_timeout(place, tmp_path):
    run = tmp_path / "run"
    process = start(2, "train.py", *flags(place, run, steps=1000), MINILDM_TIMEOUT="4")
    wait_for_steps(run, 5, process)
    stopped = workers(process)[0]
    os.kill(stopped, signal.SIGSTOP)
    begun = time.monotonic()
    line = next(line for line in process.stdout if errors(line))
    assert 3 < time.monotonic() - begun < 20
    assert line.startswith("process 2 of 2") and "Timed out" in line and "--resume" in line
    os.kill(stopped, signal.SIGKILL)  # torchrun itself would take half a minute
    finish(process, code=1)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(place, tmp_path):
    """It ends with the weights of an undisturbed run of as many processes, to the last bit."""
    finish(start(2, "train.py", *flags(place, tmp_path / "whole")))
    run = tmp_path / "run"
    process = start(2, "train.py", *flags(place, run), options=("--max-restarts", "1"))
    wait_for_steps(run, 7, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    finish(process)
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 2
    assert_same_training(run, tmp_path / "whole", 0)


@pytest.mark.stress
def test_ten_kills_of_one_of_four_processes_change_nothing(place, tmp_path):
    finish(start(4, "train.py", *flags(place, tmp_path / "whole", steps=60)))
    run, rng, killed = tmp_path / "run", random.Random(0), 0
    process = start(4, "train.py", *flags(place, run, steps=60), options=("--max-restarts", "10"))
    while killed < 10:
        wait_for_steps(run, rng.randint(2, 6), process)
        time.sleep(rng.uniform(0, 0.1))
        victims = workers(process)
        if len(victims) == 4:
            os.kill(victims[rng.randrange(4)], signal.SIGKILL)
            killed += 1
            sessions = len((run / "sessions.jsonl").read_text().splitlines())
            while process.poll() is None and len((run / "sessions.jsonl").read_text().splitlines()) == sessions:
                time.sleep(0.05)
    finish(process)
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 11
    assert_same_training(run, tmp_path / "whole", 0)


# --- two hosts: network namespaces of this machine, each with an address of its own -----------------------------------
ADDRESSES = {"host-a": "10.77.23.1", "host-b": "10.77.23.2"}


@pytest.fixture
def hosts():
    """Two network namespaces joined by one cable; only root may make them."""
    names = {name: f"minildm-{name[-1]}-{os.getpid()}" for name in ADDRESSES}
    made = [["ip", "netns", "add", name] for name in names.values()]
    a, b = names.values()
    made.append(["ip", "-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b])
    for name, address in ADDRESSES.items():
        inside = ["ip", "-n", names[name]]
        made += [[*inside, "addr", "add", f"{address}/24", "dev", "cable"]]
        made += [[*inside, "link", "set", link, "up"] for link in ("lo", "cable")]
    try:
        for command in made:
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield names
    for name in names.values():
        subprocess.run(["ip", "netns", "del", name], check=True)


def start_hosts(hosts, n, *words, options=(), port=29400, **environment):
    """torchrun on both hosts, n processes on each; it finds the other by ``options``, or by numbers and an address.
    Returns: two Popen."""
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", str(n), *options]
    first = ["--master-addr", ADDRESSES["host-a"], "--master-port", str(port)]
    started = []
    for number, (name, namespace) in enumerate(hosts.items()):
        place = [*first, "--node-rank", str(number)]
        if options:  # both namespaces have this machine's name, by which torchrun would know the host of the meeting
            place = ["--local-addr", ADDRESSES[name], "--rdzv-conf", f"is_host={number == 0}"]
        inside = ["ip", "netns", "exec", namespace, *command, *place, *map(str, words)]
        pipes = {"stdout": -1, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        started.append(subprocess.Popen(inside, env=os.environ | shared | environment, **pipes))
    return started


@pytest.mark.stress
def test_two_hosts_train_as_one_process_and_notice_a_cut_cable(place, whole, hosts, tmp_path):
    run = tmp_path / "run"
    for process in start_hosts(hosts, 2, "train.py", *flags(place, run)):
        finish(process)
    assert_same_training(run, whole, 1e-5)

    cut, length = tmp_path / "cut", {"steps": 200, "validation_interval": 100}
    processes = start_hosts(hosts, 2, "train.py", *flags(place, cut, **length), port=29401, MINILDM_TIMEOUT="8")
    wait_for_steps(cut, 20, processes[0])
    subprocess.run(["ip", "-n", hosts["host-a"], "link", "set", "cable", "down"], check=True)
    begun, found = time.monotonic(), []
    for process in processes:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 1
        found += errors(said)
    print(f"{time.monotonic() - begun:.1f} s after the cut:", *found, sep="\n")
    assert len(found) == 4 and all("lost the connection" in line and f"--resume {cut}" in line for line in found)
    subprocess.run(["ip", "-n", hosts["host-a"], "link", "set", "cable", "up"], check=True)
    state = torch.load(cut / "last" / "state.pt", weights_only=True)
    assert 16 <= state["step"] < 200
    for process in start_hosts(hosts, 2, "train.py", "--resume", cut, port=29402):
        finish(process)
    assert train.main(flags(place, tmp_path / "undisturbed", **length)) == 0
    assert_same_training(cut, tmp_path / "undisturbed", 1e-4)


@pytest.mark.stress
def test_two_hosts_start_again_when_one_loses_a_process(place, hosts, tmp_path):
    """As under Slurm: the hosts meet by --rdzv-backend c10d, and only the one that lost a process counts a restart."""
    run, length = tmp_path / "run", {"steps": 60, "validation_interval": 30}
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES['host-a']}:29400", "--rdzv-id", "job-1"]
    options += ["--max-restarts", "3"]
    processes = start_hosts(hosts, 2, "train.py", *flags(place, run, **length), options=options)
    for host in (1, 0):
        wait_for_steps(run, 10, processes[0])
        os.kill(next(iter(workers(processes[host]).values())), signal.SIGKILL)
        sessions = len((run / "sessions.jsonl").read_text().splitlines())
        while processes[0].poll() is None and len((run / "sessions.jsonl").read_text().splitlines()) == sessions:
            time.sleep(0.05)
    for process in processes:
        finish(process)
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 3
    assert train.main(flags(place, tmp_path / "undisturbed", **length)) == 0
    assert_same_training(run, tmp_path / "undisturbed", 1e-4)
