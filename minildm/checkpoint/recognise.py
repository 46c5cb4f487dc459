"""What a file is when it is not a whole Stable Diffusion v1.x / v2.x model, and why its tensors do not fit."""

from typing import NamedTuple

from minildm.errors import InputError

WRAPPERS = {  # what others put into the names of a network's tensors
    "_orig_mod.": "saved from a network that torch.compile had wrapped",
    "module.": "saved from a network that DistributedDataParallel had wrapped",
    "base_layer.": "saved with a live PEFT adapter, which has to be merged first",
    "state_dict.": "saved with their place in a dictionary",
}
UNET = "model.diffusion_model."
ROOTS = (UNET, "first_stage_model.", "cond_stage_model.")
UNKNOWN = "something else"
INPUTS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth-guided model", 7: "an upscaler"}
WHOLE_FILE = "give the file or folder that holds all three networks"
# Parts of names, any of which tells that the file is of this kind; what to do about it. The first that fits counts.
OTHERS = (
    (("lora_", "hada_", "lokr_", ".lora."), "an adapter (LoRA)",
     "it changes a base model and cannot be used alone: give the base here"),
    (("controlnet_cond_embedding.",), "a ControlNet", "minildm samples without one: give the base model"),
    (("conditioner.embedders.1.", "add_embedding."), "an SDXL model", "use a v1.x or v2.x checkpoint"),
    (("joint_blocks.",), "Stable Diffusion 3, a diffusion transformer", "use a v1.x or v2.x checkpoint"),
    (("double_blocks.", "single_blocks."), "Flux, a diffusion transformer", "use a v1.x or v2.x checkpoint"),
)  # fmt: skip
PARTS = (  # of Stable Diffusion, alone
    (("down_blocks.0.", "time_embedding."), "the U-Net of a diffusers folder",
     "give the folder that holds unet/, vae/ and text_encoder/"),
    (("decoder.conv_in",), "a VAE alone", WHOLE_FILE),
    (("decoder.mid",), "a VAE alone", WHOLE_FILE),
    (("text_model.encoder.layers",), "a text encoder alone", WHOLE_FILE),
    (("control_model.",), "a ControlNet", "minildm samples without one: give the base model"),
    (("emb_params",), "a textual inversion", "it adds a word to a base model: give the base here"),
)  # fmt: skip


class Other(NamedTuple):
    kind: str
    advice: str


def other_model(file):
    """What the TensorFile holds, as Other, unless its names are those of a whole single-file Stable Diffusion."""

    def has(part):
        return any(part in name for name in file.shapes)

    for parts, *other in OTHERS:
        if any(map(has, parts)):
            return Other(*other)
    if has(f"{UNET}label_emb."):
        kind = "SD v2.1 unCLIP, which samples from images" if has("cond_stage_model.") else "an SDXL model (refiner)"
        return Other(kind, "use a v1.x or v2.x text-to-image checkpoint")
    if has(UNET) and not any(name.startswith(ROOTS) for name in file.shapes):
        before = next(name for name in file.shapes if UNET in name).partition(UNET)[0]
        why = WRAPPERS.get(before, "which other tools put there")
        return Other(f"a model whose names begin with {before[:40]!r} ({why})", "save it without that prefix")
    for wrapper, why in WRAPPERS.items():
        if has(f"{UNET}{wrapper}"):
            return Other(f"a model with {wrapper!r} in its names ({why})", "save it without that")
    if has("model_ema.") and not has(UNET):
        return Other("the moving average of a training run alone", f"use the file with {UNET}*")
    if has(f"{UNET}input_blocks."):
        has_text = has("cond_stage_model.") or has("conditioner.embedders.0.")
        absent = ["first_stage_model."] * (not has("first_stage_model.")) + ["cond_stage_model."] * (not has_text)
        if not absent:
            return None
        return Other(f"a U-Net without {' and '.join(absent)}*", "use the file that holds all three networks")
    for parts, *other in PARTS:
        if all(map(has, parts)):
            return Other(*other)
    return Other(UNKNOWN, f"expected {', '.join(f'{root}*' for root in ROOTS)}")


def refuse_other_models(file):
    """Raise InputError if the TensorFile holds anything but all three networks, saying what it is."""
    if other := other_model(file):
        kind = f"{other.kind} ({_first_tensors(file)})" if other.kind == UNKNOWN else other.kind
        raise InputError(f"{file.path} is {kind}, not a Stable Diffusion v1.x / v2.x model; {other.advice}")


def _first_tensors(file):
    first = sorted(file.shapes)[:3]
    return f"its tensors: {', '.join(first)}, ..." if first else "it holds no tensors"


def other_input_channels(channels):
    """The error for a U-Net whose input does not have 4 channels: which model it is and what to use instead."""
    return (
        f"the U-Net reads {channels} channels ({INPUTS.get(channels, 'not a text-to-image model')}), expected 4; "
        "use the text-to-image checkpoint of the same release"
    )


def why_no_match(missing, unused):
    """The likely reason why names are missing while others are left over, as a clause; '' if there is none."""
    for part, why in WRAPPERS.items():
        if any(part in name and name.replace(part, "", 1) in missing for name in unused):
            return f"; names with {part!r} were {why}: save it without that"
    return ""
