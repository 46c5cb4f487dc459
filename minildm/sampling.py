"""Planning for sample.py: which prompts, which files in which batches, and the text stored in each PNG.

This module does not import torch, so that a mistake on the command line is reported at once.
"""

import csv
import os
import re
from pathlib import Path
from typing import NamedTuple

from minildm import __version__
from minildm.config import SAMPLER_NAMES
from minildm.errors import InputError
from minildm.files import sha256
from minildm.images import parameters_text, read_parameters


class PlannedImage(NamedTuple):
    prompt: str
    seed: int
    path: Path


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
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"--prompts {path} is not UTF-8 text") from None
    if path.suffix.lower() in (".csv", ".tsv"):
        prompts = _table_column(text, path, column)
    elif column is None:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        raise InputError(f"--column is for a .csv or .tsv file, but --prompts is {path}")
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompt")
    return prompts


def _table_column(text, path, column):
    """The values of ``column`` (default: prompt, or text) in a .csv or .tsv file's ``text``; none may be blank."""
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        columns, rows = rows.fieldnames or [], list(rows)
    except csv.Error as error:
        raise InputError(f"--prompts {path} is not readable as CSV ({error})") from None
    if column is None:
        column = next((name for name in ("prompt", "text") if name in columns), None)
    if column not in columns:
        raise InputError(
            f"--prompts {path} has no column {column or 'prompt or text'!r}; its columns are "
            f"{', '.join(map(str, columns)) or 'none'}; name one with --column"
        )
    prompts = [row[column] or "" for row in rows]
    if blank := [i for i, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        raise InputError(
            f"--prompts {path} has no prompt in {len(blank)} of {len(rows)} rows, the first of them row {blank[0]}; "
            "fill them in or delete them"
        )
    return prompts


def check_request(prompts, negative, n, seed):
    """Raise InputError for prompts that are not valid UTF-8, and for seeds beyond those of torch's generators."""
    for prompt in (*prompts, negative):
        try:
            prompt.encode()
        except UnicodeEncodeError:  # the shell passed on bytes that are no text
            raise InputError(f"the prompt {prompt!r} is not valid UTF-8") from None
    n_images = n * len(prompts)
    if seed > 2**63 - n_images:
        raise InputError(f"--seed must be at most 2^63 - {n_images} for {n_images} images, got {seed}")


# --- adapters --------------------------------------------------------------------------------------------------------
def choose_adapters(adapters, base):
    """The adapters to merge into ``base``: those of --adapter; none for "none"; by default the embedded base's own.

    Raises: InputError; FileNotFoundError, naming the adapters that do not exist.
    """
    from minildm.loading import EMBEDDED_ADAPTER, is_embedded, parse_adapter

    if adapters == ["none"]:
        return []
    if "none" in adapters:
        raise InputError("--adapter none means no adapter; leave it out beside other adapters")
    if not adapters and is_embedded(base) and EMBEDDED_ADAPTER.is_file():
        print("using the embedded base with its adapter for chest radiographs (--adapter none: without it)")
        return [str(EMBEDDED_ADAPTER)]
    paths = [parse_adapter(adapter)[0] for adapter in adapters]
    if absent := [path for path in paths if not path.is_file()]:
        if (absent[0].parent / "model").is_dir():
            raise FileNotFoundError(
                f"{absent[0].parent} is a run of full fine-tuning, which has no adapter; give --base "
                f"{absent[0].parent / 'model'} instead"
            )
        names = ", ".join(map(str, absent))
        raise FileNotFoundError(f"no such adapter: {names}; give PATH[@RANK][:MULTIPLIER] of a file or a run folder")
    return adapters


def describe_adapters(adapters):
    """The adapters for a PNG's text: name, hash (a later run may write to the same path), rank if any, multiplier."""
    from minildm.loading import parse_adapter

    return " + ".join(
        f"{path.parent.name}/{path.name} {sha256(path)[:10]}{'' if rank is None else f' rank {rank}'} x {multiplier:g}"
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
    numbers = [int(match[1]) for name in existing if (match := re.match(r"(\d+)-.*\.png$", name))]
    first = 0 if continues else max(numbers, default=-1) + 1
    planned = []
    for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n)):
        image = PlannedImage(prompt, seed + i, folder / f"{first + i:05d}-seed{seed + i}.png")
        if image.path.name not in existing:
            planned.append(image)
        elif (old := read_parameters(image.path)) != (new := parameters(image)):
            old, new = (old or "no parameters").splitlines(), new.splitlines()
            line = -1 if old[-1] != new[-1] else 0  # the settings, or else the prompt
            raise InputError(
                f"{image.path} exists and was made with other settings ({old[line]}) than this command's "
                f"({new[line]}); give another --out"
            )
    return planned


def split_batches(planned, batch_size):
    """Batches of at most ``batch_size`` images with consecutive seeds."""
    batches = []
    for image in planned:
        if batches and len(batches[-1]) < batch_size and image.seed == batches[-1][-1].seed + 1:
            batches[-1].append(image)
        else:
            batches.append([image])
    return batches


# --- the text in a PNG -----------------------------------------------------------------------------------------------
def describe_image(image, negative, settings, model, adapters=""):
    """The text of a PNG's ``parameters`` chunk.

    Args: settings: SamplingSettings with guidance, height and width set; adapters: from `describe_adapters`.
    """
    pairs = {
        "Steps": settings.steps,
        "Sampler": SAMPLER_NAMES[settings.sampler] + " Karras" * settings.karras,
        "CFG scale": settings.guidance,
        "Seed": image.seed,
        "Model hash": model.base_hash[:10],
        "Size": f"{settings.width}x{settings.height}",
        "Model": model.files.path.stem,
        "Prediction": model.config.schedule.prediction,
        "Precision": str(model.dtype).removeprefix("torch."),
    }
    if model.vae_hash:  # the web UI's names
        pairs |= {"VAE hash": model.vae_hash[:10], "VAE": model.files.vae_path.absolute().name}
    if settings.eta:
        pairs["Eta"] = settings.eta
    if adapters:
        pairs["Adapter"] = adapters
    return parameters_text(image.prompt, negative, **pairs, Version=f"minildm {__version__}")
