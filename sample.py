"""Generate images: python sample.py "chest x-ray, age 47 male" -n 4

Prompts -> token ids -> context -> latents -> images -> PNG files. torch takes seconds to import, so it is imported
inside `main`, once the command line is known to be good. Under torchrun each process takes its turns of the batches.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

from minildm import like, record, sampling
from minildm.config import SamplingSettings
from minildm.errors import exit_cleanly
from minildm.files import writable_folder
from minildm.images import FROM_IMAGE, SYNTHETIC, save_png, sheet_by_prompt
from minildm.progress import Progress
from minildm.settings import Parser, Several, add_flags, at_least, from_flags
from minildm.startup import prepare_process

SHEET_IMAGES = 64  # at most, on the contact sheet


def parse(arguments):
    parser = Parser(prog="sample.py", description="Generate images from prompts.")
    add = parser.add_argument_group("prompts and images").add_argument
    add("prompt", nargs="?", help="description of the image")
    add("--prompts", metavar="FILE", type=Path, help="text, .csv, .tsv or .jsonl of prompts; run again to continue")
    add("--column", help="column of the table that holds the prompts (default: prompt, or text)")
    add("--negative", default="", metavar="PROMPT", help="description of what to avoid")
    add("-n", type=at_least(1), default=1, metavar="N", help="images per prompt")
    add("--init-image", metavar="FILE", type=Path, help="image or DICOM file to start from; see --strength")
    add("--like", metavar="FILE.png", type=Path, help="make this image again; other flags change what they say")
    add_flags(parser, SamplingSettings, "sampling")
    add = parser.add_argument_group("model").add_argument
    add("--base", help="a .safetensors file or a diffusers-layout folder (default: the one in weights/)")
    add("--vae", metavar="PATH", help="autoencoder file or folder in place of the base's own, such as sd-vae-ft-mse")
    add(
        "--adapter",
        action=Several,
        nargs=1,
        default=(),
        metavar="FILE[@RANK][:0.6]",
        help="adapter file or run folder, with the rank to use (DyLoRA) and a multiplier; may be repeated (default: "
        "none; with weights/tiny, the adapter that comes with it. --adapter none turns that off, too)",
    )
    add("--prediction", choices=("epsilon", "v"), help="what a single file's U-Net predicts; v for SD v2.x at 768 px")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float16 on a GPU, float32 elsewhere)")
    add("--compile", action="store_true", help="compile the networks: starts minutes later, then runs faster")
    add("--plain", action="store_true", help="only the textbook code: slower, least memory, the same up to rounding")
    add("--batch-size", type=at_least(1), default=4, help="images at a time")
    add("--out", type=Path, default=Path("samples"), help="folder for the PNG files")
    parser.set_defaults(recorded=None, products=None)
    args, more = parser.parse_known_args(arguments)
    if args.prompt is not None and more and not any(word.startswith("-") for word in more):
        prompt = " ".join([args.prompt, *more])
        parser.error(f'several prompts, or one without quotes? Give one, in quotes: "{prompt}"')
    args = parser.parse_args(arguments)
    if args.like is not None:
        parser.set_defaults(**like.flags_like(args))
        args = parser.parse_args(arguments)
    return args


def main(arguments):
    args = parse(arguments)
    settings = from_flags(SamplingSettings, args)
    prompts = sampling.read_prompts(args.prompt, args.prompts, args.column)
    sampling.check_request(prompts, args.negative, args.n, settings.seed)
    init_image = sampling.read_init_image(args.init_image, settings.strength)
    writable_folder(args.out)

    from minildm import distributed, kernels
    from minildm.latent_diffusion import complete_settings
    from minildm.loading import load
    from minildm.training.machine import free_memory

    distributed.join()  # the other processes, if torchrun has started several
    start = time.perf_counter()
    adapters = sampling.choose_adapters(args.adapter, args.base)
    model = load(args.base, adapters, args.device, args.dtype, args.prediction, args.vae)
    settings = complete_settings(settings, model.config, init_image is not None)
    if not (args.plain or args.compile) and distributed.from_first(
        lambda: sampling.float32_wanted(model, args.products)
    ):
        model.compute_in_float32()
    if args.compile:
        model.compile_networks()
    print(
        f"{model.files.title}: {model.config.schedule.prediction}-prediction, {model.config.image_size} px, "
        f"{record.dtype_name(model.precision)} on {model.device}, loaded in {time.perf_counter() - start:.1f} s"
    )

    request = record.Request(args, settings, model, adapters, init_image)
    continues = args.prompts is not None
    plan = prompts, args.n, settings.seed, args.out, continues, request.parameters
    planned = distributed.from_first(lambda: sampling.plan_images(*plan))
    if skipped := len(prompts) * args.n - len(planned):
        print(f"{skipped} images are already in {args.out}; {len(planned)} to generate")
    repeated = like.batch_like(request, planned)
    batches = sampling.split_batches(planned, args.batch_size) if repeated is None else [repeated]
    at_a_time = max(map(len, batches), default=0)
    sampling.check_size(settings, model.config, at_a_time, model.dtype.itemsize, free_memory(model.device, 0))
    init_images = None if init_image is None else init_image.tensor(settings.height, settings.width)
    description = SYNTHETIC if init_image is None else FROM_IMAGE
    own = distributed.turns(list(enumerate(batches)))
    made, start = [], time.perf_counter()  # made: (place in the plan, PlannedImage, its image if on the sheet)
    with kernels.plain(args.plain), Progress("sampling", "step", settings.network_calls * len(own)) as bar:
        for number, batch in own:
            options = asdict(settings) | {"seed": [png.seed for png in batch], "init_images": init_images}
            batch_prompts = [png.prompt for png in batch]
            images = model.sample(batch_prompts, args.negative, callback=lambda *_: bar.update(), **options)
            for place, (image, png) in enumerate(zip(images, batch), number * args.batch_size):
                if png.path is not None:
                    texts = request.parameters(png), description, request.record(png, batch)
                    png = sampling.save_planned(png, continues, image, *texts)
                    made.append((place, png, image if place < SHEET_IMAGES else None))
    made = distributed.gather_to_first(made)
    if made is None:
        return 0

    made = sorted((one for part in made for one in part), key=lambda one: one[0])
    saved, sheet = [png for _, png, _ in made], [image for _, _, image in made if image is not None]
    for png in saved[:8]:
        print(f"{png.path} (seed {png.seed})")
    if repeated is not None:
        print(like.compare(args.like, saved[0].path))
    if len(planned) > 1:
        folder = writable_folder(args.out / "sheets")  # not --out itself, where metrics read every image
        path = folder / saved[0].path.name
        contact_sheet = sheet_by_prompt([png.prompt for png in planned[: len(sheet)]], sheet)
        save_png(contact_sheet, path, f"contact sheet of {len(sheet)} images", description)
        print(f"{len(planned)} images in {args.out}, {time.perf_counter() - start:.1f} s; contact sheet: {path}")
    print(f"next: another seed, python sample.py ... --seed {settings.seed + len(prompts) * args.n}")
    return 0


if __name__ == "__main__":
    prepare_process()
    exit_cleanly(main, sys.argv[1:])
