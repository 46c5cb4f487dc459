"""What a single file says about itself beyond its shapes: in metadata (github.com/Stability-AI/ModelSpec) and by marks,
tensors that only have to be there. It is believed, or refused where it contradicts itself. A pickle has no metadata.

And a warning for any layout: of tokens that only its own tokenizer knows.
"""

import re
import warnings

import torch

from minildm.config import VOCABULARY, ScheduleConfig
from minildm.errors import InputError
from minildm.schedule import NoiseSchedule

PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # the second is ComfyUI's
NAMES = {"epsilon": "epsilon", "eps": "epsilon", "v": "v", "v_prediction": "v"}


def prediction_statements(file):
    """{where the TensorFile says what its U-Net predicts: "epsilon", "v", or else what it says}."""
    stated = {"the tensor v_pred": "v"} if "v_pred" in file.shapes else {}
    for key in PREDICTION_KEYS:
        if said := file.metadata.get(key, "").strip():
            stated[key] = NAMES.get(said.lower(), said)
    if file.metadata.get("modelspec.architecture", "").endswith("-768-v"):
        stated["modelspec.architecture"] = "v"
    return stated


def stated_prediction(file, strict=True):
    """What the file says that the U-Net predicts, "epsilon" or "v"; None if nothing.

    Raises InputError if it says two things, or another one; unless ``strict``, that counts as nothing.
    """
    stated = prediction_statements(file)
    said = set(stated.values())
    if not said or said == {"v"} or said == {"epsilon"}:
        return next(iter(said), None)
    if not strict:
        return None
    says = " and ".join(f"{where} = {what[:40]!r}" for where, what in stated.items())
    raise InputError(f"{file.path} has {says}, expected epsilon or v, and one of them; say which with --prediction")


def stated_pixels(file):
    """The image size in the file's metadata, such as "768x768" or "768", if it is square; else None."""
    match = re.fullmatch(r"(\d{2,4})(?:x\1)?", file.metadata.get("modelspec.resolution", ""))
    return int(match[1]) if match and int(match[1]) % 8 == 0 and int(match[1]) else None


def warn_of_clip_skip(file):
    """Warn if the file was trained with an earlier layer of the text encoder than the last, which is used here."""
    layer = file.metadata.get("modelspec.encoder_layer", "1").strip()
    if layer not in ("", "1"):
        warnings.warn(
            f"{file.path} was trained with text features from layer {layer[:40]} from the end (clip skip; "
            "modelspec.encoder_layer), minildm always takes the last; prompts will mean something slightly else",
            stacklevel=6,
        )


def warn_of_added_tokens(path, text_encoder, added=()):
    """Warn if the TextEncoderConfig has embeddings beyond CLIP's vocabulary, or its tokenizer the tokens ``added``."""
    if n := max(len(added), text_encoder.vocabulary - VOCABULARY):
        first = f" ({', '.join(sorted(added)[:3])}{', ...' * (len(added) > 3)})" if added else ""
        warnings.warn(
            f"{path} has {n} token{'s' * (n > 1)} beyond CLIP's{first}, as textual inversion adds them; minildm's "
            "tokenizer does not, so prompts with them mean something else",
            stacklevel=5,
        )


def stated_schedule(file, prediction):
    """Stable Diffusion's schedule; with zero terminal SNR if a tensor ``ztsnr`` or the file's own table says so."""
    usual = NoiseSchedule().alphas_cumprod
    zero = "ztsnr" in file.shapes
    if not zero and (table := _alphas_cumprod(file, tuple(usual.shape))) is not None:
        rescaled = NoiseSchedule("v", zero_terminal_snr=True).alphas_cumprod
        zero = torch.allclose(table, rescaled, atol=1e-3)
        if not zero and not torch.allclose(table, usual, atol=1e-3):  # in float16 it is 5e-4 off
            warnings.warn(
                f"{file.path} holds another noise schedule (alphas_cumprod) than Stable Diffusion's, by up to "
                f"{(table - usual).abs().max():.3g}; it is not used, as it often is what merging tools left behind",
                stacklevel=6,
            )
    if zero:  # which only makes sense if sampling begins at the last timestep
        return ScheduleConfig(prediction=prediction, zero_terminal_snr=True, timestep_spacing="trailing")
    return ScheduleConfig(prediction=prediction)


def _alphas_cumprod(file, shape):
    """The file's table as float32; None if it has none of this shape."""
    dtype = file.dtypes.get("alphas_cumprod")
    if file.shapes.get("alphas_cumprod") != shape or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    ((_, table),) = file.tensors(["alphas_cumprod"])
    return table.float()
