"""Sampling compared with diffusers + transformers: python tests/benchmarks/bench_sampling.py [--device cuda]

Both use the same random weights and take turns, so that other load on the machine affects both. Each row gives the
median over the turns and the ratio diffusers / minildm: above 1, minildm is faster or needs less memory. Start-up and
loading run in new processes. Nothing is asserted.
"""

import gc
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

from minildm.settings import Parser

PARTS = ["start", "image", "unet", "vae"]


# --- new processes: start-up and loading -----------------------------------------------------------------------------
def child_minildm(folder, what, dtype):
    start = time.perf_counter()
    import torch

    import minildm

    ready, memory = time.perf_counter(), _resident()
    model = minildm.load(folder, device="cpu", dtype=getattr(torch, dtype))
    loaded, peak = time.perf_counter(), _resident("VmHWM")
    if what == "startup":
        model.sample(["chest x-ray"], steps=1, guidance=7.5, output="latent")
    _report(start, ready, loaded, memory, peak)


def child_diffusers(folder, what, dtype):
    start = time.perf_counter()
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    ready, memory = time.perf_counter(), _resident()
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    parts = {
        name: kind.from_pretrained(folder, subfolder=name, torch_dtype=getattr(torch, dtype))
        for name, kind in kinds.items()
    }
    loaded, peak = time.perf_counter(), _resident("VmHWM")
    if what == "startup":
        tokenizer = CLIPTokenizer(
            f"{folder}/tokenizer/vocab.json", f"{folder}/tokenizer/merges.txt", model_max_length=77
        )
        pipe = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        pipe("chest x-ray", num_inference_steps=1, output_type="latent")
    _report(start, ready, loaded, memory, peak)


def _resident(entry="VmRSS"):
    """Resident memory in MB; VmHWM: its peak. (The peak of getrusage includes the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(entry))


def _report(start, ready, loaded, memory, peak):
    print(
        json.dumps(
            {
                "import_s": ready - start,
                "load_s": loaded - ready,
                "total_s": time.perf_counter() - start,
                "memory_mb": peak - memory,
            }
        )
    )


def in_new_processes(folder, what, dtype, turns):
    """Each side's median of each measure over ``turns`` alternating processes: {side: {measure: median}}."""
    results = {"minildm": [], "diffusers": []}
    for _ in range(turns):
        for side, rows in results.items():
            start = time.perf_counter()
            out = subprocess.run(
                [sys.executable, __file__, "--child", side, str(folder), what, dtype],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )
            rows.append(json.loads(out.stdout.splitlines()[-1]) | {"process_s": time.perf_counter() - start})
    return {
        side: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for side, rows in results.items()
    }


# --- one process: the same work in turns -----------------------------------------------------------------------------
def in_turns(ours, peer, device, seconds=6.0, least=3):
    """Median seconds of each function. They are called alternately, for at least ``seconds`` and ``least`` times."""
    import torch

    def once(function):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(ours), once(peer)  # warm up
    times, start = ([], []), time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - start < seconds:
        times[0].append(once(ours))
        times[1].append(once(peer))
    return tuple(statistics.median(t) for t in times)


class Table:
    def __init__(self):
        self.rows = []

    def add(self, what, ours, peer, unit="s", note=""):
        self.rows.append((what, ours, peer, peer / ours, unit, note))
        print(f"{what:<52} {ours:9.3f} {unit:<3} {peer:9.3f} {unit:<3} {peer / ours:6.2f}  {note}", flush=True)


def bench_startup_and_loading(table, folder, small, turns):
    result = in_new_processes(small, "startup", "float32", turns)
    table.add(
        "start-up to the first denoising step, small model",
        result["minildm"]["process_s"],
        result["diffusers"]["process_s"],
        note=f"imports: {result['minildm']['import_s']:.1f} s, {result['diffusers']['import_s']:.1f} s",
    )
    for dtype in ("float16", "float32"):
        result = in_new_processes(folder, "load", dtype, turns)
        table.add(f"load SD v1.5 (fp16 files) as {dtype}", result["minildm"]["load_s"], result["diffusers"]["load_s"])
        table.add(
            f"  peak memory while loading, {dtype}",
            result["minildm"]["memory_mb"],
            result["diffusers"]["memory_mb"],
            "MB",
        )


def bench_unet(table, device, dtypes, sizes, batches):
    import torch
    from peers import diffusers_unet

    from minildm.config import UNetConfig
    from minildm.unet import UNet

    for dtype in dtypes:
        unet = UNet(UNetConfig()).to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        peer = diffusers_unet(unet).to(memory_format=torch.contiguous_format)  # as diffusers loads it
        variants = [("", unet, peer)]
        if device == "cuda":
            peer_fast = diffusers_unet(unet)  # channels-last, as its own guide advises
            variants.append((" compiled", torch.compile(unet), torch.compile(peer_fast)))
        for size in sizes:
            for batch in batches:
                x = torch.randn(batch, 4, size // 8, size // 8, device=device, dtype=dtype)
                context = torch.randn(batch, 77, 768, device=device, dtype=dtype)
                t = torch.tensor([500], device=device)
                for name, a, b in variants:
                    ours, theirs = in_turns(
                        lambda a=a: a(x, t, context), lambda b=b: b(x, t, context, return_dict=False), device
                    )
                    rate = flops(unet, x, t, context) / ours / 1e12
                    table.add(
                        f"U-Net step{name}, {size} px, batch {batch}, {str(dtype)[6:]}",
                        ours,
                        theirs,
                        note=f"{rate:.2f} TFLOP/s",
                    )
        del unet, peer, variants
        gc.collect()


def flops(unet, x, t, context):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from minildm.unet import UNet

    with torch.device("meta"):
        shadow = UNet(unet.config)
    with FlopCounterMode(display=False) as counter:
        shadow(x.float().to("meta"), t.to("meta"), context.float().to("meta"))
    return counter.get_total_flops()


def bench_vae(table, device, dtypes):
    import torch
    from peers import diffusers_vae

    from minildm.config import VAEConfig
    from minildm.vae import VAE

    for dtype in dtypes:
        vae = VAE(VAEConfig()).to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        peer = diffusers_vae(vae).to(memory_format=torch.contiguous_format)
        z = torch.randn(1, 4, 64, 64, device=device, dtype=dtype)
        table.add(
            f"VAE decode, 512 px, {str(dtype)[6:]}",
            *in_turns(lambda: vae.decode(z), lambda: peer.decode(z, return_dict=False), device),
        )


def bench_small_image(table, device, small, what):
    import torch
    from peers import diffusers_pipeline

    import minildm

    model = minildm.load(small, device=device, dtype=torch.float32)
    pipe = diffusers_pipeline(small).to(device)

    def ours():
        model.sample(["chest x-ray"], steps=20, guidance=7.5)

    def theirs():
        pipe("chest x-ray", num_inference_steps=20, guidance_scale=7.5, generator=torch.Generator().manual_seed(0))

    table.add(f"image in 20 guided DDIM steps, {what}", *in_turns(ours, theirs, device, seconds=15))


def bench_machine(device):
    """Print the machine's rates for matrix products and convolutions, with which the other rates can be compared."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        size = 8192 if device == "cuda" else 2048
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds, _ = in_turns(lambda a=a, b=b: a @ b, lambda: None, device, seconds=1)
        print(f"matrix product {size} cubed, {str(dtype)[6:]}: {2 * size**3 / seconds / 1e12:.3f} TFLOP/s")
    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, 320, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
            w = torch.randn(320, 320, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
            seconds, _ = in_turns(lambda x=x, w=w: torch.conv2d(x, w, padding=1), lambda: None, device, seconds=1)
            rate = 2 * 9 * 320**2 * 64**2 / seconds / 1e12
            print(f"3x3 convolution 320 x 64 x 64, {str(dtype)[6:]}: {rate:.3f} TFLOP/s")


def write_models(folder):
    """Write models with random weights: one of SD v1.5's size in fp16, two small ones in fp32 with tokenizer files."""
    import torch
    from peers import random_model, small_config, write_folder, write_tokenizer

    from minildm.config import ModelConfig

    for name, config in (("small", small_config()), ("toy", ModelConfig.tiny())):
        write_folder(random_model(config), folder / name)
        write_tokenizer(folder / name / "tokenizer")
    write_folder(random_model(ModelConfig()), folder / "sd15", torch.float16)
    return folder / "sd15", folder / "small", folder / "toy"


def main():
    if sys.argv[1:2] == ["--child"]:
        side, folder, what, dtype = sys.argv[2:]
        return (child_minildm if side == "minildm" else child_diffusers)(folder, what, dtype)
    parser = Parser(description="Compare sampling with diffusers.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="parts to run")
    parser.add_argument("--sizes", nargs="*", type=int, default=[256, 512], help="image height and width, pixels")
    parser.add_argument("--turns", type=int, default=3, help="new processes of each side")
    args = parser.parse_args()
    import torch

    torch.set_grad_enabled(False)
    dtypes = [torch.float32, torch.bfloat16] if args.device == "cpu" else [torch.bfloat16, torch.float16]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}"
    )
    bench_machine(args.device)
    print(f"{'':<52} {'minildm':>13} {'diffusers':>13}  ratio")
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        if "start" in args.only or "image" in args.only:
            full, small, toy = write_models(Path(folder))
            if "start" in args.only:
                bench_startup_and_loading(table, full, small, args.turns)
            if "image" in args.only:
                bench_small_image(table, args.device, toy, "0.8 M U-Net, 64 px")
                bench_small_image(table, args.device, small, "5.9 M U-Net, 128 px")
    if "unet" in args.only:
        bench_unet(table, args.device, dtypes, args.sizes, (1,) if args.device == "cpu" else (2, 8))
    if "vae" in args.only:
        bench_vae(table, args.device, dtypes)


if __name__ == "__main__":
    main()
