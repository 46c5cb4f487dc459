"""What --read-captions teaches: how much of what each word changes in a phantom's code the text encoder has learned.

    python tests/benchmarks/bench_reading.py --data phantom:6000 --steps 1000
    python tests/benchmarks/bench_reading.py --data phantom:6000 --steps 1000 --reader attention --targets squared-error

A word's true effect is estimated by least squares from held-out images' codes, on view, sex and finding (with its
side); its learned effect in the same way from the codes that the reader predicts from their captions. The share is
learned . true / training . true, where "training" is the estimate from the training images, whose errors are others: 1
= all of it, 0 = nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import minildm
from minildm.adapters import METHODS
from minildm.data.cache import latent_cache
from minildm.data.open import DataSettings, open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.splits import split_by_patient
from minildm.loading import EMBEDDED
from minildm.pretraining import text_encoder
from minildm.training import reading
from minildm.training.config import TrainingConfig
from minildm.training.finetune import Finetuning, Samples
from minildm.training.machine import CACHE


class AttentionReader(text_encoder.CaptionReader):
    """That of pretraining: a query for each patch has to find the words."""

    def __init__(self, width, n, device=None):
        super().__init__(width, 4, round((n / 4) ** 0.5))

    def forward(self, context):
        return super().forward(context).flatten(1)


class Unchanged:
    """Ordinary squared error, in units of the mean variance."""

    def __init__(self, codes):
        self.mean, self.matrix = codes.mean(0), torch.eye(codes.shape[1]) / codes.var(0).mean().sqrt()

    def __call__(self, codes):
        return (codes - self.mean) @ self.matrix


def words_of(fields):
    """The words of a record whose effects are measured; of these, a normal PA of a woman has none."""
    side = fields.get("loc", "").split(" ")[0] if fields["diagnosis"] in ("pleural effusion", "pneumothorax") else ""
    finding = f"{fields['diagnosis']} {side}".strip()
    return {fields["view"], fields["sex"], finding} - {"PA", "female", "normal"}


def effects(codes, records):
    """{word: its effect (n,)}: least squares of the codes (N, n) on a constant and the words."""
    found = [words_of(record.fields) for record in records]
    names = sorted(set().union(*found))
    design = torch.tensor([[1.0, *(float(name in words) for name in names)] for words in found])
    return dict(zip(names, torch.linalg.lstsq(design, codes).solution[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="phantom:6000")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--adapter", default="lora", choices=("lora", "full"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--reader", default="linear", choices=("linear", "attention"))
    parser.add_argument("--targets", default="whitened", choices=("whitened", "squared-error"))
    parser.add_argument("--rate", type=float, default=reading.RATE, help="learning rate of the reader")
    parser.add_argument("--factor", type=float, help="of the rate, for the text encoder")
    args = parser.parse_args()

    settings = DataSettings(balance="diagnosis")
    data = open_data_set(args.data, settings)
    model = minildm.load(EMBEDDED, device="cpu")
    latents = latent_cache(data.records, settings.transform(model.config.image_size), model.vae, CACHE)
    everything = Samples(data.records, prompts_for(data), latents)
    splits = split_by_patient(data.records, "80/16/4", 0)
    training, held_out = everything.subset(splits["train"]), everything.subset(splits["validation"])
    task = Finetuning(model, training, held_out, TrainingConfig(batch_size=16), balance="diagnosis")
    targets = {"targets": ("unet", "text_encoder")} | ({} if args.adapter == "full" else {"rank": args.rank})
    method_class = METHODS[args.adapter]
    method = method_class(model, method_class.settings_class(**targets), 1, 0)

    torch.manual_seed(0)
    made = {}
    readers = {"linear": reading.MeanReader, "attention": AttentionReader}
    whitenings = {"whitened": reading.Whitening, "squared-error": Unchanged}
    reading.MeanReader = lambda *a, **k: made.setdefault("reader", readers[args.reader](*a, **k))
    reading.Whitening = lambda *a: made.setdefault("whiten", whitenings[args.targets](*a))
    reading.RATE = args.rate
    usual = reading.WHOLE_ENCODER if method.float32_weights else 1
    trained = [p for name, p in method.trained().items() if name.startswith("text_encoder.")]
    begun = time.perf_counter()
    reading._read(task, trained, usual if args.factor is None else args.factor, args.steps)
    seconds = time.perf_counter() - begun

    with torch.no_grad():
        codes, training_codes = (
            torch.cat([reading._code(task, pair["mean"][None]) for pair in pairs])
            for pairs in (task.validation_pairs, task.pairs)
        )
        predicted = torch.cat([made["reader"](model.encode_prompt([prompt])) for prompt in held_out.prompts])
        predicted = predicted @ torch.linalg.inv(made["whiten"].matrix)
    learned = effects(predicted, held_out.records)
    true, in_training = effects(codes, held_out.records), effects(training_codes, training.records)
    shares = {word: (learned[word] @ true[word] / (in_training[word] @ true[word])).item() for word in true}
    print(f"{args.reader} reader, {args.targets}, {args.adapter}: {16 * args.steps:,} captions in {seconds:.0f} s")
    print(", ".join(f"{word} {share:.2f}" for word, share in shares.items()))


if __name__ == "__main__":
    main()
