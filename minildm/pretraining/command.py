"""Latent diffusion from nothing: ``python -m minildm pretrain``, on any data set; weights/tiny was made by it.

Rombach et al. 2022, arXiv:2112.10752, in stages, each a task for the training loop that fine-tuning uses, too:

1. autoencoder.py: images <-> a code of 4 numbers for 8 x 8 pixels, then whitened.
2. text_encoder.py: captions -> a prediction of the code; from then on the text encoder is frozen.
3. the U-Net learns to denoise the codes, given their captions (training/finetune.py's task).
4. autoencoder.py: the decoder alone, on the same codes.

RUN/autoencoder, RUN/text_encoder, RUN/diffusion and RUN/decoder hold the stages' states and sheets (those of all but
the diffusion show images of the data set), RUN/model the result in the diffusers layout with a card.
"""

import dataclasses
import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minildm.checkpoint import NETWORKS, save_folder
from minildm.data.cache import latent_cache
from minildm.data.loader import TrainingPairs
from minildm.data.open import DataSettings, open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.reading import read
from minildm.data.splits import split_by_patient
from minildm.errors import InputError
from minildm.loading import usable_device
from minildm.pretraining.autoencoder import Autoencoding, psnr, unit_scale, whiten_codes
from minildm.pretraining.card import write_card
from minildm.pretraining.models import SHAPES, new_model
from minildm.pretraining.stage import (
    HELD_OUT,
    STAGES,
    Networks,
    PretrainingSettings,
    StageSettings,
    has_bfloat16,
    named_check,
    run_stage,
    stage_config,
)
from minildm.pretraining.text_encoder import CaptionReading
from minildm.settings import Parser, add_flags, from_flags
from minildm.training.finetune import Finetuning, Samples
from minildm.training.machine import checkpoint_blocks
from minildm.training.run import Run, data_fingerprint, read_record

FREE = ("device", "workers", "cache", "micro_batch", "checkpointing", "sample_interval", "save_interval")  # on --resume
MANY_EPOCHS = 100  # beyond which a note says that images can be learnt by heart


@dataclass(frozen=True)
class Plan:
    """A checked command line."""

    shape: str
    data: str
    data_settings: DataSettings
    settings: PretrainingSettings
    stages: dict[str, StageSettings]
    out: Path
    resume: bool

    @property
    def record(self):
        """All settings, flat, by the names of their flags: what each stage's config.json records."""
        record = {"shape": self.shape, "data": self.data} | self.data_settings.as_json() | self.settings.as_json()
        for stage, (_, prefix, *_) in STAGES.items():
            record |= {prefix + name: value for name, value in self.stages[stage].as_json().items()}
        return record


def make_parser():
    parser = Parser(prog="python -m minildm pretrain", description="Train a latent diffusion model from nothing.")
    add = parser.add_argument_group("what").add_argument
    add("--shape", default="tiny", choices=tuple(SHAPES), help="sizes of the networks: weights/tiny's, or as published")
    add("--data", default="procedural", metavar="NAME:PATH", help="procedural, phantom, folder:..., padchest:..., ...")
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    add("--resume", type=Path, metavar="RUN", help="continue this run, exactly")
    add_flags(parser, DataSettings, "data")
    for title, prefix, steps, batch_size, lr in STAGES.values():
        add_flags(parser, StageSettings, f"stage: {title}", prefix=prefix)
        parser.set_defaults(**{f"{prefix}steps": steps, f"{prefix}batch_size": batch_size, f"{prefix}lr": lr})
    add_flags(parser, PretrainingSettings, "all stages")
    parser.set_defaults(size=128, split="98/2")
    return parser


def parse(arguments):
    parser = make_parser()
    given, _ = parser.parse_known_args(arguments)
    if given.resume:
        if given.out != parser.get_default("out"):
            raise InputError(f"--resume {given.resume} continues in its own folder; leave --out {given.out} out")
        parser.set_defaults(**read_record(given.resume / "autoencoder")["settings"])
    args = parser.parse_args(arguments)
    stages = {}
    for stage, (_, prefix, *_) in STAGES.items():  # a wrong flag of the last stage must not wait for the first to end
        try:
            stages[stage] = from_flags(StageSettings, args, prefix)
        except InputError as error:
            raise named_check(error, prefix) from None
    settings, data_settings = from_flags(PretrainingSettings, args), from_flags(DataSettings, args)
    crop, size = settings.vae_crop, data_settings.size
    if crop is not None and (crop % 8 or crop > size):
        raise InputError(f"--vae-crop {crop} must be a multiple of 8, from 8 to --size {size}")
    out = args.resume or args.out
    return Plan(args.shape, args.data, data_settings, settings, stages, out, args.resume is not None)


def main(arguments):
    plan = parse(arguments)
    settings, size = plan.settings, plan.data_settings.size
    device = usable_device(settings.device)
    dtype = getattr(torch, settings.dtype or ("bfloat16" if has_bfloat16() else "float32"))
    runs = {stage: open_stage(plan, stage) for stage in STAGES}

    # Data
    transform = plan.data_settings.transform(size)
    data = open_data_set(plan.data, plan.data_settings, settings.seed)
    template, skip_bad = plan.data_settings.prompt_template, plan.data_settings.skip_bad
    prompts_for(data, template)  # if there are no captions, say so before every image is decoded
    data, contents = readable(data, transform, skip_bad, plan.resume)
    prompts = tuple(prompts_for(data, template))
    parts = split_by_patient(data.records, plan.data_settings.split, settings.seed)
    if "validation" not in parts:
        raise InputError(f"--split {plan.data_settings.split} leaves no image to validate on; choose 98/2, 80/16/4 or "
                         "70/10/20")  # fmt: skip
    parts["validation"] = parts["validation"][:: math.ceil(len(parts["validation"]) / HELD_OUT)]
    images = {name: image_pairs(data.records, parts[name], transform) for name in ("train", "validation")}
    for note in data.notes:
        print(f"note: {note}")
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
    print(f"{data.name}: {sizes} images of {size} px; run: {plan.out}")

    config = SHAPES[plan.shape]
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, latent_size=size // 8))
    model = new_model(config, settings.seed, device)
    if settings.checkpointing:
        checkpoint_blocks(model.vae, model.unet, model.text_encoder)
    found = data_fingerprint(data.records, prompts, [contents.get(record.name, b"") for record in data.records])
    options = {"balance": plan.data_settings.balance, "workers": settings.workers}
    seconds = {}

    def begin(stage, validation_interval=None):
        """Announce a stage. Returns: (its run, its TrainingConfig)."""
        runs[stage].begin(data=found)
        config, n = stage_config(settings, plan.stages[stage], validation_interval), len(parts["train"])
        print(f"stage {list(STAGES).index(stage) + 1} of {len(STAGES)}, {STAGES[stage][0]}: {config.steps:,} steps of "
              f"{config.batch_size}; {runs[stage].folder}")  # fmt: skip
        if stage in ("text_encoder", "diffusion") and config.steps * config.batch_size > MANY_EPOCHS * n:
            print(f"note: that is {config.steps * config.batch_size // n:,} times each of {n:,} images, which can be "
                  "learnt by heart; python -m minildm audit finds copies")  # fmt: skip
        return runs[stage], config

    def autoencoding(stage, crop):
        run, config = begin(stage, validation_interval=1000)
        task = Autoencoding(model.vae, *images.values(), config, stage, crop, device, dtype, **options)
        seconds[stage] = run_stage(model.vae, task, config, run, back_to_best=False)

    # 1: the autoencoder
    model.vae.requires_grad_(True)
    autoencoding("autoencoder", settings.vae_crop or size)
    whiten_codes(model.vae, images["train"], device)
    latents = latent_cache(data.records, transform, model.vae, settings.cache)
    samples = Samples(data.records, prompts, latents)
    training, held_out = samples.subset(parts["train"]), samples.subset(parts["validation"])
    vae = dataclasses.replace(model.config.vae, scaling_factor=unit_scale(training.latents))
    model.config = dataclasses.replace(model.config, vae=vae)

    # 2: the text encoder
    run, config = begin("text_encoder")
    task = CaptionReading(model, training, held_out, config, size // 8, dtype, **options)
    seconds["text_encoder"] = run_stage(task.networks, task, config, run, back_to_best=True)

    # 3: the U-Net
    run, config = begin("diffusion")
    model.unet.requires_grad_(True)
    task = Finetuning(model, training, held_out, config, settings.cache, precision=dtype, **options)
    seconds["diffusion"] = run_stage(model.unet, task, config, run, back_to_best=True)

    # 4: the decoder alone
    for module in (model.vae.decoder, model.vae.post_quant_conv):
        module.requires_grad_(True)
    autoencoding("decoder", size)

    folder = plan.out / "model"
    save_folder({name: getattr(model, name) for name in NETWORKS}, model.config, folder)
    quality = psnr(model.vae, images["validation"], device)
    write_card(folder, card_command(plan), plan, runs, seconds, quality, str(dtype).removeprefix("torch."), device)
    print(f"reconstructions of held-out images: PSNR {quality:.2f} dB; losses and hashes: {folder / 'README.md'}")
    print(f"next: python sample.py {shlex.quote(held_out.prompts[0])} --base {shlex.quote(str(folder))}")
    return 0


def open_stage(plan, stage):
    folder = plan.out / stage
    resume = plan.resume and (folder / "config.json").exists()
    command = f"python -m minildm pretrain --resume {shlex.quote(str(plan.out))}"
    return Run(folder, plan.record, resume, FREE, Networks.result, command)


def image_pairs(records, indices, transform):
    """TrainingPairs of images without prompts."""
    records = [records[i] for i in indices]
    return TrainingPairs(records, [""] * len(records), transform)


def readable(data, transform, skip_bad, resume):
    """Decode every file once, so that none fails hours later; images rendered on demand have none.

    Returns: (the DataSet, with ``skip_bad`` without images that cannot be read; {name: hash of the file's contents}).
    """
    files = [record for record in data.records if record.render is None]
    contents, bad = {}, {}

    def decode(record):
        try:
            contents[record.name] = read(record, transform)[2]
        except InputError as error:
            bad[record.name] = str(error)

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(decode, files), total=len(files), desc="decoding all images", delay=2, disable=None))
    if bad and not skip_bad:
        advice = "restore them, or begin a new run with --skip-bad" if resume else "--skip-bad leaves them out"
        raise InputError(f"{len(bad):,} of {len(data):,} images cannot be used: {'; '.join(list(bad.values())[:5])}; "
                         f"{advice}")  # fmt: skip
    records = tuple(record for record in data.records if record.name not in bad)
    return dataclasses.replace(data, records=records), contents


def card_command(plan):
    """The command that makes the model again: settings that differ from the defaults and decide about the result."""
    parser, words = make_parser(), ["python -m minildm pretrain"]
    for name, value in plan.record.items():
        if name not in FREE and value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}"] + [shlex.quote(str(value))] * (value is not True)
    return " ".join(words)
