"""Training, side by side with diffusers + transformers + PEFT: python tests/benchmarks/bench_training.py

The same LoRA step (rank 4 on every linear layer of both networks: the text encoder's forward, noise, the U-Net's
forward and backward, clipping, AdamW) on the same random weights and data, in new processes by turns (by_turns.py),
which gives time and peak memory. Ratio peer / minildm: above 1, minildm is faster or leaner.

Then what SeLoRA's test costs: steps with it against steps without, by turns in one process, spread over
expand_interval = 40 steps. Nothing here is asserted: the numbers go into docs/performance.md.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import by_turns

LR, CLIP, INTERVAL = 1e-4, 1.0, 40


def model_of(size, device, dtype):
    """Random weights, small or of SD v1.5's size; no VAE is needed, the latents are given."""
    from peers import random_network, small_config

    from minildm.config import ModelConfig, VAEConfig
    from minildm.latent_diffusion import LatentDiffusion

    config = ModelConfig() if size == "sd15" else small_config()
    import torch

    networks = {
        name: random_network(getattr(config, name)).to(device, dtype).to(memory_format=torch.channels_last)
        for name in ("unet", "text_encoder")
    }
    return LatentDiffusion(config, vae=random_network(VAEConfig.tiny()), **networks)


def data_of(model, batch, pixels):
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (batch, 4, pixels // 8, pixels // 8)
    latents, noise = (torch.randn(shape, generator=generator).to(model.device) for _ in range(2))
    timesteps = torch.randint(1000, (batch,), generator=generator).to(model.device)
    return latents, noise, timesteps, model.tokenize(["chest x-ray, age 47 male, view PA"] * batch).to(model.device)


def mean_loss(schedule, dtype, unet, text_encoder, data):
    """``unet`` and ``text_encoder``: functions of tensors, ours or the peer's."""
    latents, noise, timesteps, token_ids = data
    noisy = schedule.add_noise(latents, noise, timesteps).to(dtype)
    return (unet(noisy, timesteps, text_encoder(token_ids)).float() - noise).square().mean()


def our_step(model, data, kind="lora", rank=4):
    """A function that does one step; with ``test`` on, SeLoRA's test inside it."""
    from minildm import kernels
    from minildm.adapters import add_adapter, fisher_probe
    from minildm.optimizer import AdamW, clip_gradients

    add_adapter(model, kind, rank=rank)
    if kernels.float32_is_faster(model.dtype, model.device):  # on some CPUs, in bfloat16
        kernels.products_in_float32(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters)

    def loss():
        with kernels.lean():  # as in training
            return mean_loss(model.schedule, model.dtype, model.unet, model.text_encoder, data)

    def step(test=False, expected=False):
        if test:
            with fisher_probe(model, expected=expected) as probe:
                loss().backward()
            probe.scores()
        else:
            loss().backward()
        clip_gradients(parameters, CLIP).item()
        optimizer.step(LR)
        for parameter in parameters:
            parameter.grad = None

    return step


def peer_step(model, data):
    """PEFT's LoRA around the peer's networks: float32 adapters, as diffusers' training scripts have it."""
    import torch
    from peers import diffusers_unet, transformers_text_encoder
    from peft import LoraConfig, inject_adapter_in_model

    unet = diffusers_unet(model.unet).to(memory_format=torch.contiguous_format)  # as diffusers loads it
    text_encoder = transformers_text_encoder(model.text_encoder)
    parameters = []
    for network in (unet, text_encoder):
        network.requires_grad_(False)
        names = [name for name, part in network.named_modules() if isinstance(part, torch.nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=names), network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameters.append(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    schedule, dtype, device = model.schedule, model.dtype, model.device  # and not the model: its weights would stay

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = mean_loss(
                schedule,
                dtype,
                lambda *inputs: unet(*inputs, return_dict=False)[0],
                lambda token_ids: text_encoder(token_ids, return_dict=False)[0],
                data,
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step.parameters = parameters
    return step


def lora_step(side, device, size, dtype, batch, pixels):
    """The LoRA step of either side."""
    import torch

    model = model_of(size, device, getattr(torch, dtype))
    data = data_of(model, batch, pixels)
    return our_step(model, data) if side == "minildm" else peer_step(model, data)


# --- SeLoRA's test ---------------------------------------------------------------------------------------------------
def bench_test(args, dtype, batch):
    model = model_of(args.size, args.device, dtype)
    step = our_step(model, data_of(model, batch, args.pixels), "selora", rank=1)
    plain, sampled, expected = (
        statistics.median(t)
        for t in alternately(
            (step, lambda: step(test=True), lambda: step(test=True, expected=True)), args.device, args.seconds
        )
    )
    for name, tested in (("sampled", sampled), ("expected", expected)):
        print(
            f"SeLoRA's test, {name}, {args.pixels} px, batch {batch}, {str(dtype)[6:]}: {1000 * plain:.1f} ms a "
            f"step, {1000 * tested:.1f} ms with it: {100 * (tested / plain - 1) / INTERVAL:+.2f} % of training at "
            f"t = {INTERVAL}",
            flush=True,
        )


def alternately(functions, device, seconds, least=3):
    """Seconds of each function, called alternately in this process: lists."""
    import torch

    def once(function):
        begun = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for function in functions:
        once(function)  # warm up
    times, begun = [[] for _ in functions], time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - begun < seconds:
        for own, function in zip(times, functions):
            own.append(once(function))
    return times


def main():
    if sys.argv[1:2] == ["--child"]:
        return by_turns.child({"step": lora_step})
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="small", choices=("small", "sd15"), help="sd15: SD v1.5's networks")
    parser.add_argument("--pixels", type=int, help="side of the images (default: 128 small, 224 sd15)")
    parser.add_argument("--batches", nargs="*", type=int, help="(default: 8 small; 1 sd15 on a CPU, 1 and 8 on a GPU)")
    parser.add_argument("--dtypes", nargs="*", help="(default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--turns", type=int, default=3, help="new processes of each side")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing in each process")
    parser.add_argument("--only", nargs="*", default=["step", "test"], choices=("step", "test"), help="which parts")
    args = parser.parse_args()
    args.pixels = args.pixels or {"small": 128, "sd15": 224}[args.size]
    batches = args.batches or ([8] if args.size == "small" else [1] if args.device == "cpu" else [1, 8])
    dtypes = args.dtypes or (["float32"] if args.device == "cpu" else ["bfloat16"])
    by_turns.machine(args.device)
    cases = [(dtype, batch) for dtype in dtypes for batch in batches]
    if "step" in args.only:
        table = by_turns.Table()
        table.begin()
        for dtype, batch in cases:
            what = f"LoRA step, {'SD v1.5' if args.size == 'sd15' else 'small networks'}, {args.pixels} px, "
            options = {"device": args.device, "size": args.size, "dtype": dtype, "batch": batch, "pixels": args.pixels}
            result = by_turns.compare(__file__, "step", args.turns, args.seconds, **options)
            table.add(f"{what}batch {batch}, {dtype}", result)
    if "test" in args.only:
        import torch

        for dtype, batch in cases:
            bench_test(args, getattr(torch, dtype), batch)


if __name__ == "__main__":
    main()
