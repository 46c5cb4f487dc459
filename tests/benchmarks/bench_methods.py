"""Every method on the embedded base, by the same steps and seeds: python tests/benchmarks/bench_methods.py --out DIR

A cell is one run of train.py (a method, a data set, a seed) in a folder of its own. Cells that are complete are skipped
and interrupted ones continue, so the command may be stopped and repeated; --jobs runs several cells at a time, each on
its share of the processor. At the end: one table per data set, mean and standard deviation over the seeds, as Markdown
for docs/results.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DREAMBOOTH = ["--adapter", "lora", "--instance-prompt", "a photo of sks chest x-ray", "--class-prompt", "a chest x-ray"]
METHODS = {
    "selora": ["--adapter", "selora"],
    "lora": ["--adapter", "lora"],
    "adalora": ["--adapter", "adalora"],
    "dylora": ["--adapter", "dylora"],
    "full": ["--adapter", "full", "--targets", "unet", "text_encoder"],
    "dreambooth": [*DREAMBOOTH, "--class-images", "64"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the cells")
    parser.add_argument("--data", nargs="+", default=["phantom"], metavar="NAME:PATH", help="data sets")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=tuple(METHODS), help="methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds")
    parser.add_argument("--steps", type=int, default=300, help="steps of each cell")
    parser.add_argument("--batch-size", type=int, default=8, help="samples per step")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--table", action="store_true", help="only print the tables of the cells that are complete")
    args = parser.parse_args()
    cells = [(data, method, seed) for seed in args.seeds for data in args.data for method in args.methods]
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda cell: run(args, *cell), cells))
    for data in args.data:
        print("\n".join(table(args, data)))


def folder(args, data, method, seed):
    return args.out / data.partition(":")[0] / f"{method}-{seed}"


def entries(path):
    log = path / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def complete(path, steps):
    return any(entry.get("step") == steps and "validation" in entry for entry in entries(path))


def run(args, data, method, seed):
    path = folder(args, data, method, seed)
    if complete(path, args.steps):
        return
    command = [sys.executable, "train.py", *METHODS[method], "--base", "weights/tiny", "--data", data]
    command += ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--sample-interval", "0"]
    command += ["--read-captions", "0"]  # a preset would have some methods read and not the others
    command += ["--seed", str(seed), "--out", str(path.resolve())]
    if (path / "log.jsonl").is_file():
        command = [sys.executable, "train.py", "--resume", str(path.resolve())]
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    path.mkdir(parents=True, exist_ok=True)
    (path / "output.txt").write_text(done.stdout + done.stderr)
    print(
        f"{data}, {method}, seed {seed}: {'done' if done.returncode == 0 else done.stderr.strip()[-300:]}", flush=True
    )


def table(args, data):
    """Markdown lines: validation loss before and best, parameters, seconds per step, peak memory."""
    seeds = ", ".join(map(str, args.seeds))
    yield f"\n{data}, {args.steps} steps of {args.batch_size}, seeds {seeds}:\n"
    yield "| method | n | validation, before | best | trained: U-Net, text encoder | s/step | peak memory, GB |"
    yield "|---|---|---|---|---|---|---|"
    for method in args.methods:
        paths = [folder(args, data, method, seed) for seed in args.seeds]
        logs = [entries(path) for path in paths if complete(path, args.steps)]
        if not logs:
            continue
        validation = [[entry["validation"] for entry in log if "validation" in entry] for log in logs]
        seconds = [max(entry.get("seconds", 0) for entry in log) / args.steps for log in logs]
        memory = [max(entry.get("memory_mb", 0) for entry in log) / 1000 for log in logs]
        parameters = (paths[0] / "output.txt").read_text() if (paths[0] / "output.txt").is_file() else ""
        counts = [line.split(":")[1].split(" of ")[0].strip() for line in parameters.splitlines()
                  if line.startswith(("unet:", "text_encoder:")) and " of " in line]  # fmt: skip
        row = [method, str(len(logs)), spread([v[0] for v in validation]), spread([min(v) for v in validation])]
        row += [", ".join(counts), spread(seconds, 2), spread(memory, 2)]
        yield "| " + " | ".join(row) + " |"


def spread(values, digits=4):
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
