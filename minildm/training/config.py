"""Settings of a training run: one frozen dataclass, and the papers' settings under a name."""

import math
from dataclasses import dataclass

from minildm.adapters.inject import KINDS, LAYERS, NETWORKS
from minildm.errors import InputError

# What the papers state; what they leave open stays at our defaults. SeLoRA (arXiv:2408.07196), section 4: IU X-ray for
# 10 epochs, Montgomery for 100. A flag given beside --preset wins. Data flags are among them.
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
    # The embedded base is so small that it takes, and needs, larger steps than Stable Diffusion.
    "tiny": {
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "warmup": 50,
        "batch_size": 16,
        "steps": 1500,
        "sample_interval": 500,
        "samples": 9,
    },
    "nyu-lora": {
        "adapter": "lora",
        "rank": 4,
        "size": 224,
        "lr": 1e-4,
        "weight_decay": 0.0,
        "batch_size": 8,
        "epochs": 10,
    },
}


@dataclass(frozen=True)
class TrainingConfig:
    # adapter
    adapter: str = "selora"
    rank: int | None = None  # None: 1 for selora, which grows, 4 for lora
    alpha: float | None = None  # scale = alpha / rank as it starts; None = rank (scale 1)
    layers: str = "all-linear"
    targets: tuple[str, ...] = NETWORKS
    # rank growth (selora)
    expand_threshold: float = 1.1  # lambda: grow where the Fisher ratio reaches it
    expand_interval: int = 40  # t, steps between tests
    expand_criterion: str = "sampled"  # the paper's drawn row, or "expected": the mean over all rows
    max_rank: int | None = None  # of any layer
    max_parameters: int | None = None  # of the adapter in all; the highest ratios come first
    # length
    epochs: float | None = None
    steps: int | None = None  # at most; None with epochs None: 1000
    # optimization
    batch_size: int = 8  # samples a step
    micro_batch: int | None = None  # samples at a time, a divisor of batch_size: memory, never the result
    lr: float = 1e-4
    lr_schedule: str = "constant"  # or "cosine", to 0
    warmup: int = 0  # steps, linear
    weight_decay: float = 0.0  # 0: Adam
    clip: float = 1.0  # largest norm of the gradient; 0 = off
    max_bad_steps: int = 10  # in a row, whose loss or gradient is not finite, before the run stops
    ema_decay: float = 0.0  # of a moving average of the weights (pretraining); 0 = off
    checkpointing: bool = False  # compute activations twice instead of keeping them
    # diffusion
    caption_dropout: float = 0.1  # share of samples that see the empty prompt, for guidance
    min_snr_gamma: float = 0.0  # 5 is usual; 0 = off
    noise_offset: float = 0.0  # 0.1 is usual; 0 = off
    seed: int = 0
    # looking at it
    validation_interval: int | None = None  # steps; None = every epoch, or every few where epochs are below 40 steps
    validation_pairs: int = 64  # (timestep, noise) pairs, or one for each picture if that is more, at most 512
    sample_interval: int = 0  # steps between sheets of sample pictures; 0 = none
    samples: int = 4  # pictures on a sheet
    save_interval: int = 100  # steps between saved states

    def __post_init__(self):
        for name, choices in (
            ("adapter", KINDS),
            ("layers", LAYERS),
            ("lr_schedule", ("constant", "cosine")),
            ("expand_criterion", ("sampled", "expected")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{_flag(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in (
            "rank",
            "expand_interval",
            "max_rank",
            "max_parameters",
            "steps",
            "batch_size",
            "micro_batch",
            "max_bad_steps",
            "validation_interval",
            "validation_pairs",
            "samples",
            "save_interval",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"--alpha must be a finite number above 0, got {self.alpha}")
        for name in ("lr", "warmup", "weight_decay", "clip", "min_snr_gamma", "noise_offset", "sample_interval"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{_flag(name)} must be a finite number >= 0, got {getattr(self, name)}")
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise InputError(f"--epochs must be above 0, got {self.epochs}")
        if not self.expand_threshold >= 1:
            raise InputError(
                f"--expand-threshold (lambda) must be at least 1, got {self.expand_threshold}: the Fisher "
                "ratio expanded / original is never below 1, so every layer would grow at every test"
            )
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--ema-decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in [0, 2^63), got {self.seed}")
        if not 0 <= self.caption_dropout <= 1:
            raise InputError(f"--caption-dropout must be in [0, 1], got {self.caption_dropout}")
        if self.batch_size % self.samples_at_a_time:
            raise InputError(f"--micro-batch must divide --batch-size {self.batch_size}, got {self.micro_batch}")

    @property
    def start_rank(self):
        return self.rank if self.rank is not None else {"selora": 1, "lora": 4}[self.adapter]

    @property
    def samples_at_a_time(self):
        return self.batch_size if self.micro_batch is None else self.micro_batch

    def total_steps(self, n_pictures):
        """Steps of the whole run over ``n_pictures``: what ``epochs`` take, and not more than ``steps``."""
        if self.epochs is None:
            return 1000 if self.steps is None else self.steps
        steps = math.ceil(self.epochs * n_pictures / self.batch_size)
        return steps if self.steps is None else min(steps, self.steps)

    def validation_steps(self, n_pictures):
        """Steps between validations: a whole number of epochs, at least 40 steps, unless set."""
        if self.validation_interval is not None:
            return self.validation_interval
        epoch = math.ceil(n_pictures / self.batch_size)
        return epoch * math.ceil(40 / epoch)


def _flag(name):
    return "--" + name.replace("_", "-")
