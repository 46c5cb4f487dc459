"""The command line of train.py: flags from the settings dataclasses, with defaults from a preset or a resumed run.

Each part has one dataclass: what is trained (`Goal`), the data, DreamBooth, the method (only the chosen one's flags
exist), the training, the machine. A value comes from the first of: its flag, the resumed run, the preset, the method's
defaults, the dataclass.
"""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

from minildm.adapters import METHODS, NETWORKS, Method
from minildm.data.open import DataSettings
from minildm.data.prompts import prompts_for
from minildm.data.splits import SPLITS, classes_of, split_by_patient
from minildm.distributed import from_first
from minildm.errors import InputError
from minildm.loading import is_embedded
from minildm.settings import Parser, Settings, add_flags, flag, from_flags, setting
from minildm.training.config import PRESETS, TrainingConfig, preset_values
from minildm.training.dreambooth import DreamBoothSettings
from minildm.training.machine import Machine
from minildm.training.run import data_fingerprint, read_record

# Settings that a resumed run may change: the machine's; where files lie, since their contents are compared; the end.
PATHS = ("data", "base", "vae", "on_top_of", "exclude")
FREE = ("device", "workers", "cache", "compile", "micro_batch", "checkpointing", "forgetting_probe", "steps", "epochs")
FREE += (*PATHS, "save_format")


@dataclass(frozen=True)
class Goal(Settings):
    adapter: str = setting("selora", "the method; --adapter NAME --help shows its settings", choices=tuple(METHODS))
    base: str | None = setting(
        None, "checkpoint file or diffusers-layout folder (default: the one in weights/)", metavar="PATH"
    )
    vae: str | None = setting(
        None, "autoencoder file or folder in place of the base's own, such as sd-vae-ft-mse", metavar="PATH"
    )
    on_top_of: tuple[str, ...] = setting((), "adapters to merge into the base first", metavar="FILE[@RANK][:0.6]")
    prediction: str | None = setting(
        None,
        "what the U-Net predicts, where a single file cannot say: v for SD v2.x at 768 px",
        choices=("epsilon", "v"),
    )
    data: str = setting("phantom", "phantom, folder:..., iu-xray:..., padchest:..., ...", metavar="NAME:PATH")
    dtype: str | None = setting(
        None,
        "precision of the frozen base, or of full's products; trained weights are float32 (default: bfloat16 where the "
        "machine has instructions for it, else float32)",
        choices=("float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class Plan:
    """A checked command line."""

    goal: Goal
    method: type  # of METHODS
    method_settings: Settings
    data: DataSettings
    dreambooth: DreamBoothSettings
    config: TrainingConfig
    machine: Machine
    out: Path
    resume: bool
    preset: str | None
    dry_run: bool

    @property
    def settings(self):
        """All settings, flat: what the run's config.json records."""
        parts = (self.goal, self.method_settings, self.data, self.dreambooth, self.config, self.machine)
        return {name: value for part in parts for name, value in part.as_json().items()}


def parse(arguments):
    """The command line as a Plan. Raises: InputError, naming the flag."""
    given = _given(arguments)
    if "preset" in given and "resume" in given:
        raise InputError("--resume takes its settings from the run; leave --preset out")
    if "out" in given and "resume" in given:
        raise InputError(f"--resume {given['resume']} continues in its own folder; leave --out {given['out']} out")
    stored = from_first(lambda: read_record(given["resume"])["settings"]) if "resume" in given else {}
    preset = given.get("preset")
    if preset is None and not stored and _on_embedded_base(given.get("base")):
        preset = "tiny"
    name = given.get("adapter", (PRESETS.get(preset, {}) | stored).get("adapter", Goal.adapter))
    if not isinstance(name, str) or name not in METHODS:  # a resumed run's file may hold anything
        raise InputError(f"--adapter must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    stored = {key: value for key, value in stored.items() if key not in ("resume", "out", "dry_run", "preset")}

    parser = _parser()
    add_flags(parser, method.settings_class, f"method: {name}")
    _add_common_flags(parser)
    values = preset_values(preset, name, _given(arguments, method))
    defaults = method.defaults | values | stored
    for length, other in (("epochs", "steps"), ("steps", "epochs")):
        if length in given and other not in given and (stored or length == "epochs"):
            defaults.pop(other, None)  # a preset's steps would cut the epochs that were asked for; the new end counts
    parser.set_defaults(**defaults)
    args, unknown = parser.parse_known_args(arguments)
    _refuse(unknown, name, parser)
    dreambooth, config = from_flags(DreamBoothSettings, args), from_flags(TrainingConfig, args)
    _check_dreambooth(dreambooth, config, given)
    if dreambooth.instance_prompt is not None:
        config = dataclasses.replace(config, caption_cut=0.0)  # of a preset
    if config.save_format != "native" and method.export is Method.export:
        raise InputError(f"--save-format {config.save_format} is for adapters; --adapter {name} writes a checkpoint, "
                         "which needs none: leave it out")  # fmt: skip
    plan = Plan(
        goal=from_flags(Goal, args, adapter=name),
        method=method,
        method_settings=from_flags(method.settings_class, args),
        data=from_flags(DataSettings, args),
        dreambooth=dreambooth,
        config=config,
        machine=from_flags(Machine, args),
        out=args.resume or args.out,
        resume=args.resume is not None,
        preset=preset,
        dry_run=args.dry_run,
    )
    _refuse_unused(plan, parser.given(arguments))
    if unused := sorted({*values} - {*plan.settings}):
        names = ", ".join(flag(setting) for setting in unused)
        warnings.warn(f"--preset {preset} also sets {names}, which --adapter {name} does not have", stacklevel=2)
    return plan


def check_texts(data, settings, seed, captioned=True):
    """Raise InputError if a run on ``data`` would fail for want of prompts, of images in a split, or of classes to
    balance: what needs no image is checked before hours of reading them.

    Args: settings: DataSettings. captioned: False for DreamBooth, whose images have one prompt and need no split.
    Returns: a fingerprint of the records' names and prompts.
    """
    training, prompts = range(len(data.records)), [""] * len(data.records)
    if captioned:
        prompts = prompts_for(data, settings.prompt_template)
        training = split_by_patient(data.records, settings.split, seed)["train"]
    if settings.balance is not None:
        classes_of([data.records[i] for i in training], settings.balance)
    return data_fingerprint(data.records, prompts, [b""] * len(prompts))


def sampling_flags(settings, result, size):
    """The flags of sample.py that use the result of a run.

    Args: settings: of the run's config.json. result: its model folder or adapter file. size: of the images in pixels.
    """
    if result.is_dir():
        words = ["--base", str(result)]
    else:
        given = [(f"--{name}", settings[name]) for name in ("base", "vae", "prediction") if settings[name]]
        given += [("--adapter", str(adapter)) for adapter in (*settings["on_top_of"], result.parent)]
        words = [word for pair in given for word in pair]
    return [*words, "--height", str(size), "--width", str(size)]


def _on_embedded_base(base):
    try:
        return is_embedded(base)
    except (InputError, FileNotFoundError):  # no base is found: said when it is loaded, and --help works without
        return False


def _parser(**options):
    parser = Parser(prog="train.py", description="Fine-tune a Stable Diffusion model on images.", **options)
    add_flags(parser, Goal, "what")
    add = parser.add_argument_group("run").add_argument
    presets = "settings of a paper, or tiny, the default for the embedded base; explicit flags take precedence"
    add("--preset", choices=tuple(PRESETS), help=presets)
    add("--out", type=Path, default=Path("runs/latest"), metavar="RUN", help="folder of the run")
    add("--resume", type=Path, metavar="RUN", help="continue this run, exactly")
    add("--dry-run", action="store_true", help="print the settings with the values a run would use, and stop")
    return parser


def _add_common_flags(parser):
    add_flags(parser, DataSettings, "data")
    add_flags(parser, DreamBoothSettings, "DreamBooth: a subject from a few images")
    add_flags(parser, TrainingConfig, "training")
    add_flags(parser, Machine, "machine")


def _given(arguments, method=None):
    """{name: value} of the flags that are given: those of all methods, and a method's own."""
    parser = _parser(add_help=False)
    if method is not None:
        add_flags(parser, method.settings_class, "method")
    _add_common_flags(parser)
    return parser.given(arguments)


def _check_dreambooth(dreambooth, config, given):
    """Refuse flags of other parts that make no sense beside DreamBooth's."""
    if dreambooth.instance_prompt is not None and "prompt_template" in given:
        raise InputError("--instance-prompt takes the place of all captions, and --prompt-template would make them; "
                         "leave one of them out")  # fmt: skip
    if dreambooth.instance_prompt is not None and "caption_cut" in given:
        raise InputError(
            "--caption-cut shortens captions, and --instance-prompt gives all images one prompt; leave one of them out"
        )
    if dreambooth.instance_prompt is not None and given.get("read_captions"):
        raise InputError("--read-captions learns from what captions tell apart, and --instance-prompt gives all images "
                         "one prompt; leave one of them out")  # fmt: skip
    if dreambooth.n_class_images and config.batch_size < 2:
        raise InputError(f"--batch-size {config.batch_size} has no room for both an instance and a class image; give "
                         "at least 2, or leave --class-prompt out")  # fmt: skip


def _refuse_unused(plan, given):
    """Refuse flags on the command line that would change nothing. ``given``: {name: value} of all that are there."""
    config, targets = plan.config, getattr(plan.method_settings, "targets", NETWORKS)
    if config.lr == 0:
        raise InputError("--lr 0 trains nothing; give a learning rate above 0, such as 1e-4")
    if config.micro_batch is not None and config.micro_batch > config.batch_size and "micro_batch" in given:
        raise InputError(f"--micro-batch {config.micro_batch} is more than --batch-size {config.batch_size}, which it "
                         "divides; lower it, or leave it out")  # fmt: skip
    unused = {
        "samples": (not config.sample_interval, "there are no sheets of sample images; give --sample-interval, too"),
        "text_encoder_rate": ("text_encoder" not in targets, "the text encoder is not trained; name it in --targets"),
        "read_captions": (
            "text_encoder" not in targets and config.read_captions > 0,
            "the text encoder is not trained; name it in --targets",
        ),
    }
    if "validation" not in SPLITS[plan.data.split]:
        reason = f"--split {plan.data.split} has no images for validation; give another --split"
        unused |= dict.fromkeys(("validation_interval", "validation_pairs"), (True, reason))
    if getattr(plan.method_settings, "text_encoder_rate", 1) == 0 and "unet" not in targets:
        raise InputError("--text-encoder-rate 0 leaves nothing to train: the text encoder is the only one of --targets")
    if config.read_captions and not plan.method.reads_captions:
        raise InputError(f"--read-captions does not suit --adapter {plan.goal.adapter}; leave it out")
    for name, (is_unused, reason) in unused.items():
        if is_unused and name in given:
            raise InputError(f"{flag(name)} would change nothing: {reason}, or leave {flag(name)} out")


def _refuse(unknown, name, parser):
    """Reject flags that the chosen method does not have."""
    for word in unknown:
        text = word.partition("=")[0]
        owners = [
            other
            for other, method in METHODS.items()
            if text in [flag(field.name) for field in dataclasses.fields(method.settings_class)]
        ]
        if owners and name not in owners:
            raise InputError(f"{text} is a setting of --adapter {' and '.join(owners)}, not of {name}; leave it out")
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
