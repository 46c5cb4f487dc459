"""Latent diffusion from scratch: ``python -m minildm pretrain``, on any data set. It made weights/tiny.

Rombach et al. 2022, arXiv:2112.10752, in four stages, each a task for the training loop that fine-tuning uses as well:

1. autoencoder.py: images <-> codes of 4 numbers per 8 x 8 pixels; the codes are then whitened.
2. text_encoder.py: the text encoder learns to predict the codes from captions, and is then frozen.
3. The U-Net learns to denoise the codes, given their captions (the task of training/finetune.py).
4. autoencoder.py: the decoder alone, on the same codes. With --decoder-of, this stage alone, for a trained model.

RUN/autoencoder, RUN/text_encoder, RUN/diffusion and RUN/decoder hold each stage's log, state and sample sheets (all but
the U-Net's show images of the data set). RUN/model is the result in diffusers layout, with a card.
"""

import dataclasses
import json
import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from minildm import kernels
from minildm.checkpoint import NETWORKS, save_folder
from minildm.data.cache import latent_cache, weights_fingerprint
from minildm.data.loader import TrainingPairs
from minildm.data.open import DataSettings, open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.reading import read
from minildm.data.splits import SPLITS, split_by_patient
from minildm.errors import InputError
from minildm.loading import load, usable_device
from minildm.pretraining.autoencoder import Autoencoding, psnr, unit_scale, whiten_codes
from minildm.pretraining.card import write_card
from minildm.pretraining.models import SHAPES, new_model
from minildm.pretraining.stage import HELD_OUT, STAGES, Networks, StageSettings, run_stage, stage_config, stage_settings
from minildm.pretraining.text_encoder import CaptionReading
from minildm.progress import Progress
from minildm.settings import Parser, Settings, add_flags, flag, from_flags, setting
from minildm.training.command_line import check_texts
from minildm.training.config import TrainingConfig
from minildm.training.finetune import Finetuning, Samples
from minildm.training.machine import Machine, checkpoint_blocks
from minildm.training.run import Run, data_fingerprint, read_record

# Settings of training and of the machine that have a flag here, and what differs from their usual defaults.
SHARED = ("micro_batch", "warmup", "ema_decay", "caption_dropout", "min_snr_gamma", "clip", "seed", "checkpointing",
          "sample_interval", "save_interval")  # fmt: skip
MACHINE = ("device", "workers", "cache")
DEFAULTS = {"warmup": 200, "ema_decay": 0.999, "sample_interval": 1000, "save_interval": 200, "split": "98/2"}
# What a resumed run may change. Data and models may lie somewhere else, since their contents are compared.
PATHS = ("data", "decoder_of", "decoder_data", "exclude")
FREE = (*MACHINE, "micro_batch", "checkpointing", "sample_interval", "save_interval", *PATHS)
MANY_EPOCHS = 100  # above this a note warns that the model may memorise images


# --- the command line ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Goal(Settings):
    shape: str = setting("tiny", "sizes of the networks: those of weights/tiny, or published ones", choices=(*SHAPES,))
    data: str = setting("procedural", "procedural, phantom, folder:..., padchest:..., ...", metavar="NAME:PATH")
    decoder_of: str | None = setting(
        None, "train only the decoder of this model, for sharper images from the same codes", metavar="MODEL"
    )
    size: int = setting(128, "of the images in pixels, a multiple of 8", at_least=8, metavar="PIXELS")
    dtype: str | None = setting(
        None,
        "precision of products; weights are float32 (default: bfloat16 where the machine is fast at it)",
        choices=("float32", "bfloat16"),
    )


@dataclass(frozen=True)
class Plan:
    """A checked command line."""

    goal: Goal
    data: DataSettings
    stages: dict[str, StageSettings]
    shared: TrainingConfig  # settings common to all stages
    machine: Machine
    device: torch.device
    record: dict  # all settings by the names of their flags: what each stage's config.json holds
    out: Path
    resume: bool


def parse(arguments):
    """The command line as a Plan. Raises: InputError, naming the flag."""
    parser = make_parser()
    given, _ = parser.parse_known_args(arguments)
    if given.resume:
        if given.out:
            raise InputError(f"--resume {given.resume} continues in its own folder; leave --out {given.out} out")
        begun = next((stage for stage in STAGES if (given.resume / stage / "config.json").is_file()), None)
        if begun is None:
            if (given.resume / "config.json").is_file() and "adapter" in read_record(given.resume)["settings"]:
                raise InputError(f"{given.resume} is a run of train.py; python train.py --resume {given.resume} "
                                 "continues it")  # fmt: skip
            raise FileNotFoundError(
                f"{given.resume} holds no pretraining run to resume (no autoencoder/config.json or decoder/config.json)"
            )
        parser.set_defaults(**read_record(given.resume / begun)["settings"])
    args = parser.parse_args(arguments)
    machine = from_flags(Machine, args)
    device = usable_device(machine.device)
    if args.dtype is None:  # decided now and recorded, so that a run resumed on another machine keeps its precision
        args.dtype = "bfloat16" if kernels.has_fast_bfloat16(device) else "float32"
    plan = Plan(
        goal=from_flags(Goal, args),
        data=from_flags(DataSettings, args),
        stages={stage: stage_settings(stage, args) for stage in STAGES},
        shared=from_flags(TrainingConfig, args),
        machine=machine,
        device=device,
        record={name: _as_json(value) for name, value in vars(args).items() if name not in ("resume", "out")},
        out=args.resume or args.out or Path("runs/pretrain"),
        resume=args.resume is not None,
    )
    for stage, settings in plan.stages.items():
        if settings.lr == 0:
            raise InputError(f"{flag(STAGES[stage].prefix + 'lr')} 0 trains nothing; give a learning rate above 0")
    if plan.goal.decoder_of is not None:
        _refuse_other_stages(args)
    crop, size = plan.stages["autoencoder"].crop, plan.goal.size
    if crop is not None and (crop % 8 or crop > size):
        raise InputError(f"--vae-crop must be a multiple of 8, from 8 to --size {size}, got {crop}")
    if "validation" not in SPLITS[plan.data.split]:
        usable = ", ".join(split for split, shares in SPLITS.items() if "validation" in shares)
        raise InputError(f"--split {plan.data.split} leaves no image to validate on; choose one of: {usable}")
    return plan


def _refuse_other_stages(args):
    """Raise InputError for a flag that changes nothing where only a decoder is trained."""
    parser = make_parser()
    others = [name for name, stage in STAGES.items() if name != "decoder"]
    names = [STAGES[name].prefix + field for name in others for field in STAGES[name].defaults.as_json()]
    for name in ("shape", *names):
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"{flag(name)} would change nothing: --decoder-of trains only a decoder; leave it out")


def make_parser():
    parser = Parser(prog="python -m minildm pretrain", description="Train a latent diffusion model from scratch.")
    add_flags(parser, Goal, "what")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, metavar="RUN", help="folder of the run (default: runs/pretrain)")
    add("--resume", type=Path, metavar="RUN", help="continue this run exactly where it stopped")
    add_flags(parser, DataSettings, "data", skip=("size",))  # which has a default here
    for stage in STAGES.values():
        add_flags(parser, type(stage.defaults), f"stage: {stage.title}", prefix=stage.prefix)
        parser.set_defaults(**{stage.prefix + name: value for name, value in stage.defaults.as_json().items()})
    add_flags(parser, TrainingConfig, "all stages", skip=_others(TrainingConfig, SHARED))
    add_flags(parser, Machine, "machine", skip=_others(Machine, MACHINE))
    parser.set_defaults(**DEFAULTS)
    return parser


def _others(settings, names):
    return [field.name for field in dataclasses.fields(settings) if field.name not in names]


def _as_json(value):
    return json.loads(json.dumps(value, default=str))


def rebuild_command(plan):
    """The command that makes this model again: the settings that affect the result and are not the defaults."""
    parser, words = make_parser(), ["python -m minildm pretrain"]
    for name, value in plan.record.items():
        if (name in PATHS or name not in FREE) and value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}"] + [shlex.quote(str(value))] * (value is not True)
    return " ".join(words)


# --- the run ---------------------------------------------------------------------------------------------------------
def main(arguments):
    plan = parse(arguments)
    size, seed, cache = plan.goal.size, plan.shared.seed, plan.machine.cache
    device, dtype = plan.device, getattr(torch, plan.goal.dtype)
    command = f"python -m minildm pretrain --resume {shlex.quote(str(plan.out))}"
    stages = list(STAGES) if plan.goal.decoder_of is None else ["decoder"]
    runs = {
        stage: Run(plan.out / stage, plan.record, _was_begun(plan, stage), FREE, Networks.result, command)
        for stage in stages
    }
    configs = {stage: stage_config(stage, plan.stages[stage], plan.shared) for stage in stages}

    base = {}  # fingerprints of an existing model's networks
    if plan.goal.decoder_of is not None:
        model = load(plan.goal.decoder_of, device=device, dtype=torch.float32)
        base = {name: weights_fingerprint(getattr(model, name)) for name in NETWORKS}
        if plan.shared.checkpointing:
            checkpoint_blocks(model.vae)

    # Records -> images and prompts, split by patient
    main_set = decoder_set = open_images(plan, plan.goal.data, captioned=plan.goal.decoder_of is None)
    if plan.stages["decoder"].data is not None:
        others = dataclasses.replace(
            plan.data, balance=None, prompt_template=None
        )  # these images may lack their fields
        decoder_set = open_images(dataclasses.replace(plan, data=others), plan.stages["decoder"].data, captioned=False)
    options = {"balance": plan.data.balance, "workers": plan.machine.workers}
    seconds = {}

    def train_stage(stage, module, task, opened, **found):
        runs[stage].begin(data=opened.fingerprint, **found)
        announce(stage, task.config, runs[stage], len(opened.splits["train"]))
        seconds[stage] = run_stage(module, task, runs[stage], back_to_best=STAGES[stage].reads_captions)

    def autoencoding(stage, crop, images):
        own = options if images is main_set.images else options | {"balance": None}
        return Autoencoding(model.vae, *images, configs[stage], stage, crop, device, dtype, **own)

    if plan.goal.decoder_of is None:
        # The model, with random weights
        config = SHAPES[plan.goal.shape]
        config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, latent_size=size // 8))
        model = new_model(config, seed, device)
        if plan.shared.checkpointing:
            checkpoint_blocks(model.vae, model.unet, model.text_encoder)

        # 1: the autoencoder; then images -> latents, encoded once
        model.vae.requires_grad_(True)
        crop = plan.stages["autoencoder"].crop or size
        train_stage("autoencoder", model.vae, autoencoding("autoencoder", crop, main_set.images), main_set)
        whiten_codes(model.vae, main_set.images[0], device)
        latents = latent_cache(main_set.records, plan.data.transform(size), model.vae, cache)
        samples = Samples(main_set.records, main_set.prompts, latents)
        training, held_out = (samples.subset(main_set.splits[name]) for name in ("train", "validation"))
        vae = dataclasses.replace(model.config.vae, scaling_factor=unit_scale(training.latents))
        model.config = dataclasses.replace(model.config, vae=vae)

        # 2: the text encoder
        task = CaptionReading(model, training, held_out, configs["text_encoder"], dtype, **options)
        train_stage("text_encoder", task.networks, task, main_set)

        # 3: the U-Net
        model.unet.requires_grad_(True)
        task = Finetuning(model, training, held_out, configs["diffusion"], cache, precision=dtype, **options)
        train_stage("diffusion", model.unet, task, main_set)

    # 4: the decoder alone
    for module in (model.vae.decoder, model.vae.post_quant_conv):
        module.requires_grad_(True)
    train_stage("decoder", model.vae, autoencoding("decoder", size, decoder_set.images), decoder_set, **base)

    folder = plan.out / "model"
    save_folder({name: getattr(model, name) for name in NETWORKS}, model.config, folder)
    decibels = psnr(model.vae, main_set.images[1], device)
    write_card(folder, rebuild_command(plan), plan, runs, seconds, decibels)
    print(f"reconstructions of held-out images: PSNR {decibels:.2f} dB; losses and hashes: {folder / 'README.md'}")
    prompt = main_set.prompts[main_set.splits["validation"][0]] or "a chest x-ray"
    use = "--base" if plan.goal.decoder_of is None else f"--base {shlex.quote(plan.goal.decoder_of)} --vae"
    print(f"next: python sample.py {shlex.quote(prompt)} {use} {shlex.quote(str(folder))}")
    return 0


def _was_begun(plan, stage):
    return plan.resume and (plan.out / stage / "config.json").exists()


def announce(stage, config, run, n_images):
    """Print which stage begins."""
    number = list(STAGES).index(stage) + 1
    print(f"stage {number} of {len(STAGES)}, {STAGES[stage].title}: {config.steps:,} steps of {config.batch_size}; "
          f"{run.folder}")  # fmt: skip
    uses = config.steps * config.batch_size
    if STAGES[stage].reads_captions and uses > MANY_EPOCHS * n_images:
        print(f"note: each of the {n_images:,} images is used {uses // n_images:,} times, so the model may memorise "
              "them; python -m minildm audit looks for copies")  # fmt: skip


@dataclass(frozen=True)
class Images:
    """A data set for a stage."""

    records: tuple
    prompts: tuple
    fingerprint: str
    splits: dict  # {name: indices of records}
    images: tuple  # TrainingPairs of images without prompts: training, held out


def open_images(plan, spec, captioned):
    """Open and split a data set, and say what is in it.

    Args: spec: as in --data. captioned: whether prompts are needed. Returns: Images.
    """
    transform = plan.data.transform(plan.goal.size)
    data, prompts, fingerprint = open_whole_data_set(plan, spec, transform, captioned)
    splits = split_by_patient(data.records, plan.data.split, plan.shared.seed)
    splits["validation"] = splits["validation"][:: math.ceil(len(splits["validation"]) / HELD_OUT)]
    for note in data.notes:
        print(f"note: {note}")
    counts = ", ".join(f"{len(indices):,} {name}" for name, indices in splits.items())
    print(f"{data.name}: {counts} images of {plan.goal.size} px; run: {plan.out}")
    images = tuple(image_pairs(data.records, splits[name], transform) for name in ("train", "validation"))
    return Images(data.records, prompts, fingerprint, splits, images)


def image_pairs(records, indices, transform):
    """TrainingPairs of images without prompts."""
    records = [records[i] for i in indices]
    return TrainingPairs(records, [""] * len(records), transform)


def open_whole_data_set(plan, spec, transform, captioned=True):
    """Open the data set and decode every file once, so that no bad file stops the run hours later.

    Returns: (DataSet, with --skip-bad without unreadable images; its prompts; a fingerprint of both).
    """
    data = open_data_set(spec, plan.data, plan.shared.seed, captioned)
    check_texts(data, plan.data, plan.shared.seed, captioned)
    files = [record for record in data.records if record.render is None]
    hashes, errors = {}, {}  # by record name

    def decode(record):
        try:
            hashes[record.name] = read(record, transform)[2]
        except InputError as error:
            errors[record.name] = str(error)

    with ThreadPoolExecutor() as pool:
        list(Progress("decoding all images", "image", len(files), pool.map(decode, files)))
    if errors and not plan.data.skip_bad:
        advice = "restore them, or begin a new run with --skip-bad" if plan.resume else "--skip-bad leaves them out"
        raise InputError(f"{len(errors):,} of {len(data):,} images cannot be used: "
                         f"{'; '.join(list(errors.values())[:5])}; {advice}")  # fmt: skip
    data = dataclasses.replace(data, records=tuple(record for record in data.records if record.name not in errors))
    prompts = tuple(prompts_for(data, plan.data.prompt_template)) if captioned else ("",) * len(data)
    return data, prompts, data_fingerprint(data.records, prompts, [hashes.get(r.name, b"") for r in data.records])
