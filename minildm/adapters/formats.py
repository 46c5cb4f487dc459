"""Names in adapter files: the one table between our module paths and what other tools call the same layers.

An adapter gives each layer two factors, dW = alpha / rank * B A. A is (rank, in), B (out, rank); for a convolution A is
(rank, in, kh, kw) and B (out, rank, 1, 1). The same layer in the dialects that `read_name` understands:

    native       unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q  .lora_A  .lora_B
    diffusers    unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q  .lora_A.weight  .lora_B.weight  [.alpha]
      before     unet. ... .attn1.to_q .lora.down.weight,  text_encoder. ... .q_proj .lora_linear_layer.down.weight
      before     ... .attn1.processor.to_q_lora.down.weight,  ... .self_attn.to_q_lora.down.weight
    peft         base_model.model.mid_block. ... .attn1.to_q  .lora_A.weight  .lora_B.weight; alpha: adapter_config.json
    kohya        lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q  .lora_down.weight  .lora_up.weight
                 .alpha,  lora_te_text_model_encoder_layers_0_self_attn_q_proj ...
      or         lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q, the blocks as CompVis numbers them
    comfyui      diffusion_model.middle_block.1. ... .to_q,  text_encoders.clip_l.transformer.text_model. ...,
                 ends as kohya's
    cloneofsimo  unet:126:down  unet:126:up  text_encoder:0:down  ...: the layers are counted (`counted_layers`)

Without an alpha, alpha = rank: dW = B A.
"""

import functools
import re

from minildm.checkpoint.single_file import RESNET_PARTS, unet_modules
from minildm.config import UNetConfig

# --- layers an adapter can change, # = a number ---
_TRANSFORMER = "attentions.#.transformer_blocks.#"
_BLOCK_LAYERS = (
    *(f"{_TRANSFORMER}.{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v")),
    *(f"{_TRANSFORMER}.{layer}" for layer in ("attn1.to_out.#", "attn2.to_out.#", "ff.net.#.proj", "ff.net.#")),
    *(f"attentions.#.{layer}" for layer in ("proj_in", "proj_out")),
    *(f"resnets.#.{layer}" for layer in ("conv1", "conv2", "conv_shortcut", "time_emb_proj")),
)
LAYERS = {
    "unet": (
        *(f"{block}.{layer}" for block in ("down_blocks.#", "mid_block", "up_blocks.#") for layer in _BLOCK_LAYERS),
        *("down_blocks.#.downsamplers.#.conv", "up_blocks.#.upsamplers.#.conv"),
        *("conv_in", "conv_out", "time_embedding.linear_#"),
    ),
    "text_encoder": tuple(
        f"text_model.encoder.layers.#.{layer}"
        for layer in (*(f"self_attn.{projection}_proj" for projection in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    ),
}
NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")  # a number that stands alone between dots or underscores
UNDERSCORED = {network: {layer.replace(".", "_"): layer for layer in layers} for network, layers in LAYERS.items()}

# --- the two ends of a tensor's name ---
STARTS = (  # (start, dialect, network; None: told by the rest)
    ("lora_unet_", "kohya", "unet"),
    ("lora_te_", "kohya", "text_encoder"),
    ("lora_te1_", "kohya", "text_encoder"),  # with lora_te2_ it is SDXL's, see OTHER_KINDS
    ("diffusion_model.", "comfyui", "unet"),
    ("text_encoders.clip_l.transformer.", "comfyui", "text_encoder"),
    ("text_encoders.clip_h.transformer.", "comfyui", "text_encoder"),  # SD v2.x
    ("base_model.model.unet.", "peft", "unet"),
    ("base_model.model.text_encoder.", "peft", "text_encoder"),
    ("base_model.model.", "peft", None),
    ("unet.", "diffusers", "unet"),
    ("text_encoder.", "diffusers", "text_encoder"),
    ("", "diffusers", None),
)
ENDS = (  # (end, factor, dialects)
    (r"\.lora_(?:A|(B))", ("native",)),
    (r"\.lora_(?:A|(B))(?:\.\w+)?\.weight", ("diffusers", "peft")),  # PEFT may put the adapter's name in between
    (r"(?:\.|_)lora\.(?:down|(up))\.weight", ("diffusers",)),
    (r"\.lora_linear_layer\.(?:down|(up))\.weight", ("diffusers",)),
    (r"\.lora_(?:down|(up))\.weight", ("kohya", "comfyui")),
)

# --- adapters of other kinds, and for other models: (what a name of theirs contains, what to call them) ---
OTHER_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (
            r"(double|single|joint)_(transformer_)?blocks|lora_te3_|^(lora_)?transformer[._]|_refiner[._]",
            "an adapter for a diffusion transformer (SD 3, Flux or the like)",
        ),
        (r"lora_te2_|^text_encoder_2\.|text_encoders\.clip_g|label_emb|add_embedding", "an adapter for SDXL"),
        (r"[._]transformer_blocks[._][1-9]", "an adapter for SDXL"),
        (r"dora_scale|lora_magnitude_vector", "a DoRA adapter, which also changes the length of weight columns"),
        (r"hada_w|hada_t", "a LoHa adapter (LyCORIS)"),
        (r"lokr_", "a LoKr adapter (LyCORIS)"),
        (r"oft_|\.boft", "an OFT adapter"),
        (r"lora_mid", "a LoCon adapter in Tucker form (LyCORIS, use_tucker)"),
        (r"\.diff(_b)?$|\.(w|b)_norm$", "an adapter with whole weight differences (LyCORIS, .diff)"),
        (r"on_input$|ia3_l", "an IA3 adapter"),
        (r"\.lora_E(\.\w+)?$|\.ranknum", "PEFT's unfinished form of AdaLoRA"),
        (r"\.bias$|bias_(indices|values|size)$", "an adapter that also changes biases"),
        (r"^lora_unet_(unet|text_encoder)_", "a broken conversion: the prefix of its names is doubled"),
        (r"^(emp_params|string_to_param|clip_l$|clip_g$)", "a textual-inversion embedding, not an adapter"),
    )
)
LOADABLE = "LoRA for SD v1.x and v2.x (its linear layers and convolutions)"


def other_kind(names):
    """What to call a file with one of these tensor names, or None: kinds of adapter that cannot be merged here."""
    for pattern, kind in OTHER_KINDS:
        if any(pattern.search(name) for name in names):
            return kind
    return None


def read_name(name):
    """Take a tensor's name apart: (dialect, module path, "A" | "B" | "alpha"), or None for a name nobody knows."""
    start, dialect, network = next(row for row in STARTS if name.startswith(row[0]))
    part, rest = None, name[len(start) :]
    if rest.endswith(".alpha") and dialect != "peft":
        part, rest = "alpha", rest.removesuffix(".alpha")
    for end, dialects in ENDS:
        if part is None and (match := re.fullmatch(f"(.+?){end}", rest)):
            known = dialects if dialect not in ("native", "diffusers") or start == "" else (*dialects,)
            if dialect in known or (known == ("native",) and start in ("unet.", "text_encoder.")):
                dialect = dialect if dialect in known else "native"
                rest, part = match[1], "B" if match[2] else "A"
    if part is None:
        return None
    path = _underscored(network, rest) if dialect == "kohya" else _dotted(network, rest, dialect)
    return None if path is None else (dialect, path, part)
