"""Reading an adapter file of any dialect: its tensors, checked, and each layer's scale.

The dialect is told from what is in the file, never from its name. Nothing is guessed: each tensor must be known, each
layer needs both factors, all numbers must be finite. An adapter without any alpha has alpha = rank, so dW = B A, as
diffusers and kohya's readers take it, too. Whether it fits a model is checked when it is merged (files.py).
"""

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from minildm.adapters.formats import CLONEOFSIMO, NATIVE, PEFT, TEXT_LAYERS, other_kind, read_name
from minildm.checkpoint import TensorFile
from minildm.errors import InputError

FORMAT = 1  # of native files
ORIGIN = "minildm_origin"  # metadata of what minildm writes in other dialects: kind, base, on_top_of
IN_FOLDERS = (  # what a folder's adapter may be called: ours, PEFT's, diffusers'
    "adapter.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOADABLE = "LoRA for Stable Diffusion v1.x and v2.x"
FAMILIES = {768: "Stable Diffusion v1.x", 1024: "Stable Diffusion v2.x", 2048: "SDXL"}  # by the width of the context


class Factors(NamedTuple):
    """A layer's change of the weights, dW = scale B A."""

    A: torch.Tensor  # (rank, in), or a convolution's (rank, in, kh, kw)
    B: torch.Tensor  # (out, rank), or (out, rank, 1, 1)
    scale: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds."""

    path: Path
    dialect: str  # whose names it has
    kind: str  # the method that trained it
    factors: dict[str, Factors]  # by module path
    about: dict  # what else the file says about itself


def adapter_file(path):
    """The adapter's file where ``path`` is a folder: a run, PEFT's or diffusers'; else ``path``."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in IN_FOLDERS if (path / name).is_file()), path / IN_FOLDERS[0])


def read_adapter(path):
    """The Adapter in a file, or in a folder (see `adapter_file`). Factors have the file's own precision.

    Raises: FileNotFoundError; InputError for what is no whole adapter that minildm can load, saying what it is.
    """
    path = adapter_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such adapter: {path}; give PATH[@RANK][:MULTIPLIER] of a file or a run folder")
    file = TensorFile(path)
    if "minildm" in file.metadata:
        return _read_native(file, path)
    if kind := other_kind(file.shapes):
        raise InputError(f"{path} holds {kind}; minildm loads {LOADABLE}")
    names = {name: read_name(name) for name in file.shapes}
    _check_names(names, path)
    (dialect,) = {name.dialect for name in names.values() if name}
    if dialect == NATIVE:
        raise InputError(f"{path} has names of minildm's format, but not its metadata, so its scale is unknown; "
                         "take the file as train.py wrote it")  # fmt: skip
    if dialect == CLONEOFSIMO:
        names = _check_counted(file, names, path)
    pairs, alphas = _read_tensors(file, names, path)
    factors = _scaled(pairs, alphas, _stated_config(file, dialect), path)
    if (width := context_width(factors)) == 2048:
        raise InputError(f"{path} holds an adapter for {FAMILIES[width]}; minildm loads {LOADABLE}")
    about = _json_object(file.metadata.get(ORIGIN), f"{path}: metadata {ORIGIN}") or {}
    return Adapter(path, dialect, str(about.get("kind", "lora")), factors, _checked_about(about, path))


def context_width(factors):
    """The width of the text features that an adapter was trained for, 768 or 1024 for Stable Diffusion; None if it
    changes no layer that shows it."""
    for path, (A, _, _) in factors.items():
        if (path.startswith(TEXT_LAYERS) and "fc2" not in path) or re.search(r"attn2\.to_[kv]$", path):
            return A.shape[1]
    return None


# --- names and tensors -----------------------------------------------------------------------------------------------
def _check_names(names, path):
    known = {name: entry for name, entry in names.items() if entry}
    unknown = [name for name, entry in names.items() if not entry and not _is_token(name)]
    if not known:
        shown = ", ".join(sorted(names)[:2])
        raise InputError(f"{path} is not an adapter in minildm's format or another that it knows; its tensors: "
                         f"{shown or 'none'}{', ...' if len(names) > 2 else ''}")  # fmt: skip
    if unknown:
        raise InputError(
            f"{path}: tensor {unknown[0]} belongs to no layer of {LOADABLE.removeprefix('LoRA for ')}"
            f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}; the file is damaged or for another model"
        )
    if len(dialects := sorted({entry.dialect for entry in known.values()})) > 1:
        raise InputError(f"{path} mixes the names of {' and '.join(dialects)}; convert its parts alone")
    seen = {}
    for name, entry in known.items():
        if (first := seen.setdefault((entry.path, entry.part), name)) != name:
            raise InputError(f"{path}: tensors {first} and {name} are for the same layer; keep one of them")


def _is_token(name):
    return re.fullmatch(r"<[^<>]+>", name) is not None


def _check_counted(file, names, path):
    """cloneofsimo's names without its textual-inversion vectors; refuse layers that were counted in another way."""
    expected = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
    for network, classes in expected.items():
        stated = _json(file.metadata.get(network), f"{path}: metadata {network}")
        if stated is not None and (not isinstance(stated, list) or {str(name) for name in stated} != classes):
            raise InputError(f"{path} numbers the layers of {stated!r:.80}, expected those of {sorted(classes)}: which "
                             "layers are meant cannot be told")  # fmt: skip
    for name, entry in names.items():
        rank = file.metadata.get(f"{name.rpartition(':')[0]}:rank")
        if entry and rank is not None and (not file.shapes[name] or rank != str(min(file.shapes[name]))):
            raise InputError(f"{path}: {name} has shape {file.shapes[name]}, but the metadata say rank {rank:.20}")
    tokens = sorted(name for name in names if _is_token(name))
    if tokens:
        warnings.warn(f"{path} also holds {len(tokens)} textual-inversion vectors, which are not used: the words "
                      f"{', '.join(tokens)} in a prompt have no special meaning", stacklevel=4)  # fmt: skip
    elif any(entry is None for entry in names.values()):
        raise InputError(f"{path}: a textual-inversion vector without a name")
    return {name: entry for name, entry in names.items() if entry}


def _read_tensors(file, names, path):
    """{module path: (A, B)} and {module path: alpha} of a file's tensors, all checked."""
    found = {}
    for name, tensor in file.tensors(names):
        entry = names[name]
        if tensor.dtype not in FLOATS:
            raise InputError(f"{path}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, expected float32"
                             ", float16 or bfloat16")  # fmt: skip
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinite numbers; the training that made it had failed")
        found.setdefault(entry.path, {})[entry.part] = (name, tensor.clone())
    pairs, alphas = {}, {}
    for layer in sorted(found):
        parts = found[layer]
        if missing := [part for part in "AB" if part not in parts]:
            other = next(name for name, _ in parts.values())
            raise InputError(f"{path}: {other} has no partner (factor {missing[0]} is missing); the file is incomplete")
        (name_a, A), (name_b, B) = parts["A"], parts["B"]
        _check_pair(name_a, A, name_b, B, path)
        pairs[layer] = (A, B)
        if "alpha" in parts:
            name, alpha = parts["alpha"]
            if alpha.numel() != 1 or alpha.item() <= 0:
                shown = f"{alpha.item():g}" if alpha.numel() == 1 else f"of shape {tuple(alpha.shape)}"
                raise InputError(f"{path}: {name} must be one positive number, got {shown}")
            alphas[layer] = alpha.item()
    return pairs, alphas


def _check_pair(name_a, A, name_b, B, path):
    """Refuse shapes that no product can have."""
    whole = A.dim() in (2, 4) and B.dim() in (2, 4) and A.shape[0] == B.shape[1] and B.shape[2:] in ((), (1, 1))
    if not whole:
        raise InputError(f"{path}: {name_a} has shape {tuple(A.shape)} and {name_b} {tuple(B.shape)}; expected (rank, "
                         "in) and (out, rank), or (rank, in, kh, kw) and (out, rank, 1, 1)")  # fmt: skip


# --- scales ----------------------------------------------------------------------------------------------------------
def _scaled(pairs, alphas, config, path):
    """{module path: Factors} from factors, alpha tensors and what the metadata say."""
    factors = {}
    for layer, (A, B) in pairs.items():
        rank = len(A)
        stated = _stated_alpha(layer, rank, config, path)
        if layer in alphas and stated is not None and not math.isclose(stated, alphas[layer], rel_tol=1e-3):
            raise InputError(f"{path}: {layer} has an alpha of {alphas[layer]:g}, but the metadata say {stated:g}")
        alpha = alphas.get(layer, rank if stated is None else stated)
        factors[layer] = Factors(A, B, alpha / rank if rank else 1.0)
    return factors


def _stated_alpha(layer, rank, config, path):
    """alpha of a layer by its network's LoraConfig, as a share of rank as everywhere else (rsLoRA divides by the
    square root); None if nothing is stated."""
    network, _, inside = layer.partition(".")
    config = config.get(network)
    if not config:
        return None
    stated_rank = _pattern(config.get("rank_pattern"), inside, "rank_pattern", path, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), inside, "alpha_pattern", path, config.get("lora_alpha"))
    if stated_rank is not None and stated_rank != rank:
        raise InputError(f"{path}: {layer} has rank {rank}, but its configuration says {stated_rank!r:.40}")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise InputError(f"{path}: lora_alpha of {layer} must be a positive number, got {alpha!r:.40}")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _pattern(patterns, layer, key, path, default):
    """The value of the first pattern that fits a layer, as PEFT matches them: the layer's whole name, or its end."""
    if patterns is None:
        return default
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {key} must be an object of layers, got {patterns!r:.40}")
    names = (layer, layer.removeprefix("text_model."))  # transformers 5 has no such prefix
    for pattern, value in patterns.items():
        plain = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise InputError(f"{path}: {key} has the regular expression {pattern!r:.60}; minildm reads layers' names")
        if any(name == plain or (pattern[0] != "^" and name.endswith(f".{plain}")) for name in names):
            return value
    return default


def _stated_config(file, dialect):
    """{network: PEFT's LoraConfig as a dict} from diffusers' metadata or the adapter_config.json beside the file."""
    what = f"{file.path}: metadata lora_adapter_metadata"
    config = _json_object(file.metadata.get("lora_adapter_metadata"), what)
    if config is None and dialect == PEFT:
        beside = file.path.parent / "adapter_config.json"
        if not beside.is_file():
            warnings.warn(f"{file.path} does not state its alpha, and there is no adapter_config.json beside it; "
                          "assuming alpha = rank, a scale of 1", stacklevel=4)  # fmt: skip
            return {}
        what = str(beside)
        config = _json_object(beside.read_text(encoding="utf-8", errors="replace"), what)
    if config is None:
        return {}
    prefixed = {
        network: {
            key.removeprefix(f"{network}."): value for key, value in config.items() if key.startswith(f"{network}.")
        }
        for network in ("unet", "text_encoder")
    }
    configs = prefixed if any(prefixed.values()) else {"unet": config, "text_encoder": config}
    for settings in configs.values():
        if settings.get("peft_type") not in (None, "LORA"):
            raise InputError(f"{what} is for {settings['peft_type']!r:.40}; minildm loads {LOADABLE}")
        if settings.get("use_dora"):
            raise InputError(f"{what} is for a DoRA adapter; minildm loads {LOADABLE}")
    return configs


# --- minildm's own format --------------------------------------------------------------------------------------------
def _read_native(file, path):
    about = _json_object(file.metadata["minildm"], f"{path}: metadata minildm")
    if about is None or "scale" not in about:  # a checkpoint, too: not read for that
        raise InputError(f"{path} is not an adapter in minildm's format (no scale in its metadata); its tensors: "
                         f"{', '.join(sorted(file.shapes)[:2])}, ...")  # fmt: skip
    scale = about["scale"]
    if about.get("format") != FORMAT or isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InputError(
            f"{path}: format {about.get('format')!r:.40} with scale {scale!r:.40}, expected format "
            f"{FORMAT} and a number; it was written by another version of minildm"
        )
    if not 0 < scale < math.inf:
        raise InputError(f"{path}: the scale must be a positive number, got {scale}")
    names = {name: read_name(name) for name in file.shapes}
    if odd := [name for name, entry in names.items() if entry is None or entry.dialect != NATIVE]:
        raise InputError(f"{path}: tensor {odd[0]} is not of an adapter")
    if not names:
        raise InputError(f"{path} holds no tensors; the training that made it had failed")
    pairs, _ = _read_tensors(file, names, path)
    factors = {layer: Factors(A, B, scale) for layer, (A, B) in pairs.items()}
    return Adapter(path, NATIVE, str(about.get("kind")), factors, _checked_about(about, path))


def _checked_about(about, path):
    """What a file says about its base and the adapters below it, in the form that `merge_file` reads."""
    below, base = about.get("on_top_of") or [], about.get("base")
    whole = isinstance(below, list) and all(
        isinstance(one, dict) and isinstance(one.get("adapter"), str) for one in below
    )
    if not whole or not (base is None or isinstance(base, str)):
        raise InputError(
            f"{path}: its metadata about the base are damaged (base {base!r:.40}, on_top_of {below!r:.40})"
        )
    return about | {"on_top_of": below}


# --- JSON ------------------------------------------------------------------------------------------------------------
def _json(text, what):
    try:
        return json.loads("null" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is no JSON ({type(error).__name__}); the file is damaged") from None


def _json_object(text, what):
    document = _json(text, what)
    if text is not None and not isinstance(document, dict):
        raise InputError(f"{what} must be a JSON object, got {type(document).__name__}; the file is damaged")
    return document
