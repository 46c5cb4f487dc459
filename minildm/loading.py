"""Find the base model, load it on a device in a precision, and merge adapters into it."""

import math
import os
import re
from pathlib import Path

import torch

from minildm import checkpoint
from minildm.adapters.files import merge_file
from minildm.adapters.metadata import rank_flag
from minildm.adapters.reading import adapter_file, read_adapter
from minildm.data.folders import is_left_behind
from minildm.errors import InputError
from minildm.files import sha256
from minildm.latent_diffusion import LatentDiffusion
from minildm.torchrun import own_device

PACKAGE = Path(__file__).resolve().parent  # an installed package carries the embedded model as minildm/tiny
WEIGHTS = PACKAGE.parent / "weights"  # a checkout keeps it in weights/tiny, beside the user's own base models
EMBEDDED = (WEIGHTS if (WEIGHTS / "tiny").is_dir() else PACKAGE) / "tiny"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST = 1000  # of an adapter's multiplier; beyond 2 or so, images only break
EMBEDDED_ADAPTER = EMBEDDED / "adapter.safetensors"  # SeLoRA for chest radiographs


def load(base=None, adapters=(), device=None, dtype=None, prediction=None, vae=None, vae_dtype=None):
    """Load a Stable Diffusion v1.x or v2.x model.

    Args:
        base: a single .safetensors or .ckpt file, or a diffusers-layout folder; None = the model of `find_base`.
        adapters: adapter files or run folders to merge, in order: "runs/a", "runs/a:0.6" to scale its change of the
            weights by 0.6, "runs/a@2" or "runs/a@2:0.6" to use a DyLoRA adapter at rank 2. What one was trained on top
            of is merged before it (`with_those_below`).
        device: "cpu", "cuda", ...; None = a GPU if there is one, else the CPU.
        dtype: of the networks, such as torch.float16 or "float16"; None = float16 on a GPU, float32 elsewhere.
        prediction: "epsilon" or "v", with a warning if the checkpoint says otherwise; None = what it says, and
            "epsilon" for a single file that says nothing (v2.0 and v2.1 at 768 px need "v").
        vae: file or folder of an autoencoder to use in place of the base's own, such as sd-vae-ft-mse.
        vae_dtype: of the autoencoder; None = as ``dtype``.
    Returns: LatentDiffusion, frozen and in eval mode.
    Raises: FileNotFoundError; InputError (a ValueError) if a file is broken or holds another kind of model.
    """
    device = usable_device(device)
    dtype = usable_dtype(dtype, device)
    plan = checkpoint.inspect(find_base() if base is None else base, prediction)
    if vae is not None:
        checkpoint.replace_vae(plan, vae)
    networks = checkpoint.load_networks(plan, device, dtype, vae_dtype)
    model = LatentDiffusion(plan.config, **networks, files=plan).eval()
    for adapter in with_those_below([adapters] if isinstance(adapters, (str, Path)) else adapters):
        merge_file(model, *parse_adapter(adapter))
    return model


def with_those_below(adapters):
    """``adapters`` (as in `load`) and, before each, those that it was trained on top of and that are not among them.

    They are looked for where they were then, and are recognised by their SHA-256. One that is not found stays away;
    merging then warns. Returns: a list.
    """
    adapters = list(adapters)
    paths = [parse_adapter(adapter)[0] for adapter in adapters]
    below = [read_adapter(path).about.get("on_top_of") for path in paths]
    if not any(below):
        return adapters
    there, stack = {sha256(path) for path in paths}, []
    for adapter, entries in zip(adapters, below):
        for entry in entries or ():
            found = None if entry["adapter"] in there else _find_adapter(entry)
            if found is not None:
                there.add(entry["adapter"])
                stack.append(f"{found}{rank_flag(entry)}:{entry['multiplier']!r}")
        stack.append(adapter)
    return stack


def _find_adapter(entry):
    """The file of an entry of ``on_top_of``, or None: the path of that time, or the embedded adapter."""
    named = [Path(entry["path"])] if isinstance(entry.get("path"), str) else []
    found = (path for path in (*named, EMBEDDED_ADAPTER) if path.is_file() and sha256(path) == entry["adapter"])
    return next(found, None)


def usable_device(name):
    """The torch.device called ``name``; None = a GPU if there is one, else the CPU. Raises InputError if torch cannot
    compute on it here."""
    name = own_device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    try:
        torch.empty(1, device=name).item()  # .item() also rejects the meta device, which stores no values
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own message for a missing device
        reason = str(error).splitlines()[0].partition(". ")[0]
        reason = "torch knows no such device" if "device type at start" in reason else reason
        raise InputError(f"device {str(name)!r} cannot be used here ({reason}); --device cpu always can") from None


def usable_dtype(dtype, device):
    """The torch.dtype called ``dtype`` ("float16" or "torch.float16"), or ``dtype`` itself if it is one; None = float16
    on a GPU, float32 elsewhere. Raises InputError for what networks cannot compute in."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or named not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise InputError(f"dtype must be one of {names}, got {dtype!r}")
    return named


def parse_adapter(adapter):
    """Split "path@2:0.6" into (Path("path"), multiplier 0.6, rank 2).

    Without them the multiplier is 1 and the rank None (all rows). What exists as a file or folder is a path, whatever
    its name ends in. A folder stands for the adapter in it (`adapter_file`).

    Raises: InputError if what follows the path of a file that exists is no number.
    """
    path, multiplier, rank = str(adapter), 1.0, None
    if not os.path.exists(path) and ":" in path:
        before, _, number = path.rpartition(":")
        try:
            path, multiplier = before, float(number)
        except ValueError:  # the colon is part of the path, or a mistake
            if os.path.exists(before) or os.path.exists(before.rpartition("@")[0]):
                problem = f"expected a number after the colon, got {number!r:.40}"
                raise InputError(f"{adapter}: {problem}; write PATH:0.6") from None
        if not math.isfinite(multiplier) or abs(multiplier) > MOST:
            raise InputError(f"{adapter}: the multiplier must be within {MOST} of 0, got {number:.40}; write PATH:0.6")
    if not os.path.exists(path) and "@" in path:
        before, _, number = path.rpartition("@")
        if re.fullmatch(r"-?[0-9]{1,9}", number):
            path, rank = before, int(number)
        elif os.path.exists(before):
            raise InputError(f"{adapter}: expected a rank after the @, got {number!r:.40}; write PATH@2")
    return adapter_file(path), multiplier, rank


def whole_adapter(adapter):
    """The path of `parse_adapter`, for a tool that takes an adapter as it is. Raises: InputError for a multiplier or a
    rank, which would have no effect."""
    path, multiplier, rank = parse_adapter(adapter)
    if multiplier != 1 or rank is not None:
        raise InputError(f"{adapter}: the adapter is taken as it is, without a multiplier or rank; give {path}")
    return path


def weights_folders():
    """Where `find_base` looks, in order: the folder named by the environment variable MINILDM_WEIGHTS, weights/ in the
    current folder, weights/ of the repository, and the package, which holds the embedded model when installed."""
    folders = [Path.cwd() / "weights", WEIGHTS, PACKAGE]
    if named := os.environ.get("MINILDM_WEIGHTS"):
        if not Path(named).is_dir():
            raise FileNotFoundError(
                f"the environment variable MINILDM_WEIGHTS is {named!r}, which is not a folder; set it to the folder "
                "that holds your base model, or unset it"
            )
        folders.insert(0, Path(named).absolute())
    return list(dict.fromkeys(folders))


def folder_for_weights():
    """Where ``python -m minildm fetch`` puts weights: the first of `weights_folders` that exists and can be written to
    (the package apart), else weights/ in the current folder, which need not exist yet."""
    for folder in weights_folders():
        if folder != PACKAGE and folder.is_dir() and os.access(folder, os.W_OK):
            return folder
    return Path.cwd() / "weights"


def find_weights(name):
    """The path of the file or folder ``name`` in the first of `weights_folders` that holds it, else where
    ``python -m minildm fetch`` would put it."""
    found = (folder / name for folder in weights_folders() if (folder / name).exists())
    return next(found, folder_for_weights() / name)


def find_base(*folders):
    """The base model to use when none is named: that of the first folder that holds one.

    Within a folder, a published model takes precedence over the embedded one (its subfolder ``tiny``).

    Args: folders: where to look, in order; by default `weights_folders`.
    Raises: FileNotFoundError naming the folders searched; InputError if the first folder with a model has several.
    """
    folders = folders or weights_folders()
    for folder in folders:
        published = [
            path
            for path in sorted(folder.glob("*"))
            if path.name != "tiny"
            and not is_left_behind(path.name)
            and (path.suffix in (".safetensors", ".ckpt") or (path / "unet").is_dir())
        ]
        if len(published) > 1:
            raise InputError(
                f"several base models in {folder}: {', '.join(path.name for path in published)}; choose one with "
                "--base (or load(base))"
            )
        if published:
            return published[0]
        if (folder / "tiny" / "unet").is_dir():
            return folder / "tiny"
    raise FileNotFoundError(
        f"no base model in {', '.join(map(str, folders))}: get v1-5-pruned-emaonly.safetensors (4.3 GB) with "
        "python -m minildm fetch sd15, put another SD v1.x or v2.x file or diffusers-layout folder there, or name one "
        "with --base (or load(base))"
    )


def is_embedded(base=None):
    """Whether ``base`` (as in `load`) is the embedded model."""
    return (find_base() if base is None else Path(base)).resolve() == EMBEDDED.resolve()
