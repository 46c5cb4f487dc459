"""python -m minildm adherence, by a user's classifier."""

import json

import pytest
import torch
from peers import assert_says
from PIL import Image
from safetensors.torch import save_file

from minildm.errors import InputError
from minildm.images import save_png
from minildm.metrics.adherence import main
from minildm.metrics.classifier import ClassifierRuler

SOURCE = """
import torch

class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        level = images.mean(dim=(1, 2, 3))
        return torch.stack([self.threshold - level, level - self.threshold], dim=1)
"""


@pytest.fixture
def classifier(tmp_path):
    """The flags of a classifier that calls images dark or bright."""
    (tmp_path / "own.py").write_text(SOURCE)
    save_file({"threshold": torch.tensor([0.5])}, tmp_path / "own.safetensors")
    words = ["--classifier", str(tmp_path / "own.py"), "--classifier-weights", str(tmp_path / "own.safetensors")]
    return [*words, "--classes", "dark", "bright", "--classifier-size", "32"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, (level, prompt) in enumerate(
        [(10, "a dark image"), (20, "a bright image"), (200, "Bright"), (220, "bright and dark"), (5, "dark")]
    ):
        image = Image.new("RGB", (40, 40), (level,) * 3)
        save_png(image, folder / f"{i:05d}-seed{i}.png", f"{prompt}\nSteps: 2, Seed: {i}")
    return folder


def test_shares_and_chance_by_a_users_classifier(images, classifier, capsys):
    assert main([str(images), *classifier]) == 0
    found = json.loads((images / "adherence.json").read_text())["fields"]["class"]
    assert found["n"] == 4 and found["share"] == 0.75  # the fourth prompt names both classes
    assert 0.2 < found["low"] < 0.75 < found["high"] < 1
    readings, asked = [0, 0, 1, 1, 0], {0: 0, 1: 1, 2: 1, 4: 0}
    pairs = [readings[i] == asked[j] for i in range(5) for j in asked if i != j]
    assert found["chance"] == pytest.approx(sum(pairs) / len(pairs))
    said = capsys.readouterr().out
    assert "75.0%" in said and "is a program, which now runs" in said


def test_torchscript_gives_the_same(images, classifier, tmp_path):
    class Dark(torch.nn.Module):
        def forward(self, images):
            level = images.mean(dim=(1, 2, 3))
            return torch.stack([0.5 - level, level - 0.5], dim=1)

    torch.jit.trace(Dark(), torch.rand(1, 3, 32, 32)).save(str(tmp_path / "own.pt"))
    main([str(images), *classifier, "--out", str(tmp_path / "a.json")])
    words = ["--classifier", str(tmp_path / "own.pt"), "--classes", "dark", "bright", "--classifier-size", "32"]
    main([str(images), *words, "--out", str(tmp_path / "b.json")])
    a, b = (json.loads((tmp_path / name).read_text())["fields"] for name in ("a.json", "b.json"))
    assert a == b


def test_a_longer_class_name_hides_those_within_it(classifier, tmp_path):
    ruler = ClassifierRuler(tmp_path / "own.py", tmp_path / "own.safetensors", ("effusion", "pleural effusion"), 32)
    assert ruler.wanted("chest x-ray, Pleural effusion") == {"class": "pleural effusion"}
    assert ruler.wanted("effusion") == {"class": "effusion"} and ruler.wanted("nodule") == {}
    assert ruler.wanted("effusion beside a pleural effusion") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: f[:2] + f[4:], "needs its weights"),
        (lambda f, t: [*f[:4], "--classes", "a", "b", "c"], "gives (2,) logits per image, expected 3"),
        (lambda f, t: [*f[:4], "--classes", "a"], "two or more"),
        (lambda f, t: [*f[:4], "--classes", "cat", "dog"], "names exactly one of the classes cat, dog"),
        (lambda f, t: ["--classifier", str(t / "own.safetensors"), *f[4:]], "neither Python (.py) nor TorchScript"),
    ],
)
def test_mistakes_are_errors_in_one_line(images, classifier, tmp_path, change, message):
    with pytest.raises(InputError) as error:
        main([str(images), *change(classifier, tmp_path)])
    assert_says(error, message)


@pytest.mark.parametrize("source", ["not python", "import nothing_of_this_name", SOURCE.replace("dim=1", "dim=7")])
def test_a_classifier_that_fails_is_an_error_in_one_line(images, classifier, tmp_path, source):
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(InputError) as error:
        main([str(images), *classifier])
    assert_says(error, "own.py fails", "Error")


def test_weights_of_another_network_are_refused(images, classifier, tmp_path):
    save_file({"other": torch.zeros(1)}, tmp_path / "own.safetensors")
    with pytest.raises(InputError) as error:
        main([str(images), *classifier])
    assert_says(error, "does not fit", "own.py")


def test_prompts_that_the_phantoms_ruler_cannot_read_are_said(images):
    with pytest.raises(InputError, match="no prompt of 5 can be judged: the phantom's ruler"):
        main([str(images)])
