"""Names in adapter files: the one table between module paths here and what other tools call the same layers.

An adapter gives each layer two factors, dW = alpha / rank * B A: A is (rank, in), B (out, rank); for a convolution A is
(rank, in, kh, kw) and B (out, rank, 1, 1). The same layer in each dialect:

    native       unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q  .lora_A  .lora_B
    diffusers    unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q  .lora_A.weight  .lora_B.weight
      before     unet. ... .attn1.to_q .lora.down.weight,  text_encoder. ... .q_proj .lora_linear_layer.down.weight
      before     ... .attn1.processor.to_q_lora.down.weight,  ... .self_attn.to_q_lora.down.weight
    PEFT         base_model.model.mid_block. ... .attn1.to_q  .lora_A.weight  .lora_B.weight
    kohya        lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q  .lora_down.weight  .lora_up.weight
      or         lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q, with blocks as the single file numbers them
                 lora_te_text_model_encoder_layers_0_self_attn_q_proj ..., each with .alpha
    cloneofsimo  unet:135:down  unet:135:up  text_encoder:2:down  ..., layers are counted

The dotted dialects leave out "unet." or "text_encoder." at times, and "text_model." after the latter. This module needs
no base model and no tensors.
"""

import functools
import re
from typing import NamedTuple

from minildm.checkpoint.single_file import RESNET_PARTS, unet_modules
from minildm.config import UNetConfig

NATIVE, DIFFUSERS, PEFT, KOHYA, CLONEOFSIMO = "native", "diffusers", "PEFT", "kohya", "cloneofsimo"
TEXT_LAYERS = "text_encoder.text_model.encoder.layers"


class Name(NamedTuple):
    """A tensor's name, taken apart. ``path``: a module path here. ``part``: "A", "B" or "alpha"."""

    dialect: str
    path: str
    part: str


class Pieces(NamedTuple):
    """A tensor's name in pieces, of any adapter, also for other models and of other kinds than LoRA."""

    dialect: str
    network: str | None  # None: the name does not say
    layer: str  # as the file calls it
    part: str  # "A", "B" and "alpha", or the end of the name for factors of other kinds


# --- the layers that an adapter can change, # = a number ---
_TRANSFORMER = "attentions.#.transformer_blocks.#"
_BLOCK_LAYERS = (
    *(f"{_TRANSFORMER}.{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v")),
    *(f"{_TRANSFORMER}.{layer}" for layer in ("attn1.to_out.#", "attn2.to_out.#", "ff.net.#.proj", "ff.net.#")),
    *(f"attentions.#.{layer}" for layer in ("proj_in", "proj_out")),
    *(f"resnets.#.{layer}" for layer in ("conv1", "conv2", "conv_shortcut", "time_emb_proj")),
)
LAYERS = {
    "unet": {
        *(f"{block}.{layer}" for block in ("down_blocks.#", "mid_block", "up_blocks.#") for layer in _BLOCK_LAYERS),
        *("down_blocks.#.downsamplers.#.conv", "up_blocks.#.upsamplers.#.conv"),
        *("conv_in", "conv_out", "time_embedding.linear_#"),
    },
    "text_encoder": {
        f"text_model.encoder.layers.#.{layer}"
        for layer in (*(f"self_attn.{projection}_proj" for projection in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    },
}
NUMBER = re.compile(r"(?<![^._])[0-9]+(?![^._])")  # stands alone between dots or underscores
UNDERSCORED = {network: {layer.replace(".", "_"): layer for layer in layers} for network, layers in LAYERS.items()}

# --- what a name begins and ends with ---
STARTS = (  # (start, dialect, network; None: the rest tells it). The first that fits
    ("lora_unet_", KOHYA, "unet"),
    ("lora_te_", KOHYA, "text_encoder"),
    ("lora_te1_", KOHYA, "text_encoder"),  # beside lora_te2_ it is SDXL's, see OTHER_MODELS
    ("lora_te2_", KOHYA, "text_encoder_2"),  # the networks that SD v1.x and v2.x do not have are named, not loaded
    ("lora_te3_", KOHYA, "text_encoder_3"),
    ("lora_transformer_", KOHYA, "transformer"),
    ("base_model.model.unet.", PEFT, "unet"),
    ("base_model.model.text_encoder.", PEFT, "text_encoder"),
    ("base_model.model.", PEFT, None),
    ("unet.", DIFFUSERS, "unet"),
    ("text_encoder.", DIFFUSERS, "text_encoder"),
    ("text_encoder_2.", DIFFUSERS, "text_encoder_2"),
    ("text_encoder_3.", DIFFUSERS, "text_encoder_3"),
    ("transformer.", DIFFUSERS, "transformer"),
    ("", DIFFUSERS, None),
)
END = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<letter>[AB])(?:\.\w+)?\.weight"  # PEFT may put the adapter's name in between
    r"|(?:[._]lora_|[._]lora\.|\.lora_linear_layer\.)(?P<side>down|up)\.weight"
    r"|(?:[._]lora)?\.alpha)"
)
OLD_PROJECTIONS = {  # as attention processors called them
    "self_attn.to_q": "self_attn.q_proj",
    "self_attn.to_k": "self_attn.k_proj",
    "self_attn.to_v": "self_attn.v_proj",
    "self_attn.to_out": "self_attn.out_proj",
    "attn1.to_out": "attn1.to_out.0",
    "attn2.to_out": "attn2.to_out.0",
}

# --- adapters for other models and of other kinds: what one of their names contains, and what to call them ---
OTHER_MODELS = (  # of names with "lora"
    (r"(double|single|joint)_(transformer_)?blocks|lora_te3_|^(lora_)?transformer[._]", "a diffusion transformer (SD 3,"
     " Flux or the like)"),
    (r"lora_te2_|^text_encoder_2\.|[._]transformer_blocks[._][1-9]", "SDXL"),
)  # fmt: skip
OTHER_PARTS = (  # what their factors are called
    (r"\.(dora_scale|lora_magnitude_vector)", "a DoRA adapter, which also changes the lengths of weight columns"),
    (r"\.hada_", "a LoHa adapter (LyCORIS)"),
    (r"\.lokr_", "a LoKr adapter (LyCORIS)"),
    (r"\.(oft|boft)_", "an OFT adapter"),
    (r"\.glora_", "a GLoRA adapter (LyCORIS)"),
    (r"\.lora_mid\.", "a LoCon adapter in Tucker form (LyCORIS, use_tucker)"),
    (r"\.diff(_b)?$", "an adapter with whole differences of weights (LyCORIS, .diff)"),
    (r"\.(on_input$|ia3_l)", "an IA3 adapter"),
    (r"\.(lora_E(\.|$)|ranknum)", "PEFT's AdaLoRA, which is no plain product of two factors"),
    (r"\.lora_(B|up)(\.\w+)?\.bias$", "an adapter that also changes biases"),
)
OTHER_FILES = (
    (r"^lora_unet_(unet|text)_", 'names with a doubled prefix ("lora_unet_unet_..."), left by a broken conversion'),
    (r"^(emp_params|clip_[lg])$", "a textual-inversion embedding"),
)


def other_model(names):
    """What to call the models of an adapter with these tensor names if they are not SD v1.x or v2.x, else None."""
    return _first(OTHER_MODELS, [name for name in names if "lora" in name])


def other_kind(names):
    """What to call an adapter with these tensor names if it is no plain LoRA, else None."""
    return _first((*OTHER_PARTS, *OTHER_FILES), names)


def _first(table, names):
    """The description in the first row of a table whose pattern is found in a name; None if there is none."""
    return next((what for pattern, what in table if any(re.search(pattern, name) for name in names)), None)


def split_name(name):
    """The Pieces of a tensor's name; None if it is not of an adapter."""
    if match := re.fullmatch(r"(unet|text_encoder)\.(.+)\.lora_([AB])", name):
        return Pieces(NATIVE, *match.groups())
    if match := re.fullmatch(r"(unet|text_encoder):(0|[1-9][0-9]{0,3}):(up|down)", name):
        return Pieces(CLONEOFSIMO, match[1], match[2], "A" if match[3] == "down" else "B")
    start, dialect, network = next(row for row in STARTS if name.startswith(row[0]))
    rest = name[len(start) :]
    if match := END.fullmatch(rest):
        part = match["letter"] or {"down": "A", "up": "B", None: "alpha"}[match["side"]]
        return Pieces(dialect, network, match["layer"], part)
    found = (re.search(pattern, rest) for pattern, _ in OTHER_PARTS)
    if match := next((match for match in found if match), None):
        return Pieces(dialect, network, rest[: match.start()], rest[match.start() + 1 :])
    return None


def module_path(pieces):
    """The module path of a name's Pieces; None if it is of no layer that an adapter can change here."""
    dialect, network, layer, _ = pieces
    if network not in (*LAYERS, None):
        return None
    if dialect == NATIVE:
        return f"{network}.{layer}" if _is_layer(f"{network}.{layer}") else None
    if dialect == CLONEOFSIMO:
        return _counted_path(network, int(layer))
    return _underscored_path(network, layer) if dialect == KOHYA else _dotted_path(network, layer)


def read_name(name):
    """Take a tensor's name apart: a Name, or None if it is of no layer that an adapter can change here."""
    pieces = split_name(name)
    if pieces is None or pieces.part not in ("A", "B", "alpha") or (path := module_path(pieces)) is None:
        return None
    return Name(pieces.dialect, path, pieces.part)


def kohya_name(path):
    """What kohya calls the layer at a module path."""
    network, _, rest = path.partition(".")
    return f"lora_{'unet' if network == 'unet' else 'te'}_{rest.replace('.', '_')}"


def _template(text):
    """A layer's name with # for each number, and the numbers."""
    return NUMBER.sub("#", text), NUMBER.findall(text)


def _is_layer(path):
    network, _, layer = path.partition(".")
    return _template(layer)[0] in LAYERS[network]


def _dotted_path(network, layer):
    layer = layer.replace(".processor.", ".")
    for old, new in OLD_PROJECTIONS.items():
        if layer.endswith(old):
            layer = layer.removesuffix(old) + new
    if layer.startswith("encoder.layers."):
        layer = f"text_model.{layer}"
    if network is None:
        network = "text_encoder" if layer.startswith("text_model.") else "unet"
    path = f"{network}.{layer}"
    return path if _is_layer(path) else None


def _underscored_path(network, layer):
    template, numbers = _template(layer)
    if (dotted := UNDERSCORED[network].get(template)) is not None:
        parts = dotted.split("#")
        return f"{network}." + "".join(part + number for part, number in zip(parts, [*numbers, ""], strict=True))
    return f"unet.{_compvis_layers()[layer]}" if network == "unet" and layer in _compvis_layers() else None


@functools.cache
def _compvis_layers():
    """{a layer's name in the single-file layout, underscored: our name without the network}, for the U-Net of SD v1.x
    and v2.x, which have the same blocks."""
    inside = [layer.removeprefix(f"{_TRANSFORMER}.") for layer in _BLOCK_LAYERS if layer.startswith(_TRANSFORMER)]
    inside = [f"transformer_blocks.0.{layer.replace('to_out.#', 'to_out.0')}" for layer in inside if "net" not in layer]
    inside += ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2", "proj_in", "proj_out"]
    table = {}
    for ours, theirs in unet_modules(UNetConfig()).items():
        if ".attentions." in ours:
            pairs = [(f"{ours}.{layer}", f"{theirs}.{layer}") for layer in inside]
        elif ".resnets." in ours:
            pairs = [(f"{ours}.{part}", f"{theirs}.{their_part}") for part, their_part in RESNET_PARTS.items()]
        else:
            pairs = [(ours, theirs)]
        table |= {theirs.replace(".", "_"): ours for ours, theirs in pairs if _is_layer(f"unet.{ours}")}
    return table


# cloneofsimo/lora counts the linear layers in attention (CrossAttention) and GEGLU, in the order in which the diffusers
# of its time created them: block after block down, then up, then the middle; in a block attn1, GEGLU, attn2.
COUNTED_UNET = (
    *(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    *(f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
)
COUNTED_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")  # of CLIPAttention, as transformers creates them
COUNTED_BLOCKS = (
    *(f"down_blocks.{level}.attentions.{i}" for level in range(3) for i in range(2)),
    *(f"up_blocks.{level}.attentions.{i}" for level in range(1, 4) for i in range(3)),
    "mid_block.attentions.0",
)
COUNTED = len(COUNTED_BLOCKS) * len(COUNTED_UNET)  # 144 layers of the U-Net


def _counted_path(network, n):
    if network == "text_encoder":
        return f"{TEXT_LAYERS}.{n // len(COUNTED_TEXT)}.self_attn.{COUNTED_TEXT[n % len(COUNTED_TEXT)]}"
    if n >= COUNTED:
        return None
    block, layer = divmod(n, len(COUNTED_UNET))
    return f"unet.{COUNTED_BLOCKS[block]}.transformer_blocks.0.{COUNTED_UNET[layer]}"
