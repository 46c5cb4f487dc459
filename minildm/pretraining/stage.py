"""What the stages of pretraining share: their settings, the method that trains whole networks, how a stage ends."""

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from minildm.adapters.method import Method
from minildm.errors import InputError
from minildm.files import written_beside
from minildm.settings import Settings, flag, from_flags, setting
from minildm.training.loop import train

HELD_OUT = 256  # validation and the card use at most this many images
SLACK = 0.02  # relative rise of the held-out loss that a stage may end with; above it, back to the best weights


# --- settings --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StageSettings(Settings):
    steps: int = setting(10000, "optimizer steps", at_least=1)
    batch_size: int = setting(32, "samples per step", at_least=1)
    lr: float = setting(1e-3, "learning rate: linear warm-up, then a cosine to 0", at_least=0)


@dataclass(frozen=True)
class AutoencoderSettings(StageSettings):
    crop: int | None = setting(
        None, "train on random square crops, a multiple of 8 (default: whole images)", at_least=8, metavar="PIXELS"
    )


@dataclass(frozen=True)
class DecoderSettings(StageSettings):
    data: str | None = setting(
        None, "other images for this stage, such as textures (default: --data)", metavar="NAME:PATH"
    )


@dataclass(frozen=True)
class Stage:
    title: str
    prefix: str  # of its flags
    reads_captions: bool  # such a stage can memorise: it is validated more often and may return to its best weights
    defaults: StageSettings


STAGES = {
    "autoencoder": Stage("autoencoder", "vae_", False, AutoencoderSettings(6000, 8, 1e-3)),
    "text_encoder": Stage("text encoder", "text_", True, StageSettings(3000, 32, 1e-3)),
    "diffusion": Stage("U-Net", "", True, StageSettings(10000, 32, 1e-3)),
    "decoder": Stage("decoder alone", "decoder_", False, DecoderSettings(2000, 8, 5e-4)),
}


def stage_settings(name, arguments):
    """The settings of a stage from parsed flags. Raises: InputError, naming the flag with its prefix."""
    stage = STAGES[name]
    try:
        return from_flags(type(stage.defaults), arguments, stage.prefix)
    except InputError as error:
        raise InputError(flag(stage.prefix) + str(error).removeprefix("--")) from None


def stage_config(name, settings, shared):
    """The TrainingConfig of a stage. Args: settings: of this stage; shared: TrainingConfig, common to all stages."""
    interval = min(1000, max(50, settings.steps // 12)) if STAGES[name].reads_captions else 1000
    return dataclasses.replace(
        shared,
        steps=settings.steps,
        batch_size=settings.batch_size,
        micro_batch=shared.micro_batch and min(shared.micro_batch, settings.batch_size),
        lr=settings.lr,
        lr_schedule="cosine",
        validation_interval=interval,
        validation_pairs=HELD_OUT,
        samples=16,
    )


# --- training --------------------------------------------------------------------------------------------------------
class Networks(Method):
    """Train all parameters of ``module`` that require gradients. Its best weights are saved if ``keep_best``."""

    result = "weights.safetensors"

    def __init__(self, module, steps, seed, keep_best):
        super().__init__(module, Settings(), steps, seed)
        self.keep_best = keep_best

    def may_be_best(self, step):
        return self.keep_best

    def save(self, path, about):
        if not self.keep_best:
            return
        state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        with written_beside(path) as beside:
            save_file(state, beside)


def run_stage(module, task, run, back_to_best):
    """Train the parameters of ``module`` that require gradients. It is left frozen, with the averaged weights.

    Args: back_to_best: return to the best weights if the held-out loss ends more than SLACK above its minimum: on a few
        hundred images a stage soon overfits.
    Returns: seconds of training.
    """
    config = task.config
    method = Networks(module, config.steps, config.seed, keep_best=back_to_best)
    state = train(method, task, config, run, config.steps)
    state.average.swap(state.trained)
    last = [entry["validation"] for entry in run.entries() if "validation" in entry][-1]
    if state.best and not last <= (1 + SLACK) * state.best[0]:  # also if the last one is NaN
        best, step = state.best
        module.load_state_dict(load_file(run.result))
        print(f"note: the held-out loss rose from {best:.4f} at step {step:,} to {last:.4f}: back to those weights")
    module.requires_grad_(False)
    return state.seconds


# --- precision -------------------------------------------------------------------------------------------------------
def low_precision(device, dtype):
    """Inside, products are computed in ``dtype``; weights, norms, sums and losses stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)
