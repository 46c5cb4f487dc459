"""What the stages of pretraining share: their settings, the method that trains whole networks, how a stage ends."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minildm.adapters.method import Method
from minildm.errors import InputError
from minildm.files import written_beside
from minildm.settings import Settings, flag, setting
from minildm.training.config import TrainingConfig
from minildm.training.loop import train
from minildm.training.machine import CACHE

HELD_OUT = 256  # images at most that validation and the card use
SLACK = 0.02  # relative rise of the held-out loss that does not send a stage back to its best weights

# Stages in their order: (title, prefix of the flags, steps, batch size, learning rate).
STAGES = {
    "autoencoder": ("autoencoder", "vae_", 6000, 8, 1e-3),
    "text_encoder": ("text encoder", "text_", 3000, 32, 1e-3),
    "diffusion": ("U-Net", "", 10000, 32, 1e-3),
    "decoder": ("decoder alone", "decoder_", 2000, 8, 5e-4),
}


def has_bfloat16():
    """Whether bfloat16 products are fast here: on a GPU, and on processors with such instructions; on others they take
    up to ten times as long as those in float32."""
    if torch.cuda.is_available():
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class StageSettings(Settings):
    steps: int = setting(0, "steps of the optimizer", at_least=1)
    batch_size: int = setting(0, "samples per step", at_least=1)
    lr: float = setting(0.0, "learning rate: linear warm-up, then a cosine to 0", at_least=0)


@dataclass(frozen=True)
class PretrainingSettings(Settings):
    """Settings of all stages, and of the machine."""

    vae_crop: int | None = setting(
        None, "train the autoencoder on random squares of this side; a multiple of 8", at_least=8, metavar="PIXELS"
    )
    micro_batch: int | None = setting(None, "samples at a time: less memory, same result", at_least=1)
    warmup: int = setting(200, "steps in which the learning rate rises from 0", at_least=0)
    ema_decay: float = setting(
        0.999, "decay of the moving average of the weights, which is kept; 0 = off", at_least=0, below=1
    )
    caption_dropout: float = setting(
        0.1, "share of samples with an empty prompt, for guidance (text encoder, U-Net)", at_least=0, at_most=1
    )
    min_snr_gamma: float = setting(0.0, "min-SNR weighting of the U-Net's loss, 5 is usual; 0 = off", at_least=0)
    clip: float = setting(1.0, "largest norm of the gradient; 0 = no clipping", at_least=0)
    seed: int = setting(0, "random seed of the whole run", at_least=0)
    checkpointing: bool = setting(False, "recompute activations in the backward: less memory, a third more time")
    sample_interval: int = setting(1000, "steps between sheets of images; 0 = none", at_least=0)
    save_interval: int = setting(200, "steps between saved states", at_least=1)
    device: str | None = setting(None, "cpu, cuda, ... (default: a GPU where there is one)")
    dtype: str | None = setting(
        None,
        "precision of products; weights are float32 (default: bfloat16 where the machine is fast at it)",
        choices=("float32", "bfloat16"),
    )
    workers: int = setting(0, "processes that read ahead", at_least=0)
    cache: Path = setting(CACHE, "folder for latents and contexts")


def stage_config(settings, stage, validation_interval=None):
    """TrainingConfig of a stage. ``settings``: PretrainingSettings; ``stage``: its StageSettings."""
    shared = ("warmup", "ema_decay", "caption_dropout", "min_snr_gamma", "clip", "seed", "checkpointing")
    micro_batch = settings.micro_batch and min(settings.micro_batch, stage.batch_size)
    return TrainingConfig(
        **{name: getattr(settings, name) for name in (*shared, "sample_interval", "save_interval")},
        **stage.as_json(),
        micro_batch=micro_batch,
        lr_schedule="cosine",
        validation_interval=validation_interval or min(1000, max(50, stage.steps // 12)),  # a twelfth of the stage
        validation_pairs=HELD_OUT,
        samples=16,
    )


class Networks(Method):
    """Train all weights of ``model``, a module whose trainable parameters are already chosen, and keep the best."""

    result = "weights.safetensors"

    def save(self, path, about):
        state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        with written_beside(path) as beside:
            save_file(state, beside)


def run_stage(module, task, config, run, back_to_best):
    """Train the parameters of ``module`` that require gradients; it is left frozen, with the averaged weights.

    ``back_to_best``: with the best weights instead of the last ones, where the held-out loss has risen by more than
    SLACK since: a few hundred images are soon learnt by heart.
    Returns: seconds of training.
    """
    state = train(Networks(module, None, config.steps, config.seed), task, config, run, config.steps)
    state.average.swap(state.trained)
    last = [entry["validation"] for entry in run.entries() if "validation" in entry][-1]
    if back_to_best and state.best and not last <= (1 + SLACK) * state.best[0]:
        best, step = state.best
        module.load_state_dict(load_file(run.result))
        print(f"note: the held-out loss rose from {best:.4f} at step {step:,} to {last:.4f}: back to those weights")
    module.requires_grad_(False)
    return state.seconds


def low_precision(device, dtype):
    """Inside, products are computed in ``dtype``; weights, norms, sums and losses stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def named_check(error, prefix):
    """The error about a stage's setting, with the flag as it is written on the command line."""
    for name in ("steps", "batch_size", "lr"):
        if str(error).startswith(flag(name) + " "):
            return InputError(flag(prefix + name) + str(error).removeprefix(flag(name)))
    return error
