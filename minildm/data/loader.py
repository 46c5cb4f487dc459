"""Records and prompts -> training batches, in an order that a resumed run continues exactly.

A run's samples form one endless sequence: epoch after epoch, each in its own seeded order. A sample's ``id`` is its
position in that sequence, so step s with batch size B holds the ids s * B ... s * B + B - 1. Everything random about a
sample (which record it is, and later its timestep and noise) is a function of (seed, id) alone. It does not depend on
where a run was interrupted, on the number of workers, or on how a batch is divided.
"""

import signal

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from minildm.data.reading import read, to_tensor
from minildm.distributed import share
from minildm.seeds import seeded

PIXEL_CACHE_BYTES = 2 * 10**9  # of decoded images held in memory, in each process that reads


class TrainingPairs(Dataset):
    """Images or their latents, with prompts.

    Item i is a dict:
        index     i
        prompt    str
        images    float32 (3, size, size) in [-1, 1]; or, with ``latents``,
        mean, logvar    float32 (4, h, w), without the scaling factor
        context   float32 (77, D), with ``contexts``

    Args: records, prompts: in one order. transform: reading.Transform, or latents: cache.CachedLatents of these
    records. contexts: cache.CachedContexts of these prompts.
    """

    def __init__(self, records, prompts, transform=None, latents=None, contexts=None):
        assert len(records) == len(prompts) and (transform is None) != (latents is None)
        self.records, self.prompts = records, prompts
        self.transform, self.latents, self.contexts = transform, latents, contexts
        self.pixel_cache, self.free_bytes = {}, PIXEL_CACHE_BYTES

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        item = {"index": i, "prompt": self.prompts[i]}
        if self.latents is not None:
            item["mean"], item["logvar"] = self.latents.moments(i)
        else:
            item["images"] = to_tensor(self._pixels(i))
        if self.contexts is not None:
            item["context"] = self.contexts[i]
        return item

    def _pixels(self, i):
        """uint8 (size, size, 3). A file is decoded once while memory allows: a large radiograph takes 40 ms."""
        if i in self.pixel_cache:
            return self.pixel_cache[i]
        pixels = read(self.records[i], self.transform)[0]
        if self.records[i].render is None and pixels.nbytes <= self.free_bytes:
            self.pixel_cache[i] = pixels
            self.free_bytes -= pixels.nbytes
        return pixels


def epoch_order(n, seed, epoch, classes=None):
    """The order of the records in one epoch, a function of the arguments alone.

    Args:
        classes: a tuple of class names for each record (splits.classes_of), for balanced sampling: every class comes
            equally often and its members take turns. An epoch then shows only some members of frequent classes, repeats
            those of rare ones, and never shows records without a class.
    Returns: int64 (n,) indices.
    """
    generator = seeded(seed, epoch)
    if classes is None:
        return torch.randperm(n, generator=generator)
    members = {}
    for i, names in enumerate(classes):
        for name in names:
            members.setdefault(name, []).append(i)
    shuffled = [
        [group[j] for j in torch.randperm(len(group), generator=generator).tolist()]
        for _, group in sorted(members.items())
    ]
    turns = [group[turn % len(group)] for turn in range(-(-n // len(shuffled))) for group in shuffled]
    return torch.tensor(turns)[torch.randperm(len(turns), generator=generator)][:n]


class SampleSequence(Dataset):
    """The endless sequence of a run's samples: item ``id`` is an item of ``pairs`` with its ``id`` and ``weight`` 1."""

    def __init__(self, pairs, seed, classes=None):
        self.pairs, self.seed, self.classes = pairs, seed, classes
        self.epoch, self.order = None, None  # the epoch last asked for; ids come in ascending order

    def record_index(self, sample_id):
        """Which record the sample shows, as an index into ``pairs``."""
        epoch, position = divmod(sample_id, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(len(self.pairs), self.seed, epoch, self.classes)
        return int(self.order[position])

    def __getitem__(self, sample_id):
        return {**self.pairs[self.record_index(sample_id)], "id": sample_id, "weight": torch.tensor(1.0)}


def training_batches(pairs, batch_size, seed, first_step, last_step, workers=0, classes=None):
    """The batches of steps [first_step, last_step).

    A batch is a dict with the entries of ``pairs``, stacked to (B, ...), and
        id        int64 (B,): step * batch_size + position, see the module's docstring
        weight    float32 (B,): ones; a task may weight its samples' losses
    """
    return batches_of(SampleSequence(pairs, seed, classes), batch_size, first_step, last_step, workers)


def batches_of(samples, batch_size, first_step, last_step, workers=0):
    """A DataLoader over the batches of ``samples``, a Dataset whose items are found by ``id``.

    Every batch is full. Workers only read ahead: no batch depends on their number. Of several processes that train
    together each gets its share of every batch, which may be empty.
    """
    ids = [share(range(step * batch_size, (step + 1) * batch_size)) for step in range(first_step, last_step)]
    pinned = torch.cuda.is_available()
    options = {"pin_memory": pinned, "collate_fn": collate, "worker_init_fn": ignore_signals}
    return DataLoader(samples, batch_sampler=ids, num_workers=workers, **options)


def ignore_signals(worker):
    """Ctrl-C, torchrun and batch systems signal all processes of a command; those that read go on until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(items):
    """A list of a batch's items -> the batch; of no items, a batch without samples."""
    if items:
        return default_collate(items)
    return {"id": torch.empty(0, dtype=torch.int64), "weight": torch.empty(0)}
