"""``python -m minildm info``: what a file or folder holds, from headers alone: no weight is read.

A checkpoint (which Stable Diffusion, or which other model), an autoencoder or an adapter. A report is a dict that JSON
can hold (--json). Of metadata only keys that are known to be technical are shown with their values: others, such as
kohya's ``ss_tag_frequency``, may hold captions, which may be patient text, so only their names are shown.
"""

import json
import re
import warnings
from collections import Counter
from pathlib import Path

from minildm import checkpoint
from minildm.adapters.reading import adapter_file
from minildm.checkpoint import TensorFile, autoencoder
from minildm.checkpoint.load import require_match
from minildm.checkpoint.recognise import UNKNOWN, other_model
from minildm.checkpoint.statements import prediction_statements, stated_pixels
from minildm.config import UNetConfig
from minildm.errors import InputError, one_line
from minildm.files import parse_json, read_json
from minildm.settings import Parser
from minildm.tools.adapter_info import count_parameters, describe_adapter, is_adapter

TECHNICAL = re.compile(
    r"format|minildm_origin|sshs_(model|legacy)_hash"
    r"|modelspec\.(sai_model_spec|architecture|implementation|title|date|author|license|resolution|prediction_type"
    r"|predict_key|merged_from|timestep_range|encoder_layer|hash_\w+|(unet|vae)_dtype)"
    r"|ss_(network_\w+|base_model_version|(new_)?sd_(model|vae)_(hash|name)|(new_)?vae_(hash|name)|v2|v_parameterization"
    r"|zero_terminal_snr|(unet_|text_encoder_)?lr|learning_rate|num_epochs|epoch|steps|max_train_steps|lr_\w+|optimizer"
    r"|mixed_precision|full_fp16|full_bf16|seed|clip_skip|max_token_length|resolution|total_batch_size"
    r"|(num_)?batch\w*|gradient_\w+|noise_offset\w*|multires_noise_\w+|min_snr_gamma|caption_dropout_rate"
    r"|prior_loss_weight|max_grad_norm|scale_weight_norms|num_(train|reg)_images|cache_latents|lowram|sd_scripts_commit_hash"
    r"|session_id|training_(started|finished)_at|minimum_keys|huber_\w+|loss_type|debiased_estimation)"
)
RANK = re.compile(r"(unet|text_encoder):\d+:rank")  # cloneofsimo's: the tensors show it
LONGEST = 120  # characters of a value that are shown


def inspect(path):
    """The report on ``path``, a dict.

    Raises: FileNotFoundError; InputError for what is no checkpoint, autoencoder or adapter, saying what it is.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}; give a checkpoint, an autoencoder or an adapter")
    if path.is_dir():
        return _folder(path)
    file = TensorFile(path)
    if is_adapter(file):
        return describe_adapter(file) | {"metadata": shown_metadata(file.metadata)}
    if any(name.endswith("decoder.conv_in.weight") for name in file.shapes) and not _has(file, ".input_blocks."):
        return _autoencoder(path)
    try:
        return _checkpoint(path)
    except InputError as error:
        other = other_model(file)
        if other is not None and other.kind == UNKNOWN:
            raise
        return _other(file, other) | {"problem": str(error)}


def _folder(path):
    if not (path / "unet").is_dir():
        if (path / "model" / "unet").is_dir():  # a run of full fine-tuning
            return _checkpoint(path / "model")
        if adapter_file(path).is_file():  # a run, PEFT's folder, diffusers'
            return inspect(adapter_file(path))
        if (path / "config.json").is_file():
            return _autoencoder(path)
    try:
        return _checkpoint(path)
    except InputError as error:
        pipeline = _pipeline_class(path / "model_index.json")
        if pipeline in (None, "StableDiffusionPipeline"):
            raise
        facts = {"kind": "checkpoint", "supported": False, "architecture": str(pipeline), "problem": str(error)}
        return {"path": str(path), **facts}


def _pipeline_class(index):
    """The class that a model_index.json names; None if there is no such file, or it names none."""
    try:
        return read_json(index).get("_class_name")
    except (OSError, InputError):
        return None


# --- checkpoints -----------------------------------------------------------------------------------------------------
def _checkpoint(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is assumed is part of the report
        plan = checkpoint.inspect(path)
    config, v2 = plan.config, plan.config.unet.linear_projection
    of_sd = config.unet.widths == UNetConfig.widths
    file = next(iter(plan.sources["unet"].values())).file
    report = {
        "path": str(path),
        "kind": "checkpoint",
        "supported": True,
        "architecture": ("" if of_sd else "small model in the layout of ") + f"Stable Diffusion v{2 if v2 else 1}.x",
        "layout": "diffusers folder" if path.is_dir() else "single file",
        "networks": {network: _size(sources.values()) for network, sources in plan.sources.items()},
        "prediction": config.schedule.prediction,
        "prediction_from": _prediction_source(path, file, v2),
        "image_size": config.image_size,
        "image_size_from": _image_size_source(path, file),
        "scaling_factor": config.vae.scaling_factor,
        "ema_tensors": 0 if path.is_dir() else sum(name.startswith("model_ema.") for name in file.shapes),
        "bytes": sum(path.stat().st_size for path in {source.file.path for source in _sources(plan)}),
        "metadata": shown_metadata(file.metadata),
    }
    try:
        require_match(plan, {network: module.state_dict() for network, module in plan.networks.items()})
    except InputError as error:
        report |= {"supported": False, "problem": str(error)}
    return report


def _sources(plan):
    return [source for sources in plan.sources.values() for source in sources.values()]


def _prediction_source(path, file, v2):
    if path.is_dir():
        return "scheduler/scheduler_config.json"
    if stated := prediction_statements(file):
        return " and ".join(stated)
    return "assumed; the file does not say, and v2.x models for 768 px predict v" if v2 else "assumed, as for all v1.x"


def _image_size_source(path, file):
    if path.is_dir():
        return "unet/config.json"
    return "modelspec.resolution" if stated_pixels(file) else "assumed from architecture and prediction"


def _autoencoder(path):
    found = autoencoder.inspect(path)
    return {
        "path": str(path),
        "kind": "autoencoder",
        "supported": True,
        "architecture": "Stable Diffusion's autoencoder"
        + ("" if found.config.widths == autoencoder.VAEConfig.widths else ", of other sizes"),
        "networks": {"vae": _size(found.sources["vae"].values())},
        "scaling_factor": found.config.scaling_factor,
        "scaling_factor_from": "config.json" if found.stated else "assumed; the file does not say",
        "bytes": found.file.path.stat().st_size,
        "metadata": shown_metadata(found.file.metadata),
    }


def _other(file, other):
    """The report on a model that minildm does not run: an Other, or None for a Stable Diffusion of another form."""
    first = file.shapes.get("model.diffusion_model.input_blocks.0.0.weight", (0, 4))
    channels = f", {first[1]} input channels" if len(first) > 1 and first[1] != 4 else ""
    return {
        "path": str(file.path),
        "kind": "checkpoint",
        "supported": False,
        "architecture": ("a changed Stable Diffusion in the single-file layout" if other is None else other.kind)
        + channels,
        "networks": {"all": count_parameters(file, file.shapes)},
        "bytes": file.path.stat().st_size,
        "metadata": shown_metadata(file.metadata),
    }


def _has(file, part):
    return any(part in name for name in file.shapes)


def _size(sources):
    """Parameters of a network and their precision; of a fused tensor's thirds, one counts."""
    names = {source.name: source.file for source in sources if source.name in source.file.shapes}
    precision = Counter()
    for name, file in names.items():
        precision.update(count_parameters(file, [name])["precision"])
    return {"parameters": sum(precision.values()), "precision": dict(precision)}


# --- metadata --------------------------------------------------------------------------------------------------------
def shown_metadata(metadata):
    """{key: text} without what may hold captions: those values are withheld, their keys listed under "withheld"."""
    shown = {key: _shortened(metadata[key]) for key in sorted(metadata) if TECHNICAL.fullmatch(key)}
    if "minildm" in metadata:
        shown["minildm"] = _own_metadata(metadata["minildm"])
    withheld = sorted(key for key in metadata if key not in shown and not RANK.fullmatch(key))
    return shown | ({"withheld": withheld} if withheld else {})


def _own_metadata(text):
    """The metadata that minildm writes, without the ranks of all layers; as text if it is damaged."""
    try:
        document = parse_json(text, "its metadata")
    except InputError:
        return _shortened(text)
    return {key: value for key, value in document.items() if key != "ranks"}


def _shortened(text):
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


# --- text ------------------------------------------------------------------------------------------------------------
def as_text(report):
    """The report as lines to print."""
    what = [report["kind"], report["architecture"], report.get("layout")]
    what.append(f"{report['bytes'] / 1e6:,.1f} MB" if "bytes" in report else None)
    lines = [f"{report['path']}: {', '.join(part for part in what if part)}"]
    if not report["supported"]:
        lines.append(f"not usable with minildm: {report.get('problem', 'not an adapter that it can load')}")
    lines += [f"{name}: {_size_text(size)}" for name, size in report.get("networks", {}).items()]
    if "prediction" in report:
        lines.append(f"prediction: {report['prediction']} ({report['prediction_from']})")
        lines.append(f"image size: {report['image_size']} px ({report['image_size_from']})")
    if "scaling_factor" in report:
        lines.append(f"VAE scaling factor: {report['scaling_factor']}")
    if report.get("ema_tensors"):
        lines.append(f"moving average: {report['ema_tensors']} tensors, which minildm does not use")
    lines += _adapter_text(report) if report["kind"] == "adapter" else []
    metadata = dict(report.get("metadata", {}))
    withheld = metadata.pop("withheld", [])
    metadata.pop("format", None)  # "pt" in every file
    for key, value in metadata.items():
        lines.append(f"metadata {key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    if withheld:
        lines.append(f"metadata whose values are not shown, as they may hold captions: {_list(withheld)}")
    return lines


def _adapter_text(report):
    scales, alphas = ", ".join(report["scale"]), ", ".join(report["alpha"])
    lines = [f"scale {scales} (alpha {alphas}): {report['scale_from']}"] if report["supported"] else []
    if report["other_tensors"]:
        lines.append(f"tensors that belong to no layer: {_list(report['other_tensors'])}")
    return lines


def _list(names, most=8):
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _size_text(size):
    total, precision = size["parameters"], sorted(size["precision"].items(), key=lambda item: -item[1])
    parts = [f"{total:,} parameters"]
    parts += [dtype if len(precision) == 1 else f"{dtype} {100 * n / total:.2g} %" for dtype, n in precision]
    if "layers" in size:
        parts.insert(0, f"{size['layers']} layer{'s' * (size['layers'] != 1)}")
    if ranks := list(size.get("ranks", [])):
        parts.append(f"rank {ranks[0]}" + (f" to {ranks[-1]}, mean {size['rank_mean']:.2f}" if len(ranks) > 1 else ""))
    return ", ".join(parts)


def main(arguments):
    parser = Parser(prog="python -m minildm info", description="Show what a model or adapter file holds.")
    parser.add_argument("path", metavar="PATH", help="checkpoint, autoencoder or adapter; a file, a folder or a run")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(arguments)
    report = inspect(args.path)
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else "\n".join(map(one_line, as_text(report))))
    return 0
