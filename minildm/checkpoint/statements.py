"""What a single file says about itself beyond its shapes: in metadata (github.com/Stability-AI/ModelSpec) and by marks,
tensors that only have to be there.

It is believed, or refused where it contradicts itself. A pickle has no metadata.
"""

import re
import warnings

import torch

from minildm.config import ScheduleConfig
from minildm.errors import InputError
from minildm.schedule import NoiseSchedule


def stated_prediction(file, strict=True):
    """What the file says that the U-Net predicts, "epsilon" or "v"; None if nothing.

    Raises InputError if it says two things, or another one; unless ``strict``, that counts as nothing.
    """
    stated = {}
    if "v_pred" in file.shapes:
        stated["a tensor v_pred"] = "v"
    if (said := file.metadata.get("modelspec.prediction_type")) is not None:
        stated[f"modelspec.prediction_type {said!r}"] = {"v_prediction": "v"}.get(said, said)
    if file.metadata.get("modelspec.architecture", "").endswith("-768-v"):
        stated["modelspec.architecture"] = "v"
    if set(stated.values()) <= {"v"} or set(stated.values()) == {"epsilon"}:
        return next(iter(stated.values()), None)
    if not strict:
        return None
    raise InputError(
        f"{file.path} has {' and '.join(stated)}, expected epsilon or v, and one of them; say which with --prediction"
    )


def stated_pixels(file):
    """The image size in the file's metadata, such as "768x768" or "768", if it is square; else None."""
    match = re.fullmatch(r"(\d{2,4})(?:x\1)?", file.metadata.get("modelspec.resolution", ""))
    return int(match[1]) if match and int(match[1]) % 8 == 0 and int(match[1]) else None


def stated_schedule(file, prediction):
    """Stable Diffusion's schedule; with zero terminal SNR if a tensor ``ztsnr`` or the file's own table says so."""
    usual = NoiseSchedule().alphas_cumprod
    zero = "ztsnr" in file.shapes
    if not zero and file.shapes.get("alphas_cumprod") == tuple(usual.shape):
        ((_, table),) = file.tensors(["alphas_cumprod"])
        table = table.float()
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
