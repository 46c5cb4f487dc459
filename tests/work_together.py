"""What several processes do at once for test_distributed.py, started by torchrun: work_together.py TASK FOLDER ..."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from made_data import folder as write_data
from made_runs import short_run, small_model
from test_training_dreambooth import dreambooth_run

import sample
from minildm import distributed
from minildm.adapters import METHODS
from minildm.data import cache
from minildm.data.cache import weights_fingerprint
from minildm.data.open import DataSettings, open_data_set
from minildm.data.reading import Transform
from minildm.errors import InputError, exit_cleanly
from minildm.metrics import audit, fid_score
from minildm.startup import prepare_process
from minildm.training import finetune

SHORT = {"steps": 6, "batch_size": 3, "expand_interval": 2, "prune_interval": 1, "final_share": 0.3, "ema_decay": 0.9}
SHORT |= {"save_interval": 3, "validation_interval": 3, "lr": 1e-3}
RUNS = (*METHODS, "dreambooth")


def everything(folder):
    """All below, in one start of the processes."""
    sums(folder)
    caches(folder)
    skip(folder)
    for name in RUNS:
        short(folder / name, name)
    short(folder / "resumed", "selora", resume=True)


def short(folder, name, resume=False, **changes):
    """A run of 6 steps of 3 samples. All processes must end with the same weights, to the last bit."""
    changes = SHORT | changes
    if name == "dreambooth":
        model, *_ = dreambooth_run(folder, validation=2, **changes)
    elif name == "full":  # Adam makes a step of lr even of a gradient that is rounding: that moves zeros
        model, *_ = short_run(folder, adapter=name, **changes | {"lr": 1e-5})
    else:
        more = {"sample_interval": 6, "samples": 1, "read_captions": 4} if name == "lora" else {}
        model, *_ = short_run(folder, adapter=name, resume=resume, **changes | more)
    found = distributed.gather_to_first(weights_fingerprint(model))
    assert found is None or len(set(found)) == 1, "processes have different weights"


def fail(folder):
    """A bug that shows in the second process alone."""

    def losses(model, batch, *arguments):
        return ordinary(model, batch, *arguments) * (1 if distributed.is_first() else 1 / 0)

    ordinary, finetune.denoising_losses = finetune.denoising_losses, losses
    short_run(folder / "run", **SHORT)


def skip(folder):
    """At the third of six steps, the loss is not finite in the last process alone."""

    def losses(model, batch, *arguments):
        bad = distributed.GROUP["index"] == distributed.count() - 1 and 2 in batch["id"] // SHORT["batch_size"]
        return ordinary(model, batch, *arguments) * (math.nan if bad else 1)

    ordinary, finetune.denoising_losses = finetune.denoising_losses, losses
    short(folder / "skipped", "selora")
    finetune.denoising_losses = ordinary


def sums(folder):
    """`sum_over_processes` of tensors of several types, in several buckets; what each process gets is saved."""
    index, most = distributed.GROUP["index"], distributed.BUCKET_BYTES
    tensors = [
        torch.full((3, 5), index + 0.5),
        torch.full((2,), 2.0**-200 * (index + 1), dtype=torch.float64),  # as SeLoRA's sums: float32 would lose them
        torch.arange(40.0).view(8, 5).t().contiguous().t(),  # not contiguous
        torch.tensor(float(index)),
    ]
    distributed.BUCKET_BYTES = 100
    distributed.sum_over_processes(tensors)
    distributed.BUCKET_BYTES = most
    distributed.require_same(tensors[:1])
    with pytest.raises(InputError, match="weights have drifted apart"):
        distributed.require_same([tensors[0], torch.tensor([1.0 + index * 2**-23])])
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), index + 1.0)
    if index == 0:
        parameters[1].grad = torch.ones(2)  # the third has none in any process
    loss = torch.tensor(float(index))
    distributed.sum_gradients(parameters, [loss])
    torch.save(tensors, folder / f"sums-{index}.pt")
    torch.save([loss, *(parameter.grad for parameter in parameters)], folder / f"gradients-{index}.pt")


def caches(folder):
    """Encode 20 images and 11 prompts in blocks of 4; how many this process encoded is saved."""
    model, counts = small_model(), {"images": 0, "prompts": 0}
    if distributed.is_first():
        write_data(folder / "data", 20)
    distributed.wait_for_all()

    def count(kind, encode):
        def counting(batch):
            counts[kind] += len(batch)
            time.sleep(0.2)  # so that the others come to their turn
            return encode(batch)

        return counting

    model.vae.encode = count("images", model.vae.encode)
    text_encoder = model.text_encoder
    text_encoder.forward = count("prompts", text_encoder.forward)
    before, cache.ROWS_PER_SHARD = cache.ROWS_PER_SHARD, 4
    records = open_data_set(f"folder:{folder / 'data'}", DataSettings(), 0).records
    latents = cache.latent_cache(records, Transform(64), model.vae, folder / "cache", batch_size=2)
    contexts = cache.context_cache([f"image {i}" for i in range(11)], model.tokenize, text_encoder, folder / "cache")
    cache.ROWS_PER_SHARD = before
    assert all(latents.moments(i)[0].isfinite().all() for i in range(20)) and len(contexts) == 11
    assert all(contexts[i].isfinite().all() for i in range(11))
    (folder / f"cached-{distributed.GROUP['index']}.json").write_text(json.dumps(counts))


def use(place, out):
    """The commands that share their work: images of a file of prompts, FID, the audit."""
    words = f"--prompts {place}/prompts.txt --base {place}/base --sampler dpm++ --steps 2 --batch-size 2 --device cpu"
    assert sample.main([*words.split(), "--out", f"{out}/images"]) == 0
    distributed.wait_for_all()
    common = f"--features vae --base {place}/base --device cpu --batch-size 4 --out {out}"
    assert fid_score.main(f"{place}/data/images {out}/images {common}/fid.json --replicates 2".split()) == 0
    held_out = f"--train {place}/data/images --holdout {place}/held-out/images"
    assert audit.main(f"{out}/images {held_out} {common}/audit".split()) == 0


def main(task, *folders):
    distributed.join()
    globals()[task](*map(Path, folders))
    return 0


if __name__ == "__main__":
    prepare_process()
    exit_cleanly(main, *sys.argv[1:])
