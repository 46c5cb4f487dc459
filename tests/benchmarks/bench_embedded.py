"""The embedded model measured: python tests/benchmarks/bench_embedded.py [--only shapes unseen psnr ...]

    shapes   does the bare base draw what 200 prompts of two shapes ask for? By guidance scale.
    unseen   the same for prompts whose two shapes no picture of the data set shows in these places, however told
    psnr     what its autoencoder loses, on pictures it never saw: procedural ones and phantoms
    time     sample.py from start to PNG, 50 DDIM steps with guidance
    chest    the base with and without its adapter for chest radiographs: Frechet distance to held-out phantoms (in
             FD-vae and FD-random features: no FID), and whether the phantom's ruler finds what was asked for
    figure   docs/embedded.png: shapes of the base, chests of the base and with its adapter, phantoms of the same labels

Numbers only, nothing is asserted; they go into the README. Not for clinical use.
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import minildm
from minildm.data.prompts import render
from minildm.data.reading import to_tensor
from minildm.data.sets import phantom as phantom_set
from minildm.data.sets import procedural as procedural_set
from minildm.images import contact_sheet
from minildm.latent_diffusion import usual_guidance
from minildm.loading import EMBEDDED, EMBEDDED_ADAPTER
from minildm.metrics.adherence import prompt_adherence
from minildm.metrics.extractors import collect, open_extractor
from minildm.teaching import phantom, procedural, ruler

SET = 1  # the seed of the pictures and prompts here; training had those of seed 0


def draw(model, prompts, args, guidance, seed=0):
    """PIL pictures of all prompts, and the seconds they took."""
    images, begun = [], time.perf_counter()
    for first in range(0, len(prompts), args.batch_size):
        images += model.sample(
            prompts[first : first + args.batch_size],
            steps=args.steps,
            sampler=args.sampler,
            guidance=guidance,
            seed=seed + first,
        )
    return images, time.perf_counter() - begun


def shapes(args):
    draw_and_check(args, "shapes", [procedural.shape_prompt((SET, i)) for i in range(args.n)])


def unseen(args):
    prompts = never_shown()
    draw_and_check(args, f"unseen shapes (all there are: {len(prompts)})", prompts[:: math.ceil(len(prompts) / args.n)])


def never_shown():
    """Prompts of two shapes, unlike in colour and shape, that none of the data set's 40,000 captions means, in whatever
    words. They come in pairs: one arrangement told from either shape."""

    def place(caption):
        told = procedural.SHAPE_PROMPT.fullmatch(caption)
        if told and told["relation"]:
            first, second = (told["c1"], told["s1"]), (told["c2"], told["s2"])
            dx, dy = procedural.direction(told["relation"])
            return (first, dx, dy, second) if dx + dy < 0 else (second, -dx, -dy, first)

    shown = {place(record.fields["text"]) for record in procedural_set.records()[0]}
    things = list(itertools.product(procedural.COLOURS, procedural.SHAPES))
    pairs = [one + two for one, two in itertools.permutations(things, 2) if one[0] != two[0] and one[1] != two[1]]
    prompts = [
        f"a {c1} {s1} {relation} a {c2} {s2}".replace("a orange", "an orange")
        for c1, s1, c2, s2 in pairs
        for relation in procedural.RELATIONS
    ]
    return [prompt for prompt in prompts if place(prompt) not in shown]


def draw_and_check(args, name, prompts):
    model = minildm.load(args.base, device=args.device)
    for guidance in args.guidance:
        images, seconds = draw(model, prompts, args, guidance)
        checks = [procedural.check_shapes(np.asarray(image), prompt) for image, prompt in zip(images, prompts)]
        colour, shape, order, right = (
            100 * np.mean([getattr(check, part) for check in checks]) for part in ("colour", "shape", "order", "right")
        )
        print(
            f"{name}, guidance {guidance:g}: right {right:.1f} % (colours {colour:.1f}, shapes {shape:.1f}, order "
            f"{order:.1f}) of {len(prompts)} prompts; {seconds:.0f} s",
            flush=True,
        )
        if args.sheets:
            contact_sheet(images[:64]).save(args.sheets / f"{name.split()[0]}-guidance-{guidance:g}.png")


@torch.no_grad()
def psnr(args):
    """Mean over pictures of 10 log10(255^2 / mean squared error), given back from the code's mean in 8 bits."""
    model = minildm.load(args.base, device=args.device)
    size = model.config.image_size
    seeds = [(SET, i) for i in range(args.n)]
    films = phantom.render_batch([phantom.labels(seed) for seed in seeds], seeds, size)
    sets = {"procedural pictures": procedural.render_batch(seeds, size)[0], "phantoms": np.stack([films] * 3, -1)}
    for name, pictures in sets.items():
        values, pairs = [], []
        for picture in pictures:
            images = to_tensor(picture[None]).to(model.device)
            back = model.vae.decode(model.vae.encode(images).mean).clamp(-1, 1)
            back = ((back + 1) * 127.5).round().byte()[0].permute(1, 2, 0).cpu().numpy()
            values.append(10 * np.log10(255**2 / np.square(back.astype(float) - picture).mean()))
            pairs += [Image.fromarray(picture), Image.fromarray(back)]
        print(
            f"PSNR of {len(values)} held-out {name}, {size} px: {np.mean(values):.2f} dB (least {np.min(values):.2f})",
            flush=True,
        )
        if args.sheets:
            contact_sheet(pairs[:32]).save(args.sheets / f"psnr-{name.split()[0]}.png")


def start_to_png(args):
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            str(ROOT / "sample.py"),
            "a red circle above a blue square",
            "--base",
            str(args.base),
            "--adapter",
            "none",
            "--out",
            out,
            "--device",
            args.device,
        ]
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
    print(
        f"sample.py, one picture, 50 DDIM steps with guidance, start-up included: {min(seconds):.1f} s (best of 3), "
        f"{os.cpu_count()} cores",
        flush=True,
    )


def chest(args):
    """Pictures for the prompts of n frontal phantoms, against n others: as near as phantoms are to each other?"""
    asked, real = (
        [record for record in phantom_set.records(2 * args.n, SET + i)[0] if record.frontal][: args.n] for i in range(2)
    )
    prompts = [render(phantom.PROMPT, record.fields) for record in asked]
    extractors = [
        open_extractor("vae", base=args.base, device=args.device),
        open_extractor("random", dims=(192, 64), device=args.device),
    ]
    real = [collect(real, extractor, keep=0).statistics for extractor in extractors]

    def report(name, pictures):
        words = []
        for extractor, theirs in zip(extractors, real):
            ours = collect(pictures, extractor, keep=0).statistics
            words += [f"{extractor.label}-{dim} {ours[dim].distance(theirs[dim]):.4g}" for dim in extractor.dims]
        agreement = prompt_adherence(pictures, [record.fields for record in asked], ruler.measure, ruler.obeys)
        words += [
            f"{field} {100 * one.share:.1f} % (chance {100 * one.chance:.1f}, n {one.n})"
            for field, one in agreement.items()
        ]
        print(f"{name}: {', '.join(words)}", flush=True)

    report(f"{args.n} phantoms themselves", asked)
    for name, adapters in (("base", []), ("adapter", [args.adapter])):
        model = minildm.load(args.base, adapters, device=args.device)
        for guidance in args.guidance if adapters else args.guidance[:1]:
            images, seconds = draw(model, prompts, args, guidance)
            with tempfile.TemporaryDirectory() as folder:
                paths = [Path(folder) / f"{i:04}.png" for i in range(len(images))]
                for image, path in zip(images, paths):
                    image.save(path)
                report(f"{name}, guidance {guidance:g}, {args.sampler} {args.steps} steps, {seconds:.0f} s", paths)
            if args.sheets:
                contact_sheet(images[:64]).save(args.sheets / f"chest-{name}-guidance-{guidance:g}.png")


def figure(args):
    """Four rows of four at the usual guidance, seeds 0 to 3; written as SHEETS/embedded.png."""
    words = [
        "a red circle above a blue square",
        "a white square to the left of a green ring",
        "three orange circles",
        "a landscape with the sun and hills",
    ]
    kinds = [
        ("PA", "male", "normal", ""),
        ("PA", "female", "cardiomegaly", ""),
        ("AP", "male", "pleural effusion", "right"),
        ("PA", "female", "normal", ""),
    ]
    people = [
        next(
            label
            for i in itertools.count(100 * column)
            for label in [phantom.labels((SET, i), view, finding)]
            if label.sex == sex and place in label.place
        )
        for column, (view, sex, finding, place) in enumerate(kinds)
    ]
    chests = [render(phantom.PROMPT, phantom.fields(person)) for person in people]
    base, adapted = (minildm.load(args.base, adapters, device=args.device) for adapters in ([], [args.adapter]))
    rows = [
        draw(model, prompts, args, usual_guidance(model.config))[0]
        for model, prompts in ((base, words), (base, chests), (adapted, chests))
    ]
    films = [
        Image.fromarray(phantom.render(person, (SET, i), rows[0][0].width)).convert("RGB")
        for i, person in enumerate(people)
    ]
    print("\n".join(words + chests))
    contact_sheet(list(itertools.chain(*rows, films))).save(args.sheets / "embedded.png")


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["shapes", "unseen", "psnr", "time", "chest"], help="which parts")
    parser.add_argument("--base", type=Path, default=EMBEDDED)
    parser.add_argument("--adapter", default=str(EMBEDDED_ADAPTER))
    parser.add_argument("-n", type=int, default=200, help="prompts, or pictures")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="write sheets of pictures here")
    args = parser.parse_args()
    if "figure" in args.only and not args.sheets:
        parser.error("figure is a picture: say where to write it, --sheets FOLDER")
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("shapes", shapes),
        ("unseen", unseen),
        ("psnr", psnr),
        ("time", start_to_png),
        ("chest", chest),
        ("figure", figure),
    ):
        if name in args.only:
            part(args)


if __name__ == "__main__":
    main()
