"""What more processes bring on this machine: python tests/benchmarks/bench_scaling.py [--model full] [--processes 1 2]

The same work by one process and by several, which torchrun starts with one thread each, by turns: a SeLoRA training
step with one global batch, the latent cache, sampling, FID's features. Efficiency is the time of one process over N
times that of N. Each turn is a new start; a row's time is the median over the turns.

    --model tiny    the embedded base (weights/tiny)
    --model full    networks of Stable Diffusion v1.5's shape with random weights, 224 px, for training and sampling
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIZES = {  # of the work, for each model
    "tiny": {"batch": 16, "side": 8, "images": 16, "pixels": 64, "cached": 2048, "features": 64},
    "full": {"batch": 4, "side": 28, "images": 4, "pixels": 224, "cached": 2048, "features": 64},
}


def base(model):
    import torch

    from minildm import load

    if model == "tiny":
        return load(ROOT / "weights" / "tiny", device="cpu", dtype=torch.float32)
    from made_runs import full_size_model

    return full_size_model(torch.float32)


def training(model, size, folder):
    from made_runs import samples, settings

    from minildm import kernels
    from minildm.adapters import METHODS
    from minildm.training.finetune import Finetuning
    from minildm.training.loop import train_step
    from minildm.training.state import State

    network = base(model)
    method_settings, config = settings(steps=1000, batch_size=size["batch"], rank=4, expand_interval=40)
    task = Finetuning(network, samples(2 * size["batch"], side=size["side"]), samples(0), config)
    method = METHODS["selora"](network, method_settings, 1000, 0)
    state, batches = State(method, config), iter(task.batches(0, 1000))

    def step():
        with kernels.lean():
            train_step(state, method, task, config, next(batches), 1e-4)
        state.step += 1

    return step


def summing(model, size, folder):
    """The sum of a training step alone."""
    import torch
    from made_runs import settings

    from minildm.adapters import METHODS
    from minildm.distributed import sum_over_processes

    method = METHODS["selora"](base(model), settings(rank=4)[0], 1000, 0)
    tensors = [torch.zeros(()), *map(torch.zeros_like, method.trained().values())]
    return lambda: sum_over_processes(tensors)


def caching(model, size, folder):
    import numpy as np
    from PIL import Image

    from minildm.data.cache import latent_cache
    from minildm.data.reading import Transform
    from minildm.data.records import Record
    from minildm.distributed import from_first, wait_for_all

    network, n = base("tiny"), size["cached"]
    paths = [folder / f"{i:05}.png" for i in range(n)]

    def write():
        rng = np.random.default_rng(0)
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(path)

    from_first(write)
    records = tuple(Record(path.name, path.name, path=path) for path in paths)
    calls = iter(range(1000))

    def build():
        latent_cache(records, Transform(64), network.vae, folder / f"cache-{next(calls)}", workers=1)
        wait_for_all()

    return build


def sampling(model, size, folder):
    from minildm.distributed import turns, wait_for_all

    network = base(model)
    seeds = list(range(size["images"]))
    groups = [seeds[i : i + 2] for i in range(0, len(seeds), 2)]
    options = {"steps": 20 if model == "tiny" else 2, "sampler": "dpm++", "output": "tensor"}
    options |= {"height": size["pixels"], "width": size["pixels"]}

    def sample():
        for group in turns(groups):
            network.sample(["a chest x-ray"] * len(group), seed=group, **options)
        wait_for_all()

    return sample


def features(model, size, folder):
    import numpy as np
    from PIL import Image

    from minildm.distributed import from_first
    from minildm.metrics.extractors import random_extractor
    from minildm.metrics.features import collect

    paths = [folder / f"{i}.png" for i in range(size["features"])]

    def write():
        rng = np.random.default_rng(0)
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(path)

    from_first(write)
    extractor = random_extractor()
    return lambda: collect(paths, extractor, keep=0, batch_size=8)


ROWS = {f.__name__: f for f in (training, summing, caching, sampling, features)}


def child(row, model, folder, seconds):
    """Time the work of a row in this process, which may have others beside it; the first prints what it took."""
    from minildm.startup import prepare_process

    prepare_process()
    import torch

    from minildm import distributed

    torch.set_num_threads(1)
    distributed.join()
    work = ROWS[row](model, SIZES[model], Path(folder))
    work()
    times, begun, more = [], time.perf_counter(), True
    while more:
        distributed.wait_for_all()
        start = time.perf_counter()
        work()
        distributed.wait_for_all()
        times.append(time.perf_counter() - start)
        more = distributed.from_first(lambda: len(times) < 2 or time.perf_counter() - begun < float(seconds))
    print(json.dumps(times))


def turn(n, row, model, seconds):
    """Median seconds of the row's work by n processes."""
    launcher = [sys.executable]
    if n > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--child", row, model, folder, str(seconds)]
        done = subprocess.run(command, stdout=-1, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{row} by {n} processes: ended with {done.returncode}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn, at least")
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores; {args.model}: {SIZES[args.model]}; one thread each\n")
    print(
        "| work | processes | seconds, median | spread | speed-up | efficiency |\n|---|---|---|---|---|---|", flush=True
    )
    for row in args.rows:
        times = {n: [] for n in args.processes}
        for number in range(args.turns):
            for n in args.processes if number % 2 == 0 else args.processes[::-1]:
                times[n].append(turn(n, row, args.model, args.seconds))
        first = statistics.median(times[args.processes[0]])
        for n, values in times.items():
            middle = statistics.median(values)
            gain, ideal = first / middle, n / args.processes[0]
            spread = f"{min(values):.4g} to {max(values):.4g}"
            print(f"| {row} | {n} | {middle:.4g} | {spread} | {gain:.2f} | {gain / ideal:.2f} |", flush=True)


if __name__ == "__main__":
    main()
