"""Writing adapters: minildm's own format, kohya's and diffusers'. All hold plain LoRA in safetensors files.

    native      one scale for all layers. Metadata ``minildm``: a JSON object with kind, scale, ranks by path, the
                base's hash and what else the caller gives
    kohya       one alpha for all layers, beside each: scale = alpha / rank. Metadata ``ss_*``, as kohya's tools show
    diffusers   scale 1 for all layers (alpha = rank), so tools that skip the metadata apply it right, too. Metadata
                ``lora_adapter_metadata``: PEFT's LoraConfig of each network, which diffusers reads

Where the layers' own scales differ from that, the rest is multiplied into B, in float32 or wider; where they do not,
each value keeps its bits. Layers of rank 0 (AdaLoRA's) are left out of the other tools' files: they change nothing. No
file holds captions or prompts, which may be patient text; a native one names the adapters below it by path, as given.
"""

import json
from collections import Counter

import torch
from safetensors.torch import save_file

from minildm.adapters.formats import DIFFUSERS, KOHYA, NATIVE, kohya_name
from minildm.adapters.metadata import FORMAT, ORIGIN, without_path
from minildm.adapters.reading import Factors, context_width
from minildm.errors import InputError
from minildm.files import written_beside

FORMATS = (NATIVE, KOHYA, DIFFUSERS)


def check_format(format):
    if format not in FORMATS:
        raise InputError(f"adapter format must be one of {', '.join(FORMATS)}, got {format!r}")


def check_out(out):
    """Raise InputError unless ``out`` is the path of a new .safetensors file."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: adapters are written as .safetensors files; change the suffix")
    if out.exists():
        raise InputError(f"--out {out} exists already; move it away, or give another --out")


def inherited(about):
    """What a file that is made of an adapter says as the adapter does: ``about`` of `write_adapter`."""
    return {key: about.get(key) for key in ("base", "on_top_of", "settings")}


def write_adapter(factors, path, kind, about, format=NATIVE):
    """Write {module path: Factors}. ``kind``: the method that trained them. ``about``: {"base": ..., "on_top_of": ...,
    "settings": ...}; settings are for native files only.

    Raises: InputError for another format, if there is nothing to write, or if a number overflows; nothing is written.
    """
    check_format(format)
    if format != NATIVE:
        factors = {name: entry for name, entry in factors.items() if len(entry.A)}
    if not factors:
        raise InputError(f"the adapter has no layer of rank 1 or more, so there is nothing to write to {path}")
    tensors, metadata = {NATIVE: _native, KOHYA: _kohya, DIFFUSERS: _diffusers}[format](factors, kind, about)
    if infinite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"{infinite[0]} would hold NaN or infinite numbers, so nothing was written to {path}; the "
                         "training that made it had failed, or its scale is too large")  # fmt: skip
    with written_beside(path) as beside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)


def rescaled(entry, scale):
    """The same change of the weights with another scale; if it is the same already, the same tensors."""
    if abs(entry.scale / scale - 1) < 1e-7:  # alpha was rounded to float32
        return Factors(entry.A, entry.B, scale)
    wide = entry.B.to(torch.promote_types(entry.B.dtype, torch.float32))
    return Factors(entry.A, wide * (entry.scale / scale), scale)


def _native(factors, kind, about):
    scales = {entry.scale for entry in factors.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors = {}
    for name, entry in factors.items():
        A, B, _ = rescaled(entry, scale)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    ranks = {name: len(entry.A) for name, entry in factors.items()}
    return tensors, {"minildm": json.dumps({"format": FORMAT, "kind": kind, "scale": scale, "ranks": ranks} | about)}


def _kohya(factors, kind, about):
    alphas = Counter(torch.tensor(entry.scale * len(entry.A)).item() for entry in factors.values())
    alpha = max(alphas, key=lambda alpha: (alphas[alpha], alpha))  # the most frequent: most layers keep their values
    tensors = {}
    for path, entry in factors.items():
        name, (A, B, _) = kohya_name(path), rescaled(entry, alpha / len(entry.A))
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    ranks = {len(entry.A) for entry in factors.values()}
    v2 = context_width({path: entry.A.shape for path, entry in factors.items()}) == 1024
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": "sd_v2" if v2 else "sd_v1",
        "ss_v2": str(v2),
    }
    return tensors, metadata | _origin(kind, about)


def _diffusers(factors, kind, about):
    tensors, config = {}, {}
    for path, entry in factors.items():
        A, B, _ = rescaled(entry, 1.0)
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    for network in dict.fromkeys(path.partition(".")[0] for path in factors):
        start = f"{network}."
        inside = {  # transformers 5 has no "text_model."
            path.removeprefix(start).removeprefix("text_model."): len(entry.A)
            for path, entry in factors.items()
            if path.startswith(start)
        }
        r = Counter(inside.values()).most_common(1)[0][0]
        pattern = {name: rank for name, rank in inside.items() if rank != r}  # whole names: each fits one layer only
        settings = {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern, "bias": "none"}
        settings |= {"target_modules": list(inside), "peft_type": "LORA", "use_rslora": False, "use_dora": False}
        config |= {f"{network}.{key}": value for key, value in settings.items()}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config)} | _origin(kind, about)


def _origin(kind, about):
    """What minildm reads again: which method, base and adapters below."""
    below = [without_path(one) for one in about.get("on_top_of") or []]
    return {ORIGIN: json.dumps({"kind": kind, "base": about.get("base"), "on_top_of": below})}
