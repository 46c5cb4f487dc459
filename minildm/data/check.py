"""``python -m minildm check DATA``: find everything that would break or spoil a run, before the run.

Every picture is decoded as a run would, every prompt is written and tokenized. Printed, and written to --out:
``check.json``, ``contact_sheet.png`` (a sample, then in red frames what was flagged) and ``flagged.txt`` (name, tab,
reason), which can be edited and given back as ``--exclude``.
"""

import argparse
import json
import re
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from minildm.config import MAX_TOKENS
from minildm.data import screening
from minildm.data.flags import add_data_flags, data_set_from, transform_from
from minildm.data.prompts import TEMPLATES, prompts_for
from minildm.data.reading import read
from minildm.data.splits import classes_of, split_by_patient
from minildm.errors import InputError
from minildm.files import writable_folder, written_beside
from minildm.settings import Help, at_least
from minildm.tokenizer import Tokenizer

DEIDENTIFIED = re.compile(r"XXXX|_{3,}|\[REDACTED\]")  # what Open-i, MIMIC-CXR and others put for removed words
COMMON = 0.2  # of the pictures
THUMBNAIL, COLUMNS, SAMPLE, FLAGGED = 144, 10, 60, 30  # pixels, pictures a row, pictures of each kind on the sheet


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m minildm check", description=__doc__.split("\n\n")[0], formatter_class=Help
    )
    parser.add_argument("data", metavar="DATA", help="name:path, such as padchest:/data/PadChest")
    parser.add_argument("--out", default="check", help="folder for the results (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the split and of --limit")
    parser.add_argument("--workers", type=at_least(1), default=2, help="threads that decode")
    add_data_flags(parser)
    arguments = parser.parse_args(arguments)
    transform = transform_from(arguments)
    out = writable_folder(arguments.out)
    data_set = data_set_from(arguments, arguments.data)

    pictures = examine(data_set.records, transform, arguments.workers)
    good = [i for i, picture in enumerate(pictures) if "error" not in picture]
    flags = flagged(data_set.records, pictures, good)
    faults = []  # what would stop a run
    broken = [picture["error"] for picture in pictures if "error" in picture]
    if broken and not arguments.skip_bad:
        faults.append(f"{len(broken):,} pictures cannot be decoded (--skip-bad goes on without them)")
    captions = splits = classes = None
    try:
        if arguments.balance:
            classes = describe_classes(data_set.records, arguments.balance)
    except InputError as error:
        faults.append(str(error))
    try:
        captions = describe_captions(prompts_for(data_set, arguments.prompt_template))
    except InputError as error:
        faults.append(str(error))
    try:
        splits = describe_splits(data_set.records, pictures, good, flags["pairs"], arguments)
    except InputError as error:
        faults.append(str(error))

    report = {
        "data": arguments.data,
        "pictures": len(data_set),
        "notes": list(data_set.notes),
        "transform": str(transform),
        "patients": len({record.patient for record in data_set.records}),
        "broken": broken,
        "flagged": flags["reasons"],
        "common": flags["common"],
        "identical": flags["identical"],
        **describe_pictures([pictures[i] for i in good]),
        "fields": describe_fields(data_set.records),
        "template": TEMPLATES.get(template := arguments.prompt_template or data_set.prompt, template),
        "captions": captions,
        "splits": splits,
        "classes": classes,
        "faults": faults,
    }
    with written_beside(out / "check.json") as path:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with written_beside(out / "flagged.txt") as path:
        path.write_text(
            "".join(f"{name}\t{'; '.join(why)}\n" for name, why in flags["reasons"].items()), encoding="utf-8"
        )
    sheet = overview_sheet([data_set.records[i] for i in good], flags["reasons"], transform)
    with written_beside(out / "contact_sheet.png") as path:
        sheet.save(path)
    print("\n".join(as_text(report)))
    print(f"\nwritten: {out / 'check.json'}, {out / 'contact_sheet.png'}, {out / 'flagged.txt'}")
    print(
        "would fail: " + "; ".join(faults)
        if faults
        else f"a run would start with this; next: python -m minildm prompts {arguments.data}"
    )
    return 1 if faults else 0


def examine(records, transform, workers):
    """Decode every picture. Returns: one dict a picture, {"error": ...} where it cannot be decoded; 2 KB each."""

    def one(record):
        try:
            # decoded whole, then measured and fitted: a run's shortcut for large JPEGs would hide the real size
            _, picture, key = read(record, transform, whole=True)
        except InputError as error:
            return {"error": str(error)}
        height, width = picture.pixels.shape[:2]
        return {
            "width": width,
            "height": height,
            "kind": picture.kind,
            "greys": picture.greys,
            "key": key.hex(),
            "hash": screening.perceptual_hash(picture.pixels),
            "small": screening.small_grey(picture.pixels),
            "reasons": screening.reasons(picture.pixels),
        }

    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(one, records), total=len(records), desc="decoding", unit="picture"))


def flagged(records, pictures, good):
    """What a person should look at: {"reasons": {name: phrases}, "common": {phrase: count}, "identical": groups of
    names, "pairs": near-duplicates}. What more than COMMON of the pictures have is how this data set is, not a flaw."""
    counts = Counter(phrase(why) for i in good for why in pictures[i]["reasons"])
    common = {why: count for why, count in counts.items() if count > COMMON * len(good)}
    reasons = {}
    for i in good:
        if odd := [why for why in pictures[i]["reasons"] if phrase(why) not in common]:
            reasons[records[i].name] = odd
    contents = {}
    for i in good:
        contents.setdefault(pictures[i]["key"], []).append(records[i].name)
    identical = [names for names in contents.values() if len(names) > 1]
    for first, *others in identical:
        for name in others:
            reasons.setdefault(name, []).append(f"the same file as {first}")
    pairs = (
        [
            (good[a], good[b])
            for a, b in screening.near_duplicates(
                *(np.stack([pictures[i][name] for i in good]) for name in ("hash", "small"))
            )
        ]
        if good
        else []
    )
    for i, j in pairs:
        if pictures[i]["key"] != pictures[j]["key"]:
            reasons.setdefault(records[j].name, []).append(f"nearly the same picture as {records[i].name}")
    return {"reasons": reasons, "common": common, "identical": identical, "pairs": pairs}


def phrase(reason):
    """A reason without its numbers and names: what is counted."""
    return re.split(r":| as ", reason)[0]


def describe_pictures(pictures):
    if not pictures:
        return {"sizes": {}, "kinds": {}, "greys": {}}
    sides = [(picture["width"], picture["height"]) for picture in pictures]
    small = min(sides, key=min)
    large = max(sides, key=max)
    return {
        "sizes": {
            "smallest": list(small),
            "largest": list(large),
            "median": [statistics.median(side) for side in zip(*sides)],
        },
        "kinds": dict(Counter(picture["kind"] for picture in pictures).most_common()),
        # the numbers differ from file to file: windows and percentiles are counted by kind
        "greys": dict(
            Counter(
                re.sub(r"(percentiles [\d.-]+|window|range)[: ][^,]*", r"\1", picture["greys"])
                if "bit" not in picture["greys"]
                else picture["greys"]
                for picture in pictures
            ).most_common()
        ),
    }


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
    """{class: pictures} of the field to balance by, most frequent first; "" = not known."""
    return dict(Counter(name for names in classes_of(records, field) for name in names or ("",)).most_common())


def describe_captions(prompts):
    """Token lengths (begin and end included), what is cut at 77, what repeats, what de-identification left behind."""
    tokenizer = Tokenizer()
    counts = Counter(prompts)
    lengths = {prompt: len(tokenizer.encode(prompt)) + 2 for prompt in counts}
    all_lengths = sorted(lengths[prompt] for prompt in prompts)
    cut = [prompt for prompt in prompts if lengths[prompt] > MAX_TOKENS]
    marked = [prompt for prompt in prompts if DEIDENTIFIED.search(prompt)]
    longest = max(lengths, key=lengths.get)
    return {
        "tokens": {"min": all_lengths[0], "median": statistics.median(all_lengths), "max": all_lengths[-1]},
        "cut": len(cut),
        "longest_loses": tokenizer.cut(longest),
        "different": len(counts),
        "repeated": {prompt: count for prompt, count in counts.most_common(5) if count > 1},
        "deidentification_marks": len(marked),
        "examples": prompts[:3],
    }


def describe_splits(records, pictures, good, pairs, arguments):
    """Pictures and patients of each split, and the leaks that patient numbers do not show: one picture on two sides."""
    splits = split_by_patient(records, arguments.split, arguments.seed)
    split_of = {i: name for name, members in splits.items() for i in members}
    leaks = [
        [records[i].name, split_of[i], records[j].name, split_of[j]] for i, j in pairs if split_of[i] != split_of[j]
    ]
    return {
        "preset": arguments.split,
        "seed": arguments.seed,
        "leaks": leaks,
        **{
            name: {"pictures": len(members), "patients": len({records[i].patient for i in members})}
            for name, members in splits.items()
        },
    }


def overview_sheet(records, flagged_names, transform):
    """Up to SAMPLE pictures spread over the data set, then up to FLAGGED of the flagged ones in red frames."""

    def thumbnail(record, side):
        return Image.fromarray(read(record, transform)[0]).resize((side, side), Image.Resampling.BOX)

    count = min(SAMPLE, len(records))
    cells = [thumbnail(records[k * len(records) // count], THUMBNAIL) for k in range(count)]
    cells += [None] * (-len(cells) % COLUMNS)  # the flagged ones begin a row
    cells += [
        ImageOps.expand(thumbnail(record, THUMBNAIL - 6), 3, "red")
        for record in [record for record in records if record.name in flagged_names][:FLAGGED]
    ]
    sheet = Image.new("RGB", (COLUMNS * THUMBNAIL, max(1, -(-len(cells) // COLUMNS)) * THUMBNAIL), "white")
    for k, cell in enumerate(cells):
        if cell is not None:
            sheet.paste(cell, (k % COLUMNS * THUMBNAIL, k // COLUMNS * THUMBNAIL))
    return sheet


def as_text(report):
    """The report for a terminal."""

    def top(counts, most=6):
        return ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:most])

    yield (
        f"{report['data']}: {report['pictures']:,} pictures of {report['patients']:,} patients ({report['transform']})"
    )
    yield from (f"  note: {note}" for note in report["notes"])
    if report["sizes"]:
        yield "sizes: " + ", ".join(
            f"{name} {width:g} x {height:g}" for name, (width, height) in report["sizes"].items()
        )
        yield f"stored as: {top(report['kinds'])}"
        yield f"greys: {top(report['greys'])}"
    yield f"broken: {len(report['broken']):,}"
    yield from (f"  {error}" for error in report["broken"][:5])
    yield f"identical files: {len(report['identical'])} groups; flagged to look at: {len(report['flagged'])}"
    phrases = Counter(phrase(why) for reasons in report["flagged"].values() for why in reasons)
    yield from (f"  {count:,} x {why}" for why, count in phrases.most_common())
    yield from (f"  not flagged, so is this data set: {count:,} x {why}" for why, count in report["common"].items())
    yield "fields:"
    for name, field in report["fields"].items():
        values = top(field["most"], 4) if field["different"] <= report["pictures"] // 2 else "mostly different"
        yield f"  {name}: known {field['known']:,}, {field['different']:,} different: {values[:100]}"
    if report["classes"]:
        yield f"balanced by their classes, pictures: {top(report['classes'], 20)}"
    yield f"prompts from {report['template']!r}:" if report["template"] else "no captions, and nothing to make them of:"
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
    if splits := report["splits"]:
        parts = ", ".join(
            f"{name} {part['pictures']:,} ({part['patients']:,} patients)"
            for name, part in splits.items()
            if isinstance(part, dict)
        )
        yield f"split {splits['preset']}, seed {splits['seed']}: {parts}"
        yield f"  the same or nearly the same picture on two sides: {len(splits['leaks'])}"
        yield from (f"  {a} ({split_a}) = {b} ({split_b})" for a, split_a, b, split_b in splits["leaks"][:5])


def show_prompts(arguments):
    """``python -m minildm prompts DATA``: the prompts a model will see, as it will see them."""
    parser = argparse.ArgumentParser(
        prog="python -m minildm prompts", description="Show what a model will be told.", formatter_class=Help
    )
    parser.add_argument("data", metavar="DATA", help="name:path, such as padchest:/data/PadChest")
    parser.add_argument("-n", type=at_least(1), default=20, help="how many, spread over the data")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of --limit")
    add_data_flags(parser)
    arguments = parser.parse_args(arguments)
    data_set = data_set_from(arguments, arguments.data)
    prompts = prompts_for(data_set, arguments.prompt_template)
    tokenizer = Tokenizer()
    shown = min(max(arguments.n, 0), len(prompts))
    for k in range(shown):
        i = k * len(prompts) // shown
        lost = tokenizer.cut(prompts[i])
        read = prompts[i] if not lost else f"{prompts[i]}   [not read: {lost}]"
        print(f"{data_set.records[i].name}\t{read}")
    return 0
