"""What keeps findings from a chest adapter? python tests/benchmarks/bench_captions.py [ADAPTER ...]

How much a word changes what the networks compute: the last positions of the context, and the U-Net's prediction from
one noisy latent at three timesteps, between prompts that differ in their diagnosis. Prints numbers and asserts nothing.
Not for clinical use.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import minildm
from minildm.loading import EMBEDDED
from minildm.seeds import seeded
from minildm.settings import Parser

PROMPT = "chest x-ray, age 58 male, view PA, projection PA, modality DX, diagnosis {}"
FINDINGS = (
    "cardiomegaly",
    "pneumothorax, loc right",
    "pneumothorax, loc left",
    "pleural effusion, loc right",
    "pacemaker",
)


@torch.no_grad()
def difference(name, model):
    """Each finding against "normal"; and, to compare with, female against male."""
    normal = PROMPT.format("normal")
    prompts = {finding: PROMPT.format(finding) for finding in FINDINGS} | {"female": normal.replace("male", "female")}
    context = model.encode_prompt([normal, *prompts.values()])  # (n, 77, D)
    print(f"{name}: length of a context vector {context[0].norm(dim=-1).mean():.2f}")
    latents = torch.randn(1, 4, 16, 16, generator=seeded(0, "latents")).expand(len(context), -1, -1, -1)
    predictions = {t: model.unet(latents, torch.tensor(t), context) for t in (900, 600, 300)}
    for i, prompt in enumerate(prompts, 1):
        last = (context[i, -1] - context[0, -1]).norm()
        changes = [
            f"t = {t}: {(prediction[i] - prediction[0]).square().mean().sqrt():.3f}"
            for t, prediction in predictions.items()
        ]
        print(f"    {prompt:<28} context at the last position {last:.2f}; prediction, {', '.join(changes)}", flush=True)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", help="adapters to look at; none = the base alone")
    parser.add_argument("--base", type=Path, default=EMBEDDED)
    args = parser.parse_args()
    difference("base", minildm.load(args.base, device="cpu"))
    for adapter in args.adapters:
        difference(adapter, minildm.load(args.base, [adapter], device="cpu"))


if __name__ == "__main__":
    main()
