"""Fine-tune: python train.py --adapter selora --data folder:/my/images

Follows the data: records -> images -> latents, captions -> prompts -> trained weights.
With --instance-prompt: DreamBooth. On several GPUs: torchrun --nproc-per-node 4 train.py ...
"""

import dataclasses
import json
import shlex
import sys
import time

from minildm.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is imported

import torch

from minildm import distributed, kernels, load
from minildm.adapters.metadata import without_path
from minildm.data.cache import latent_cache
from minildm.data.open import open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.splits import split_by_patient
from minildm.errors import InputError, exit_cleanly
from minildm.loading import usable_device
from minildm.metrics.audit import FEWEST_HELD_OUT
from minildm.report.page import write_report
from minildm.torchrun import launcher
from minildm.training.command_line import FREE, check_texts, parse, sampling_flags
from minildm.training.dreambooth import DreamBooth, sample_class_images, split_instances
from minildm.training.dry_run import values_used
from minildm.training.finetune import Finetuning, Samples, contexts_folder, finetune, summary, usual_dtype
from minildm.training.machine import session_facts
from minildm.training.run import Run, begun_by_this_launch

GENERATED = "generated"  # the folder in a run's for the images that its last lines propose to make


def main(arguments):
    distributed.join()  # the other processes, if torchrun has started several
    plan = parse(arguments)
    if distributed.from_first(lambda: begun_by_this_launch(plan.out)):
        plan = dataclasses.replace(plan, resume=True)
    goal, dreambooth, config, machine = plan.goal, plan.dreambooth, plan.config, plan.machine
    if plan.dry_run:
        print(json.dumps(values_used(plan), indent=1))
        return 0
    if plan.preset:
        print(f"settings: --preset {plan.preset}, where no flag says otherwise (--dry-run shows all)")
    run = Run(plan.out, plan.settings, plan.resume, FREE, plan.method.result)

    # The base, in its precision
    start = time.perf_counter()
    device = usable_device(machine.device)
    dtype = getattr(torch, goal.dtype or usual_dtype(device))
    weights = torch.float32 if plan.method.float32_weights else dtype
    if weights != dtype and dtype == torch.float16:
        raise InputError(f"--adapter {goal.adapter} does not train in float16; give --dtype bfloat16 or float32")
    captioned = dreambooth.instance_prompt is None
    data = open_data_set(goal.data, plan.data, config.seed, captioned)
    for note in data.notes:
        print(f"note: {note}")
    texts = check_texts(data, plan.data, config.seed, captioned)  # what needs no image is checked before any is read
    model = load(goal.base, goal.on_top_of, device, weights, goal.prediction, goal.vae, vae_dtype=torch.float32)
    plan.method.check_fit(model, plan.method_settings)
    transform = plan.data.transform(model.config.image_size)
    print(f"{model.files.title}: {transform.size} px, base in {_name(weights)} on {device}, loaded in "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip

    known = {
        "base": model.base_hash,
        "vae": goal.vae and [model.vae_hash, model.config.vae.scaling_factor],
        "on_top_of": [without_path(one) for one in model.merged],
        "dtype": _name(dtype),
        "pixels": transform.size,
        "texts": texts,
    }
    run.expect(**known)

    # Records -> images -> latents, encoded once, in float32 whatever the precision of the rest
    products = machine.products(dtype, device, run)
    latents = latent_cache(data.records, transform, model.vae, machine.cache, skip_bad=plan.data.skip_bad)
    if unreadable := len(data.records) - len(latents.records):
        print(f"note: {unreadable:,} of {len(data.records):,} images cannot be decoded and are left out (--skip-bad)")
    data = dataclasses.replace(data, records=latents.records)

    # Captions -> prompts; splits by patient; for DreamBooth also images of the class, from the untrained base
    class_images = None
    if captioned:
        prompts = prompts_for(data, plan.data.prompt_template)
        indices = split_by_patient(data.records, plan.data.split, config.seed)
    else:
        prompts = [dreambooth.instance_prompt] * len(data.records)
        indices = split_instances(data.records, plan.data.split, config.seed)
        class_images = sample_class_images(model, dreambooth, transform.size, config.seed, machine.cache)
    samples = Samples(data.records, tuple(prompts), latents)
    splits = {name: samples.subset(members) for name, members in indices.items()}
    training, validation = splits["train"], splits.get("validation", samples.subset([]))
    run.begin(
        **known,
        products=products,
        data=samples.fingerprint,
        class_images=class_images and class_images.fingerprint,
        splits={name: [record.name for record in part.records] for name, part in splits.items()},
    )

    # Training
    run.start_session(**session_facts(device, f"{launcher()} {shlex.join(['train.py', *arguments])}"))
    options = {
        "contexts": contexts_folder(plan.method_settings, machine.cache),
        "balance": plan.data.balance,
        "workers": machine.workers,
        "precision": dtype if weights != dtype and products is None else None,
    }
    if captioned:
        task = Finetuning(model, training, validation, config, **options)
    else:
        task = DreamBooth(model, training, validation, config, class_images, dreambooth.weight, **options)
    sizes = ", ".join(f"{len(part.records):,} {name}" for name, part in splits.items())
    print(f"{data.name}: {sizes} images; {task.steps:,} steps of {config.batch_size}; run: {run.folder}")
    if products is not None and device.type == "cpu":
        kernels.products_in_float32(model)
    state, method = finetune(task, plan.method, plan.method_settings, run, machine)
    if not distributed.is_first():
        return 0
    print(summary(state, method, run))
    run.save_file("report.html", lambda path: print(f"report: {write_report([run.folder], path)}"))
    words = ["python", "sample.py", training.prompts[0], *sampling_flags(plan.settings, run.result, transform.size)]
    print(f"next: {shlex.join([*words, '-n', '4', '--out', str(run.folder / GENERATED)])}")
    if command := audit_command(run, {name: len(part.records) for name, part in splits.items()}):
        print(f"then: {command}  (does it copy training images?)")
    return 0


def audit_command(run, sizes):
    """The command that looks for copies of training images among those of `sample_command`; None without enough
    held-out images. Args: sizes: {split: number of images}."""
    sizes = sizes | {"held-out": sum(n for name, n in sizes.items() if name != "train")}
    holdout = next((name for name in ("test", "held-out") if sizes.get(name, 0) >= FEWEST_HELD_OUT), None)
    if holdout is None:
        return None
    words = ["python", "-m", "minildm", "audit", str(run.folder / GENERATED)]
    return shlex.join([*words, "--train", f"run:{run.folder}:train", "--holdout", f"run:{run.folder}:{holdout}"])


def _name(dtype):
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    exit_cleanly(main, sys.argv[1:])
