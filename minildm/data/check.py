"""``python -m minildm check DATA``: find everything that would stop or spoil a run, before the run.

Every image is decoded and every prompt tokenized as a run would do it. The report is printed and written to --out:
``check.json``; ``contact_sheet.png``, a sample of the images followed by the suspicious ones in red frames; and
``flagged.txt``, the suspicious images (name, tab, reasons), which can be edited and passed to ``--exclude``.
"""

import dataclasses
import json
import re
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from minildm.config import MAX_TOKENS
from minildm.data import screening
from minildm.data.open import DataSettings, count_unread, open_data_set
from minildm.data.prompts import TEMPLATES, prompts_for
from minildm.data.reading import read
from minildm.data.splits import classes_of, split_by_patient
from minildm.errors import InputError
from minildm.files import writable_folder, written_beside
from minildm.progress import Progress
from minildm.settings import Parser, add_flags, at_least, from_flags
from minildm.tokenizer import Tokenizer

DEFAULT_SIZE = 512  # pixels
DEIDENTIFIED = re.compile(r"XXXX|_{3,}|\[REDACTED\]")  # what Open-i, MIMIC-CXR and others write for removed words
COMMON_SHARE = 0.2  # a warning that more of the images have is a property of the data set
THUMBNAIL, COLUMNS = 144, 10  # the contact sheet: pixels, images per row
MAX_SAMPLED, MAX_SUSPICIOUS = 60, 30  # images of each sort on it


def main(arguments):
    parser = data_parser("check", "Find everything that would stop or spoil a run, before the run.")
    parser.add_argument("--out", default="check", help="folder for the results")
    parser.add_argument("--workers", type=at_least(1), default=2, help="threads that decode images")
    arguments = parser.parse_args(arguments)
    settings = from_flags(DataSettings, arguments)
    out = writable_folder(arguments.out)
    data_set = open_data_set(arguments.data, settings, arguments.seed)
    transform = settings.transform(DEFAULT_SIZE)

    images, broken = examine(data_set.records, transform, arguments.workers)
    if settings.skip_bad:  # a run divides among its splits only what it can read
        data_set = dataclasses.replace(data_set, records=tuple(data_set.records[i] for i in images))
        images = dict(enumerate(images.values()))
    suspects = find_suspects(data_set.records, images)
    report = make_report(data_set, settings, arguments.seed, images, broken, suspects)
    readable = [data_set.records[i] for i in images]
    write_results(out, report, review_sheet(readable, suspects.warnings, transform))

    print("\n".join(as_text(report)))
    print(f"\nwritten: {out / 'check.json'}, {out / 'contact_sheet.png'}, {out / 'flagged.txt'}")
    if report["faults"]:
        print("a run would fail: " + "; ".join(report["faults"]))
        return 1
    print(f"a run can use this data; next: python -m minildm prompts {arguments.data}")
    return 0


def data_parser(command, description):
    """The parser of ``check`` and ``prompts``: the data set, the seed and the data flags."""
    parser = Parser(prog=f"python -m minildm {command}", description=description)
    parser.add_argument("data", metavar="DATA", help="name:path, such as padchest:/data/PadChest")
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed of --split and --limit")
    add_flags(parser, DataSettings, "data")
    return parser


# --- the images -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ImageFacts:
    """What the check needs to know about a decoded image; about 2 kB."""

    width: int  # pixels, before any crop
    height: int
    kind: str  # as in DecodedImage
    greys: str
    key: str  # hash of the file's bytes
    perceptual_hash: np.ndarray  # as computed by screening.perceptual_hash ...
    small_grey: np.ndarray  # ... and screening.small_grey
    warnings: list[str]  # screening.find_warnings


def examine(records, transform, workers):
    """Decode every image. Returns: {index: ImageFacts}, and {index: error} for those that cannot be decoded."""

    def facts(record):
        try:
            # whole: a run decodes large JPEGs at a reduced scale, which would hide the real size
            _, decoded, key = read(record, transform, whole=True)
        except InputError as error:
            return str(error)
        height, width = decoded.pixels.shape[:2]
        return ImageFacts(
            width,
            height,
            decoded.kind,
            decoded.greys,
            key.hex(),
            screening.perceptual_hash(decoded.pixels),
            screening.small_grey(decoded.pixels),
            screening.find_warnings(decoded.pixels),
        )

    with ThreadPoolExecutor(workers) as pool:
        results = list(Progress("decoding", "image", len(records), pool.map(facts, records)))
    images = {i: result for i, result in enumerate(results) if isinstance(result, ImageFacts)}
    return images, {i: result for i, result in enumerate(results) if i not in images}


@dataclass(frozen=True)
class Suspects:
    """The images a person should look at."""

    warnings: dict[str, list[str]]  # record name -> reasons
    common: dict[str, int]  # warnings so frequent that they describe the data set, and how many images have them
    identical: list[list[str]]  # names of records with the same file content
    duplicates: list[list[int]]  # groups of indices of records that show nearly or exactly the same image


def find_suspects(records, images):
    """Screening warnings, identical files and near-duplicates among ``images``, {index: ImageFacts}."""
    counts = Counter(phrase(warning) for facts in images.values() for warning in facts.warnings)
    common = {warning: count for warning, count in counts.items() if count > COMMON_SHARE * len(images)}
    warnings = {}
    for i, facts in images.items():
        if unusual := [warning for warning in facts.warnings if phrase(warning) not in common]:
            warnings[records[i].name] = unusual

    same_file = {}  # key -> indices
    for i, facts in images.items():
        same_file.setdefault(facts.key, []).append(i)
    identical = [[records[i].name for i in members] for members in same_file.values() if len(members) > 1]
    for first, *others in identical:
        for name in others:
            warnings.setdefault(name, []).append(f"the same file as {first}")

    firsts = [members[0] for members in same_file.values()]
    alike = []  # groups of these
    if firsts:
        hashes = np.stack([images[i].perceptual_hash for i in firsts])
        greys = np.stack([images[i].small_grey for i in firsts])
        alike = [[firsts[k] for k in group] for group in screening.near_duplicates(hashes, greys)]
    for first, *others in alike:
        for i in others:
            warnings.setdefault(records[i].name, []).append(f"nearly the same image as {records[first].name}")
    grouped = {i for group in alike for i in group}
    groups = [sorted(i for first in group for i in same_file[images[first].key]) for group in alike]
    duplicates = groups + [members for members in same_file.values() if len(members) > 1 and members[0] not in grouped]
    return Suspects(warnings, common, identical, duplicates)


def phrase(warning):
    """A warning without its numbers and names, for counting."""
    return re.split(r":| as ", warning)[0]


# --- the report -------------------------------------------------------------------------------------------------------
def make_report(data_set, settings, seed, images, broken, suspects):
    """The content of check.json, a dict. Its keys are a file format; ``faults`` lists what would stop a run."""
    faults = []
    if broken and not settings.skip_bad:
        faults.append(f"{len(broken):,} images cannot be decoded (--skip-bad leaves them out)")

    def or_fault(describe, *arguments):
        try:
            return describe(*arguments)
        except InputError as error:
            faults.append(str(error))

    template = data_set.prompt if settings.prompt_template is None else settings.prompt_template
    classes = or_fault(describe_classes, data_set.records, settings.balance) if settings.balance else None
    captions = or_fault(describe_captions, data_set, settings.prompt_template)
    splits = or_fault(describe_splits, data_set.records, settings.split, seed, suspects.duplicates)
    return {
        "data": data_set.name,
        "pictures": len(data_set),
        "notes": list(data_set.notes),
        "transform": str(settings.transform(DEFAULT_SIZE)),
        "patients": len({record.patient for record in data_set.records}),
        "broken": list(broken.values()),
        "flagged": suspects.warnings,
        "common": suspects.common,
        "identical": suspects.identical,
        **describe_images(list(images.values())),
        "fields": describe_fields(data_set.records),
        "unread": {name: dict(texts.most_common(12)) for name, texts in count_unread(data_set.records).items()},
        "template": TEMPLATES.get(template, template),
        "captions": captions,
        "splits": splits,
        "classes": classes,
        "faults": faults,
    }


def describe_images(images):
    """Sizes, kinds and grey mappings of the decoded images (ImageFacts)."""
    if not images:
        return {"sizes": {}, "kinds": {}, "greys": {}}
    sizes = [(facts.width, facts.height) for facts in images]
    return {
        "sizes": {
            "smallest": list(min(sizes, key=min)),
            "largest": list(max(sizes, key=max)),
            "median": [statistics.median(side) for side in zip(*sizes)],
        },
        "kinds": dict(Counter(facts.kind for facts in images).most_common()),
        "greys": dict(Counter(_grey_mapping(facts.greys) for facts in images).most_common()),
    }


def _grey_mapping(greys):
    """How greys became 8 bits, without the numbers of windows and percentiles, which differ from file to file."""
    return greys if "bit" in greys else re.sub(r"(percentiles [\d.-]+|window|range)[: ][^,]*", r"\1", greys)


def describe_fields(records):
    """For each caption field: in how many records it is known, and its most frequent values."""
    fields = {}
    for record in records:
        for name, value in record.fields.items():
            fields.setdefault(name, Counter())[value] += 1
    return {
        name: {"known": values.total(), "different": len(values), "most": dict(values.most_common(12))}
        for name, values in sorted(fields.items())
    }


def describe_classes(records, field):
    """{class: number of images} for the field to balance by, most frequent first; "" = unknown."""
    return dict(Counter(name for names in classes_of(records, field) for name in names or ("",)).most_common())


def describe_captions(data_set, template):
    """Token counts (with begin and end), what is cut at 77 tokens, repeats, and marks left by de-identification."""
    if not data_set.records:
        raise InputError("no image can be decoded")
    prompts, tokenizer = prompts_for(data_set, template), Tokenizer()
    counts = Counter(prompts)
    lengths = {prompt: len(tokenizer.encode(prompt)) + 2 for prompt in counts}
    all_lengths = sorted(lengths[prompt] for prompt in prompts)
    return {
        "tokens": {"min": all_lengths[0], "median": statistics.median(all_lengths), "max": all_lengths[-1]},
        "cut": sum(length > MAX_TOKENS for length in all_lengths),
        "longest_loses": tokenizer.cut(max(lengths, key=lengths.get)),
        "different": len(counts),
        "repeated": {prompt: count for prompt, count in counts.most_common(5) if count > 1},
        "deidentification_marks": sum(bool(DEIDENTIFIED.search(prompt)) for prompt in prompts),
        "examples": prompts[:3],
    }


def describe_splits(records, preset, seed, duplicates):
    """Images and patients of each split, and the leaks that patient numbers do not reveal: one image in two splits.

    Of each group of duplicates, the images outside its training image's split are listed beside that image.
    """
    splits = split_by_patient(records, preset, seed)
    split_of = {i: name for name, members in splits.items() for i in members}
    leaks = []
    for group in duplicates:
        kept = next((i for i in group if split_of[i] == "train"), group[0])
        leaks += [
            [records[kept].name, split_of[kept], records[i].name, split_of[i]]
            for i in group
            if split_of[i] != split_of[kept]
        ]
    parts = {
        name: {"pictures": len(members), "patients": len({records[i].patient for i in members})}
        for name, members in splits.items()
    }
    return {"preset": preset, "seed": seed, "leaks": leaks, **parts}


def write_results(out, report, sheet):
    """Write check.json, flagged.txt and contact_sheet.png into the folder ``out``."""
    with written_beside(out / "check.json") as path:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [f"{name}\t{'; '.join(warnings)}\n" for name, warnings in report["flagged"].items()]
    with written_beside(out / "flagged.txt") as path:
        path.write_text("".join(lines), encoding="utf-8")
    with written_beside(out / "contact_sheet.png") as path:
        sheet.save(path)


def review_sheet(records, warnings, transform):
    """Up to 60 images spread over the data set, then up to 30 of those with ``warnings`` in red frames."""

    def thumbnail(record, side):
        return Image.fromarray(read(record, transform)[0]).resize((side, side), Image.Resampling.BOX)

    count = min(MAX_SAMPLED, len(records))
    cells = [thumbnail(records[k * len(records) // count], THUMBNAIL) for k in range(count)]
    cells += [None] * (-len(cells) % COLUMNS)  # the suspicious images start a new row
    suspicious = [record for record in records if record.name in warnings][:MAX_SUSPICIOUS]
    cells += [ImageOps.expand(thumbnail(record, THUMBNAIL - 6), 3, "red") for record in suspicious]
    sheet = Image.new("RGB", (COLUMNS * THUMBNAIL, max(1, -(-len(cells) // COLUMNS)) * THUMBNAIL), "white")
    for k, cell in enumerate(cells):
        if cell is not None:
            sheet.paste(cell, (k % COLUMNS * THUMBNAIL, k // COLUMNS * THUMBNAIL))
    return sheet


# --- for the terminal -------------------------------------------------------------------------------------------------
def as_text(report):
    """The report as lines to print."""
    yield f"{report['data']}: {report['pictures']:,} images of {report['patients']:,} patients ({report['transform']})"
    yield from (f"  note: {note}" for note in report["notes"])
    yield from _images_as_text(report)
    yield "fields:"
    for name, field in report["fields"].items():
        values = _most(field["most"], 4) if field["different"] <= report["pictures"] // 2 else "mostly different"
        yield f"  {name}: known {field['known']:,}, {field['different']:,} different: {values[:100]}"
    for name, texts in report["unread"].items():
        yield f"  {name}: not understood, so missing: {_most({repr(text): n for text, n in texts.items()}, 8)}"
    if report["classes"]:
        yield f"classes to balance, images in each: {_most(report['classes'], 20)}"
    yield from _captions_as_text(report)
    yield from _splits_as_text(report)


def _images_as_text(report):
    if report["sizes"]:
        sizes = (f"{name} {width:g} x {height:g}" for name, (width, height) in report["sizes"].items())
        yield "sizes: " + ", ".join(sizes)
        yield f"stored as: {_most(report['kinds'], 6)}"
        yield f"greys: {_most(report['greys'], 6)}"
    yield f"broken: {len(report['broken']):,}"
    yield from (f"  {error}" for error in report["broken"][:5])
    yield f"groups of identical files: {len(report['identical'])}; suspicious images: {len(report['flagged'])}"
    counts = Counter(phrase(warning) for warnings in report["flagged"].values() for warning in warnings)
    yield from (f"  {count:,} x {warning}" for warning, count in counts.most_common())
    for warning, count in report["common"].items():
        yield f"  not suspicious, typical of this data set: {count:,} x {warning}"


def _captions_as_text(report):
    yield f"prompts from {report['template']!r}:" if report["template"] else "no captions and no prompt template"
    if captions := report["captions"]:
        tokens, share = captions["tokens"], captions["cut"] / report["pictures"]
        yield (
            f"  tokens {tokens['min']} to {tokens['max']}, median {tokens['median']:g}; {captions['cut']:,} "
            f"({share:.1%}) are longer than {MAX_TOKENS} and lose their end"
        )
        yield (
            f"  {captions['different']:,} different; most repeated: {max(captions['repeated'].values(), default=1)} "
            f"times; de-identification marks in {captions['deidentification_marks']:,}"
        )
        yield from (f"  e.g. {prompt[:110]}" for prompt in captions["examples"])


def _splits_as_text(report):
    if splits := report["splits"]:
        parts = ", ".join(
            f"{name} {part['pictures']:,} ({part['patients']:,} patients)"
            for name, part in splits.items()
            if isinstance(part, dict)
        )
        yield f"split {splits['preset']}, seed {splits['seed']}: {parts}"
        yield f"  images in two splits, the same or nearly the same: {len(splits['leaks'])}"
        yield from (f"  {a} ({split_a}) = {b} ({split_b})" for a, split_a, b, split_b in splits["leaks"][:5])


def _most(counts, number):
    """The first ``number`` of {name: count}, as text."""
    return ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:number])


# --- python -m minildm prompts ----------------------------------------------------------------------------------------
def show_prompts(arguments):
    """``python -m minildm prompts DATA``: print the prompts the model will see, and what is cut from them."""
    parser = data_parser("prompts", "Show the prompts of a data set, as the model will see them.")
    parser.add_argument("-n", type=at_least(1), default=20, help="number of prompts, spread over the data set")
    arguments = parser.parse_args(arguments)
    settings = from_flags(DataSettings, arguments)
    data_set = open_data_set(arguments.data, settings, arguments.seed)
    prompts = prompts_for(data_set, settings.prompt_template)
    for note in data_set.notes:
        print(f"note: {note}", file=sys.stderr)
    tokenizer = Tokenizer()
    shown = min(arguments.n, len(prompts))
    for i in (k * len(prompts) // shown for k in range(shown)):
        lost = tokenizer.cut(prompts[i])
        print(f"{data_set.records[i].name}\t{prompts[i]}" + f"   [cut: {lost}]" * bool(lost))
    return 0
