"""``python -m minildm adherence RUN|FAKE``: do images show what their prompts ask for, according to a ruler?

A ruler is two functions: ``measure``, from a grey image uint8 (H, W) to a reading, and ``obeys``, from a reading and
the fields of a prompt to {field: True or False}, without the fields it cannot judge. By default it is the phantom's
(teaching/ruler.py), for prompts in the form of its captions; --classifier gives another (classifier.py).
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import minildm
from minildm.errors import InputError
from minildm.files import writable_file
from minildm.metrics.clip import png_prompt
from minildm.metrics.sources import list_images, read_as_training, write_json
from minildm.settings import Parser, Settings, add_flags, from_flags, setting
from minildm.teaching import phantom, ruler


@dataclass(frozen=True)
class Agreement:
    share: float  # of the images that show what their own prompt asks for
    low: float  # 95 % interval of the share (Wilson)
    high: float
    chance: float | None  # that share with every other image's prompt: what ignoring the prompt gives; None: no other
    n: int  # images whose prompt asks for a value of this field


def prompt_adherence(images, wanted, measure, obeys):
    """Compare each image with its own prompt, and with all others' for the level of chance.

    Args:
        images: paths or records.
        wanted: the fields of each image's prompt.
        measure, obeys: the ruler.
    Returns: {field: Agreement}.
    """
    if len(images) != len(wanted) or not images:
        raise InputError(f"{len(images)} images and {len(wanted)} prompts: expected one prompt per image")
    readings = [measure(np.asarray(read_as_training(image).convert("L"))) for image in images]
    verdicts = [[obeys(reading, fields) for fields in wanted] for reading in readings]  # image i, prompt j
    result = {}
    for name in sorted({name for row in verdicts for verdict in row for name in verdict}):
        matched = [row[i][name] for i, row in enumerate(verdicts) if name in row[i]]
        mismatched = [
            verdict[name]
            for i, row in enumerate(verdicts)
            for j, verdict in enumerate(row)
            if i != j and name in verdict
        ]
        chance = float(np.mean(mismatched)) if mismatched else None
        share = float(np.mean(matched))
        result[name] = Agreement(share, *wilson(share, len(matched)), chance, len(matched))
    return result


def wilson(share, n, z=1.96):
    """95 % interval of a share of n independent trials (Wilson 1927, JASA 22, 209), also near 0 and 1."""
    centre, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


# --- the command -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ClassifierSettings(Settings):
    classifier: Path | None = setting(
        None, "your classifier in place of the phantom's ruler: FILE.py or TorchScript FILE.pt, both of them programs"
    )
    classifier_weights: Path | None = setting(None, "its weights, .safetensors, for a FILE.py")
    classes: tuple[str, ...] = setting((), "its classes, in the order of its logits, as prompts name them")
    classifier_size: int = setting(224, "pixels a side of the images it takes", at_least=8)


def phantom_fields(prompt):
    """The fields that a prompt in the form of a phantom's caption asks for: {"view": "PA", "diagnosis": ...}."""
    findings = "|".join(sorted(phantom.FINDINGS, key=len, reverse=True))
    places = sorted({place for _, places, _ in phantom.FINDINGS.values() for place in places if place}, key=len)
    patterns = {
        "view": r"view (PA|AP|LATERAL)\b",
        "sex": r"\b(male|female)\b",
        "diagnosis": rf"diagnosis ({findings})\b",
        "loc": rf"loc ({'|'.join(reversed(places))})\b",
    }
    found = {name: re.search(pattern, prompt) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in found.items() if match}


def main(argv):
    parser = Parser(prog="python -m minildm adherence", description="Do images show what their prompts ask for?")
    parser.add_argument("images", help="folder of images that hold their prompts, or a run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON file of results (default: adherence.json beside the images)"
    )
    add_flags(parser, ClassifierSettings, "ruler")
    arguments = parser.parse_args(argv)
    settings = from_flags(ClassifierSettings, arguments)
    folder = Path(arguments.images)
    images = list_images(folder / "generated" if (folder / "generated").is_dir() else folder)
    if not isinstance(images[0], Path):
        raise InputError(
            f"{arguments.images} is a data set; adherence expects generated images, which hold their prompts"
        )
    prompts = [png_prompt(path, "adherence reads prompts from PNG files of sample.py") for path in images]
    out = writable_file(images[0].parent / "adherence.json" if arguments.out is None else arguments.out)
    if settings.classifier is None:
        measure, obeys, wanted, name = ruler.measure, ruler.obeys, phantom_fields, "the phantom's ruler"
        advice = (
            "the phantom's ruler needs captions such as 'chest x-ray, view PA, diagnosis normal'; give --classifier"
        )
    else:
        from minildm.metrics.classifier import ClassifierRuler

        if len(settings.classes) < 2:
            raise InputError("--classifier needs the names of its classes, two or more: --classes normal effusion ...")
        own = ClassifierRuler(
            settings.classifier, settings.classifier_weights, settings.classes, settings.classifier_size
        )
        measure, obeys, wanted, name = own.measure, own.obeys, own.wanted, str(settings.classifier)
        advice = f"no prompt names exactly one of the classes {', '.join(settings.classes)}"
    fields = [wanted(prompt) for prompt in prompts]
    if not any(fields):
        raise InputError(f"no prompt of {len(prompts)} can be judged: {advice}")
    result = prompt_adherence(images, fields, measure, obeys)
    print(f"{len(images)} images, by {name}:")
    for field, found in result.items():
        interval = f"95 % interval {found.low:.1%} to {found.high:.1%}, n = {found.n}"
        chance = "unknown" if found.chance is None else f"{found.chance:.1%}"
        print(f"  {field:<10} as asked {found.share:.1%} ({interval}); by chance {chance}")
    fields = {field: asdict(found) for field, found in result.items()}
    write_json(out, {"fields": fields, "ruler": name, "minildm": minildm.__version__})
    print(f"wrote {out}")
    return 0
