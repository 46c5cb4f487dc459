"""What a file is when it is not a Stable Diffusion v1.x / v2.x model, and why its tensors do not fit: errors that name
the cause."""

from minildm.errors import InputError

WRAPPERS = {  # what others put into the names of a network's tensors
    "_orig_mod.": "saved from a network that torch.compile had wrapped",
    "module.": "saved from a network that DistributedDataParallel had wrapped",
    "base_layer.": "saved with a live PEFT adapter, which has to be merged first",
    "state_dict.": "saved with their place in a dictionary",
}
ROOTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")


def refuse_other_models(file):
    """Raise InputError if the TensorFile holds anything but all three networks, saying what it is."""

    def has(part):
        return any(part in name for name in file.shapes)

    def refuse(kind, advice):
        raise InputError(f"{file.path} is {kind}, not a Stable Diffusion v1.x / v2.x model; {advice}")

    if has("lora_") or has("hada_") or has(".lora."):
        refuse("an adapter (LoRA)", "it changes a base model and cannot be used alone: give the base here")
    if has("conditioner.embedders.") and (has("conditioner.embedders.1.") or has("diffusion_model.label_emb.")):
        refuse("an SDXL model (base or refiner)", "use a v1.x or v2.x checkpoint")
    if has("model.diffusion_model.joint_blocks") or has("double_blocks."):
        refuse("a diffusion transformer (SD 3, Flux)", "use a v1.x or v2.x checkpoint")
    if has("model.diffusion_model.") and not any(name.startswith(ROOTS) for name in file.shapes):
        before = next(name for name in file.shapes if "model.diffusion_model." in name).partition("model.")[0]
        why = WRAPPERS.get(before, "which other tools put there")
        refuse(f"a model whose names begin with {before!r} ({why})", "save it without that prefix")
    if has("model.diffusion_model._orig_mod."):
        refuse("a model with '_orig_mod.' in its names (torch.compile)", "save it without that")
    if has("model_ema.") and not has("model.diffusion_model."):
        refuse("the moving average of a training run alone", "use the file with model.diffusion_model.*")
    if has("model.diffusion_model.input_blocks."):
        text = not (has("cond_stage_model.") or has("conditioner.embedders.0."))
        absent = ["first_stage_model."] * (not has("first_stage_model.")) + ["cond_stage_model."] * text
        if absent:
            refuse(f"a U-Net without {' and '.join(absent)}*", "use the file that holds all three networks")
        return
    if has("down_blocks.0.") and has("time_embedding."):
        refuse("the U-Net of a diffusers folder", "give the folder that holds unet/, vae/ and text_encoder/")
    if has("decoder.conv_in") or has("decoder.mid"):
        refuse("a VAE alone", "give the file or folder that holds all three networks")
    if has("text_model.encoder.layers"):
        refuse("a text encoder alone", "give the file or folder that holds all three networks")
    first = ", ".join(sorted(file.shapes)[:3]) or "none"
    refuse(
        f"something else (its tensors: {first}, ...)",
        "expected model.diffusion_model.*, first_stage_model.*, cond_stage_model.*",
    )


def other_input_channels(channels):
    """The error for a U-Net whose input does not have 4 channels: which model it is and what to use instead."""
    kind = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth-guided model", 7: "an upscaler"}
    return (
        f"the U-Net reads {channels} channels ({kind.get(channels, 'not a text-to-image model')}), expected 4; "
        "use the text-to-image checkpoint of the same release"
    )


def why_no_match(missing, unused):
    """The likely reason why names are missing while others are left over, as a clause; '' if there is none."""
    for part, why in WRAPPERS.items():
        if any(part in name and name.replace(part, "", 1) in missing for name in unused):
            return f"; names with {part!r} were {why}: save it without that"
    return ""
