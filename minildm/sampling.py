"""Planning for sample.py: which prompts, which files in which batches, and the text stored in each PNG.

This module does not import torch, so that a mistake on the command line is reported at once.
"""

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from minildm import __version__, tables
from minildm.config import SAMPLER_NAMES, SPATIAL_FACTOR
from minildm.data import reading
from minildm.errors import InputError, naming
from minildm.files import input_file, sha256
from minildm.images import parameters_text, read_parameters, save_png

NUMBERED = re.compile(r"([0-9]{1,18})-.*\.png$")  # an image's file name

DECODER_COPIES = 5  # of the decoder's widest tensor, at its peak: measured at 1024 px, 5.1
FAR = 4  # times the training size


class PlannedImage(NamedTuple):
    prompt: str
    seed: int
    path: Path | None  # None: a row that only fills a batch (record.py)


class InitImage(NamedTuple):
    """The file of --init-image."""

    path: Path
    sha256: str
    data: bytes

    def tensor(self, height, width):
        """The image in [-1, 1], (1, 3, height, width), read as training reads images: greys of any depth and DICOM by
        the range they declare; the largest centred part of this shape, scaled by the same filter."""
        pixels = reading.decode(self.data, self.path, at_least=max(height, width)).pixels
        return reading.to_tensor(reading.crop(pixels, height, width)[None])


# --- prompts ---------------------------------------------------------------------------------------------------------
def read_prompts(prompt=None, path=None, column=None):
    """The prompts of the command line: [``prompt``], or those of the text or table file ``path``.

    Raises: InputError, naming the flag; FileNotFoundError.
    """
    if (prompt is None) == (path is None):
        raise InputError('give either one prompt, as in sample.py "chest x-ray", or a file of them, --prompts FILE')
    if path is None:
        if column is not None:
            raise InputError(f"--column {column} is for --prompts FILE.csv")
        return [prompt]
    with naming("--prompts"):
        return tables.read_prompts(input_file(path, "--prompts"), column)


def read_init_image(path, strength):
    """The InitImage of --init-image ``path``, checked to be an image; None if ``path`` is.

    Raises: InputError, also for a ``strength`` without an image; FileNotFoundError.
    """
    if path is None:
        if strength is not None:
            raise InputError(f"--strength {strength:g} is for --init-image FILE, which is not given")
        return None
    if path.is_dir():
        raise InputError(f"--init-image {path} is a folder; give one image, which all prompts start from")
    if not path.is_file():
        raise FileNotFoundError(f"--init-image {path}: no such file")
    data = reading.file_bytes(path)
    decoded = reading.decode(data, path, at_least=SPATIAL_FACTOR)  # a mistake shows before the model is loaded
    print(f"starting from {path}: {decoded.kind}, {decoded.greys}")
    return InitImage(path, hashlib.sha256(data).hexdigest(), data)


def check_request(prompts, negative, n, seed):
    """Raise InputError for prompts that are not valid UTF-8, and for seeds beyond those of torch's generators. Warn of
    an empty prompt."""
    for prompt in (*prompts, negative):
        try:
            prompt.encode()
        except UnicodeEncodeError:  # the shell passed on bytes that are no text
            raise InputError(f"the prompt {prompt!r} is not valid UTF-8") from None
    if not all(prompt.strip() for prompt in prompts):
        warnings.warn("the prompt is empty: the image shows whatever the model makes without one", stacklevel=2)
    n_images = n * len(prompts)
    if seed > 2**63 - n_images:
        raise InputError(f"--seed must be at most 2^63 - {n_images} for {n_images} images, got {seed}")


def check_size(settings, config, n, itemsize, free):
    """Raise InputError for images whose decoding will not fit into memory; warn of sizes that the model cannot handle.

    Args:
        settings: SamplingSettings with height and width. config: ModelConfig. n: images at a time.
        itemsize: bytes of a number of the VAE. free: bytes of memory, or None where the system does not say.
    """
    height, width, usual = settings.height, settings.width, config.image_size
    needed = DECODER_COPIES * config.vae.widths[1] * itemsize * n * height * width
    size = f"{width} x {height} px"
    if free is not None and needed > free:
        raise InputError(
            f"{size} at {n} images at a time need about {needed / 1e9:.1f} GB of memory to decode, and "
            f"{free / 1e9:.1f} GB are free; lower --width, --height or --batch-size"
        )
    if max(height, width) > FAR * usual:
        warnings.warn(
            f"{size} is far from the {usual} px that the model was trained at: objects repeat, and the time grows with "
            "the square of the area",
            stacklevel=2,
        )


# --- adapters --------------------------------------------------------------------------------------------------------
def choose_adapters(adapters, base):
    """The adapters to merge into ``base``: those of --adapter, with the ones they were trained on top of; none for
    "none"; by default the embedded base's own.

    Args: adapters: a tuple of flags.
    Raises: InputError; FileNotFoundError, naming the adapters that do not exist.
    """
    from minildm.loading import EMBEDDED_ADAPTER, is_embedded, parse_adapter, with_those_below

    if adapters == ("none",):
        return ()
    if "none" in adapters:
        raise InputError("--adapter none means no adapter; leave it out beside other adapters")
    if not adapters and is_embedded(base) and EMBEDDED_ADAPTER.is_file():
        print("using the embedded base with its adapter for chest radiographs (--adapter none: without it)")
        return (str(EMBEDDED_ADAPTER),)
    with naming("--adapter"):
        paths = [parse_adapter(adapter)[0] for adapter in adapters]
    if absent := [path for path in paths if not os.path.isfile(path)]:
        if (absent[0].parent / "model").is_dir():
            raise FileNotFoundError(
                f"{absent[0].parent} is a run of full fine-tuning, which has no adapter; give --base "
                f"{absent[0].parent / 'model'} instead"
            )
        names = ", ".join(map(str, absent))
        raise FileNotFoundError(f"no such adapter: {names}; give PATH[@RANK][:MULTIPLIER] of a file or a run folder")
    stack = with_those_below(adapters)
    for below in [adapter for adapter in stack if adapter not in adapters]:
        print(f"merging {below}, too, which the adapter was trained on top of")
    return tuple(stack)


def describe_adapters(adapters):
    """The adapters for a PNG's text: name, hash (a later run may write to the same path), rank if any, multiplier."""
    from minildm.loading import parse_adapter

    return " + ".join(
        f"{Path(os.path.abspath(path)).parent.name}/{path.name} {sha256(path)[:10]}"
        f"{'' if rank is None else f' rank {rank}'} x {multiplier:g}"
        for path, multiplier, rank in map(parse_adapter, adapters)
    )


# --- files -----------------------------------------------------------------------------------------------------------
def plan_images(prompts, n, seed, folder, continues, parameters):
    """The images to generate, in the order of their seeds: ``n`` for each prompt, named ``00012-seed12.png``.

    Args:
        seed: of the first image; image i has seed + i.
        continues: False: numbers go on from those in the folder. True: numbers start at 0 and images that exist are
            skipped, so that a call continues an interrupted one.
        parameters: function from a PlannedImage to its PNG text.
    Returns: list of PlannedImage.
    Raises: InputError if an image exists and its parameters are others.
    """
    existing = set(os.listdir(folder))
    numbers = [int(match[1]) for name in existing if (match := NUMBERED.match(name))]
    first = 0 if continues else max(numbers, default=-1) + 1
    planned = []
    for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n)):
        image = PlannedImage(prompt, seed + i, folder / f"{first + i:05d}-seed{seed + i}.png")
        if image.path.name not in existing:
            planned.append(image)
        else:
            _require_same_parameters(image.path, parameters(image))
    return planned


def save_planned(png, continues, image, parameters, *texts):
    """Save the Pillow ``image`` of a PlannedImage; nothing that another process has made meanwhile is replaced.

    Args: continues: as in `plan_images`: the name is fixed, and a file that has it must be the same image. texts: see
        `save_png`.
    Returns: the PlannedImage, with the path it has now: its number goes up until the name is free.
    Raises: InputError if an image of other settings has taken a fixed name.
    """
    while True:
        try:
            save_png(image, png.path, parameters, *texts, replace=False)
        except FileExistsError:
            if continues:
                _require_same_parameters(png.path, parameters)
                return png
            number, _, rest = png.path.name.partition("-")
            taken = [int(match[1]) for name in os.listdir(png.path.parent) if (match := NUMBERED.match(name))]
            png = png._replace(path=png.path.with_name(f"{max(int(number), *taken) + 1:05d}-{rest}"))
        else:
            return png


def _require_same_parameters(path, new):
    """Raise InputError unless the image at ``path`` has the ``parameters`` text ``new``."""
    if (old := read_parameters(path)) != new:
        old, new = (old or "no parameters").split("\n"), new.split("\n")
        line = -1 if old[-1] != new[-1] else 0  # the settings, or else the prompt
        raise InputError(
            f"{path} exists and was made with other settings ({old[line]}) than this command's ({new[line]}); give "
            "another --out"
        )


def split_batches(planned, batch_size):
    """Batches of at most ``batch_size`` images."""
    return [planned[i : i + batch_size] for i in range(0, len(planned), batch_size)]


# --- the text in a PNG -----------------------------------------------------------------------------------------------
def describe_image(image, negative, settings, model, adapters="", init_image=None):
    """The text of a PNG's ``parameters`` chunk, under the web UI's names where it has them.

    Args: settings: SamplingSettings with guidance, height and width set; adapters: from `describe_adapters`.
    """
    pairs = {
        "Steps": settings.steps,
        "Sampler": SAMPLER_NAMES[settings.sampler] + " Karras" * settings.karras,
        "CFG scale": settings.guidance,
        "Seed": image.seed,
        "Model hash": model.base_hash[:10],
        "Size": f"{settings.width}x{settings.height}",
        "Model": model_name(model.files.path),
        "Prediction": model.config.schedule.prediction,
        "Precision": str(model.precision).removeprefix("torch."),
    }
    if model.vae_hash:  # the web UI's names
        pairs |= {"VAE hash": model.vae_hash[:10], "VAE": model.files.vae_path.absolute().name}
    if settings.eta:
        pairs["Eta"] = settings.eta
    if adapters:
        pairs["Adapter"] = adapters
    if init_image is not None:
        pairs |= {"Denoising strength": settings.strength, "Init image hash": init_image.sha256[:10]}
    return parameters_text(image.prompt, negative, **pairs, Version=f"minildm {__version__}")


def model_name(path):
    """The name of a base: that of its folder, whole, or that of its file without the suffix of a checkpoint."""
    path = Path(os.path.abspath(path))  # for "." and ".."; a link keeps its own name
    known = path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    return path.stem if known and not path.is_dir() else path.name


def float32_wanted(model, recorded):
    """Whether products of a model in bfloat16 are to be computed in float32. ``recorded``: the dtype they were computed
    in before ("float32", "bfloat16"), which is kept; None: what is faster here."""
    from minildm import kernels

    if recorded is None:
        return kernels.float32_is_faster(model.dtype, model.device)
    return recorded == "float32" and kernels.is_bfloat16_on_cpu(model.dtype, model.device)
