"""The diffusers layout: a folder with unet/, vae/, text_encoder/ and scheduler/.

Each network has a config.json (config_json.py) and one file of tensors, or several and an index. Tensors have our
parameter names, so they load without a table, with two exceptions: older files name the VAE's attention otherwise, and
newer tools drop the prefix ``text_model.``.

model_index.json and tokenizer/ are optional. They are checked for what would change the meaning: other classes, another
tokenizer, added tokens. safety_checker/ and feature_extractor/ are not opened.
"""

import json
import warnings
from pathlib import Path

import torch

from minildm.checkpoint.config_json import (
    schedule_from_json,
    schedule_to_json,
    text_encoder_from_json,
    text_encoder_to_json,
    unet_from_json,
    unet_to_json,
    vae_from_json,
    vae_to_json,
)
from minildm.checkpoint.document import brief
from minildm.checkpoint.statements import warn_of_added_tokens
from minildm.checkpoint.tensors import Source, TensorFile
from minildm.checkpoint.writing import module_tensors, write_tensors
from minildm.config import ModelConfig
from minildm.errors import InputError
from minildm.files import read_json, written_beside
from minildm.tokenizer import merges, vocabulary

NETWORKS = ("unet", "vae", "text_encoder")
CLASSES = {  # of model_index.json, whose values are [library, class]
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
WITHOUT_EFFECT = ("scheduler", "safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")


# --- reading ---------------------------------------------------------------------------------------------------------
def read_config(path):
    """The ModelConfig of the folder ``path``. Raises InputError or FileNotFoundError, naming the file."""
    if missing := [f"{name}/" for name in NETWORKS if not (path / name).is_dir()]:
        versions = sorted(path.glob("snapshots/*/unet"))
        raise InputError(
            f"{path} is not a diffusers-layout model: it has no {', '.join(missing)}; "
            "expected unet/, vae/, text_encoder/ and scheduler/"
            + (f"; it is a download cache: give {versions[-1].parent}" if versions else "")
        )
    _check_index(path)
    text_encoder = _read_settings(path / "text_encoder" / "config.json", text_encoder_from_json)
    warn_of_added_tokens(path, text_encoder, _added_tokens(path / "tokenizer"))
    return ModelConfig(
        unet=_read_settings(path / "unet" / "config.json", unet_from_json),
        vae=read_vae_config(path / "vae" / "config.json"),
        text_encoder=text_encoder,
        schedule=_read_settings(path / "scheduler" / "scheduler_config.json", schedule_from_json),
        pad_token_id=_pad_token_id(path / "tokenizer", text_encoder),
    )


def read_vae_config(path):
    """The VAEConfig of a config.json. Raises InputError or FileNotFoundError, naming the file."""
    return _read_settings(path, vae_from_json)


def _read_settings(path, from_json):
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; a diffusers-layout folder needs it")
    return from_json(read_json(path), str(path))


def find_tensors(path, networks):
    """Where the folder holds each parameter of ``networks``.

    Returns: ({network: {parameter: Source}}, tensors that are no parameter, the U-Net's files).
    """
    sources, unused, files = {}, [], {}
    for network, module in networks.items():
        files[network] = [TensorFile(file) for file in weights_files(path / network)]
        expected = module.state_dict()
        sources[network] = {}
        for file in files[network]:
            for name in file.shapes:
                parameter = current_name(name, network)
                if parameter in expected and parameter not in sources[network]:
                    sources[network][parameter] = Source(file, name)
                elif not name.endswith(("position_ids", "text_projection.weight")) or network != "text_encoder":
                    unused.append(f"{network}/{name}")
    return sources, unused, [file.path for file in files["unet"]]


def weights_files(folder):
    """The files that hold the tensors of the network in ``folder``: one, or those that an index lists."""
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    pickle_stem = "pytorch_model" if folder.name == "text_encoder" else stem
    kinds = [(stem, "safetensors"), (pickle_stem, "bin")]
    for stem, suffix in kinds:
        for name in (f"{stem}.{suffix}", f"{stem}.fp16.{suffix}"):
            if (folder / name).is_file():
                return [folder / name]
        for pattern in (f"{stem}.{suffix}.index.json", f"{stem}.*index*.json"):
            if indexes := sorted(folder.glob(pattern)):
                return _shards(indexes[0])
    others = [file for stem, suffix in kinds for file in sorted(folder.glob(f"{stem}.*.{suffix}"))]
    if len(others) == 1:  # another variant, such as .bf16. or .non_ema.
        return others
    expected = ", ".join(f"{stem}.{suffix}, {stem}.fp16.{suffix}" for stem, suffix in kinds)
    found = f"; found {', '.join(file.name for file in others[:3])}: rename the one to use" if others else ""
    raise FileNotFoundError(f"no weights in {folder}; expected one of {expected}{found}")


def weights_file(folder):
    """The one file of `weights_files`. Raises InputError if there are several."""
    first, *more = weights_files(folder)
    if more:
        raise InputError(f"{folder} holds its tensors in {1 + len(more)} files, expected one; merge them first")
    return first


def _shards(index):
    """The files that an index lists. They must lie beside it."""
    names = read_json(index).get("weight_map")
    names = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index} has no weight_map from tensors to files beside it; get it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index} lists {len(names)} files, of which {len(missing)} are missing: {', '.join(missing[:3])}; get them"
        )
    return [index.parent / name for name in names]


def current_name(name, network):
    """The present name of a tensor in a file of any age."""
    if network == "text_encoder" and not name.startswith("text_model."):
        return f"text_model.{name}"
    if network == "vae":
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    return name


# --- what else changes the meaning -----------------------------------------------------------------------------------
def _check_index(path):
    """Refuse a model_index.json that names other networks; warn of parts that are left out."""
    if not (path / "model_index.json").exists():
        return
    index, left_out = read_json(path / "model_index.json"), []
    for part, value in index.items():
        name = value[1] if isinstance(value, list) and len(value) == 2 else None
        if part[:1] == "_" or part in WITHOUT_EFFECT or name is None:
            continue
        if part not in CLASSES:
            left_out.append(part)
        elif name not in CLASSES[part]:
            raise InputError(
                f"{path / 'model_index.json'}: {part} is a {brief(name)}, expected {' or '.join(CLASSES[part])}; it "
                "is not a Stable Diffusion v1.x / v2.x model"
            )
    pipeline = index.get("_class_name", "StableDiffusionPipeline")
    if left_out or not str(pipeline).startswith("StableDiffusion"):
        left_out = f", whose parts {', '.join(left_out)} are left out" if left_out else ""
        warnings.warn(
            f"{path} was made for {pipeline}{left_out}; minildm samples as StableDiffusionPipeline does", stacklevel=4
        )


def _added_tokens(folder):
    """The tokens that were added to the tokenizer in ``folder``, a set.

    Raises InputError for a tokenizer that splits words or numbers tokens otherwise than CLIP's.
    """
    added = set()
    if (file := folder / "tokenizer.json").exists():
        document = read_json(file)
        model = document["model"] if isinstance(document.get("model"), dict) else {}
        _require_clips_merges(file, model.get("merges"))
        added |= _beyond_clips(file, model.get("vocab")) | _contents(document.get("added_tokens"))
    if (file := folder / "merges.txt").exists():
        lines = _read_lines(file)
        _require_clips_merges(file, lines[1:] if lines and lines[0].startswith("#version") else lines)
    if (file := folder / "vocab.json").exists():
        added |= _beyond_clips(file, read_json(file))
    if (file := folder / "added_tokens.json").exists():
        added |= set(read_json(file))
    if (file := folder / "tokenizer_config.json").exists():
        about = read_json(file)
        name = about.get("tokenizer_class", "CLIPTokenizer")
        if name not in (*CLASSES["tokenizer"], None):
            raise InputError(
                f"{file}: the tokenizer is {brief(name)}, expected one of {', '.join(CLASSES['tokenizer'])}"
            )
        entries = about.get("added_tokens_decoder")
        added |= _contents(list(entries.values()) if isinstance(entries, dict) else None)
    return added - vocabulary().keys()


def _contents(entries):
    """The tokens of a list of {"content": token, ...}, a set."""
    entries = entries if isinstance(entries, list) else []
    return {str(entry.get("content")) for entry in entries if isinstance(entry, dict)}


def _beyond_clips(file, found):
    """The tokens of a vocabulary {token: id} beyond CLIP's, a set. Raises InputError unless it has all of CLIP's."""
    if not isinstance(found, dict) or any(found.get(token) != i for token, i in vocabulary().items()):
        raise InputError(f"{file} is not CLIP's vocabulary, the only one minildm has; get the model's v1 or v2 form")
    return found.keys() - vocabulary().keys()


def _require_clips_merges(file, found):
    """Raise InputError unless ``found``, "a b" or ["a", "b"] each, are the merges of CLIP's byte-pair encoding."""
    found = found if isinstance(found, list) else []
    found = [" ".join(map(str, merge)) if isinstance(merge, list) else str(merge) for merge in found]
    if [merge for merge in found if merge] != merges():
        raise InputError(
            f"{file} splits words otherwise than CLIP's tokenizer, the only one minildm has; its prompts would become "
            "other tokens"
        )


def _read_lines(file):
    try:
        return file.read_text(encoding="utf-8").split("\n") if file.stat().st_size < 1 << 24 else []
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); get it again") from None


def _pad_token_id(folder, text_encoder):
    """SD 1.x pads with end-of-text, SD 2.x with "!", whose id is 0. Where no file says it, the activation does."""
    known = {"<|endoftext|>": 49407, "!": 0}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file := folder / name).is_file():
            default = "<|endoftext|>" if name == "special_tokens_map.json" else None
            token = read_json(file).get("pad_token", default)
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                continue
            if not isinstance(token, str) or token not in known:
                raise InputError(f"{file}: pad_token is {brief(token)}, expected one of {', '.join(map(repr, known))}")
            return known[token]
    return 49407 if text_encoder.activation == "quick_gelu" else 0


# --- writing ---------------------------------------------------------------------------------------------------------
def save_folder(networks, config, path, dtype=torch.float16):
    """Write a diffusers-layout folder: networks {"unet": module, ...} and their ModelConfig, tensors as ``dtype``.

    The tokenizer's vocabulary is not written: all models share CLIP's. Raises InputError if an adapter is live.
    """
    if any("lora_" in name for module in networks.values() for name, _ in module.named_parameters()):
        raise InputError("the model has a live adapter; merge_adapter(model) before saving it as a base")
    write_folder({name: module_tensors(module, dtype) for name, module in networks.items()}, config, path)


def write_folder(tensors, config, path):
    """Write a diffusers-layout folder from {network: {parameter: LazyTensor}} and a ModelConfig."""
    path = Path(path)
    to_json = {"unet": unet_to_json, "vae": vae_to_json, "text_encoder": text_encoder_to_json}
    documents = {
        "scheduler/scheduler_config.json": schedule_to_json(config.schedule),
        "tokenizer/special_tokens_map.json": {"pad_token": "!" if config.pad_token_id == 0 else "<|endoftext|>"},
    }
    for network in tensors:
        documents[f"{network}/config.json"] = to_json[network](getattr(config, network))
        name = "model.safetensors" if network == "text_encoder" else "diffusion_pytorch_model.safetensors"
        (path / network).mkdir(parents=True, exist_ok=True)
        write_tensors(tensors[network], path / network / name)
    for name, document in documents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path / name) as beside:
            beside.write_text(json.dumps(document, indent=2) + "\n")
