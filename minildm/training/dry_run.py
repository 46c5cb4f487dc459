"""train.py --dry-run: the settings that a run would use, also those that the machine, the base or the data decide.
Nothing is written, and no image is read."""

import sys

from minildm import checkpoint
from minildm.data.open import open_data_set
from minildm.data.splits import split_by_patient
from minildm.errors import InputError
from minildm.loading import find_base, usable_device
from minildm.training.finetune import usual_dtype


def values_used(plan):
    """All settings of a Plan, {name: value}; None where there is none, such as a limit that is off. What a base or data
    that cannot be opened would decide stays None, too, and a line on stderr says why."""
    settings = plan.settings
    for find in (_of_machine, _of_method, _of_base, _of_data):
        try:
            settings |= {name: value for name, value in find(plan).items() if settings.get(name) is None}
        except (InputError, FileNotFoundError) as error:
            print(f"note: not all values are known: {error}", file=sys.stderr)
    return settings


def _of_machine(plan):
    device = usable_device(plan.machine.device)
    return {"device": str(device), "dtype": usual_dtype(device), "micro_batch": plan.config.batch_size}


def _of_method(plan):
    if not hasattr(plan.method_settings, "alpha"):
        return {}
    return {"alpha": float(plan.method_settings.rank)}  # scale 1


def _of_base(plan):
    path = find_base() if plan.goal.base is None else plan.goal.base
    config = checkpoint.inspect(path, plan.goal.prediction).config
    return {"base": str(path), "prediction": config.schedule.prediction, "size": config.image_size}


def _of_data(plan):
    config, dreambooth, captioned = plan.config, plan.dreambooth, plan.dreambooth.instance_prompt is None
    data = open_data_set(plan.goal.data, plan.data, config.seed, captioned)
    found = {"prompt_template": data.prompt} if captioned else {}
    per_step = config.batch_size
    if dreambooth.class_prompt is not None:
        found |= {"class_images": dreambooth.n_class_images, "prior_weight": dreambooth.weight}
        per_step -= config.batch_size // 2 if dreambooth.n_class_images else 0
    try:
        sizes = {name: len(part) for name, part in split_by_patient(data.records, plan.data.split, config.seed).items()}
    except InputError:
        if captioned:
            raise
        sizes = {"train": len(data.records)}  # of a handful of images, all are trained on
    n = sizes["train"]
    found["steps"] = config.total_steps(n, per_step)
    found["epochs"] = round(found["steps"] * per_step / n, 2)
    if "validation" in sizes:
        found["validation_interval"] = config.steps_between_validations(n, per_step)
    return found
