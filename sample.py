"""Draw pictures: python sample.py "chest x-ray, age 47 male" -n 4

Reads like the data's way through the system: prompts -> token ids -> context -> latents -> images -> PNG files.
torch is imported inside `main`, once the command line is known to be good.
"""

import argparse
import csv
import itertools
import os
import re
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from minildm import __version__
from minildm.errors import InputError, exit_cleanly
from minildm.files import sha256, writable_folder
from minildm.images import SAMPLER_NAMES, contact_sheet, parameters_text, read_parameters, save_png
from minildm.settings import Help

SHEET_PICTURES = 64  # at most, on one contact sheet


def parse(arguments):
    parser = argparse.ArgumentParser(prog="sample.py", description="Draw pictures from prompts.", formatter_class=Help)
    add = parser.add_argument_group("what").add_argument
    add("prompt", nargs="?", help="what to draw")
    add(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="many: a text file with one prompt a line, or a .csv; the same "
        "command continues where an interrupted one stopped",
    )
    add("--column", help="column of the .csv (default: prompt, or text)")
    add("--negative", default="", help="what to lead away from")
    add("-n", type=int, default=1, help="pictures for each prompt")
    add("--height", type=int, help="pixels, a multiple of 8 (default: the model's own size)")
    add("--width", type=int, help="pixels, a multiple of 8 (default: the model's own size)")
    add = parser.add_argument_group("how").add_argument
    add("--sampler", default="ddim", choices=tuple(SAMPLER_NAMES), help="20 steps do for dpm++")
    add("--steps", type=int, default=50, help="calls of the U-Net, 1 to 1000")
    add(
        "--guidance",
        type=float,
        help="guidance scale; 1 or less = off, and twice as fast (default: 7.5; 3 for "
        "models smaller than Stable Diffusion, such as weights/tiny)",
    )
    add("--eta", type=float, default=0.0, help="noise of ddim's steps, 0 to 1")
    add("--karras", action="store_true", help="Karras spacing of dpm++'s steps")
    add("--seed", type=int, default=0, help="picture i has seed + i")
    add = parser.add_argument_group("with what").add_argument
    add("--base", help=".safetensors file or diffusers-layout folder (default: the one in weights/)")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:0.6]",
        help="adapter file or run folder, with its "
        "multiplier; repeat for several; none: the bare base (default: none; with weights/tiny the adapter beside it)",
    )
    add("--prediction", choices=("epsilon", "v"), help="of a single file that cannot say it: v for SD v2.x at 768 px")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float16 on a GPU, float32 elsewhere)")
    add("--compile", action="store_true", help="compile the U-Net: a minute's start, then faster")
    add("--batch-size", type=int, default=4, help="pictures at a time")
    add("--out", type=Path, default=Path("samples"), help="folder for the PNGs")
    return parser.parse_args(arguments)


def main(arguments):
    args = parse(arguments)
    prompts = read_prompts(args)
    writable_folder(args.out)

    import torch

    from minildm.latent_diffusion import check_sampling, usual_guidance
    from minildm.loading import EMBEDDED_ADAPTER, is_embedded, load, split_multiplier

    check_sampling(
        args.steps,
        1.0 if args.guidance is None else args.guidance,
        args.sampler,
        args.eta,
        args.karras,
        args.seed,
        args.height,
        args.width,
    )
    if not args.adapter and is_embedded(args.base) and EMBEDDED_ADAPTER.is_file():
        args.adapter = [str(EMBEDDED_ADAPTER)]
        print("the embedded base with its adapter for chest radiographs (--adapter none: the bare base)")
    if args.adapter == ["none"]:
        args.adapter = []
    elif "none" in args.adapter:
        raise InputError("--adapter none is the bare base; leave it out beside other adapters")
    adapters = [split_multiplier(adapter) for adapter in args.adapter]
    if absent := [str(path) for path, _ in adapters if not path.is_file()]:
        raise FileNotFoundError(f"no such adapter: {', '.join(absent)}")

    start = time.perf_counter()
    model = load(
        args.base,
        args.adapter,
        device=args.device,
        dtype=args.dtype and getattr(torch, args.dtype),
        prediction=args.prediction,
    )
    print(
        f"{model.files.path}: {model.config.schedule.prediction}-prediction, {model.config.image_size} px, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}, loaded in {time.perf_counter() - start:.1f} s"
    )
    args.guidance = usual_guidance(model.config) if args.guidance is None else args.guidance
    hashing = threading.Thread(target=lambda: model.base_hash, daemon=True)  # seconds of reading, while sampling starts
    hashing.start()
    if args.compile:
        model.unet.compile()

    settings = describe(args, model, adapters)
    todo = plan(args, prompts, settings, hashing, model)
    if skipped := len(prompts) * args.n - len(todo):
        print(f"{skipped} pictures are already in {args.out}; {len(todo)} to draw")
    shown, start = [], time.perf_counter()
    calls = args.steps + (args.sampler == "plms" and args.steps > 1)
    batches = split_batches(todo, args.batch_size)
    with tqdm(total=calls * len(batches), unit="step", disable=None, dynamic_ncols=True) as bar:
        for batch in batches:
            images = model.sample(
                [prompt for prompt, *_ in batch],
                args.negative,
                args.steps,
                args.guidance,
                args.sampler,
                args.eta,
                seed=batch[0][1],
                height=args.height,
                width=args.width,
                karras=args.karras,
                callback=lambda step, latents: bar.update(),
            )
            hashing.join()
            for image, (prompt, seed, path) in zip(images, batch):
                save_png(image, path, parameters(args, prompt, seed, settings, model))
                shown += [image] if len(shown) < SHEET_PICTURES else []

    for _, seed, path in todo[:8]:
        print(f"{path} (seed {seed})")
    if len(todo) > 1:
        sheet = args.out / "sheets" / todo[0][2].name  # in a folder of its own: metrics read every picture in --out
        writable_folder(sheet.parent)
        save_png(contact_sheet(shown), sheet, f"contact sheet of {len(shown)} pictures")
        print(f"{len(todo)} pictures in {args.out}, {time.perf_counter() - start:.1f} s; contact sheet: {sheet}")
    print(f"next: another seed, python sample.py ... --seed {args.seed + len(prompts) * args.n}")
    return 0


def read_prompts(args):
    """The prompts of the command line: one, or a file's. Raises InputError for whatever is wrong with the numbers."""
    if (args.prompt is None) == (args.prompts is None):
        raise InputError('give one prompt, as in sample.py "chest x-ray", or a file of them with --prompts FILE')
    for name in ("n", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.column is not None and args.prompts is None:
        raise InputError(f"--column {args.column} is for --prompts FILE.csv")
    prompts = [args.prompt] if args.prompts is None else prompts_of_file(args)
    for text in (*prompts, args.negative):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the prompt {text!r} is not valid UTF-8") from None
    if not 0 <= args.seed <= 2**63 - len(prompts) * args.n:
        raise InputError(f"--seed must be in [0, 2^63 - {len(prompts) * args.n}], got {args.seed}")
    return prompts


def prompts_of_file(args):
    if not args.prompts.is_file():
        raise FileNotFoundError(f"--prompts {args.prompts}: no such file")
    try:
        text = args.prompts.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"--prompts {args.prompts} is not UTF-8 text") from None
    if args.prompts.suffix.lower() not in (".csv", ".tsv"):
        if args.column is not None:
            raise InputError(f"--column is for a .csv, but --prompts is {args.prompts}")
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        separator = "\t" if args.prompts.suffix.lower() == ".tsv" else ","
        rows = csv.DictReader(text.splitlines(keepends=True), delimiter=separator)
        try:
            columns, rows = rows.fieldnames or [], list(rows)
        except csv.Error as error:
            raise InputError(f"--prompts {args.prompts} is not readable as CSV ({error})") from None
        column = args.column or next((name for name in ("prompt", "text") if name in columns), None)
        if column not in columns:
            raise InputError(
                f"--prompts {args.prompts} has no column {column or 'prompt or text'!r}; its columns: "
                f"{', '.join(map(str, columns)) or 'none'}; name one with --column"
            )
        prompts = [row[column] or "" for row in rows]
        if blank := [i for i, prompt in enumerate(prompts, 1) if not prompt.strip()]:
            raise InputError(
                f"--prompts {args.prompts} has no prompt in {len(blank)} of {len(rows)} rows, first in "
                f"row {blank[0]}; fill or delete them"
            )
    if not prompts:
        raise InputError(f"--prompts {args.prompts} holds no prompt")
    return prompts


def describe(args, model, adapters):
    """The settings that every picture of this call shares, for its parameters: [before the seed], [after it]."""
    size = f"{args.width or model.config.image_size}x{args.height or model.config.image_size}"
    before = {
        "Steps": args.steps,
        "Sampler": SAMPLER_NAMES[args.sampler] + " Karras" * args.karras,
        "CFG scale": args.guidance,
    }
    after = {
        "Size": size,
        "Model": model.files.path.stem,
        "Prediction": model.config.schedule.prediction,
        "Precision": str(model.dtype).removeprefix("torch."),
    }
    if args.eta:
        after["Eta"] = args.eta
    if adapters:  # by content: the same name may hold another training tomorrow
        after["Adapter"] = " + ".join(
            f"{path.parent.name}/{path.name} {sha256(path)[:10]} x {multiplier:g}" for path, multiplier in adapters
        )
    return before, after


def parameters(args, prompt, seed, settings, model):
    before, after = settings
    return parameters_text(
        prompt,
        args.negative,
        **before,
        Seed=seed,
        **{"Model hash": model.base_hash[:10]},
        **after,
        Version=f"minildm {__version__}",
    )


def plan(args, prompts, settings, hashing, model):
    """What is to be drawn: [(prompt, seed, path)], in the order of the seeds.

    A single prompt's pictures are numbered on from those in the folder. Those of --prompts have fixed numbers: a
    picture that is there and was made the same way is not drawn again, one made otherwise is an error.
    """
    there = set(os.listdir(args.out))
    numbers = [int(match[1]) for name in there if (match := re.match(r"(\d+)-.*\.png$", name))]
    first = max(numbers, default=-1) + 1 if args.prompts is None else 0
    todo = []
    for i, prompt in enumerate(itertools.chain.from_iterable([prompt] * args.n for prompt in prompts)):
        seed, path = args.seed + i, args.out / f"{first + i:05d}-seed{args.seed + i}.png"
        if path.name not in there:
            todo.append((prompt, seed, path))
            continue
        hashing.join()
        old, new = read_parameters(path), parameters(args, prompt, seed, settings, model)
        if old != new:
            old, new = ((text or "no parameters").splitlines() for text in (old, new))
            which = -1 if old[-1] != new[-1] else 0  # the settings, or else the prompt
            raise InputError(
                f"{path} is there and was made otherwise ({old[which]}) than this command would make it "
                f"({new[which]}); give another --out"
            )
    return todo


def split_batches(todo, batch_size):
    """Batches of at most ``batch_size`` pictures whose seeds follow each other."""
    batches = []
    for item in todo:
        if batches and len(batches[-1]) < batch_size and item[1] == batches[-1][-1][1] + 1:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


if __name__ == "__main__":
    exit_cleanly(main, sys.argv[1:])
