"""Generate images: python sample.py "chest x-ray, age 47 male" -n 4

Prompts -> token ids -> context -> latents -> images -> PNG files. torch takes seconds to import, so it is imported
inside `main`, once the command line is known to be good.
"""

import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from minildm import sampling
from minildm.config import SamplingSettings
from minildm.errors import exit_cleanly
from minildm.files import writable_folder
from minildm.images import contact_sheet, save_png
from minildm.settings import Parser, add_flags, at_least, from_flags

SHEET_IMAGES = 64  # at most, on the contact sheet


def parse(arguments):
    parser = Parser(prog="sample.py", description="Generate images from prompts.")
    add = parser.add_argument_group("prompts").add_argument
    add("prompt", nargs="?", help="description of the image")
    add("--prompts", metavar="FILE", type=Path, help="text, .csv or .tsv file of prompts; run again to continue")
    add("--column", help="column of the table that holds the prompts (default: prompt, or text)")
    add("--negative", default="", metavar="PROMPT", help="description of what to avoid")
    add("-n", type=at_least(1), default=1, metavar="N", help="images per prompt")
    add_flags(parser, SamplingSettings, "sampling")
    add = parser.add_argument_group("model").add_argument
    add("--base", help="a .safetensors file or a diffusers-layout folder (default: the one in weights/)")
    add("--vae", metavar="PATH", help="autoencoder file or folder in place of the base's own, such as sd-vae-ft-mse")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[@RANK][:0.6]",
        help="adapter file or run folder, with the rank to use (DyLoRA) and a multiplier; may be repeated (default: "
        "none, but with weights/tiny the adapter that comes with it; --adapter none: not even that)",
    )
    add("--prediction", choices=("epsilon", "v"), help="what a single file's U-Net predicts; v for SD v2.x at 768 px")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float16 on a GPU, float32 elsewhere)")
    add("--compile", action="store_true", help="compile the U-Net: starts a minute later, then runs faster")
    add("--batch-size", type=at_least(1), default=4, help="images at a time")
    add("--out", type=Path, default=Path("samples"), help="folder for the PNG files")
    return parser.parse_args(arguments)


def main(arguments):
    args = parse(arguments)
    settings = from_flags(SamplingSettings, args)
    prompts = sampling.read_prompts(args.prompt, args.prompts, args.column)
    sampling.check_request(prompts, args.negative, args.n, settings.seed)
    writable_folder(args.out)

    import torch

    from minildm.latent_diffusion import complete_settings
    from minildm.loading import load

    start = time.perf_counter()
    adapters = sampling.choose_adapters(args.adapter, args.base)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = load(args.base, adapters, args.device, dtype, args.prediction, args.vae)
    settings = complete_settings(settings, model.config)
    if args.compile:
        model.unet.compile()
    print(
        f"{model.files.title}: {model.config.schedule.prediction}-prediction, {model.config.image_size} px, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}, loaded in {time.perf_counter() - start:.1f} s"
    )

    adapter_text = sampling.describe_adapters(adapters)
    hashing = threading.Thread(  # takes seconds, so it runs during the sampling
        target=lambda: (model.base_hash, model.vae_hash), daemon=True
    )
    hashing.start()

    def parameters(image):
        hashing.join()
        return sampling.describe_image(image, args.negative, settings, model, adapter_text)

    continues = args.prompts is not None
    planned = sampling.plan_images(prompts, args.n, settings.seed, args.out, continues, parameters)
    if skipped := len(prompts) * args.n - len(planned):
        print(f"{skipped} images are already in {args.out}; {len(planned)} to generate")
    batches = sampling.split_batches(planned, args.batch_size)
    calls = settings.steps + (settings.sampler == "plms" and settings.steps > 1)  # of the U-Net, for each batch
    sheet, start = [], time.perf_counter()
    with tqdm(total=calls * len(batches), unit="step", disable=None, dynamic_ncols=True) as bar:
        for batch in batches:
            options = asdict(replace(settings, seed=batch[0].seed))
            batch_prompts = [png.prompt for png in batch]
            images = model.sample(batch_prompts, args.negative, callback=lambda *_: bar.update(), **options)
            for image, png in zip(images, batch):
                save_png(image, png.path, parameters(png))
            sheet += images[: SHEET_IMAGES - len(sheet)]

    for png in planned[:8]:
        print(f"{png.path} (seed {png.seed})")
    if len(planned) > 1:
        folder = writable_folder(args.out / "sheets")  # not --out itself, where metrics read every image
        path = folder / planned[0].path.name
        save_png(contact_sheet(sheet), path, f"contact sheet of {len(sheet)} images")
        print(f"{len(planned)} images in {args.out}, {time.perf_counter() - start:.1f} s; contact sheet: {path}")
    print(f"next: another seed, python sample.py ... --seed {settings.seed + len(prompts) * args.n}")
    return 0


if __name__ == "__main__":
    exit_cleanly(main, sys.argv[1:])
