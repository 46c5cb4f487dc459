"""Fine-tune: python train.py --adapter selora --data folder:/my/pictures

Reads like the data's way through the system: records -> pictures -> latents, captions -> prompts -> an adapter.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from minildm import load
from minildm.data.flags import add_data_flags, data_set_from, transform_from
from minildm.data.prompts import prompts_for
from minildm.data.splits import split_by_patient
from minildm.errors import InputError, exit_cleanly
from minildm.loading import is_embedded, usable_device
from minildm.settings import Help, at_least
from minildm.training.config import PRESETS, TrainingConfig
from minildm.training.finetune import Pictures, adapt, encode, summary
from minildm.training.run import Run, fingerprint, read_settings

NOT_SETTINGS = ("resume", "dry_run", "out", "preset")
FREE = ("device", "workers", "cache", "compile", "micro_batch")  # what a resumed run may change


def parser():
    parser = argparse.ArgumentParser(
        prog="train.py", description="Fine-tune a Stable Diffusion model on pictures.", formatter_class=Help
    )
    add = parser.add_argument_group("what").add_argument
    add("--adapter", default="selora", choices=("selora", "lora"), help="selora: ranks grow where it pays")
    add("--base", help=".safetensors file or diffusers-layout folder (default: the one in weights/)")
    add("--on-top-of", action="append", default=[], metavar="FILE[:0.6]", help="adapters to merge into the base first")
    add("--prediction", choices=("epsilon", "v"), help="of a single file that cannot say it: v for SD v2.x at 768 px")
    add("--data", default="phantom", metavar="NAME:PATH", help="phantom, folder:..., iu-xray:..., padchest:..., ...")
    add(
        "--preset",
        choices=tuple(PRESETS),
        help="a paper's settings, or those for the embedded base (default there); flags beside it win",
    )
    add("--out", type=Path, default=Path("runs/latest"), help="folder for the run")
    add("--resume", type=Path, metavar="RUN", help="continue this run, exactly")
    add("--dry-run", action="store_true", help="print the settings and stop")
    add_data_flags(parser)

    add = parser.add_argument_group("adapter").add_argument
    add("--rank", type=int, help="at the start (default: 1 for selora, 4 for lora)")
    add("--alpha", type=float, help="scale = alpha / rank (default: scale 1)")
    add("--layers", choices=("all-linear", "paper", "attention"), help="which layers of a network")
    add("--targets", nargs="+", choices=("unet", "text_encoder"), help="which networks")
    add = parser.add_argument_group("rank growth (selora)").add_argument
    add("--expand-threshold", type=float, help="lambda >= 1: grow where the Fisher ratio reaches it")
    add("--expand-interval", type=int, help="t, steps between tests")
    add("--expand-criterion", choices=("sampled", "expected"), help="the paper's drawn row, or the mean over all rows")
    add("--max-rank", type=int, help="of any layer")
    add("--max-parameters", type=int, help="of the adapter in all; the highest ratios come first")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=float, help="passes over the training pictures")
    add("--steps", type=int, help="at most (default: 1000, or what --epochs take)")
    add("--batch-size", type=int, help="samples a step")
    add("--micro-batch", type=int, help="samples at a time, a divisor of the batch size: less memory, same result")
    add("--lr", type=float, help="learning rate of Adam")
    add("--lr-schedule", choices=("constant", "cosine"), help="after the warm-up")
    add("--warmup", type=int, help="steps")
    add("--weight-decay", type=float, help="of AdamW")
    add("--clip", type=float, help="largest norm of the gradient, 0 = off")
    add("--max-bad-steps", type=int, help="steps in a row whose loss is not finite, before the run stops")
    add("--checkpointing", action="store_true", help="compute activations twice instead of keeping them: less memory")
    add("--seed", type=int, help="of everything random")
    add = parser.add_argument_group("diffusion").add_argument
    add("--caption-dropout", type=float, help="share of samples with an empty prompt, for guidance")
    add("--min-snr-gamma", type=float, help="weight the loss by min-SNR, 5 is usual; 0 = off")
    add("--noise-offset", type=float, help="0.1 is usual; 0 = off")
    add = parser.add_argument_group("looking at it").add_argument
    add("--validation-interval", type=int, help="steps (default: every epoch, or every few if they are short)")
    add("--validation-pairs", type=int, help="(timestep, noise) pairs; one for each picture if those are more")
    add("--sample-interval", type=int, help="steps between sheets of sample pictures; 0 = none")
    add("--samples", type=int, help="pictures on a sheet")
    add("--save-interval", type=int, help="steps between saved states")
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the frozen base; the adapter is float32 (default: bfloat16 on a GPU, float32 elsewhere)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the networks: minutes at the "
        "start (and whenever a selora layer passes rank 8, 16, ...), then faster on a GPU",
    )
    add("--workers", type=at_least(0), default=0, help="processes that read ahead")
    add("--cache", type=Path, default=Path.home() / ".cache" / "minildm", help="folder for latents and contexts")
    parser.set_defaults(size=None, **{field.name: field.default for field in dataclasses.fields(TrainingConfig)})
    return parser


def parse(arguments):
    """The flags; those that are not given come from --preset (the embedded base has its own) or --resume."""
    flags = parser()
    given, _ = flags.parse_known_args(arguments)
    if given.preset and given.resume:
        raise InputError("--resume takes its settings from the run; leave --preset out")
    preset = given.preset or ("tiny" if not given.resume and is_embedded(given.base) else None)
    if preset:
        flags.set_defaults(preset=preset, **PRESETS[preset])
    if given.epochs is not None and given.steps is None:
        flags.set_defaults(steps=None)  # a preset's steps would cut the epochs that were asked for
    if given.resume:
        flags.set_defaults(**read_settings(given.resume)["flags"], out=given.resume)
    args = flags.parse_args(arguments)
    args.targets = tuple(args.targets)
    return args


def main(arguments):
    args = parse(arguments)
    config = TrainingConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainingConfig)})
    flags = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in NOT_SETTINGS
    }
    if args.dry_run:
        print(json.dumps(flags, indent=1))
        return 0
    if args.preset:
        print(f"settings: --preset {args.preset}, where no flag says otherwise (--dry-run shows all)")
    run = Run(args.out, flags, resume=args.resume is not None, free=FREE)

    start = time.perf_counter()
    device = usable_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    data = data_set_from(args, args.data)
    model = load(args.base, args.on_top_of, device, getattr(torch, dtype), args.prediction)
    args.size = model.config.image_size if args.size is None else args.size
    print(
        f"{model.files.path}: {args.size} px, base in {dtype} on {device}, loaded in "
        f"{time.perf_counter() - start:.1f} s"
    )

    latents = encode(model, data.records, transform_from(args), args.cache, args.skip_bad)
    if bad := len(data.records) - len(latents.records):
        print(f"note: {bad:,} of {len(data.records):,} pictures cannot be decoded and are left out (--skip-bad)")
    data = dataclasses.replace(data, records=latents.records)
    pictures = Pictures(data.records, tuple(prompts_for(data, args.prompt_template)), latents)
    splits = {
        name: pictures.some(indices) for name, indices in split_by_patient(data.records, args.split, args.seed).items()
    }
    training, validation = splits["train"], splits.get("validation", pictures.some([]))
    run.begin(
        base=model.base_hash,
        dtype=dtype,
        pixels=args.size,
        data=fingerprint(data.records, pictures.prompts, latents.keys),
        splits={name: [record.name for record in part.records] for name, part in splits.items()},
    )
    for note in data.notes:
        print(f"note: {note}")
    print(
        f"{data.name}: "
        + ", ".join(f"{len(part.records):,} {name}" for name, part in splits.items())
        + f" pictures; {config.total_steps(len(training.records)):,} steps of {config.batch_size}; run: {run.folder}"
    )

    state = adapt(model, training, validation, config, run, args.cache, args.balance, args.workers, args.compile)
    print(summary(model, state, run))
    prompt = training.prompts[0].replace('"', "'")
    print(
        f'next: python sample.py "{prompt}"'
        + f" --base {args.base}" * bool(args.base)
        + f" --adapter {run.folder} -n 4 --height {args.size} --width {args.size}"
    )
    return 0


if __name__ == "__main__":
    exit_cleanly(main, sys.argv[1:])
