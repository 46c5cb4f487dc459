"""The card of a pretrained model: README.md beside its weights."""

import numpy as np
import torch

from minildm.files import sha256, written_beside
from minildm.pretraining.stage import STAGES


def write_card(folder, command, plan, runs, seconds, psnr):
    """Write how the model was made, its loss curves as numbers, and the SHA-256 of its files.

    Args: command: makes the model again. plan: command.Plan. runs, seconds: {stage: Run}, {stage: time of training}.
    psnr: of reconstructions, in dB.
    """
    where = "a GPU" if plan.device.type == "cuda" else f"a CPU, threads: {torch.get_num_threads()}"
    lines = [
        f"# {folder.resolve().parent.name}: a latent diffusion model by minildm",
        "",
        f"Made by `{command}`",
        "",
        f"- data: {plan.goal.data}, {plan.goal.size} px; seed {plan.shared.seed}; products in {plan.goal.dtype}; "
        f"PyTorch {torch.__version__.split('+')[0]}",
    ]
    if plan.goal.decoder_of is not None:
        lines.append(f"- encoder, text encoder and U-Net: those of {plan.goal.decoder_of}")
    for stage in runs:
        settings = plan.stages[stage]
        lines.append(f"- {STAGES[stage].title}: {settings.steps:,} steps of {settings.batch_size} images in "
                     f"{seconds[stage] / 60:.0f} min")  # fmt: skip
    lines += [f"- on {where}; PSNR {psnr:.2f} dB on held-out images", "", "Not for clinical use.", ""]
    for stage, run in runs.items():
        entries = run.entries()
        validation = {entry["step"]: entry["validation"] for entry in entries if "validation" in entry}
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        what = {"diffusion": "loss", "text_encoder": "mean squared error of the code"}.get(stage, "mean squared error")
        lines += [f"| {stage}: step | training loss, mean of the 200 steps before | held-out {what} |", "|---|---|---|"]
        for step, value in validation.items():
            recent = losses[max(step - 200, 0) : step]
            lines.append(f"| {step:,} | {f'{np.mean(recent):.4f}' if recent else ''} | {value:.4f} |")
        lines.append("")
    lines += ["| file | bytes | SHA-256 |", "|---|---|---|"]
    for path in sorted(folder.rglob("*.safetensors")):
        lines.append(f"| `{path.relative_to(folder)}` | {path.stat().st_size:,} | `{sha256(path)}` |")
    with written_beside(folder / "README.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
