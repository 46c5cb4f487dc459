"""Records and prompts -> training batches, in an order that a resumed run can continue exactly."""

import hashlib

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from minildm.data.reading import read, to_tensor

KEPT_BYTES = 2 * 10**9  # of decoded pictures in memory, in each process that reads


class TrainingPairs(Dataset):
    """Item i is a dict: ``index`` i, ``prompt``, and
    ``images`` float32 (3, size, size) in [-1, 1], or, where latents are cached, ``mean`` and ``logvar`` float32
    (4, h, w); and ``context`` float32 (77, D) where contexts are cached.

    Args: records and prompts in one order; transform: reading.Transform; latents: cache.CachedLatents of these records;
    contexts: cache.CachedContexts of these prompts. Give a transform or latents.
    """

    def __init__(self, records, prompts, transform=None, latents=None, contexts=None):
        assert len(records) == len(prompts) and (transform is None) != (latents is None)
        self.records, self.prompts = records, prompts
        self.transform, self.latents, self.contexts = transform, latents, contexts
        self.kept, self.room = {}, KEPT_BYTES

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        item = {"index": i, "prompt": self.prompts[i]}
        if self.latents is not None:
            item["mean"], item["logvar"] = self.latents.moments(i)
        else:
            item["images"] = to_tensor(self._picture(i))
        if self.contexts is not None:
            item["context"] = self.contexts[i]
        return item

    def _picture(self, i):
        """uint8 (size, size, 3). A file is decoded once, as long as there is room: a large film takes 40 ms."""
        if i in self.kept:
            return self.kept[i]
        pixels = read(self.records[i], self.transform)[0]
        if self.records[i].render is None and pixels.nbytes <= self.room:
            self.kept[i], self.room = pixels, self.room - pixels.nbytes
        return pixels


def epoch_order(n, seed, epoch, classes=None):
    """The order of one epoch: a function of (seed, epoch) and of nothing else.

    Args:
        classes: one tuple of class names a record (splits.classes_of) for balanced sampling: every class comes equally
            often, its members in turn; frequent classes show only some members an epoch, rare ones repeat, records
            without a class do not come.
    Returns: int64 (n,) indices.
    """
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
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


class StepBatches(Sampler):
    """Lists of indices for the steps [first_step, last_step): step s takes the samples s * B ... s * B + B - 1 of the
    endless sequence of epochs. Every batch is full: one may end an epoch and begin the next."""

    def __init__(self, n, batch_size, seed, first_step, last_step, classes=None):
        self.n, self.batch_size, self.seed, self.classes = n, batch_size, seed, classes
        self.steps = range(first_step, last_step)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        epoch, order = None, None
        for step in self.steps:
            batch = []
            for k in range(step * self.batch_size, (step + 1) * self.batch_size):
                if k // self.n != epoch:
                    epoch = k // self.n
                    order = epoch_order(self.n, self.seed, epoch, self.classes)
                batch.append(int(order[k % self.n]))
            yield batch


def training_batches(pairs, batch_size, seed, first_step, last_step, workers=0, classes=None):
    """A DataLoader over the steps [first_step, last_step). Workers only read ahead: no batch depends on them."""
    sampler = StepBatches(len(pairs), batch_size, seed, first_step, last_step, classes)
    return DataLoader(pairs, batch_sampler=sampler, num_workers=workers, pin_memory=torch.cuda.is_available())
