"""Which model, on which device, in which precision: find the base, load it, merge adapters into it."""

from pathlib import Path

import torch

from minildm import checkpoint
from minildm.adapters.files import merge_file
from minildm.errors import InputError
from minildm.latent_diffusion import LatentDiffusion

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
EMBEDDED = WEIGHTS / "tiny"  # the teaching model that every clone carries ...
EMBEDDED_ADAPTER = EMBEDDED / "adapter.safetensors"  # ... and a SeLoRA adapter of it for chest radiographs


def load(base=None, adapters=(), device=None, dtype=None, prediction=None):
    """Load a Stable Diffusion v1.x / v2.x model.

    Args:
        base: a single .safetensors (or .ckpt) file or a diffusers-layout folder; None = the one model in weights/.
        adapters: files to merge, in order: "adapter.safetensors", or "adapter.safetensors:0.6" for 0.6 of its effect.
        device: "cpu", "cuda", ...; None = a GPU where there is one.
        dtype: of the networks; None = float16 on a GPU, float32 elsewhere.
        prediction: "epsilon" or "v"; None = what a folder's scheduler says, "epsilon" for a single file, which cannot
            say (v2.0 / v2.1 at 768 px need "v").
    Returns: LatentDiffusion, frozen and in eval mode.
    Raises: FileNotFoundError; InputError (a ValueError) for broken files and other models, naming the tensors.
    """
    device = usable_device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    plan = checkpoint.inspect(find_base() if base is None else base, prediction)
    model = LatentDiffusion(plan.config, **checkpoint.load_networks(plan, device, dtype), files=plan).eval()
    for adapter in [adapters] if isinstance(adapters, (str, Path)) else adapters:
        merge_file(model, *split_multiplier(adapter))
    return model


def usable_device(name):
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        torch.empty(1, device=name).item()  # the meta device has no values
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own words for a device it lacks
        raise InputError(
            f"device {str(name)!r} cannot be used here ({str(error).splitlines()[0]}); --device cpu always can"
        ) from None


def split_multiplier(adapter):
    """ "path:0.6" -> ("path", 0.6); "path" -> ("path", 1.0). A folder means the adapter.safetensors in it."""
    path, colon, number = str(adapter).rpartition(":")
    try:
        path, multiplier = (path, float(number)) if colon else (number, 1.0)
    except ValueError:  # the colon belongs to the path
        path, multiplier = str(adapter), 1.0
    return (Path(path) / "adapter.safetensors" if Path(path).is_dir() else Path(path)), multiplier


def find_base(folder=WEIGHTS):
    """The base model in weights/: the one published model there, else the embedded weights/tiny.

    Raises FileNotFoundError saying which file to put where; InputError if there are several to choose from.
    """
    found = [
        path
        for path in sorted(folder.glob("*"))
        if path.name != "tiny" and (path.suffix in (".safetensors", ".ckpt") or (path / "unet").is_dir())
    ]
    if len(found) > 1:
        raise InputError(
            f"several base models in {folder}: {', '.join(path.name for path in found)}; choose one with "
            "--base (or load(base))"
        )
    if found:
        return found[0]
    if (folder / "tiny" / "unet").is_dir():
        return folder / "tiny"
    raise FileNotFoundError(
        f"no base model in {folder}: put v1-5-pruned-emaonly.safetensors (4.3 GB, "
        "stable-diffusion-v1-5/stable-diffusion-v1-5 on Hugging Face), another SD v1.x / v2.x file "
        "or a diffusers-layout folder there, or name one with --base (or load(base))"
    )


def is_embedded(base=None):
    """Whether ``base`` (as in `load`) is the teaching model in weights/tiny."""
    return (find_base() if base is None else Path(base)).resolve() == EMBEDDED.resolve()
