"""The record in a generated PNG: all that is needed to generate it again (like.py), as JSON.

The same prompt, seed and settings give the same image, but the same bits need more: a product of matrices rounds
differently for another number of rows, on another number of CPU threads and with another torch. So the record also
holds the size of the batch, the image's row in it and the threads. What the other rows hold does not matter; to make
one image again, the batch is filled with copies of it. Paths are recorded as given, so they may say more than you want
to share; of a file that was not given, only the name.

This module does not import torch, so that a mistake on the command line is reported at once.
"""

import threading

from minildm import __version__
from minildm.errors import InputError
from minildm.files import parse_json, sha256
from minildm.images import RECORD, read_text
from minildm.sampling import describe_adapters, describe_image

SCHEMA = 1
LARGEST_BATCH = 4096  # a damaged record cannot ask for more

NUMBER, FILE = (int, float), {"path": str, "given": bool, "sha256": str}
FORM = {  # what `read_record` expects: a type, several in a tuple, None; a list of one form for lists
    "prompt": str,
    "negative_prompt": str,
    "sampling": {  # SamplingSettings; the seed is this image's
        "sampler": str,
        "steps": int,
        "guidance": NUMBER,
        "eta": NUMBER,
        "karras": bool,
        "seed": int,
        "height": int,
        "width": int,
        "strength": (*NUMBER, None),
    },
    "init_image": (FILE, None),
    "base": FILE,  # path: as given, or as found where none was given
    "vae": (FILE, None),
    "adapters": [FILE | {"multiplier": NUMBER, "rank": (int, None)}],
    "prediction": str,
    "dtype": str,
    "products": str,  # float32 where bfloat16 was slower (kernels.float32_is_faster), else as dtype
    "vae_dtype": str,  # float32 once the VAE has overflowed in half precision
    "compile": bool,
    "plain": bool,
    "batch": {"size": int, "index": int},
    "machine": {"device": str, "processor": str, "threads": int},
    "versions": {"minildm": str, "torch": str},
}


# --- writing ---------------------------------------------------------------------------------------------------------
class Request:
    """What all images of one call of sample.py share, and what is written into each PNG.

    Args:
        args: the flags, of which base, adapter, negative, compile and plain are used.
        settings: complete SamplingSettings. model: LatentDiffusion.
        adapters: as chosen for it. init_image: InitImage or None.
    """

    def __init__(self, args, settings, model, adapters, init_image):
        self.args, self.settings, self.model, self.init_image = args, settings, model, init_image
        self.adapter_text = describe_adapters(adapters)
        self.adapters = _describe_adapters(adapters, args.adapter)
        vae_path = model.files.vae_path
        self.files = {  # as flags name them
            "base": [str(model.files.path)],
            "vae": [] if vae_path is None else [str(vae_path)],
            "adapters": list(adapters),
        }
        self.hashing = threading.Thread(target=lambda: model.base_hash, daemon=True)
        self.hashing.start()  # takes seconds for a large base, so it runs during the sampling

    def parameters(self, image):
        """The ``parameters`` text of a PlannedImage."""
        self.hashing.join()
        text = self.adapter_text
        return describe_image(image, self.args.negative, self.settings, self.model, text, self.init_image)

    def record(self, image, batch):
        """The record of a PlannedImage that was generated as one of ``batch``, a dict for JSON."""
        self.hashing.join()
        model, init_image, vae_path = self.model, self.init_image, self.model.files.vae_path
        return {
            "schema": SCHEMA,
            "prompt": image.prompt,
            "negative_prompt": self.args.negative,
            "sampling": self.settings.as_json() | {"seed": image.seed},
            "init_image": None if init_image is None else _describe_file(init_image.path, init_image.sha256),
            "base": _describe_file(model.files.path, model.base_hash, given=self.args.base is not None),
            "vae": None if vae_path is None else _describe_file(vae_path, model.vae_hash),
            "adapters": self.adapters,
            "prediction": model.config.schedule.prediction,
            "dtype": dtype_name(model.precision),
            "products": dtype_name(model.dtype),
            "vae_dtype": dtype_name(next(model.vae.parameters()).dtype),
            "compile": self.args.compile,
            "plain": self.args.plain,
            "batch": {"size": len(batch), "index": batch.index(image)},
            **machine_of(model.device),
        }


def _describe_file(path, digest, given=True):
    return {"path": str(path) if given else path.name, "given": given, "sha256": digest}


def _describe_adapters(adapters, given):
    """``given``: those of the adapters that flags name; others come with the base, or lie below a given one."""
    from minildm.loading import parse_adapter

    described = []
    for adapter in adapters:
        path, multiplier, rank = parse_adapter(adapter)
        file = _describe_file(path, sha256(path), given=adapter in given)
        described.append(file | {"multiplier": multiplier, "rank": rank})
    return described


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def machine_of(device):
    """Where the computing is done, as far as it changes how results are rounded."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "machine": {
            "device": str(device),
            "processor": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"minildm": __version__, "torch": torch.__version__},
    }


# --- reading ---------------------------------------------------------------------------------------------------------
def read_record(path):
    """The record of a PNG, or None if it holds none. Raises InputError if it is damaged or of a later schema."""
    text = read_text(path).get(RECORD)
    if text is None:
        return None
    record = parse_json(text, f"{path}: its record (chunk {RECORD!r})")
    schema = record.get("schema")
    if schema != SCHEMA:
        raise InputError(
            f"{path}: its record has schema {str(schema)[:20]!r}, expected {SCHEMA}; it was written by another version "
            "of minildm"
        )
    if wrong := _mismatch(record, FORM):
        raise InputError(f"{path}: its record is damaged at {wrong}; get the image again")
    if not 0 <= record["batch"]["index"] < record["batch"]["size"] <= LARGEST_BATCH:
        raise InputError(f"{path}: its record is damaged at batch; get the image again")
    return record


def _mismatch(value, form, name=""):
    """Where ``value`` differs from ``form``, as a dotted name; None where it does not."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return name
        parts = ((value.get(key, ...), part, f"{name}.{key}".lstrip(".")) for key, part in form.items())
        return next((wrong for part in parts if (wrong := _mismatch(*part))), None)
    if isinstance(form, list):
        if not isinstance(value, list):
            return name
        return next((wrong for i, each in enumerate(value) if (wrong := _mismatch(each, form[0], f"{name}.{i}"))), None)
    if isinstance(form, tuple):
        found = [_mismatch(value, each, name) for each in form]
        return None if None in found else found[0]
    if form is None:
        return None if value is None else name
    return None if isinstance(value, form) and (form is bool or not isinstance(value, bool)) else name
