"""Settings of a training run, and the papers' settings by name."""

import math
from dataclasses import dataclass

from minildm.adapters.inject import NETWORKS
from minildm.adapters.writing import FORMATS
from minildm.settings import Settings, setting

# What the papers state; what they leave open stays at our defaults. SeLoRA (arXiv:2408.07196), section 4: IU X-ray for
# 10 epochs, Montgomery for 100. A flag beside --preset wins. Settings of the data and of the method are among them.
_SELORA = {
    "adapter": "selora",
    "layers": "paper",
    "size": 224,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "batch_size": 8,
    "expand_threshold": 1.1,
    "expand_interval": 40,
}
PRESETS = {
    "selora-iu": _SELORA | {"epochs": 10, "split": "80/16/4", "prompt_template": "findings"},
    "selora-montgomery": _SELORA | {"epochs": 100, "split": "80/20", "prompt_template": "montgomery"},
    "selora-384": _SELORA | {"epochs": 10, "size": 384},
    "nyu-lora": {
        "adapter": "lora",
        "rank": 4,
        "size": 224,
        "lr": 1e-4,
        "weight_decay": 0.0,
        "batch_size": 8,
        "epochs": 10,
    },
    # The embedded base is so small that it takes, and needs, larger steps than Stable Diffusion. It knows no word for a
    # chest or its diseases, so adapters read captions first.
    "tiny": {
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "warmup": 50,
        "batch_size": 16,
        "steps": 1500,
        "sample_interval": 500,
        "samples": 9,
        "read_captions": 1000,
        "methods": {
            "adalora": {"lr": 1e-2, "read_captions": 0},  # it might prune what was read: it goes by denoising gradients
            "dylora": {"read_captions": 0},
            "full": {"lr": 1e-3, "read_captions": 0},
        },
        "reading": {
            "lr": 4e-3,
            "batch_size": 8,
            "steps": 2000,
            "text_encoder_rate": 0.0,
            "caption_cut": 0.1,
            "min_snr_gamma": 1.0,
            "ema_decay": 0.999,
            "methods": {"selora": {"rank": 16}, "lora": {"rank": 16}, "adalora": {"lr": 1e-2}, "full": {"lr": 1e-3}},
        },
        "without_data": {"data": "phantom:6000", "balance": "diagnosis"},
    },
}


def preset_values(preset, method, given):
    """{setting: value} of a preset.

    Args: preset: its name, or None. method: the name of the method. given: {setting: value} of the flags on the command
        line. Parts of a preset hold for some runs only, and take precedence: "methods", by name; "reading", where
        captions are read; "without_data", where they are and no data set is given.
    """
    values, parts = _for_method(PRESETS.get(preset, {}), method), {}
    for name in ("reading", "without_data"):
        parts[name] = _for_method(values.pop(name, {}), method)
    targets = given.get("targets", NETWORKS)
    can_read = "text_encoder" in targets and given.get("instance_prompt") is None
    if not (can_read and (values | given).get("read_captions")):
        return values | {"read_captions": 0}
    if "unet" not in targets:
        parts["reading"].pop("text_encoder_rate", None)  # something has to be trained
    if given.keys() & {"alpha", "max_rank", "max_parameters"}:
        parts["reading"].pop("rank", None)  # which these were chosen for
    return values | parts["reading"] | ({} if "data" in given else parts["without_data"])


def _for_method(part, method):
    values = dict(part)
    return values | values.pop("methods", {}).get(method, {})


@dataclass(frozen=True)
class TrainingConfig(Settings):
    # length
    epochs: float | None = setting(None, "passes over the training images", above=0)
    steps: int | None = setting(
        None, "steps, at most (default: the preset's, else what --epochs takes, else 1000)", at_least=1
    )
    # optimization
    batch_size: int = setting(8, "samples per step", at_least=1)
    micro_batch: int | None = setting(None, "samples at a time: less memory, same result", at_least=1)
    lr: float = setting(1e-4, "learning rate", at_least=0)
    lr_schedule: str = setting("constant", "after the warm-up; cosine falls to 0", choices=("constant", "cosine"))
    warmup: int = setting(0, "steps in which the learning rate rises from 0", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's weight decay; 0 is plain Adam", at_least=0)
    clip: float = setting(1.0, "largest norm of the gradient; 0 = no clipping", at_least=0)
    ema_decay: float = setting(0.0, "decay of a moving average of the weights; 0 = off", at_least=0, below=1)
    max_bad_steps: int = setting(10, "steps in a row without a finite loss before the run stops", at_least=1)
    checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, a third more time")
    # diffusion
    caption_dropout: float = setting(
        0.1, "share of samples with an empty prompt, which guidance needs", at_least=0, at_most=1
    )
    caption_cut: float = setting(
        0.0, "share of captions that are cut at a random comma, so that short prompts work, too", at_least=0, at_most=1
    )
    read_captions: int = setting(
        0,
        "steps before the denoising in which the text encoder learns to predict an image's code from its caption, for "
        "words that it has never seen; 0 = none",
        at_least=0,
    )
    min_snr_gamma: float = setting(0.0, "min-SNR weighting of the loss, 5 is usual; 0 = off", at_least=0)
    noise_offset: float = setting(0.0, "offset noise, 0.1 is usual; 0 = off", at_least=0)
    seed: int = setting(0, "random seed of the whole run", at_least=0)
    # progress
    validation_interval: int | None = setting(
        None, "steps between validations (default: an epoch, or several if they are short)", at_least=1
    )
    validation_pairs: int = setting(
        64, "(timestep, noise) pairs; one per image if there are more images; 512 at most are used", at_least=1
    )
    sample_interval: int = setting(0, "steps between sheets of sample images; 0 = none", at_least=0)
    samples: int = setting(4, "images on a sheet", at_least=1)
    forgetting_probe: bool = setting(
        False, "generate images of fixed unrelated prompts before and after training, and measure their drift"
    )
    save_interval: int = setting(100, "steps between saved states", at_least=1)
    save_format: str = setting(
        "native",
        "kohya (ComfyUI, A1111, Forge) or diffusers: also write RUN/adapter.FORMAT.safetensors for that tool",
        choices=FORMATS,
    )

    def total_steps(self, n_images, images_per_step=None):
        """Steps of the whole run: what ``epochs`` passes over ``n_images`` take, and not more than ``steps``.

        Args: images_per_step: how many of these images a batch holds; None = ``batch_size``.
        """
        if self.epochs is None:
            return 1000 if self.steps is None else self.steps
        steps = math.ceil(self.epochs * n_images / (images_per_step or self.batch_size))
        return steps if self.steps is None else min(steps, self.steps)

    def steps_between_validations(self, n_images, images_per_step=None):
        """A whole number of epochs, at least 40 steps, unless ``validation_interval`` is set."""
        if self.validation_interval is not None:
            return self.validation_interval
        epoch = math.ceil(n_images / (images_per_step or self.batch_size))
        return epoch * math.ceil(40 / epoch)
