"""DreamBooth: bind a rare word to the subject of a few images, without losing its class (Ruiz et al. 2022,
arXiv:2208.12242).

Instance images, those of --data, are all captioned with one prompt that holds a rare word ("a photo of sks chest
x-ray"). Class images are sampled from the base before anything is trained, with a prompt without that word ("a chest
x-ray"), and trained on with that prompt, so that the model keeps what it knows about the class. The loss is the
paper's Eq. 2, with its prior preservation:

    loss = mean over instance samples + prior_weight * mean over class samples

A batch of B holds n_instance = B - B // 2 instance and n_class = B // 2 class samples, in this order. The loop computes
sum_i weight_i loss_i / B, so an instance sample weighs B / n_instance and a class sample prior_weight * B / n_class.
Without --class-prompt, or with --prior-weight 0, there are no class images: plain fine-tuning on one prompt.

Works with every --adapter; the paper trains all layers of the diffusion model (--adapter full; text encoder optional),
about 1,000 steps at a learning rate of 5e-6 for Stable Diffusion. Differs from the paper: 200 class images by default,
not about 1,000; they come from 25 steps of DPM-Solver++ with guidance, not from the ancestral sampler; half of each
batch is class images (the paper names no share); prompts of both kinds are dropped as in fine-tuning
(--caption-dropout 0 keeps all). ``python -m minildm rare-tokens`` suggests words.

Validation is that of fine-tuning, on held-out instance images with the instance prompt. A handful of images cannot be
split: if a part of --split would be empty, all are trained on and there is no validation; the run then keeps the
weights of the last step.
"""

import hashlib
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from minildm import __version__
from minildm.config import SAMPLER_NAMES, SamplingSettings
from minildm.data.cache import latent_cache, weights_fingerprint
from minildm.data.loader import SampleSequence, batches_of
from minildm.data.reading import Transform
from minildm.data.records import Record
from minildm.data.splits import SPLITS, split_by_patient
from minildm.distributed import count, turns, wait_for_all
from minildm.errors import InputError
from minildm.files import writable_folder, written_beside
from minildm.images import parameters_text, save_png
from minildm.latent_diffusion import usual_guidance
from minildm.progress import Progress
from minildm.seeds import seeded
from minildm.settings import Settings, flag, setting
from minildm.training.finetune import Finetuning, Samples
from minildm.training.loss import Captions

IMAGES_AT_A_TIME = 4  # class images sampled together
CLASS_IMAGES, PRIOR_WEIGHT = 200, 1.0  # defaults


@dataclass(frozen=True)
class DreamBoothSettings(Settings):
    """The flags of DreamBooth; --instance-prompt turns it on."""

    instance_prompt: str | None = setting(
        None, 'prompt of every image of --data, with a rare word: "a photo of sks chest x-ray"; turns DreamBooth on'
    )
    class_prompt: str | None = setting(
        None, 'prompt of the class images, without that word: "a chest x-ray" (default: no class images)'
    )
    class_images: int | None = setting(
        None, f"class images to sample from the base before training (default: {CLASS_IMAGES})", at_least=1
    )
    prior_weight: float | None = setting(
        None, f"weight of the class images' loss; 0 = no class images (default: {PRIOR_WEIGHT:g})", at_least=0
    )

    def __post_init__(self):
        super().__post_init__()
        needs = {"class_prompt": "instance_prompt", "class_images": "class_prompt"}
        needs["prior_weight"] = "class_prompt" if self.prior_weight else "instance_prompt"
        for name, needed in needs.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise InputError(f"{flag(name)} needs {flag(needed)}; give both, or leave {flag(name)} out")
        if self.class_images is not None and self.prior_weight == 0:
            warnings.warn(
                f"--class-images {self.class_images} are not used: --prior-weight 0 leaves them out", stacklevel=3
            )
        for name in ("instance_prompt", "class_prompt"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise InputError(f"{flag(name)} is empty; give a prompt, or leave it out")
        if self.instance_prompt is not None and self.instance_prompt == self.class_prompt:
            raise InputError(
                f"--instance-prompt and --class-prompt are the same, {self.class_prompt!r}; leave the rare word out of "
                "the class prompt"
            )

    @property
    def n_class_images(self):
        """Class images to sample; 0: none are used."""
        if self.class_prompt is None or self.prior_weight == 0:
            return 0
        return CLASS_IMAGES if self.class_images is None else self.class_images

    @property
    def weight(self):
        """Weight of the class images' mean loss."""
        return PRIOR_WEIGHT if self.prior_weight is None else self.prior_weight


# --- class images ----------------------------------------------------------------------------------------------------
def sample_class_images(model, settings, size, seed, cache):
    """Samples of the class, generated by the model as it is; those made before are not generated again.

    They are PNG files in a folder below ``cache`` whose name is a hash of all they depend on: prompt, number, seed,
    size, sampling settings and the model's weights. A batch that was interrupted is generated again as a whole, since
    an image's rounding may depend on its batch, so an interruption changes no image.

    Args: model: its VAE in float32. settings: DreamBoothSettings. size: height and width in pixels. seed: of the run.
    Returns: Samples; None if the settings ask for no class images.
    """
    n, prompt = settings.n_class_images, settings.class_prompt
    if n == 0:
        return None
    first_seed = seeded(seed, "class images").initial_seed()  # runs with seeds 0 and 1 share no image
    sampling = SamplingSettings("dpm++", 25, usual_guidance(model.config), seed=first_seed, height=size, width=size)
    recipe = (
        f"{n} class images of {prompt!r}; {sampling}; {model.config.schedule}; {weights_fingerprint(model)}; latents "
        f"scaled by {model.config.vae.scaling_factor}"
    )
    folder = Path(cache) / f"class-images-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}"
    writable_folder(folder, "--cache")
    with written_beside(folder / "recipe.txt") as path:
        path.write_text(recipe + "\n", encoding="utf-8")
    paths = [folder / f"{i:05d}.png" for i in range(n)]
    print(f"class images: {n:,} of {prompt!r}, in {folder}")
    batches = [range(first, min(first + IMAGES_AT_A_TIME, n)) for first in range(0, n, IMAGES_AT_A_TIME)]

    def sample_missing(batches, bar):
        for batch in batches:
            if not all(paths[i].exists() for i in batch):
                options = asdict(sampling) | {"seed": first_seed + batch.start}
                _sample_batch(model, prompt, options, [paths[i] for i in batch])
            bar.update(len(batch))

    with Progress("sampling class images", "image", sum(map(len, turns(batches)))) as bar:
        sample_missing(turns(batches), bar)  # all of them, for a process alone
    if count() > 1:
        wait_for_all()
        sample_missing(batches, Progress("", "image", hidden=True))  # nothing, unless hosts have caches of their own
        wait_for_all()
    records = tuple(Record(path.name, path.name, path=path) for path in paths)
    latents = latent_cache(records, Transform(size), model.vae, cache)
    return Samples(records, (prompt,) * n, latents)


def _sample_batch(model, prompt, options, paths):
    """Generate the images with seeds from ``options["seed"]`` on, and write those whose file does not exist."""
    images = model.sample([prompt] * len(paths), **options)
    for i, (image, path) in enumerate(zip(images, paths)):
        if path.exists():
            continue
        text = parameters_text(
            prompt,
            **{"Steps": options["steps"], "Sampler": SAMPLER_NAMES[options["sampler"]]},
            **{"CFG scale": options["guidance"], "Seed": options["seed"] + i, "Size": f"{image.width}x{image.height}"},
            Version=f"minildm {__version__}",
        )
        try:
            save_png(image, path, text)
        except OSError as error:
            raise InputError(
                f"could not write {path} ({error.strerror}); make room, then run again: the class images made so far "
                "are kept"
            ) from None


# --- the task --------------------------------------------------------------------------------------------------------
def split_instances(records, preset, seed):
    """`split_by_patient`, or, where a part of the split would be empty, all records for training."""
    if preset not in SPLITS:
        raise InputError(f"unknown split {preset!r}; one of: {', '.join(SPLITS)}")
    try:
        return split_by_patient(records, preset, seed)
    except InputError:
        print(f"note: {len(records)} images are too few for --split {preset}: all are trained on, without validation")
        return {"train": list(range(len(records)))}


class InstanceAndClassSamples(Dataset):
    """The endless sequence of a run's samples: of each batch of B, the first ``n_instance`` are instance samples.

    Item ``id`` = step * B + position has the entries of `TrainingPairs`, with ``index`` 0 for the instance prompt or 1
    for the class prompt, its ``id`` and its ``weight``. Each kind of image comes in epochs of its own seeded order, so
    which image an item shows is a function of (seed, id).

    Args: instances, class_images: TrainingPairs. classes: of the instances, for balanced sampling, or None.
    """

    def __init__(self, instances, class_images, batch_size, n_instance, prior_weight, seed, classes=None):
        n_class = batch_size - n_instance
        self.batch_size, self.n_instance, self.n_class = batch_size, n_instance, n_class
        self.instances = SampleSequence(instances, seed, classes)
        self.class_images = SampleSequence(class_images, f"{seed} class images")
        self.instance_weight = torch.tensor(batch_size / n_instance)
        self.class_weight = torch.tensor(prior_weight * batch_size / n_class)

    def __getitem__(self, sample_id):
        step, position = divmod(sample_id, self.batch_size)
        if position < self.n_instance:
            item = self.instances[step * self.n_instance + position]
            return item | {"index": 0, "id": sample_id, "weight": self.instance_weight}
        item = self.class_images[step * self.n_class + position - self.n_instance]
        return item | {"index": 1, "id": sample_id, "weight": self.class_weight}


class DreamBooth(Finetuning):
    """Fine-tuning on instance images and class images together.

    Args:
        training, validation: Samples of instance images, with the instance prompt; validation may be empty.
        class_images: Samples with the class prompt; None = none.
        prior_weight: weight of the class images' mean loss.
        options: as in Finetuning.
    """

    def __init__(self, model, training, validation, config, class_images=None, prior_weight=PRIOR_WEIGHT, **options):
        n_class = 0 if class_images is None else config.batch_size // 2
        assert n_class or class_images is None, "a batch of 1 has no room for class images"
        self.n_instance = config.batch_size - n_class
        super().__init__(model, training, validation, config, images_per_step=self.n_instance, **options)
        self.prior_weight, self.class_pairs = prior_weight, None
        prompts = training.prompts[:1]
        if class_images is not None:
            self.class_pairs, class_captions = self._pairs(class_images)
            prompts = (*prompts, class_images.prompts[0])
            self.captions = Captions(model, prompts, class_captions.contexts)  # by the prompt's index, 0 or 1
        self.sheet_prompts = [prompts[i % len(prompts)] for i in range(config.samples)]  # each with its own seed

    def batches(self, first_step, last_step):
        if self.class_pairs is None:
            return super().batches(first_step, last_step)
        size, seed = self.batch_size, self.config.seed
        samples = InstanceAndClassSamples(
            self.pairs, self.class_pairs, size, self.n_instance, self.prior_weight, seed, self.classes
        )
        return batches_of(samples, size, first_step, last_step, self.workers)
