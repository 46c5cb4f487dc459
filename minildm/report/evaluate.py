"""The metrics of a comparison's cells: generated images against the run's own held-out images -> metrics.json.

Held out are all images of the run's splits but the training split. All images, generated or not, are read as training
reads them, at the run's size. Each image is described once by each network, whatever number of cells it serves; what
the networks say of real images is kept on disk, so that an interrupted comparison, or another share of its cells, does
not describe them again.
"""

import hashlib
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import minildm
from minildm.data.cache import ROWS_PER_SHARD, Rows, image_state, short_hash
from minildm.data.prompts import prompts_for
from minildm.data.splits import classes_of
from minildm.errors import InputError
from minildm.files import read_json
from minildm.loading import find_weights, usable_device
from minildm.metrics.adherence import prompt_adherence
from minildm.metrics.audit import as_views, compare_described, detail
from minildm.metrics.clip import clip_score
from minildm.metrics.extractors import clip_file, inception_extractor, random_extractor, vae_extractor
from minildm.metrics.features import FeatureSet, batches
from minildm.metrics.fid_score import measure
from minildm.metrics.frechet import Statistics
from minildm.metrics.inception import WEIGHTS_NAME
from minildm.metrics.run_split import open_run_data, run_settings
from minildm.metrics.sources import as_tensor, image_name, read_as_training, write_json
from minildm.metrics.utility import usefulness
from minildm.progress import Progress
from minildm.report.read_run import read_run
from minildm.teaching import ruler

DIMS = (2048, 192, 64)
CLIP = ("ViT-L-14", "openai")  # of the CLIP score
FEWEST = 2  # images on either side of a Frechet distance


@dataclass(frozen=True)
class Part:
    """Images with their prompts: a split of a run's data, or what a cell generated."""

    images: tuple  # records or paths
    prompts: tuple


class RunData:
    """The data of a run, opened again by the settings and the splits in its config.json.

    Raises: InputError if the data set no longer holds an image of the run.
    """

    def __init__(self, run):
        settings, splits = run_settings(run.settings), run.found["splits"]
        names = [name for members in splits.values() for name in members]
        data, found = open_run_data(run.settings, settings, names, run.folder)
        prompts = dict(zip((record.name for record in data.records), prompts_for(data, settings.prompt_template)))
        records = {record.name: record for record in found}
        self.transform = settings.transform(run.found["pixels"])
        self.splits = {
            split: Part(tuple(records[name] for name in members), tuple(prompts[name] for name in members))
            for split, members in splits.items()
        }

    @cached_property
    def held_out(self):
        """All images that were not trained on; those of the test split first."""
        parts = [self.splits[name] for name in sorted(self.splits, key=lambda name: name != "test") if name != "train"]
        return Part(*(tuple(x for part in parts for x in getattr(part, name)) for name in ("images", "prompts")))

    def requests(self, n):
        """The held-out records whose prompts the n images of a cell show."""
        if not self.held_out.images:
            raise InputError("the split leaves no held-out image to take prompts from; give another --split")
        return spread_out(self.held_out.images, n)

    def prompts(self, n):
        return spread_out(self.held_out.prompts, n)


def spread_out(items, n):
    """n of the items, evenly spaced, since names may be sorted by class; or all of them, again and again."""
    if n >= len(items):
        return [items[i % len(items)] for i in range(n)]
    return [items[i * len(items) // n] for i in range(n)]


class Evaluator:
    """Describes images and measures cells.

    Args:
        folder: where the features of real images are kept.
        base: of FD-vae, as in `load`. device: of the networks. replicates: of the bootstrap. utility: caption field.
    """

    def __init__(self, folder, base=None, device=None, replicates=100, utility=None, batch_size=16):
        self.folder, self.base, self.device = folder, base, usable_device(device)
        self.replicates, self.utility_field, self.batch_size = replicates, utility, batch_size
        self.pixels, self.rows = {}, {}  # {key of an image: ...}, {(label, dim): {key: features}}

    @cached_property
    def extractors(self):
        """FID's network where its weights are there; else an untrained one and the base's autoencoder."""
        if find_weights(WEIGHTS_NAME).is_file():
            return [inception_extractor(None, DIMS, self.device)]
        return [random_extractor(DIMS, self.device), vae_extractor(self.base, self.device)]

    @property
    def request(self):
        """What decides about the numbers besides the images: an older metrics.json must have the same."""
        has_clip = find_weights(clip_file(*CLIP)).is_file()
        labels = ["FID"] if find_weights(WEIGHTS_NAME).is_file() else ["FD-random", "FD-vae"]
        return {
            "features": labels,
            "clip": list(CLIP) if has_clip else None,
            "replicates": self.replicates,
            "utility": self.utility_field,
        }

    def describe(self, images, transform, title):
        """Describe the generated images that are new."""
        for extractor in self.extractors:
            new = self._new(images, extractor)
            described = self._features_of(new, extractor, transform, f"{title}, {extractor.label}")
            for image, features in zip(new, described):
                self._keep(image, extractor, features)

    def describe_real(self, records, transform):
        """Describe the records that are new, or find what an earlier process has found of them."""
        for extractor in self.extractors:
            if not (new := self._new(records, extractor)):
                continue
            keys = {record.name: key_on_disk(record) for record in records}
            known = self._described_before(records, keys, extractor, transform)
            for record in new:
                self._keep(record, extractor, known[keys[record.name]].numpy())

    def _described_before(self, records, keys, extractor, transform):
        """Rows of the features of all depths, one after the other, of all the records: those that are missing on disk
        are described in blocks, which several processes share among them. Blocks are cut from all records by name, so
        they are the same in every process, whatever the split and whatever is missing.

        Args: keys: {name of a record: its `key_on_disk`}.
        """
        recipe = f"{extractor.label}, {extractor.dims}, {extractor.facts}, of {transform}"
        known = Rows(self.folder, recipe, (sum(extractor.dims),), torch.float32)
        ordered = sorted(records, key=lambda record: record.name)
        blocks = [ordered[start : start + ROWS_PER_SHARD] for start in range(0, len(ordered), ROWS_PER_SHARD)]

        def missing(block):
            return [record for record in block if keys[record.name] not in known]

        counts = {i: n for i, block in enumerate(blocks) if (n := len(missing(block)))}
        names = {i: short_hash("".join(record.name for record in blocks[i])) for i in counts}
        total = sum(counts.values())
        with Progress(f"real images, {extractor.label}", "image", total, hidden=not total) as progress:

            def describe(i):
                if new := missing(blocks[i]):
                    features = np.stack(list(self._features_of(new, extractor, transform)))
                    if changed := [record for record in new if key_on_disk(record) != keys[record.name]]:
                        raise InputError(f"{changed[0].path} changed while it was described; run again")
                    known.add([keys[record.name] for record in new], torch.from_numpy(features))
                progress.update(counts[i])

            known.fill(names, describe)
        return known

    def _new(self, images, extractor):
        deepest = self.rows.setdefault((extractor.label, max(extractor.dims)), {})
        return list({key_of(image): image for image in images if key_of(image) not in deepest}.values())

    def _features_of(self, images, extractor, transform, title=None):
        """Yield each image's features of all depths, one after the other: (sum of dims,)."""

        def prepare(image):
            return extractor.prepare(read_as_training(image, transform))

        for _, batch in batches(images, extractor, self.batch_size, title, prepare):
            yield from np.concatenate([batch[dim] for dim in extractor.dims], axis=1)

    def _keep(self, image, extractor, features):
        for dim, values in zip(extractor.dims, np.split(features, np.cumsum(extractor.dims)[:-1])):
            self.rows.setdefault((extractor.label, dim), {})[key_of(image)] = values

    def features(self, images, extractor):
        rows = {
            dim: np.stack([self.rows[extractor.label, dim][key_of(image)] for image in images])
            for dim in extractor.dims
        }
        statistics = {dim: Statistics(dim) for dim in extractor.dims}
        for dim, values in rows.items():
            statistics[dim].add(values)
        return FeatureSet(len(images), statistics, rows, list(images))

    def described(self, images, transform):
        """(pixels, features) for the audit, by the first extractor."""
        label, dim = self.extractors[0].label, max(self.extractors[0].dims)
        for image in images:
            if key_of(image) not in self.pixels:
                self.pixels[key_of(image)] = detail(as_tensor(read_as_training(image, transform)))
        keys, rows = [key_of(image) for image in images], self.rows[label, dim]
        return torch.stack([self.pixels[key] for key in keys]), torch.from_numpy(np.stack([rows[key] for key in keys]))

    # --- the parts of metrics.json ------------------------------------------------------------------------------------
    def fidelity(self, real, fake):
        """One result per extractor, as fid.json's; real and fake: images."""
        if min(len(real), len(fake)) < FEWEST:
            raise InputError(f"{len(real)} held-out and {len(fake)} other images: a distance needs 2 on either side")
        results = []
        for extractor in self.extractors:
            found = measure(self.features(real, extractor), self.features(fake, extractor), extractor, self.replicates)
            results.append(found | {"features": extractor.facts, "seed": 0})
        return results

    def reference(self, data, n):
        """The same distances of as many training images: what real images reach."""
        train = data.splits["train"].images
        return self.fidelity(data.held_out.images, spread_out(train, min(n, len(train))))

    def audit(self, data, generated):
        images = (generated, data.splits["train"].images, data.held_out.images)
        sets = [self.described(part, data.transform) for part in images]
        comparisons = compare_described(*sets, self.extractors[0].label)
        names = [image_name(image) for image in data.held_out.images]
        pictures = [{"generated": image_name(image)} for image in generated]
        return {
            "views": as_views(comparisons, names),
            "pictures": pictures,
            "features": self.extractors[0].facts,
            "seed": 0,
        }

    def clip(self, data, generated):
        if not find_weights(clip_file(*CLIP)).is_file():
            raise InputError(f"no CLIP weights ({clip_file(*CLIP)}); get them with: python -m minildm fetch clip")
        return asdict(clip_score(generated, data.prompts(len(generated)), *CLIP, self.device, self.batch_size))

    def adherence(self, run, data, generated):
        if run.settings["data"].partition(":")[0] != "phantom":
            raise InputError("the ruler reads phantoms only; for other data: python -m minildm adherence --classifier")
        wanted = [record.fields for record in data.requests(len(generated))]
        found = prompt_adherence(generated, wanted, ruler.measure, ruler.obeys)
        return {
            "fields": {name: asdict(agreement) for name, agreement in found.items()},
            "ruler": "the phantom's ruler",
        }

    def utility(self, data, generated):
        """AUC on held-out real images of a classifier of the caption field, by what it was trained on."""
        field, n = self.utility_field, len(generated)
        if field is None:
            raise InputError("not asked for (--utility FIELD)")
        test, train, asked = data.held_out.images, data.splits["train"].images, data.requests(n)
        label, dim = self.extractors[-1].label, max(self.extractors[-1].dims)
        rows = self.rows[label, dim]

        def part(images, records):
            return np.stack([rows[key_of(image)] for image in images]), classes_of(records, field)

        found = usefulness(part(train, train), part(generated, asked), part(test, test))
        return found | {"field": field, "classifier": f"linear, on {label}'s {dim} features"}

    def measure(self, cell, data, generated):
        """Write the cell's metrics.json, unless it is there."""
        path, run = cell.folder / "metrics.json", read_run(cell.folder)
        prompts = hashlib.sha256((cell.folder / "prompts.jsonl").read_bytes()).hexdigest()
        request = self.request | {"images": len(generated), "prompts": prompts, "result": _result_stamp(cell.folder)}
        if path.is_file() and read_json(path).get("request") == request:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small samples: the tables say how small
            self.describe_real([*data.held_out.images, *data.splits["train"].images], data.transform)
            self.describe(generated, data.transform, cell.name)
            content = {
                "request": request,
                "minildm": minildm.__version__,
                "torch": torch.__version__,
                "held_out": len(data.held_out.images),
                "fidelity": or_reason(self.fidelity, data.held_out.images, generated),
                "reference": or_reason(self.reference, data, len(generated)),
                "clip_score": or_reason(self.clip, data, generated),
                "adherence": or_reason(self.adherence, run, data, generated),
                "audit": or_reason(self.audit, data, generated),
                "utility": or_reason(self.utility, data, generated),
            }
        write_json(path, content)


def key_of(image):
    """A path, or the name of a record, which is the same whenever its data set is opened."""
    return image if isinstance(image, Path) else image.name


def key_on_disk(record):
    """32 bytes that change if the record's image does."""
    return hashlib.sha256(image_state(record).encode(errors="surrogatepass")).digest()


def or_reason(part, *arguments):
    """part(*arguments), or {"missing": why} where the images or weights do not allow it."""
    try:
        return part(*arguments)
    except InputError as error:
        return {"missing": str(error)}


def _result_stamp(folder):
    """Tells a later result of training from an earlier one."""
    summary = read_json(folder / "summary.json")
    return [summary["steps"], summary["best"]]
