"""Two sides by turns: the same work of minildm and of its peer, each turn in a new process.

A benchmark script has rows. `compare` starts its own script again for each side and turn, ``--child SIDE ROW OPTIONS``;
`child` builds the row's work, does it once to warm up, times it, and prints a line of JSON. In this way neither side
sees the other's memory, threads or settings, and other load on the machine meets both. minildm's processes begin as
its commands do (`minildm.startup.prepare_process`); the peer's begin as Python does.
"""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIDES = ("minildm", "peer")


def child(makers):
    """Time one side's work and print it as JSON. ``makers``: {row: function of (side, **options) -> the work}, where
    the work is a function without arguments. To be called before torch is imported."""
    side, row, options = sys.argv[2:]
    options = json.loads(options)
    seconds, count_flops = options.pop("seconds"), options.pop("count_flops")
    if side == "minildm":
        from minildm.startup import prepare_process

        prepare_process()
    import torch

    device = options.get("device", "cpu")
    work = makers[row](side, **options)
    resident = memory_mb(device, reset=True)
    times, begun = [], None
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        begun = begun or time.perf_counter()  # the first call warms up
    result = {"seconds": times[1:], "peak_mb": memory_mb(device), "resident_mb": resident}
    if count_flops:
        from minildm import kernels

        kernels.SMALL = 0  # the counter does not see the thread of the second half
        result["computed"] = flops(work)
        with kernels.plain():
            result["direct"] = flops(work)
    print(json.dumps(result))


def compare(script, row, turns, seconds, **options):
    """{side: {"seconds": each turn's median, "peak_mb", "resident_mb", and of minildm "computed", "direct" (FLOP)}}"""
    results = {side: [] for side in SIDES}
    for turn in range(turns):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            extra = {"seconds": seconds, "count_flops": side == "minildm" and turn == 0}
            command = [sys.executable, str(script), "--child", side, row, json.dumps(options | extra)]
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if out.returncode:
                raise SystemExit(f"{row}, {side}: ended with {out.returncode}")
            results[side].append(json.loads(out.stdout.splitlines()[-1]))
    summary = {}
    for side, rows in results.items():
        summary[side] = {key: statistics.median(row[key] for row in rows) for key in ("peak_mb", "resident_mb")}
        summary[side]["seconds"] = [statistics.median(row["seconds"]) for row in rows]
        summary[side] |= {key: rows[0][key] for key in ("computed", "direct") if key in rows[0]}
    return summary


class Table:
    """Rows as Markdown, printed as they come."""

    HEAD = "| row | minildm | peer | ratio | spread of the ratio | TFLOP direct / computed | TFLOP/s | peak MB |"

    def begin(self):
        print(self.HEAD + "\n" + "|---" * self.HEAD[1:].count("|") + "|", flush=True)

    def add(self, what, result):
        """A row of what `compare` returned. The ratio is peer / minildm: above 1, minildm is faster."""
        ours, theirs = (result[side]["seconds"] for side in SIDES)
        ratios = [b / a for a, b in zip(ours, theirs)]  # of processes that ran one after the other
        middle, other = statistics.median(ours), statistics.median(theirs)
        cells = [what, f"{middle:.3g} s", f"{other:.3g} s", f"**{other / middle:.2f}**"]
        cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        direct, computed = (result["minildm"].get(key, 0) / 1e12 for key in ("direct", "computed"))
        cells += [f"{direct:.3g} / {computed:.3g}", f"{computed / middle:.3f}"] if direct else ["", ""]
        peaks = [result[side]["peak_mb"] for side in SIDES]
        cells.append(f"{peaks[0]:,.0f} / {peaks[1]:,.0f} ({peaks[0] / peaks[1]:.2f})")
        print("| " + " | ".join(cells) + " |", flush=True)


def machine(device="cpu"):
    """Print the processor, the versions, and the rates of matrix products and convolutions: what other rates mean."""
    import diffusers
    import peft
    import torch
    import transformers

    from minildm import kernels

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    print(
        f"{time.strftime('%Y-%m-%d')}; {name}, {torch.get_num_threads()} threads; torch {torch.__version__}, {versions}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        slow = dtype == torch.bfloat16 and not kernels.has_fast_bfloat16(torch.device(device))  # hundreds of times
        size = 8192 if device == "cuda" else 256 if slow else 2048
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        x, w = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((2, 320, 64, 64), (320, 320, 3, 3)))
        x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
        product = fastest(lambda a=a, b=b: a @ b, device)
        convolution = fastest(lambda x=x, w=w: torch.conv2d(x, w, padding=1), device)
        print(
            f"{str(dtype)[6:]}: matrix product of {size} cubed {2 * size**3 / product / 1e12:.3g} TFLOP/s, "
            f"3x3 convolution of 2 x 320 x 64 x 64 {2 * 2 * 9 * 320**2 * 64**2 / convolution / 1e12:.3g} TFLOP/s"
        )
    print(flush=True)


def fastest(function, device, seconds=1.0):
    import torch

    times, begun = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def processor():
    """The processor's name and what it has for matrix products, on Linux."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    entries = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    entries = {key.strip(): value.strip() for key, value in entries.items()}
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in entries.get("flags", "").split()]
    name = f"{entries.get('model name', platform.processor())} (model {entries.get('model', '?')}; {', '.join(flags)})"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{name}, used as {limit}" if limit else name


def memory_mb(device, reset=False):
    """The peak in MB, of a GPU's allocator or of the process; with ``reset`` it counts from now on."""
    import torch

    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what building the networks has freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is resident now
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6


def flops(work):
    """Floating-point operations of the work's matrix products, convolutions and attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten  # the CPU's attention, which the counter does not know

    def attention(query, key, value, *_, out_shape=None, **__):
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]

    def attention_backward(grad, query, key, value, *_, out_shape=None, **__):
        return 10 * query[0] * query[1] * query[2] * key[2] * query[3]  # QK^T again, and four more products

    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return counter.get_total_flops()
