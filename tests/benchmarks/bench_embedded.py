"""The embedded model measured: python tests/benchmarks/bench_embedded.py [--only shapes unseen psnr ...]

    shapes   does the base without adapters show what 200 prompts for two shapes ask for? At several guidance scales.
    unseen   the same for arrangements of two shapes that no image of the training data shows, in whatever words
    psnr     what the autoencoder loses on images it never saw: procedural ones and phantoms
    time     sample.py from start to PNG, 50 DDIM steps with guidance
    chest    the base with and without its adapter for chest radiographs: Frechet distance to held-out phantoms (FD-vae
             and FD-random, not FID), and whether the phantom's ruler finds what the prompts ask for
    findings does the adapter show the findings that prompts ask for? A balanced list of prompts, by the phantom's ruler
    figure   docs/embedded.png: shapes by the base, chests by the base and with its adapter, phantoms of the same labels

Prints numbers and asserts nothing. Not for clinical use.
"""

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
from minildm.metrics.adherence import prompt_adherence, wilson
from minildm.metrics.extractors import FeatureSettings, open_extractor
from minildm.metrics.features import collect
from minildm.settings import Parser
from minildm.teaching import phantom, procedural, ruler
from minildm.teaching.shape_check import SHAPE_PROMPT, check_shapes, direction
from minildm.teaching.shapes import COLOURS, RELATIONS, SHAPES, shape_prompt, with_article

SET = 1  # the seed of the images and prompts here; the model was trained on those of seed 0


def sample(model, prompts, args, guidance, seed=0):
    """PIL images of all prompts, and the seconds they took."""
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
    sample_and_check(args, "shapes", [shape_prompt((SET, i)) for i in range(args.n)])


def unseen(args):
    prompts = unseen_prompts()
    subset = prompts[:: math.ceil(len(prompts) / args.n)]
    sample_and_check(args, f"unseen shapes (of {len(prompts)} such prompts)", subset)


def unseen_prompts():
    """Prompts for two shapes of different colour and form whose arrangement no caption of the data set describes.

    They come in pairs, as each arrangement can be described from either shape.
    """

    def arrangement(caption):
        match = SHAPE_PROMPT.fullmatch(caption)
        if match and match["relation"]:
            first, second = (match["c1"], match["s1"]), (match["c2"], match["s2"])
            dx, dy = direction(match["relation"])
            return (first, dx, dy, second) if dx + dy < 0 else (second, -dx, -dy, first)

    seen = {arrangement(record.fields["text"]) for record in procedural_set.records()[0]}
    things = list(itertools.product(COLOURS, SHAPES))
    pairs = [one + two for one, two in itertools.permutations(things, 2) if one[0] != two[0] and one[1] != two[1]]
    prompts = [
        f"{with_article(c1)} {s1} {relation} {with_article(c2)} {s2}"
        for c1, s1, c2, s2 in pairs
        for relation in RELATIONS
    ]
    return [prompt for prompt in prompts if arrangement(prompt) not in seen]


def sample_and_check(args, name, prompts):
    model = minildm.load(args.base, device=args.device)
    for guidance in args.guidance:
        images, seconds = sample(model, prompts, args, guidance)
        checks = [check_shapes(np.asarray(image), prompt) for image, prompt in zip(images, prompts)]
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
    """Mean over images of 10 log10(255^2 / mean squared error), reconstructed from the latents' mean, in 8 bits."""
    model = minildm.load(args.base, device=args.device)
    size = model.config.image_size
    seeds = [(SET, i) for i in range(args.n)]
    radiographs = phantom.render_batch([phantom.labels(seed) for seed in seeds], seeds, size)
    sets = {"procedural images": procedural.render_batch(seeds, size)[0], "phantoms": np.stack([radiographs] * 3, -1)}
    for name, batch in sets.items():
        values, pairs = [], []
        for pixels in batch:
            images = to_tensor(pixels[None]).to(model.device)
            decoded = model.vae.decode(model.vae.encode(images).mean).clamp(-1, 1)
            decoded = ((decoded + 1) * 127.5).round().byte()[0].permute(1, 2, 0).cpu().numpy()
            values.append(10 * np.log10(255**2 / np.square(decoded.astype(float) - pixels).mean()))
            pairs += [Image.fromarray(pixels), Image.fromarray(decoded)]
        print(
            f"PSNR of {len(values)} held-out {name}, {size} px: {np.mean(values):.2f} dB (lowest {np.min(values):.2f})",
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
        f"sample.py, one image, 50 DDIM steps with guidance, start-up included: {min(seconds):.1f} s (best of 3), "
        f"{os.cpu_count()} cores",
        flush=True,
    )


def chest(args):
    """Images for the prompts of n frontal phantoms, against n others: as near as phantoms are to each other?"""
    asked, real = (
        [record for record in phantom_set.records(2 * args.n, SET + i)[0] if record.frontal][: args.n] for i in range(2)
    )
    prompts = [render(phantom_set.PROMPT, record.fields) for record in asked]
    extractors = [
        open_extractor(FeatureSettings(features="vae", base=args.base, device=args.device)),
        open_extractor(FeatureSettings(features="random", device=args.device), dims=(192, 64)),
    ]
    real = [collect(real, extractor, keep=0).statistics for extractor in extractors]

    def report(name, images):
        words = []
        for extractor, theirs in zip(extractors, real):
            ours = collect(images, extractor, keep=0).statistics
            words += [f"{extractor.label}-{dim} {ours[dim].distance(theirs[dim]):.4g}" for dim in extractor.dims]
        agreement = prompt_adherence(images, [record.fields for record in asked], ruler.measure, ruler.obeys)
        words += [
            f"{field} {100 * one.share:.1f} % (chance {100 * one.chance:.1f}, n {one.n})"
            for field, one in agreement.items()
        ]
        print(f"{name}: {', '.join(words)}", flush=True)

    report(f"{args.n} phantoms themselves", asked)
    for name, adapters in (("base", []), ("adapter", [args.adapter])):
        model = minildm.load(args.base, adapters, device=args.device)
        for guidance in args.guidance if adapters else args.guidance[:1]:
            images, seconds = sample(model, prompts, args, guidance)
            with tempfile.TemporaryDirectory() as folder:
                paths = [Path(folder) / f"{i:04}.png" for i in range(len(images))]
                for image, path in zip(images, paths):
                    image.save(path)
                report(f"{name}, guidance {guidance:g}, {args.sampler} {args.steps} steps, {seconds:.0f} s", paths)
            if args.sheets:
                contact_sheet(images[:64]).save(args.sheets / f"chest-{name}-guidance-{guidance:g}.png")


ASKED = ("cardiomegaly", "pleural effusion", "pneumothorax", "pacemaker", "consolidation", "normal")


def findings(args):
    """n frontal images for each finding, three quarters of them PA: what the ruler sees, with 95 % intervals."""
    people = [
        phantom.labels((SET, kind, i), view="AP" if i % 4 == 3 else "PA", finding=finding)
        for kind, finding in enumerate(ASKED)
        for i in range(args.n)
    ]
    fields = [phantom.fields(person) for person in people]
    prompts = [render(phantom_set.PROMPT, one) for one in fields]
    model = minildm.load(args.base, [] if args.adapter == "none" else [args.adapter], device=args.device)
    originals = phantom.render_batch(people, [(SET, kind, i) for kind in range(len(ASKED)) for i in range(args.n)])
    report_findings("the phantoms of these labels", people, fields, list(originals))
    for guidance in args.guidance:
        images, seconds = sample(model, prompts, args, guidance)
        images = [np.asarray(image.convert("L")) for image in images]
        title = f"guidance {guidance:g}, {args.sampler} {args.steps} steps, {seconds:.0f} s"
        report_findings(title, people, fields, images)
        if args.sheets:
            shown = [Image.fromarray(images[kind * args.n + i]) for kind in range(len(ASKED)) for i in range(8)]
            contact_sheet(shown, columns=8).save(args.sheets / f"findings-guidance-{guidance:g}.png")


def report_findings(title, people, fields, images):
    readings = ruler.measure(images)
    verdicts = [ruler.obeys(reading, one) for reading, one in zip(readings, fields)]

    def share(name, values, by_chance=None):
        mean = np.mean(values)
        low, high = wilson(mean, len(values))
        chance = "" if by_chance is None else f", chance {100 * np.mean(by_chance):.1f}"
        print(
            f"    {name:<28} {100 * mean:5.1f} % ({100 * low:.1f} to {100 * high:.1f}; n {len(values)}{chance})",
            flush=True,
        )

    def seen(finding, where):
        return [ruler.obeys(readings[i], {"diagnosis": finding})["diagnosis"] for i in where]

    print(title)
    every = range(len(people))
    others = {finding: [i for i in every if people[i].finding != finding] for finding in ASKED}
    chance = [np.mean(seen(finding, others[finding])) for finding in ASKED]
    share("findings as asked", [verdict["diagnosis"] for verdict in verdicts], chance)
    for finding in ASKED:
        share(
            f"  {finding}",
            seen(finding, [i for i in every if people[i].finding == finding]),
            seen(finding, others[finding]),
        )
    sided = [
        verdict["loc"]
        for verdict, person in zip(verdicts, people)
        if person.finding in ("pleural effusion", "pneumothorax") and verdict["diagnosis"]
    ]
    if sided:
        share("side, where it is seen", sided)
    share("view", [verdict["view"] for verdict in verdicts])
    share("sex", [verdict["sex"] for verdict in verdicts])


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
        ("PA", "female", "pacemaker", ""),
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
    chests = [render(phantom_set.PROMPT, phantom.fields(person)) for person in people]
    base, adapted = (minildm.load(args.base, adapters, device=args.device) for adapters in ([], [args.adapter]))
    rows = [
        sample(model, prompts, args, usual_guidance(model.config))[0]
        for model, prompts in ((base, words), (base, chests), (adapted, chests))
    ]
    radiographs = [
        Image.fromarray(phantom.render(person, (SET, i), rows[0][0].width)).convert("RGB")
        for i, person in enumerate(people)
    ]
    print("\n".join(words + chests))
    contact_sheet(list(itertools.chain(*rows, radiographs))).save(args.sheets / "embedded.png")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parts = ["shapes", "unseen", "psnr", "time", "chest", "findings"]
    parser.add_argument("--only", nargs="*", default=parts, choices=[*parts, "figure"], help="which parts")
    parser.add_argument("--base", type=Path, default=EMBEDDED)
    parser.add_argument("--adapter", default=str(EMBEDDED_ADAPTER))
    parser.add_argument("-n", type=int, default=200, help="prompts, or images; of findings: of each")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="write contact sheets here")
    args = parser.parse_args()
    if "figure" in args.only and not args.sheets:
        parser.error("--only figure needs a folder to write to: add --sheets FOLDER")
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("shapes", shapes),
        ("unseen", unseen),
        ("psnr", psnr),
        ("time", start_to_png),
        ("chest", chest),
        ("findings", findings),
        ("figure", figure),
    ):
        if name in args.only:
            part(args)


if __name__ == "__main__":
    main()
