"""What keeps findings from a chest adapter? python tests/benchmarks/bench_captions.py [ADAPTER ...]

    difference   how much a word changes what the networks compute: the last positions of the context, and the U-Net's
                 prediction from one noisy latent at three timesteps, between prompts that differ in their diagnosis
    reading      (--read STEPS) an adapter on the text encoder alone learns to predict an image's code from its caption,
                 as in pretraining's second stage; to train on top of: train.py --on-top-of OUT --targets unet

Prints numbers and asserts nothing. Not for clinical use.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import minildm
from minildm.adapters import add_adapter, save_adapter
from minildm.data.cache import latent_cache
from minildm.data.open import DataSettings, open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.splits import split_by_patient
from minildm.loading import EMBEDDED
from minildm.pretraining.text_encoder import CaptionReader
from minildm.seeds import seeded
from minildm.settings import Parser
from minildm.teaching import ruler
from minildm.training.machine import CACHE

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


def read_captions(args):
    """Train LoRA on the text encoder, and a CaptionReader, by least squares; findings come equally often."""
    data = open_data_set(args.data, DataSettings())
    model = minildm.load(args.base, device="cpu")
    latents = latent_cache(data.records, DataSettings().transform(model.config.image_size), model.vae, CACHE)
    token_ids = model.tokenize(prompts_for(data))
    codes = model.config.vae.scaling_factor * torch.stack([latents.moments(i)[0] for i in range(len(data.records))])
    splits = split_by_patient(data.records, "80/16/4", 0)
    diagnoses = [record.fields["diagnosis"] for record in data.records]
    members = {}
    for i in splits["train"]:
        members.setdefault(diagnoses[i], []).append(i)
    add_adapter(model, kind="lora", rank=args.rank, targets=("text_encoder",))
    torch.manual_seed(0)
    reader = CaptionReader(model.text_encoder.config.width, model.text_encoder.config.n_heads, codes.shape[-1])
    adapter = [p for p in model.text_encoder.parameters() if p.requires_grad]
    rates = (args.lr, 1e-3)
    groups = [{"params": adapter}, {"params": list(reader.parameters())}]
    optimizer, rng, kinds = torch.optim.Adam(groups), np.random.default_rng(0), sorted(members)
    held_out = splits["validation"][:512]

    def loss_of(indices):
        return (reader(model.text_encoder(token_ids[indices])) - codes[indices]).square().mean()

    for step in range(args.read):
        share = min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / args.read))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = share * rate
        optimizer.zero_grad()
        loss_of([rng.choice(members[kinds[k]]) for k in rng.integers(len(kinds), size=32)]).backward()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            with torch.no_grad():
                error = loss_of(held_out)
            print(f"{step + 1} steps: held-out mean squared error of the code {error:.4f}", flush=True)
    plain = (codes[held_out] - codes[splits["train"]].mean(0)).square().mean()
    print(f"without the caption (the mean code): {plain:.4f}")
    report_predictions(model, reader, token_ids, held_out, diagnoses)
    save_adapter(model, args.out)
    print(f"wrote {args.out}")


@torch.no_grad()
def report_predictions(model, reader, token_ids, held_out, diagnoses):
    """What the ruler reads in the images that are predicted from held-out captions."""
    images = model.decode_latents(reader(model.text_encoder(token_ids[held_out])))
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()[:, 0].numpy()
    readings = ruler.measure(list(images))
    for finding in sorted(set(diagnoses)):
        seen = [
            ruler.obeys(reading, {"diagnosis": finding}).get("diagnosis")
            for reading, i in zip(readings, held_out)
            if diagnoses[i] == finding
        ]
        if None not in seen:
            print(f"    {finding:<20} shown by {100 * np.mean(seen):.0f} % of {len(seen)} predicted images")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", help="adapters to look at; none = the base alone")
    parser.add_argument("--base", type=Path, default=EMBEDDED)
    parser.add_argument("--read", type=int, metavar="STEPS", help="train the text encoder's adapter instead")
    parser.add_argument("--data", default="phantom:6000")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("captions.safetensors"))
    args = parser.parse_args()
    if args.read:
        read_captions(args)
        return
    difference("base", minildm.load(args.base, device="cpu"))
    for adapter in args.adapters:
        difference(adapter, minildm.load(args.base, [adapter], device="cpu"))


if __name__ == "__main__":
    main()
