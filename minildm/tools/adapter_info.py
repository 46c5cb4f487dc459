"""The part of ``python -m minildm info`` that describes adapters of every tool, also those minildm cannot load.

Everything is read off names and shapes; of the tensors only kohya's ``alpha`` scalars are read. A report names the
dialect (who writes such names), the kind (LoRA, LoHa, ...), the family of bases it is for, and each network's layers
and ranks.
"""

import math
import re
from collections import Counter

from minildm.errors import InputError
from minildm.files import parse_json

FACTOR = re.compile(
    r"(?P<module>.+?)(?:"
    r"[._]lora_(?P<kohya>down|up|mid)\.weight|[._]lora\.(?P<older>down|up)\.weight|\.lora_linear_layer\.(?P<linear>down|up)\.weight"
    r"|\.lora_(?P<letter>[ABE])(?:\.\w+)?(?:\.weight)?|:(?P<simo>down|up)"
    r"|\.(?P<other>hada_w[12]_[ab]|hada_t[12]|lokr_\w+|oft_\w+|glora_\w+|dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)"
    r"|\.(?P<alpha>(?:network_|lora_)?alpha))"
)
KINDS = {"hada": "LoHa", "lokr": "LoKr", "oft": "OFT", "glora": "GLoRA", "dora": "DoRA", "lora_magnitude": "DoRA"}
TRANSFORMER = ("transformer_blocks_", "double_blocks", "single_blocks", "joint_blocks")  # how its layers begin
FAMILIES = {768: "Stable Diffusion v1.x", 1024: "Stable Diffusion v2.x", 2048: "SDXL"}  # by the width of the context


def is_adapter(file):
    """Whether a TensorFile holds an adapter's factors."""
    return any(match["alpha"] is None for name in file.shapes if (match := FACTOR.fullmatch(name)))


def describe_adapter(file):
    """The report on an adapter's TensorFile, a dict, without its metadata."""
    matches = {name: match for name in file.shapes if (match := FACTOR.fullmatch(name))}
    own = _json(file.metadata.get("minildm"))
    dialect = _dialect(file, own)
    ranks, inputs = {}, {}  # {(network, module): rank}, and its number of inputs
    for name, match in matches.items():
        shape, layer = file.shapes[name], _layer(match["module"])
        if _is_A(match) and shape:
            ranks[layer], inputs[layer] = shape[0], shape[1] if len(shape) > 1 else 0
        elif match["other"] == "hada_w1_b" and shape:
            ranks[layer], inputs[layer] = shape[0], shape[-1]
        elif match["alpha"] is None:
            ranks.setdefault(layer, None)
    kind = _kind(matches.values(), own, file)
    family = _family(inputs, matches.values())
    factors = [(name, *_layer(match["module"])) for name, match in matches.items() if match["alpha"] is None]
    networks = {}
    for network in dict.fromkeys(network for network, _ in ranks):
        known = [rank for (of, _), rank in ranks.items() if of == network and rank is not None]
        networks[network] = count_parameters(file, [name for name, of, _ in factors if of == network]) | {
            "layers": sum(of == network for of, _ in ranks),
            "ranks": {str(rank): n for rank, n in sorted(Counter(known).items())},
            "rank_mean": sum(known) / len(known) if known else None,
        }
    return {
        "path": str(file.path),
        "kind": "adapter",
        "supported": not (family == "SDXL" or "transformer" in family or kind in KINDS.values()),
        "architecture": f"{kind} for {family}",
        "layout": f"{dialect} names",
        "dialect": dialect,
        "adapter_kind": kind,
        "family": family,
        "networks": networks,
        **_scales(file, matches, ranks, own),
        "rank_of": {f"{network}/{module}": rank for (network, module), rank in ranks.items()},
        "other_tensors": sorted(set(file.shapes) - set(matches)),
        "bytes": file.path.stat().st_size,
    }


def count_parameters(file, names):
    """{"parameters": n, "precision": {dtype: n}} of a TensorFile's tensors ``names``."""
    precision = Counter()
    for name in names:
        precision[str(file.dtypes[name]).removeprefix("torch.")] += math.prod(file.shapes[name])
    return {"parameters": sum(precision.values()), "precision": dict(precision)}


def _is_A(match):
    part = match["kohya"] or match["older"] or match["linear"] or match["letter"] or match["simo"]
    return part in ("down", "A")


def _layer(module):
    """(network, module) of a factor's name."""
    name = module.removeprefix("base_model.model.")
    for prefix, network in (
        ("lora_unet_", "unet"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("lora_te_", "text_encoder"),
        ("lora_transformer_", "transformer"),
        ("text_encoder_2.", "text_encoder_2"),
        ("text_encoder.", "text_encoder"),
        ("transformer.", "transformer"),
        ("unet.", "unet"),
        ("text_encoder:", "text_encoder"),
        ("unet:", "unet"),
    ):
        if name.startswith(prefix):
            return network, name.removeprefix(prefix)
    return ("text_encoder" if name.startswith(("text_model.", "encoder.layers.")) else "unet"), name


def _dialect(file, own):
    if own is not None:
        return "native"
    for part, dialect in (
        ("lora_unet_", "kohya"),
        ("lora_te", "kohya"),
        ("lora_transformer_", "kohya"),
        ("base_model.model.", "PEFT"),
    ):
        if any(name.startswith(part) for name in file.shapes):
            return dialect
    if any(re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", name) for name in file.shapes):
        return "cloneofsimo"
    if any(".processor." in name for name in file.shapes):
        return "diffusers (attention processors)"
    return "diffusers"


def _kind(matches, own, file):
    if own is not None:
        return str(own.get("kind", "lora"))
    for match in matches:
        for part, kind in KINDS.items():
            if match["other"] and match["other"].startswith(part):
                return kind
    kernels = [shape for shape in file.shapes.values() if len(shape) == 4 and shape[2:] != (1, 1)]
    return "LoRA with convolutions" if kernels else "LoRA"


def _family(inputs, matches):
    """The bases an adapter fits, from the width of the context that cross-attention reads, or of the text encoder."""
    networks = {network for network, _ in inputs} | {_layer(match["module"])[0] for match in matches}
    if "text_encoder_2" in networks:
        return "SDXL"
    if "transformer" in networks or any(module.startswith(TRANSFORMER) for _, module in inputs):
        return "a diffusion transformer (SD 3, Flux)"
    context = {n for (network, module), n in inputs.items() if re.search(r"attn2[._](processor\.)?to_[kv]", module)}
    context |= {n for (network, _), n in inputs.items() if network == "text_encoder" and n in (768, 1024)}
    if not context:  # cloneofsimo numbers the layers; 320, 640, 1280, 2560, 5120 are the U-Net's own widths
        context = {n for (network, _), n in inputs.items() if network == "unet" and n in FAMILIES}
    families = [FAMILIES.get(n) for n in sorted(context)]
    if len(families) == 1 and families[0]:
        return families[0]
    if not families:
        return "a base that cannot be told (no cross-attention)"
    return f"a base whose context has {' or '.join(map(str, sorted(context)))} channels"


def _scales(file, matches, ranks, own):
    """{"scale": {scale: layers}, "alpha": {alpha: layers}, "scale_from": where they are stated}."""
    stored = [name for name, match in matches.items() if match["alpha"]]
    alphas, scales, source = Counter(), Counter(), "the alpha tensors"
    if own is not None:
        scale, source = own.get("scale"), "minildm's metadata"
        if isinstance(scale, (int, float)):
            scales[f"{scale:g}"] = len(ranks)
            alphas.update(f"{scale * rank:g}" for rank in ranks.values() if rank is not None)
    elif stored:
        for name, tensor in file.tensors(stored):
            rank = ranks.get(_layer(matches[name]["module"]))
            alpha = tensor.item() if tensor.numel() == 1 else math.nan
            alphas[f"{alpha:g}"] += 1
            scales[f"{alpha / rank:g}" if rank else "unknown"] += 1
    elif stated := _config(file):
        source = ", ".join(stated)
    else:
        scales["1"], source = len(ranks), "assumed: the file does not say, so alpha = rank"
    return {"scale": dict(scales), "alpha": dict(alphas), "scale_from": source}


def _config(file):
    """What diffusers' metadata, or PEFT's adapter_config.json beside the file, states: ["unet.lora_alpha = 4", ...]."""
    source, document = "lora_adapter_metadata", _json(file.metadata.get("lora_adapter_metadata"))
    beside = file.path.parent / "adapter_config.json"
    if document is None and beside.is_file():
        source, document = beside.name, _json(beside.read_text(encoding="utf-8", errors="replace"))
    keys = [key for key in document or {} if key.rpartition(".")[2] in ("lora_alpha", "r", "use_rslora", "use_dora")]
    return [source, *(f"{key} = {document[key]}" for key in keys)] if keys else []


def _json(text):
    """A JSON object; None if the text is missing or no such object."""
    try:
        return parse_json(text or "", "metadata")
    except InputError:
        return None
