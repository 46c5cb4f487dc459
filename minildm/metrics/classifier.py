"""A user's classifier as a ruler: does an image show the class that its prompt names?

Two forms. Both are programs: use them only if you trust their author.
- ``FILE.py`` with a class ``Classifier(torch.nn.Module)``, and its weights as .safetensors. Python code is executed.
- ``FILE.pt``, TorchScript. It can do anything that TorchScript can, such as writing files.
Either maps images (B, 3, s, s) float32 in [0, 1] to logits (B, classes), the classes in the order of --classes.
"""

import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from minildm.errors import InputError
from minildm.files import input_file


class ClassifierRuler:
    """``measure`` and ``obeys`` of a classifier (see adherence.py), for the field ``name``."""

    def __init__(self, path, weights, classes, size=224, name="class"):
        self.network, self.classes, self.size, self.name = open_classifier(path, weights), list(classes), size, name
        with failures_named(path):
            shape = tuple(self._logits(Image.new("RGB", (size, size))).shape)
        if shape != (len(self.classes),):
            raise InputError(
                f"{path} gives {shape} logits per image, expected {len(self.classes)}, one for each --classes"
            )

    def _logits(self, image):
        pixels = torch.from_numpy(np.array(image.convert("RGB").resize((self.size, self.size), Image.BILINEAR)))
        with torch.no_grad():
            return self.network(pixels.permute(2, 0, 1)[None].float() / 255)[0]

    def measure(self, grey):
        """The class of a grey image, uint8 (H, W)."""
        return self.classes[int(self._logits(Image.fromarray(grey)).argmax())]

    def obeys(self, reading, wanted):
        return {self.name: reading == wanted[self.name]} if self.name in wanted else {}

    def wanted(self, prompt):
        """The one class that a prompt names, as {name: class}; {} if it names none or several. "pleural effusion" does
        not name "effusion" as well."""
        found, text = [], prompt.lower()
        for name in sorted(self.classes, key=len, reverse=True):
            if name.lower() in text:
                found.append(name)
                text = text.replace(name.lower(), " ")
        return {self.name: found[0]} if len(found) == 1 else {}


@contextlib.contextmanager
def failures_named(path):
    """Any error of the user's program becomes an InputError that names its file."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{path} fails ({type(error).__name__}: {' '.join(str(error).split())[:150]})") from None


def open_classifier(path, weights=None):
    """The network of a FILE.py with weights, or of a TorchScript FILE.pt, in eval mode."""
    path = input_file(path, "--classifier")
    print(f"note: {path} is a program, which now runs; use only what you trust")
    if path.suffix != ".py":
        try:
            return torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:100]
            raise InputError(f"{path} is neither Python (.py) nor TorchScript ({reason})") from None
    if weights is None:
        raise InputError(f"{path} needs its weights: --classifier-weights FILE.safetensors")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with failures_named(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "Classifier"):
        raise InputError(f"{path} has no class Classifier(torch.nn.Module)")
    with failures_named(path):
        network = module.Classifier()
    try:
        network.load_state_dict(load_file(input_file(Path(weights), "--classifier-weights")))
    except (RuntimeError, SafetensorError) as error:
        raise InputError(f"{weights} does not fit {path}'s Classifier ({' '.join(str(error).split())[:150]})") from None
    return network.eval()
