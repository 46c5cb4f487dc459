"""What an adapter file says about itself: the scale of each layer, the method, the base, the adapters below it.

Metadata are text that anybody may have written, so each value is checked before it is used.
"""

import math
import re
import warnings

from minildm.adapters.formats import NATIVE, PEFT
from minildm.errors import InputError
from minildm.files import parse_json, read_json
from minildm.settings import is_finite_number

FORMAT = 1  # of native files
ORIGIN = "minildm_origin"  # metadata of what minildm writes in other dialects: kind, base, on_top_of
LOADABLE = "LoRA for Stable Diffusion v1.x and v2.x"
SCALES = (1e-12, 1e12)  # far beyond any in use, so that nothing computed from a scale overflows
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT's initializations that subtract B A from the base
ASSUMED = "assumed: the file does not say, so alpha = rank"


def stated_scales(file, dialect, layers, about):
    """({module path: scale}, where the file states it) of a Header (reading.py). Of the tensors only alphas are read.

    Raises: InputError for an alpha or a scale that is no positive number, or two that contradict each other.
    """
    path = file.path
    if dialect == NATIVE:
        return dict.fromkeys(layers, about["scale"]), "minildm's metadata"
    config, source = _stated_config(file, dialect)
    names = {parts["alpha"]: layer for layer, parts in layers.items() if "alpha" in parts}
    alphas, scales, sources = {}, {}, set()
    for name, tensor in file.tensors(names):
        alphas[names[name]] = alpha = tensor.item()
        if not 0 < alpha < math.inf:
            raise InputError(f"{path}: {name} must be one positive number, got {alpha:g}")
    for layer, parts in layers.items():
        rank = file.shapes[parts["A"]][0]
        alpha, stated = alphas.get(layer), _stated_alpha(layer, rank, config, path)
        if None not in (alpha, stated) and not math.isclose(stated, alpha, rel_tol=1e-3):
            raise InputError(f"{path}: {layer} has an alpha of {alpha:g}, but the metadata say {stated:g}")
        sources.add("the alpha tensors" if alpha is not None else ASSUMED if stated is None else source)
        alpha = stated if alpha is None else alpha
        scales[layer] = 1.0 if alpha is None or not rank else alpha / rank
        _check_scale(scales[layer], f"{path}: the scale of {layer}, alpha / rank,")
    return scales, " and ".join(sorted(sources))


def _check_scale(scale, what):
    if not is_finite_number(scale) or not SCALES[0] <= scale <= SCALES[1]:
        limits = "{:g} and {:g}".format(*SCALES)
        raise InputError(f"{what} must be a positive number between {limits}, got {scale!r:.40}; the file is damaged")


def _stated_alpha(layer, rank, config, path):
    """alpha of a layer by its network's LoraConfig, as a share of rank as everywhere else (rsLoRA divides by the
    square root); None if nothing is stated."""
    network, _, inside = layer.partition(".")
    if (config := config.get(network)) is None:
        return None
    stated_rank = _by_pattern(config["rank_pattern"], inside, config.get("r"))
    alpha = _by_pattern(config["alpha_pattern"], inside, config.get("lora_alpha"))
    if stated_rank is not None and stated_rank != rank:
        raise InputError(f"{path}: {layer} has rank {rank}, but its configuration says {stated_rank!r:.40}")
    if alpha is None:
        return None
    if not is_finite_number(alpha) or alpha <= 0:
        raise InputError(f"{path}: lora_alpha of {layer} must be a positive number, got {alpha!r:.40}")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _read_patterns(patterns, what):
    """{(layer's name or its end, only whole names): (place in the order, value)} of a LoraConfig's pattern; the first
    that fits counts."""
    if not isinstance(patterns, (dict, type(None))):
        raise InputError(f"{what} must be an object of layers, got {patterns!r:.40}")
    read = {}
    for i, (pattern, value) in enumerate((patterns or {}).items()):
        plain = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise InputError(f"{what} has the regular expression {pattern!r:.60}; minildm reads layers' names")
        read.setdefault((plain, pattern.startswith("^")), (i, value))
    return read


def _by_pattern(patterns, layer, default):
    """The value of the first pattern that fits a layer, as PEFT matches them: the layer's whole name, or its end."""
    keys = []
    for name in (layer, layer.removeprefix("text_model.")):  # transformers 5 has no such prefix
        parts = name.split(".")
        keys += [(name, True), *((".".join(parts[i:]), False) for i in range(len(parts)))]
    found = [patterns[key] for key in keys if key in patterns]
    return min(found, key=lambda entry: entry[0])[1] if found else default


def _stated_config(file, dialect):
    """{network: PEFT's LoraConfig as a dict}, and where it is: diffusers' metadata or the adapter_config.json beside
    the file."""
    source = "lora_adapter_metadata"
    what = f"{file.path}: metadata {source}"
    config = stated_json(file, source)
    if config is None and dialect == PEFT:
        beside = file.path.parent / "adapter_config.json"
        if not beside.is_file():
            warnings.warn(f"{file.path} does not state its alpha, and there is no adapter_config.json beside it; "
                          "assuming alpha = rank, a scale of 1", stacklevel=4)  # fmt: skip
            return {}, source
        what, source = str(beside), beside.name
        config = read_json(beside)
    if config is None:
        return {}, source
    prefixed = {
        network: {
            key.removeprefix(f"{network}."): value for key, value in config.items() if key.startswith(f"{network}.")
        }
        for network in ("unet", "text_encoder")
    }
    configs = prefixed if any(prefixed.values()) else {"unet": config, "text_encoder": dict(config)}
    for settings in configs.values():
        for key in ("rank_pattern", "alpha_pattern"):
            settings[key] = _read_patterns(settings.get(key), f"{what}: {key}")
        if settings.get("peft_type") not in (None, "LORA"):
            raise InputError(f"{what} is for {settings['peft_type']!r:.40}; minildm loads {LOADABLE}")
        for key in ("use_dora", "use_rslora"):
            if settings.get(key) not in (None, True, False):
                raise InputError(f"{what}: {key} must be true or false, got {settings[key]!r:.40}")
        if settings.get("use_dora"):
            raise InputError(f"{what} is for a DoRA adapter; minildm loads {LOADABLE}")
        if str(settings.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
            raise InputError(
                f"{what} has init_lora_weights {settings['init_lora_weights']!r:.40}, which changed the base's weights "
                "too; save it in PEFT with path_initial_model_for_weight_conversion"
            )
    return configs, source


# --- minildm's own format --------------------------------------------------------------------------------------------
def native_metadata(file):
    """The metadata of a file in minildm's own format, a dict with "scale", "kind" and "on_top_of", checked."""
    path = file.path
    about = stated_json(file, "minildm")
    if "scale" not in about:  # a checkpoint, too: not read for that
        raise InputError(f"{path} is not an adapter in minildm's format (no scale in its metadata); its tensors: "
                         f"{', '.join(sorted(file.shapes)[:2])}, ...")  # fmt: skip
    scale = about["scale"]
    if about.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {about.get('format')!r:.40}, expected {FORMAT}; it was written by another version of "
            "minildm"
        )
    _check_scale(scale, f"{path}: the scale")
    return _checked_about(about, path)


def origin(file):
    """What minildm wrote about itself into a file for another tool, a dict with "kind" and "on_top_of", checked."""
    return _checked_about(stated_json(file, ORIGIN) or {}, file.path)


def _checked_about(about, path):
    """What a file says about its method, its base and the adapters below it, in the form that `merge_file` reads."""
    below, base, kind = about.get("on_top_of") or [], about.get("base"), about.get("kind", "lora")
    whole = isinstance(below, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("adapter"), str)
        and is_finite_number(one.get("multiplier"))
        and isinstance(one.get("rank"), int | None)
        for one in below
    )
    if not whole or not isinstance(kind, str) or not (base is None or isinstance(base, str)):
        raise InputError(
            f"{path}: its metadata are damaged (kind {kind!r:.40}, base {base!r:.40}, on_top_of {below!r:.40})"
        )
    return about | {"kind": kind, "on_top_of": below}


def stated_json(file, key, kind=dict):
    """The JSON document in a TensorFile's metadata ``key``, of type ``kind``; None if there is no such key.

    Raises: InputError if the text is not JSON, or of another type.
    """
    text = file.metadata.get(key)
    return None if text is None else parse_json(text, f"{file.path}: metadata {key}", kind)


def rank_flag(entry):
    """The rank of an entry of ``on_top_of`` as in a flag, "@2"; empty where all of its rank was merged."""
    return "" if entry.get("rank") is None else f"@{entry['rank']}"


def without_path(entry):
    """What identifies an entry of ``on_top_of`` or ``model.merged``: a file may lie somewhere else today."""
    return {key: value for key, value in entry.items() if key != "path"}
