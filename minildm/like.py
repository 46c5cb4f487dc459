"""sample.py --like FILE.png: make the image again, from the record in it (record.py); other flags change what they say.

`flags_like` turns the record into defaults for the command line; `batch_like` makes sure that the result is the same
bit for bit. Bases, adapters and initial images are found by the recorded path and recognised by their SHA-256.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from minildm.config import SAMPLER_NAMES
from minildm.errors import InputError
from minildm.files import sha256
from minildm.images import read_text, split_parameters
from minildm.record import FORM, machine_of, read_record


def flags_like(args):
    """The flags that make the image ``args.like`` again, as defaults for a parser: what is given explicitly wins.

    An image without a record, but with the text of the web UI, gives prompts and sampling settings; its model is not
    looked for, and a warning says so.

    Args: args: the flags as first parsed. Files that they name are not looked for in the record.
    Returns: {name: value}, among them ``recorded``, the record or None, and ``explicit``, what of its files the flags
        replace.
    Raises: InputError if the image has neither, and for a file whose contents have changed; FileNotFoundError.
    """
    if not args.like.is_file():
        raise FileNotFoundError(f"--like {args.like}: no such file")
    record = read_record(args.like)
    flags = _flags_of_text(args) if record is None else _flags_of_record(args, record)
    if args.prompts is not None:
        del flags["prompt"]
    files = {"base": args.base, "vae": args.vae, "adapters": args.adapter or args.base}
    return flags | {"recorded": record, "explicit": {what for what, value in files.items() if value}}


def _flags_of_record(args, record):
    from minildm.adapters.metadata import rank_flag  # with torch

    base, vae, init_image, adapters = (record[key] for key in ("base", "vae", "init_image", "adapters"))
    flags = {
        "prompt": record["prompt"],
        "negative": record["negative_prompt"],
        **{key: record["sampling"][key] for key in FORM["sampling"]},
        "prediction": record["prediction"],
        "device": record["machine"]["device"],
        "dtype": record["dtype"],
        "products": record["products"] if args.dtype in (None, record["dtype"]) else None,
        "compile": record["compile"],
        "plain": record["plain"],
    }
    if args.base is None and base["given"]:
        _require(args.like, "base", base, "--base")
        flags["base"] = base["path"]
    if vae is not None and args.vae is None:
        _require(args.like, "autoencoder", vae, "--vae")
        flags["vae"] = vae["path"]
    if init_image is not None and args.init_image is None:
        _require(args.like, "initial image", init_image, "--init-image", contents=True)
        flags["init_image"] = Path(init_image["path"])
    if not adapters:
        flags["adapter"] = ("none",)
    elif not args.adapter and (given := [adapter for adapter in adapters if adapter["given"]]):
        for adapter in given:  # those below them are found as they were then
            _require(args.like, "adapter", adapter, "--adapter", contents=True)
        flags["adapter"] = tuple(f"{one['path']}{rank_flag(one)}:{one['multiplier']!r}" for one in given)
    return flags


def _require(image, what, file, flag, contents=False):
    """Raise unless ``file``, a part of the record, exists and, if ``contents``, has its SHA-256."""
    path = Path(file["path"])
    if not path.exists() or (contents and not path.is_file()):
        raise FileNotFoundError(f"the {what} of {image}, {path}, is not there; say where it is with {flag}")
    if contents and (found := sha256(path)) != file["sha256"]:
        raise InputError(
            f"the {what} {path} is not the one that {image} was made with (SHA-256 {found[:10]}, not "
            f"{file['sha256'][:10]}); give the right one with {flag}, or {flag} {path} to use it all the same"
        )


def _flags_of_text(args):
    """The flags in the web UI's text: those of `SamplingSettings`, as far as they are there, and the prompts."""
    path = args.like
    prompt, negative, pairs = split_parameters(read_text(path).get("parameters", ""))
    if "Steps" not in pairs:
        raise InputError(f"--like {path}: it holds no settings, neither minildm's record nor the web UI's text")
    if "Init image hash" in pairs and args.init_image is None:
        raise InputError(f"{path} was made from another image, which its text does not name; give it with --init-image")
    warnings.warn(
        f"{path} holds the web UI's text only: prompts and sampling settings are taken from it, the model is what "
        "--base and --adapter say, and the image will not be the same bit for bit",
        stacklevel=2,
    )
    name = pairs.get("Sampler", "")
    samplers = {known: sampler for sampler, known in SAMPLER_NAMES.items()}
    sampler = name.removesuffix(" Karras")
    width, _, height = pairs.get("Size", "").partition("x")
    values = {
        "sampler": samplers.get(sampler, name),  # one that is not ours is refused by name, unless a flag replaces it
        "karras": name.endswith(" Karras") or pairs.get("Schedule type") == "Karras",
        "steps": pairs["Steps"],
        "guidance": pairs.get("CFG scale"),
        "seed": pairs.get("Seed"),
        "eta": pairs.get("Eta"),
        "width": width,
        "height": height,
        "prediction": pairs.get("Prediction"),
        "dtype": pairs.get("Precision"),
        "strength": pairs.get("Denoising strength") if args.init_image is not None else None,  # else of a hires fix
    }
    return {"prompt": prompt, "negative": negative, **{key: value for key, value in values.items() if value}}


def batch_like(request, planned):
    """The batch that makes the image ``args.like`` again, bit for bit on the same machine, or None if the flags ask for
    another image or for several. Sets the recorded number of CPU threads.

    Args: request: Request, whose args come from `flags_like`. planned: list of PlannedImage.
    Raises: InputError if the base, or a file found by default, is not the one that the image was made with.
    """
    import torch

    args, recorded = request.args, request.args.recorded
    if recorded is None or not planned:
        return None
    image = planned[0]
    record = request.record(image, planned)
    for what in ("base", "vae", "adapters"):
        if what not in args.explicit:
            _require_same(args.like, what, record[what], recorded[what], request.files[what])
    if len(planned) > 1:
        return None
    new, old = _decisive(record), _decisive(recorded)
    if differences := [name for name in old if new[name] != old[name]]:
        print(f"unlike {args.like}: {', '.join(differences)}")
        return None
    threads = recorded["machine"]["threads"]
    if recorded["machine"]["device"] == "cpu" and 1 <= threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
    here = machine_of(request.model.device)
    if any(here[key] != recorded[key] for key in here):
        there, here = (
            "{device} ({processor}, {threads} threads) with minildm {minildm} and torch {torch}".format(
                **where["machine"], **where["versions"]
            )
            for where in (recorded, here)
        )
        warnings.warn(f"{args.like} was made on {there}; here, on {here}, its last bits may differ", stacklevel=2)
    if recorded["vae_dtype"] == "float32":
        request.model.vae.float()
    index, size = recorded["batch"]["index"], recorded["batch"]["size"]
    batch = [image._replace(path=None)] * size
    batch[index] = image
    return batch


def compare(image, path):
    """Whether the PNG ``path`` has the pixels of ``image``, as a sentence."""
    with Image.open(image) as theirs, Image.open(path) as ours:
        theirs, ours = np.asarray(theirs, dtype=int), np.asarray(ours, dtype=int)
    if theirs.shape != ours.shape:
        return f"not the same as {image}, which has other dimensions than its record says"
    if not (differences := np.abs(theirs - ours)).any():
        return f"the same as {image}, bit for bit"
    n, n_all = np.count_nonzero(differences), differences.size
    return f"not the same as {image}: {n:,} of {n_all:,} values differ, by up to {differences.max()} of 255"


def _require_same(image, what, ours, theirs, files):
    """Raise InputError unless the files that were found, ``files`` as flags name them, are those of the record."""
    found, wanted = ([file["sha256"] for file in _files(part)] for part in (ours, theirs))
    if found != wanted:
        flag = {"base": "--base", "vae": "--vae", "adapters": "--adapter"}[what]
        found, wanted = (
            " and ".join(f"{file['path']} (SHA-256 {file['sha256'][:10]})" for file in _files(part)) or "none"
            for part in (ours, theirs)
        )
        raise InputError(
            f"{image} was made with another {flag.lstrip('-')}, {wanted}, than the one found, {found}; give the right "
            f"one with {flag}, or {flag} {f' {flag} '.join(files) or 'none'} to use this one all the same"
        )


def _files(part):
    return part if isinstance(part, list) else [] if part is None else [part]


def _decisive(record):
    """What decides how the image looks, apart from rounding: {name as in a message: value}."""

    def hashes(part):
        return [(file["sha256"], file.get("multiplier"), file.get("rank")) for file in _files(part)]

    files = {"base": "base", "autoencoder": "vae", "adapters": "adapters", "initial image": "init_image"}
    return {
        "prompt": record["prompt"],
        "negative prompt": record["negative_prompt"],
        **record["sampling"],
        **{name: hashes(record[key]) for name, key in files.items()},
        **{key: record[key] for key in ("prediction", "dtype", "products", "compile", "plain")},
        "device": record["machine"]["device"],
    }
