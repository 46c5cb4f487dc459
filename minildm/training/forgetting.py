"""The forgetting probe: what training on new images does to prompts that have nothing to do with them.

Images of a few fixed prompts are generated with the same seeds before and after training. Their latents z give

    drift     = sqrt( mean (z_after - z_before)^2 )    over all images and elements; 0: no image has changed
    unrelated = sqrt( mean (z_i - z_j)^2 )             over all pairs of different images before training, for scale

Scaled latents have a variance of about 1, so ``unrelated`` is near sqrt 2. Drift says how far images have moved, not
that they are worse: a small change of the weights may turn one good image into another. samples/forgetting.png shows
them side by side. The embedded base knows only simple images, so its prompts ask for two coloured shapes, and the shape
checker counts how many images are right before and after.
"""

import io
import json

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from minildm.files import written_beside
from minildm.images import save_png
from minildm.latent_diffusion import to_pil, usual_guidance
from minildm.loading import is_embedded
from minildm.progress import Progress
from minildm.teaching.shape_check import check_shapes
from minildm.teaching.shapes import shape_prompt

PROMPTS = ("A bird sitting on a tree", "An X-ray of a car", "A dog on a beach", "A cup of coffee on a wooden table")
N_SHAPES = 16  # prompts for the embedded base
STEPS = 20  # of DPM-Solver++
LATENTS, SHEET = "samples/forgetting-before.safetensors", "samples/forgetting.png"  # in the run's folder
SEED = 0  # of the first image: the same for every run, so that runs and methods can be compared


class ForgettingProbe:
    """Generates the images before training when it is made, and those after training in `measure`.

    The latents before training are kept in the run's folder, so that a resumed run has them.

    Args: model: LatentDiffusion, not yet trained. run: begun. size: height and width of the images in pixels.
    """

    def __init__(self, model, run, size):
        self.model, self.run, self.size = model, run, size
        self.shapes = model.files is not None and is_embedded(model.files.path)
        self.prompts = [shape_prompt((11, i)) for i in range(N_SHAPES)] if self.shapes else list(PROMPTS)
        recipe = json.dumps({"prompts": self.prompts, "size": size, "steps": STEPS, "seed": SEED})
        self.before = _load(run.folder / LATENTS, recipe) if run.resume else None  # (n, 4, h, w)
        if self.before is None:
            self.before = self._sample("before")
            run.save_file(LATENTS, lambda path: _save(path, self.before, recipe))

    def _sample(self, when):
        """Scaled latents of all prompts, (n, 4, h, w) on the CPU."""
        with Progress(f"forgetting probe, {when} training", "step", STEPS) as bar:
            return self.model.sample(
                self.prompts,
                steps=STEPS,
                guidance=usual_guidance(self.model.config),
                sampler="dpm++",
                seed=SEED,
                height=self.size,
                width=self.size,
                output="latent",
                callback=lambda *_: bar.update(),
            ).cpu()

    def measure(self, step):
        """Generate the images after training, log drift and correct shapes, and write samples/forgetting.png."""
        after = self._sample("after")
        images = [self._decode(self.before), self._decode(after)]
        labels = [["before"] * len(self.prompts), ["after"] * len(self.prompts)]
        entry = {"drift": root_mean_square(after - self.before), "unrelated": unrelated_distance(self.before)}
        entry["prompts"] = len(self.prompts)
        if self.shapes:
            right = [[check_shapes(np.asarray(i), p).right for i, p in zip(part, self.prompts)] for part in images]
            labels = [
                [f"{label}: {'right' if ok else 'wrong'}" for label, ok in zip(*both)] for both in zip(labels, right)
            ]
            entry |= {"right_before": sum(right[0]), "right_after": sum(right[1])}
        self.run.log(step=step, **entry)
        text = f"contact sheet, before and after {step} steps of training"  # fid and audit leave contact sheets out
        sheet = side_by_side(*images, *labels, self.prompts)
        self.run.save_file(SHEET, lambda path: save_png(sheet, path, text))

    def _decode(self, latents):
        with torch.no_grad():
            return [to_pil(self.model.decode_latents(z[None].to(self.model.device)))[0] for z in latents]


def root_mean_square(x):
    return x.double().square().mean().sqrt().item()


def unrelated_distance(latents):
    """Root mean square distance of two different images of (n, ...): (z_i - z_j)^2 has a mean of twice the variance."""
    return (2 * latents.double().var(dim=0).mean()).sqrt().item()


def forgetting_line(entry):
    """The probe's entry of the log as a line for the run's summary."""
    shapes = ""
    if "right_before" in entry:
        n = entry["prompts"]
        shapes = f"; correct shapes: {entry['right_before']} of {n} before, {entry['right_after']} of {n} after"
    return (
        f"forgetting probe, {entry['prompts']} unrelated prompts: drift of the latents {entry['drift']:.3f} "
        f"({entry['unrelated']:.3f} between unrelated images){shapes}; see {SHEET}"
    )


def _save(path, latents, recipe):
    with written_beside(path) as beside:
        save_file({"latents": latents}, beside, {"recipe": recipe})


def _load(path, recipe):
    """The stored latents; None if there are none of this recipe."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents") if (file.metadata() or {}).get("recipe") == recipe else None


def side_by_side(before, after, labels_before, labels_after, prompts):
    """One image: for each prompt the image before and the one after training, labelled, under the prompt."""
    from matplotlib.figure import Figure

    size, gap = before[0].width, 4
    columns = min(len(prompts), 4 if size <= 256 else 2)
    rows = -(-len(prompts) // columns)
    width = 3.4  # inches of a pair of images
    figure = Figure(figsize=(width * columns, (0.5 * width + 0.5) * rows), layout="constrained")
    for axis, *pair, prompt in zip(figure.subplots(rows, columns, squeeze=False).flat, before, after, prompts):
        joined = Image.new("RGB", (2 * size + gap, size), "white")
        for image, left in zip(pair, (0, size + gap)):
            joined.paste(image, (left, 0))
        axis.imshow(joined)
        axis.set_title(prompt, fontsize=9)
    for axis, *labels in zip(figure.axes, labels_before, labels_after):
        axis.set_xticks([size / 2, 1.5 * size + gap], labels, fontsize=8)
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    for axis in figure.axes[len(prompts) :]:
        axis.set_axis_off()
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=max(110, 2 * size / width))
        return Image.open(buffer).convert("RGB")
