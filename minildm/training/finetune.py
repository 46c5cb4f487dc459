"""Fine-tuning: the task for the training loop, given a model and its data; the run of a method on it; and its summary.

images -> cached moments, prompts -> (cached) context -> losses of samples -> the loop
"""

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
from torch.utils.data import default_collate

from minildm import kernels
from minildm.adapters import NETWORKS, parameter_counts
from minildm.config import SPATIAL_FACTOR
from minildm.data.cache import CachedLatents, context_cache
from minildm.data.loader import TrainingPairs, training_batches
from minildm.data.splits import classes_of
from minildm.distributed import from_first, is_first
from minildm.errors import InputError
from minildm.images import contact_sheet, save_png
from minildm.latent_diffusion import to_pil, usual_guidance
from minildm.progress import Progress
from minildm.training.forgetting import ForgettingProbe, forgetting_line
from minildm.training.loop import exported_name, train
from minildm.training.loss import (
    MOST_PAIRS,
    Captions,
    caption_texts,
    denoising_losses,
    sample_randomness,
    validation_loss,
)
from minildm.training.machine import checkpoint_blocks, disk_forecast, forecast, memory_advice
from minildm.training.reading import read_captions
from minildm.training.run import data_fingerprint
from minildm.training.task import Task


@dataclass(frozen=True)
class Samples:
    """A split of the data: records and prompts in one order, and the moments of their images."""

    records: tuple
    prompts: tuple
    latents: CachedLatents

    def subset(self, indices):
        keys = [self.latents.keys[i] for i in indices]
        latents = CachedLatents(self.latents.rows, tuple(self.records[i] for i in indices), keys)
        return Samples(latents.records, tuple(self.prompts[i] for i in indices), latents)

    @property
    def fingerprint(self):
        """A hash of names, prompts and image contents, for the run's record."""
        return data_fingerprint(self.records, self.prompts, self.latents.keys)


class Finetuning(Task):
    """Denoising of cached latents, conditioned on their prompts.

    Args:
        model: LatentDiffusion. training, validation: Samples; validation may be empty.
        contexts: folder to cache contexts in if the text encoder is frozen (`contexts_folder`); None if it is trained.
        balance: a caption field whose classes come equally often, or None. workers: processes that read ahead.
        precision: dtype of the products under torch.autocast; None = that of the weights.
        images_per_step: training images in a batch; None = ``config.batch_size``, the whole batch.
    ``steps``: of the whole run.
    Raises: InputError if there is no image to train on.
    """

    def __init__(
        self,
        model,
        training,
        validation,
        config,
        contexts=None,
        balance=None,
        workers=0,
        precision=None,
        images_per_step=None,
    ):
        self.n_images = len(training.records)
        if not self.n_images:
            raise InputError("there is no image to train on; give more data or another --split")
        self.model, self.config, self.workers, self.precision = model, config, workers, precision
        self.batch_size = config.batch_size
        self.images_per_step = config.batch_size if images_per_step is None else images_per_step
        self.steps = config.total_steps(self.n_images, self.images_per_step)
        self.contexts = contexts
        self.text_encoder_frozen = False  # in the steps: --text-encoder-rate 0; then each context is computed once
        self.pairs, self.captions = self._pairs(training, cut=config.caption_cut > 0)
        self.latent_shape = self.pairs[0]["mean"].shape  # (4, h, w)
        self.classes = None if balance is None else classes_of(training.records, balance)
        self.validation_pairs = None
        if validation.records:
            self.validation_pairs, self.validation_captions = self._pairs(validation)
            self.validation_interval = config.steps_between_validations(self.n_images, self.images_per_step)
        shown = validation if validation.records else training
        self.sheet_prompts = list(dict.fromkeys(shown.prompts))[: config.samples]

    @property
    def image_size(self):
        """Height and width of the training images in pixels."""
        return self.latent_shape[-1] * SPATIAL_FACTOR

    def _pairs(self, samples, cut=False):
        contexts, model = None, self.model
        if self.contexts is not None:
            texts = caption_texts(samples.prompts, cut)
            contexts = context_cache(texts, model.tokenize, model.text_encoder, self.contexts)
        pairs = TrainingPairs(samples.records, samples.prompts, latents=samples.latents, contexts=contexts)
        return pairs, Captions(model, samples.prompts, contexts, cut)

    def begin(self):
        if self.text_encoder_frozen:
            with self.products():
                self.captions.freeze()
                if self.validation_pairs is not None:
                    self.validation_captions.freeze(MOST_PAIRS)

    def batches(self, first_step, last_step):
        seed, size = self.config.seed, self.batch_size
        return training_batches(self.pairs, size, seed, first_step, last_step, self.workers, self.classes)

    def losses(self, batch):
        n_timesteps = self.model.schedule.n_timesteps
        randomness = sample_randomness(self.config.seed, "sample", batch["id"], self.latent_shape, n_timesteps)
        with self.products():
            return denoising_losses(self.model, batch, randomness, self.captions, self.config)

    def halves(self, batch):
        plain = self.precision in (None, torch.float32) and not self.config.checkpointing
        if not (plain and kernels.halves_pay(self.model.unet, batch["mean"])):
            return [batch]
        return [{name: values[rows] for name, values in batch.items()} for rows in kernels.two_halves(len(batch["id"]))]

    def products(self):
        """Inside, matrix products and convolutions run in ``precision``; weights and losses stay float32."""
        if self.precision in (None, torch.float32):
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, self.precision)

    def validate(self):
        with self.products():
            return validation_loss(self.model, self.validation_pairs, self.validation_captions, self.config)

    def sample_sheet(self, path):
        """Images of fixed prompts and seeds: only the weights differ from one sheet to the next."""
        with Progress("sampling a sheet", "step", 20, leave=False) as bar:
            images = self._sheet_images(lambda *_: bar.update())
        save_png(contact_sheet(to_pil(images)), path, f"contact sheet, {path.stem}")

    def _sheet_images(self, callback):
        return self.model.sample(
            self.sheet_prompts,
            steps=20,
            guidance=usual_guidance(self.model.config),
            sampler="dpm++",
            seed=self.config.seed,
            height=self.image_size,
            width=self.image_size,
            output="tensor",
            callback=callback,
        )


def usual_dtype(device):
    """The name of the default precision of the frozen base, or of full's products."""
    return "bfloat16" if kernels.has_fast_bfloat16(device) else "float32"


def contexts_folder(settings, folder):
    """Where to cache contexts: ``folder``, or None if a method with these settings trains the text encoder."""
    return None if "text_encoder" in getattr(settings, "targets", NETWORKS) else folder


def finetune(task, method_class, settings, run, machine):
    """Train the model of ``task``, a Finetuning, with a method.

    Args: method_class, settings: of METHODS, and its settings. machine: training.machine.Machine.
    Returns: (the loop's State, the method). The model has the weights of the last step, the run's result the best ones.
    """
    model, config = task.model, task.config
    if task.images_per_step > task.n_images:
        print(f"note: --batch-size {config.batch_size} exceeds the {task.n_images} training images: images repeat "
              "within a batch")  # fmt: skip
    if new_end := changed_end(task, method_class, run):
        print(f"note: {new_end}")
    if config.warmup >= task.steps:
        print(f"note: --warmup {config.warmup} is not over after the {task.steps} steps of the run: the learning rate "
              f"never reaches --lr {config.lr:g}")  # fmt: skip
    if config.validation_pairs > MOST_PAIRS:
        print(f"note: validation uses {MOST_PAIRS} pairs, not the {config.validation_pairs:,} of --validation-pairs")
    with kernels.plain() if machine.plain else kernels.lean():
        probe = ForgettingProbe(model, run, task.image_size) if config.forgetting_probe and is_first() else None
        method = method_class(model, settings, task.steps, config.seed)
        text_rates = [method.rate(name) for name in method.trained() if name.startswith("text_encoder.")]
        trains_text = bool(text_rates)
        assert not (trains_text and task.contexts), "cached contexts would not follow the text encoder"
        from_first(lambda: print_forecast(task, method, run))
        if config.checkpointing:
            checkpoint_blocks(model.unet, model.text_encoder)
        method.compiled = machine.compile
        if machine.compile:
            torch._dynamo.config.recompile_limit = 64  # at 8 it would give up, silently, as layers grow
            model.unet.compile()
            model.text_encoder.compile()
        if config.read_captions and trains_text and not from_first(run.state.exists):
            if task.captions.n_different > 1:
                read_captions(task, method, config.read_captions)
            else:
                print("note: all captions are the same, so --read-captions has nothing to learn from and is skipped")
        task.text_encoder_frozen = trains_text and not any(text_rates) and method.can_freeze_text_encoder
        state = train(method, task, config, run, task.steps)
        if probe is not None:
            with state.averaged():
                probe.measure(state.step)
    run.save_summary(summary_facts(state, method))
    return state, method


def changed_end(task, method_class, run):
    """What to say of a resumed run whose --steps or --epochs are others than before; None if the end is the same."""
    if run.settings_before is None:
        return None
    before = dataclasses.replace(task.config, **{name: run.settings_before.get(name) for name in ("steps", "epochs")})
    before = before.total_steps(task.n_images, task.images_per_step)
    if before == task.steps:
        return None
    schedules = ["the cosine learning rate"] * (task.config.lr_schedule == "cosine") + [*method_class.follows_end]
    if not schedules:
        return f"the run now ends at step {task.steps:,}, not {before:,}"
    return (
        f"the run now ends at step {task.steps:,}, not {before:,}; {' and '.join(schedules)} will follow the new end "
        f"from here on, so the result is not that of a run begun with {task.steps:,} steps"
    )


def print_forecast(task, method, run):
    """Print the memory that a step will take, and the disk space of the run if it is much, with advice if short."""
    config = task.config
    one = default_collate([task.pairs[0]]) | {"id": torch.zeros(1, dtype=torch.int64)}
    needed, free = forecast(task.model, lambda: task.losses(one), config)
    there = "" if free is None else f" of {free / 1e9:.1f} GB"
    print(f"memory: about {needed / 1e9:.2f} GB{there} for a step")
    if free is not None and needed > free:
        print(f"note: that may not fit; {memory_advice(config)}")
    if run.state.exists():
        return  # resumed: the space is taken already
    needed, free = disk_forecast(task.model, method, config, run.folder)
    if needed > 1e9 or needed > free:
        print(f"disk: up to {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free, for the saved state and the result")
    if needed > free:
        raise InputError(
            f"{run.folder} has {free / 1e9:.1f} GB free, and this run needs up to {needed / 1e9:.1f} GB; make room, or "
            "give an --out on another disk"
        )


def summary_facts(state, method):
    """What summary.json holds: the numbers of the end of a run that its log does not give."""
    return {
        "steps": state.step,
        "skipped": state.skipped,
        "seconds": state.seconds,  # of training, over all sessions
        "best": state.best,  # (validation loss, step) of the saved result; None: it is that of the last step
        "parameters": parameter_counts(method.model),  # {network: (trained, all, percent)} after the last step
        "description": method.describe(),
    }


def summary(state, method, run):
    """Lines to print at the end: what was trained, what it cost, and how the loss changed."""
    lines = method.describe()
    entries = run.entries()
    measured = [(entry["step"], entry["validation"]) for entry in entries if "validation" in entry]
    if measured:
        (_, before), (last_step, last) = measured[0], measured[-1]
        best = f"no finite one: {run.result.name} holds the weights of the last step"
        if state.best:
            best = f"best {state.best[0]:.4f} at step {state.best[1]} ({100 * (state.best[0] / before - 1):+.1f} %)"
        lines.append(f"validation loss: {before:.4f} before, {last:.4f} at step {last_step}, {best}")
    else:
        lines.append(f"no validation split: {run.result.name} holds the weights of the last step")
    lines += [forgetting_line(entry) for entry in entries if "drift" in entry]
    skipped = f", {state.skipped} skipped as not finite" if state.skipped else ""
    memory = max((entry.get("memory_mb", 0) for entry in entries), default=0)
    lines.append(f"{state.step} steps{skipped}, {state.seconds:.1f} s, peak memory {memory / 1000:.2f} GB")
    exported = "".join(f"{path.name}, " for path in sorted(run.folder.glob(exported_name("*"))))
    lines.append(f"files in {run.folder}: {run.result.name}, {exported}log.jsonl, config.json, samples/, last/")
    return "\n".join(lines)
