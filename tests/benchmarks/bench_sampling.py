"""Sampling compared with diffusers + transformers: python tests/benchmarks/bench_sampling.py [--device cuda]

Both use the same random weights; every number comes from a new process, and the sides take turns (by_turns.py). The
table is Markdown for docs/performance.md: medians, the ratio diffusers / minildm with its spread over the turns (above
1, minildm is faster), operations as plain code needs them and as they are computed, their rate, peak memory. Nothing is
asserted.
"""

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

import by_turns

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


def bench_startup_and_loading(folder, small, turns):
    print("| start-up and loading | minildm | diffusers | ratio |\n|---|---|---|---|")

    def row(what, key, unit, result):
        ours, theirs = result["minildm"][key], result["diffusers"][key]
        print(f"| {what} | {ours:.3g} {unit} | {theirs:.3g} {unit} | **{theirs / ours:.2f}** |", flush=True)

    result = in_new_processes(small, "startup", "float32", turns)
    row("start-up to the first denoising step, small model", "process_s", "s", result)
    row("&nbsp;&nbsp;of it, imports", "import_s", "s", result)
    for dtype in ("float16", "float32"):
        result = in_new_processes(folder, "load", dtype, turns)
        row(f"load SD v1.5 (fp16 files) as {dtype}", "load_s", "s", result)
        row(f"&nbsp;&nbsp;peak memory while loading, {dtype}", "memory_mb", "MB", result)
    print()


# --- the same work by turns ------------------------------------------------------------------------------------------
def unet_step(side, device, dtype, pixels, batch, compile=False):
    """One evaluation of SD v1.5's U-Net."""
    import torch
    from peers import diffusers_unet, random_network

    from minildm.config import UNetConfig

    torch.set_grad_enabled(False)
    dtype = getattr(torch, dtype)
    unet = random_network(UNetConfig()).to(device, dtype).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 4, pixels // 8, pixels // 8, device=device, dtype=dtype)
    context = torch.randn(batch, 77, 768, device=device, dtype=dtype)
    t = torch.tensor([500], device=device)
    if side == "minildm":
        if not compile:
            unet, x, context = in_the_faster_precision(unet, x, context)
        unet = torch.compile(unet) if compile else unet
        return lambda: unet(x, t, context)
    peer = diffusers_unet(unet)
    # Contiguous, as diffusers loads it; channels-last before it is compiled, as its own guide advises.
    peer = torch.compile(peer) if compile else peer.to(memory_format=torch.contiguous_format)
    return lambda: peer(x, t, context, return_dict=False)


def in_the_faster_precision(network, *inputs):
    """The network and its inputs; from bfloat16 in float32 where that is faster, as `LatentDiffusion` does it."""
    from minildm import kernels

    if not kernels.float32_is_faster(inputs[0].dtype, inputs[0].device):
        return network, *inputs
    return network.float(), *(x.float() for x in inputs)


def vae_decode(side, device, dtype, pixels):
    """SD v1.5's decoder: latents -> one image."""
    import torch
    from peers import diffusers_vae, random_network

    from minildm.config import VAEConfig

    torch.set_grad_enabled(False)
    dtype = getattr(torch, dtype)
    vae = random_network(VAEConfig()).to(device, dtype).to(memory_format=torch.channels_last)
    z = torch.randn(1, 4, pixels // 8, pixels // 8, device=device, dtype=dtype)
    if side == "minildm":
        vae, z = in_the_faster_precision(vae, z)
        return lambda: vae.decode(z)
    peer = diffusers_vae(vae).to(memory_format=torch.contiguous_format)
    return lambda: peer.decode(z, return_dict=False)


def image(side, device, folder):
    """One image in 20 steps with guidance, from a prompt."""
    import torch

    torch.set_grad_enabled(False)
    if side == "minildm":
        import minildm

        model = minildm.load(folder, device=device, dtype=torch.float32)
        return lambda: model.sample(["chest x-ray"], steps=20, guidance=7.5)
    from peers import diffusers_pipeline

    pipe = diffusers_pipeline(Path(folder)).to(device, torch.float32)
    return lambda: pipe("chest x-ray", num_inference_steps=20, guidance_scale=7.5)


def write_models(folder, full):
    """Write models with random weights, a small one in float32 and one of SD v1.5's size in fp16, and the embedded
    model with the tokenizer files that the peer reads."""
    import shutil

    import torch
    from peers import random_model, small_config, write_folder, write_tokenizer

    from minildm.config import ModelConfig

    write_folder(random_model(small_config()), folder / "small")
    write_tokenizer(folder / "small" / "tokenizer")
    if full:
        write_folder(random_model(ModelConfig()), folder / "sd15", torch.float16)
    shutil.copytree(ROOT / "weights" / "tiny", folder / "tiny", ignore=shutil.ignore_patterns("tokenizer"))
    write_tokenizer(folder / "tiny" / "tokenizer")
    return folder / "sd15", folder / "small", folder / "tiny"


def main():
    if sys.argv[1:2] == ["--child"]:
        if sys.argv[3] in MAKERS:
            return by_turns.child(MAKERS)
        side, folder, what, dtype = sys.argv[2:]
        return (child_minildm if side == "minildm" else child_diffusers)(folder, what, dtype)
    parser = Parser(description="Compare sampling with diffusers.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="parts to run")
    parser.add_argument("--sizes", nargs="*", type=int, default=[256, 512], help="image height and width, pixels")
    parser.add_argument("--batches", nargs="*", type=int, help="of the U-Net (default: 1 and 2; 2 and 8 on a GPU)")
    parser.add_argument("--dtypes", nargs="*", help="(default: float32 and bfloat16; bfloat16 and float16 on a GPU)")
    parser.add_argument("--turns", type=int, default=3, help="new processes of each side")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing in each process")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    dtypes = args.dtypes or (["bfloat16", "float16"] if gpu else ["float32", "bfloat16"])
    by_turns.machine(args.device)
    table = by_turns.Table()

    def row(what, name, **options):
        table.add(what, by_turns.compare(__file__, name, args.turns, args.seconds, device=args.device, **options))

    with tempfile.TemporaryDirectory() as folder:
        if "start" in args.only or "image" in args.only:
            full, small, tiny = write_models(Path(folder), full="start" in args.only)
        if "start" in args.only:
            bench_startup_and_loading(full, small, args.turns)
        table.begin()
        if "image" in args.only:
            row("20-step guided image, weights/tiny", "image", folder=str(tiny))
            row("20-step guided image, U-Net of 5.9 M parameters, 128 px", "image", folder=str(small))
    for dtype in dtypes:
        if "unet" in args.only:
            for pixels in args.sizes:
                for batch in args.batches or ((2, 8) if gpu else (1, 2)):
                    for compiled in (False, True) if gpu else (False,):
                        what = f"U-Net step{' compiled' * compiled}, {pixels} px, batch {batch}, {dtype}"
                        row(what, "unet", dtype=dtype, pixels=pixels, batch=batch, compile=compiled)
        if "vae" in args.only:
            row(f"VAE decode, {max(args.sizes)} px, {dtype}", "vae", dtype=dtype, pixels=max(args.sizes))


MAKERS = {"unet": unet_step, "vae": vae_decode, "image": image}

if __name__ == "__main__":
    main()
