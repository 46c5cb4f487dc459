"""The part of ``python -m minildm info`` that describes adapters of every tool, also those minildm cannot load.

Names are read as for loading (adapters/formats.py), and whether a file can be loaded is what loading would say
(adapters/reading.py). Of the tensors only ``alpha`` scalars are read. A report names the dialect (who writes such
names), the kind (LoRA, LoHa, ...), the family of bases it is for, and each network's layers and ranks.
"""

import math
import warnings
from collections import Counter

from minildm.adapters.formats import NATIVE, module_path, other_kind, other_model, split_name
from minildm.adapters.metadata import stated_scales
from minildm.adapters.reading import FAMILIES, context_width, recognize
from minildm.errors import InputError

SHAPED_LIKE_A = ("A", "hada_w1_b")  # (rank, in): of LoHa's four factors, one


def is_adapter(file):
    """Whether a TensorFile holds an adapter's factors."""
    pieces = map(split_name, file.shapes)
    return any(entry is not None and entry.part != "alpha" for entry in pieces)


def describe_adapter(file):
    """The report on an adapter's TensorFile, a dict, without its metadata."""
    pieces = {name: entry for name in file.shapes if (entry := split_name(name)) is not None}
    paths = {name: module_path(entry) for name, entry in pieces.items()}
    layers = {name: (_network(entry, paths[name]), entry.layer) for name, entry in pieces.items()}
    ranks, shapes = {}, {}  # {(network, layer): rank}, {module path: shape of A}
    for name, entry in pieces.items():
        if entry.part != "alpha":
            ranks.setdefault(layers[name], None)
        if entry.part in SHAPED_LIKE_A and len(shape := file.shapes[name]) > 1:
            ranks[layers[name]] = shape[0]
            shapes |= {} if paths[name] is None else {paths[name]: shape}
    networks = {}
    for network in dict.fromkeys(network for network, _ in ranks):
        known = [rank for (of, _), rank in ranks.items() if of == network and rank is not None]
        names = [name for name, (of, _) in layers.items() if of == network and pieces[name].part != "alpha"]
        networks[network] = count_parameters(file, names) | {
            "layers": sum(of == network for of, _ in ranks),
            "ranks": {str(rank): n for rank, n in sorted(Counter(known).items())},
            "rank_mean": sum(known) / len(known) if known else None,
        }
    facts = _as_loaded(file)
    kind = facts.pop("method", None) or _kind(file)
    family = other_model(file.shapes) or _family(context_width(shapes))
    dialect = facts.pop("dialect", None) or Counter(entry.dialect for entry in pieces.values()).most_common(1)[0][0]
    return {
        "path": str(file.path),
        "kind": "adapter",
        **facts,
        "architecture": f"{kind} for {family}",
        "layout": f"{dialect} names",
        "dialect": dialect,
        "adapter_kind": kind,
        "family": family,
        "networks": networks,
        "rank_of": {f"{network}/{layer}": rank for (network, layer), rank in ranks.items()},
        "other_tensors": sorted(set(file.shapes) - set(pieces)),
        "bytes": file.path.stat().st_size,
    }


def count_parameters(file, names):
    """{"parameters": n, "precision": {dtype: n}} of a TensorFile's tensors ``names``."""
    precision = Counter()
    for name in names:
        precision[str(file.dtypes[name]).removeprefix("torch.")] += math.prod(file.shapes[name])
    return {"parameters": sum(precision.values()), "precision": dict(precision)}


def _as_loaded(file):
    """Whether minildm can load a TensorFile; if so its {scale: layers}, {alpha: layers} and where they are stated, else
    the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is assumed is part of the report
            header = recognize(file)
            scales, source = stated_scales(file, *header)
    except InputError as error:
        return {"supported": False, "problem": str(error), "scale": {}, "alpha": {}}
    ranks = {layer: file.shapes[parts["A"]][0] for layer, parts in header.layers.items()}
    return {
        "supported": True,
        "dialect": header.dialect,
        "method": header.about["kind"] if header.dialect == NATIVE else None,
        "scale": dict(Counter(f"{scale:g}" for scale in scales.values())),
        "alpha": dict(Counter(f"{scale * ranks[layer]:g}" for layer, scale in scales.items())),
        "scale_from": source,
    }


def _network(entry, path):
    """The network of a layer, in whose name it may be missing."""
    return entry.network or (path or "unet").partition(".")[0]


def _kind(file):
    if (kind := other_kind(file.shapes)) is not None:
        return kind
    kernels = [shape for shape in file.shapes.values() if len(shape) == 4 and tuple(shape[2:]) != (1, 1)]
    return "LoRA with convolutions" if kernels else "LoRA"


def _family(width):
    """The bases that an adapter fits, from the width of the text features."""
    unknown = "a base that cannot be told" if width is None else f"a base whose context has {width} channels"
    return FAMILIES.get(width, unknown)
