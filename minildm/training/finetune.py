"""Fine-tuning with an adapter: the loop, given a model, its data and a run's folder; and what to say about the result.

pictures -> cached moments, prompts -> (cached) context -> sample losses -> the loop
"""

import re
from dataclasses import dataclass

import torch

from minildm.adapters import adapter_layers, add_adapter, parameter_counts, save_adapter
from minildm.data.cache import CachedLatents, context_cache, latent_cache
from minildm.data.loader import TrainingPairs, training_batches
from minildm.data.splits import classes_of
from minildm.errors import InputError
from minildm.images import contact_sheet, save_png
from minildm.latent_diffusion import to_pil, usual_guidance
from minildm.training.loop import memory_advice, train
from minildm.training.loss import Captions, checkpoint_blocks, draw, sample_losses, validation_loss
from minildm.training.machine import forecast


@dataclass(frozen=True)
class Pictures:
    """One split: records and prompts in one order, and the moments of their pictures."""

    records: tuple
    prompts: tuple
    latents: CachedLatents

    def some(self, indices):
        latents = CachedLatents(
            self.latents.rows, tuple(self.records[i] for i in indices), [self.latents.keys[i] for i in indices]
        )
        return Pictures(latents.records, tuple(self.prompts[i] for i in indices), latents)


def encode(model, records, transform, cache, skip_bad=False):
    """CachedLatents of the pictures. The VAE runs in float32: the reference for all precisions, and done once."""
    return latent_cache(records, transform, model.vae.float(), cache, skip_bad=skip_bad)


def adapt(model, training, validation, config, run, cache, balance=None, workers=0, compiled=False):
    """Train a new adapter on ``training``; ``validation`` may be empty.

    Args: training, validation: Pictures. cache: folder for contexts. balance: a caption field, or None. compiled: run
        the networks through torch.compile.
    Returns: the loop's State; the model's live adapter is the one of the last step, the run's file the best one.
    """
    if not training.records:
        raise InputError("there is no picture to train on; give more data or another --split")
    n = len(training.records)
    if config.batch_size > n:
        print(
            f"note: --batch-size {config.batch_size} is larger than the {n} training pictures: a picture "
            "comes more than once in a batch, each time with another timestep and noise"
        )
    add_adapter(model, config.adapter, config.start_rank, config.alpha, config.targets, config.layers, config.seed)
    pairs, captions = _pairs(model, training, config, cache)
    shape = pairs[0]["mean"].shape
    steps = config.total_steps(n)
    classes = None if balance is None else classes_of(training.records, balance)

    def losses(batch, numbers):
        draws = draw(config.seed, "sample", numbers, shape, model.schedule.n_timesteps)
        return sample_losses(model, batch, draws, captions, config)

    def batches(first, last):
        return training_batches(pairs, config.batch_size, config.seed, first, last, workers, classes)

    validate = None
    if validation.records:
        validation_pairs, validation_captions = _pairs(model, validation, config, cache)

        def validate():
            return validation_loss(model, validation_pairs, validation_captions, config)

    report_forecast(model, lambda: losses(torch.utils.data.default_collate([pairs[0]]), [0]), config)
    if config.checkpointing:
        checkpoint_blocks(model.unet, model.text_encoder)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # at 8 it would give up, in silence, as SeLoRA's layers grow
        model.unet.compile()
        model.text_encoder.compile()
    prompts = list(dict.fromkeys((validation if validation.records else training).prompts))[: config.samples]
    return train(
        model,
        losses,
        batches,
        steps,
        config,
        run,
        validate,
        config.validation_steps(n),
        keep=lambda path: save_adapter(model, path, settings=adapter_settings(config)),
        draw=lambda step: draw_sheet(model, prompts, shape[-1] * 8, config, run, step),
    )


def _pairs(model, pictures, config, cache):
    """The data of a split, and its captions: contexts are cached where no adapter changes the text encoder."""
    contexts = None
    if "text_encoder" not in config.targets:
        contexts = context_cache([*pictures.prompts, ""], model.tokenize, model.text_encoder, cache)
    pairs = TrainingPairs(pictures.records, pictures.prompts, latents=pictures.latents, contexts=contexts)
    return pairs, Captions(model, pictures.prompts, contexts)


def adapter_settings(config):
    """What the adapter's file says about its training."""
    names = ("layers", "targets", "lr", "batch_size", "epochs", "steps", "seed")
    return {name: getattr(config, name) for name in names}


def report_forecast(model, one_sample_loss, config):
    """Print what a step will take; where that is more than there is, say what helps."""
    needed, free = forecast(model, one_sample_loss, config)
    there = "" if free is None else f" of {free / 1e9:.1f} GB"
    print(f"memory: about {needed / 1e9:.2f} GB{there} for a step")
    if free is not None and needed > free:
        print(f"note: that may not fit; {memory_advice(config)}")


def draw_sheet(model, prompts, size, config, run, step):
    """A sheet of pictures from fixed prompts and seeds: only the adapter differs from one sheet to the next."""
    images = model.sample(
        prompts,
        steps=20,
        guidance=usual_guidance(model.config),
        sampler="dpm++",
        seed=config.seed,
        height=size,
        width=size,
        output="tensor",
    )
    save_png(
        contact_sheet(to_pil(images)), run.folder / "samples" / f"step-{step:06}.png", f"contact sheet of step {step}"
    )


# --- the result ------------------------------------------------------------------------------------------------------
KINDS = (
    ("attn1.to_", "self "),
    ("attn2.to_", "cross "),
    ("ff.net.0", "widen"),
    ("ff.net.2", "narrow"),
    ("time_emb_proj", "time"),
    ("linear_", "linear "),
    ("proj_", "proj "),
    ("self_attn.", "self "),
    ("mlp.", ""),
)
BLOCK = re.compile(r"(down_blocks\.\d|up_blocks\.\d|mid_block|time_embedding|layers\.\d+)")


def kind_of(path):
    """ "unet...attn2.to_q" -> "cross q": what a layer does in its block."""
    mark, word = next((mark, word) for mark, word in KINDS if mark in path)
    tail = path.partition(mark)[2] if mark.endswith(("_", ".")) else ""
    return word + tail.removesuffix(".0").removesuffix("_proj")


def rank_map(ranks):
    """{module path: rank} -> a table of text: a line for each block, a column for each kind of layer, the mean rank in
    it; for SeLoRA, where the network needed to change."""
    tables = {}
    for path, rank in ranks.items():
        row = tables.setdefault(path.split(".")[0], {}).setdefault(BLOCK.search(path)[1], {})
        row.setdefault(kind_of(path), []).append(rank)
    lines = []
    for network, rows in tables.items():
        kinds = list(dict.fromkeys(kind for block in sorted(rows) for kind in rows[block]))
        lines.append(f"{network:<16}" + "".join(f"{kind:>10}" for kind in kinds))
        for block, row in rows.items():
            cells = (f"{sum(row[kind]) / len(row[kind]):.1f}" if kind in row else "." for kind in kinds)
            lines.append(f"  {block:<14}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def summary(model, state, run):
    """What was trained, where the ranks are, what it cost and what it brought: lines to print."""
    layers = adapter_layers(model)
    ranks = {path: layer.rank for path, layer in layers.items()}
    scale = next(iter(layers.values())).scale
    lines = [
        f"{state.config.adapter} on {len(layers)} layers, ranks {min(ranks.values())} to {max(ranks.values())} "
        f"(mean {sum(ranks.values()) / len(ranks):.2f}), scale {scale:g}; mean rank by block and kind of layer:",
        rank_map(ranks),
    ]
    for network, (own, base, percent) in parameter_counts(model).items():
        lines.append(f"{network}: {own:,} parameters trained, {percent:.3f} % of {base:,}")
    measured = [(entry["step"], entry["validation"]) for entry in run.entries() if "validation" in entry]
    if measured:
        (_, before), (last_step, last) = measured[0], measured[-1]
        best, step = state.best if state.best else (float("nan"), 0)
        lines.append(
            f"validation loss: {before:.4f} before, {last:.4f} at step {last_step}, best {best:.4f} at step "
            f"{step} ({100 * (best / before - 1):+.1f} %)"
        )
    else:
        lines.append("no validation split: the adapter is that of the last step")
    skipped = f", {state.skipped} skipped as not finite" if state.skipped else ""
    steps = [entry for entry in run.entries() if "memory_mb" in entry]
    lines.append(
        f"{state.step} steps{skipped}, {state.seconds:.1f} s, peak memory "
        f"{max((entry['memory_mb'] for entry in steps), default=0) / 1000:.2f} GB"
    )
    lines.append(f"files: {run.adapter}, log.jsonl, config.json, samples/, last/")
    return "\n".join(lines)
