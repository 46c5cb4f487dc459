"""The latent cache: what the frozen VAE (and a frozen text encoder) makes of the data, computed once.

A latent row is the VAE's mean and logvar in float16, (8, size/8, size/8): drawing z from them stays random, at every
epoch. A context row is the text encoder's output, (77, D). Rows lie in safetensors shards of up to 128, read through
the page cache (memory-mapped), so memory held does not grow with the data.

Keys are contents: a shard folder's name is the hash of its recipe (transform, VAE weights), a row's key the hash of the
file's bytes. What does not match is not found, so nothing stale is ever used. To look a file up without reading it
again, its hash is remembered with its size, times and inode, as git does.

Building is a walk over blocks of 128 records. A block is locked (``flock``: given back when a process dies) and written
whole or not at all, so a build may be killed at any time, and several processes, or the ranks of a distributed run,
that build at once share the blocks out between them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from minildm.data.reading import read, to_tensor
from minildm.errors import InputError
from minildm.files import writable_folder, written_beside

SHARD_ROWS = 128  # records: what an interruption can cost, and what is held in memory while building
SETTLED = 2.0  # seconds: a younger file could change again within the clock's resolution, its hash is not remembered


def weights_fingerprint(module):
    """SHA-256 over a module's weights (names, types, shapes, bytes), wherever they were loaded from. 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Rows:
    """A folder of shards: rows of one shape in float16, found by their 32-byte key."""

    def __init__(self, folder, recipe):
        self.folder = writable_folder(Path(folder) / hashlib.sha256(recipe.encode()).hexdigest()[:24], "--cache")
        if not (self.folder / "recipe.txt").is_file():
            with written_beside(self.folder / "recipe.txt") as path:
                path.write_text(recipe + "\n", encoding="utf-8")
        self.shards = {}  # file name -> tensor (n, ...), memory-mapped
        self.place = {}  # key -> (file name, row)
        self.refresh()

    def refresh(self):
        """Take in the shards that this or another process has finished since."""
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path.name not in self.shards:
                try:
                    with safe_open(path, framework="pt") as shard:
                        keys, self.shards[path.name] = shard.get_tensor("keys"), shard.get_tensor("rows")
                except Exception as error:
                    raise InputError(
                        f"{path} is not a whole cache file ({error}); delete it, it will be built again"
                    ) from None
                for row, key in enumerate(keys.numpy()):
                    self.place[key.tobytes()] = (path.name, row)

    def __contains__(self, key):
        return key in self.place

    def __getitem__(self, key):
        """The row in float32, a copy."""
        name, row = self.place[key]
        return self.shards[name][row].float()

    def add(self, keys, rows):
        """Write rows (n, ...) under ``keys`` as one shard."""
        if not torch.isfinite(rows).all() or rows.abs().max() > torch.finfo(torch.float16).max:
            raise InputError("the network gave values float16 cannot hold; run it in float32 (--dtype float32)")
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32).copy()),
            "rows": rows.half().contiguous(),
        }
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:24]
        with written_beside(self.folder / f"{name}.safetensors") as path:
            save_file(tensors, path)
        self.refresh()

    def need(self, count, row_bytes):
        """Stop before the work begins if ``count`` rows will not fit on the disk."""
        needed, free = int(count * row_bytes * 1.02), shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"the cache needs {needed / 1e9:.2f} GB for {count:,} rows, {self.folder} has "
                f"{free / 1e9:.2f} GB free; make room or give another --cache"
            )

    @contextlib.contextmanager
    def locked(self, name, wait):
        """Hold a block's lock. Yields False, without it, if another process has it and ``wait`` is off."""
        with open(self.folder / f"{name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file gives the lock back


class CachedLatents:
    """Moments of the pictures of a data set, in its order. ``records``: those that could be read."""

    def __init__(self, rows, records, keys):
        self.rows, self.records, self.keys = rows, records, keys

    def __len__(self):
        return len(self.records)

    def moments(self, i):
        """Record i's (mean, logvar), each float32 (4, h, w): raw, no scaling factor."""
        return self.rows[self.keys[i]].chunk(2)


def latent_cache(records, transform, vae, folder, batch_size=4, workers=2, skip_bad=False):
    """Encode what is not encoded yet.

    Args:
        records: of an opened data set; transform: reading.Transform; vae: on the device and in the dtype to run in.
        folder: where caches live; any number of data sets, sizes and VAEs may share it.
        workers: threads that read and decode while the VAE encodes.
        skip_bad: leave pictures out that cannot be decoded, and go on; otherwise they are an error, after all others
            have been cached.
    Returns: CachedLatents.
    Raises: InputError for undecodable pictures (count and first five), a file that changes meanwhile, too small a disk.
    """
    rows = Rows(folder, f"latents (mean, logvar) of {transform}; VAE {weights_fingerprint(vae)}")
    keys, bad = [None] * len(records), {}
    blocks = [range(start, min(start + SHARD_ROWS, len(records))) for start in range(0, len(records), SHARD_ROWS)]
    names = {
        block: hashlib.sha256("\n".join(_label(records[i]) for i in block).encode()).hexdigest()[:24]
        for block in blocks
    }

    def look_up(block):
        """Fill in the keys of what is cached; the others are returned."""
        seen = _remembered(rows.folder / f"{names[block]}.json")
        for i in block:
            key = seen.get(_state(records[i])) if records[i].path is not None else None
            keys[i] = key if key in rows else None
        return [i for i in block if keys[i] is None and i not in bad]

    missing = {block: todo for block in blocks if (todo := look_up(block))}
    side = transform.size // 8
    rows.need(sum(map(len, missing.values())), row_bytes=8 * side * side * 2)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=sum(map(len, missing.values())), unit="picture", desc="caching latents", disable=not missing) as bar,
    ):
        for wait in (False, True):  # first the blocks nobody else is at, then see to the others
            for block in list(missing):
                with rows.locked(names[block], wait) as ours:
                    if not ours:
                        continue
                    rows.refresh()
                    _encode_block(records, look_up(block), keys, bad, rows, transform, vae, batch_size, pool)
                    _remember(rows.folder / f"{names[block]}.json", records, keys, block)
                    bar.update(len(missing.pop(block)))
    if bad and not skip_bad:
        raise InputError(
            f"{len(bad):,} of {len(records):,} pictures cannot be used: "
            f"{'; '.join([bad[i] for i in sorted(bad)[:5]])}; --skip-bad goes on without them"
        )
    kept = [i for i in range(len(records)) if i not in bad]
    return CachedLatents(rows, tuple(records[i] for i in kept), [keys[i] for i in kept])


def _encode_block(records, todo, keys, bad, rows, transform, vae, batch_size, pool):
    weight = next(vae.parameters())
    new_keys, new_rows, waiting, states = [], [], [], {}

    def load(i):
        states[i] = _state(records[i])
        try:
            pixels, _, key = read(records[i], transform)
            return i, pixels, key
        except InputError as error:
            return i, None, str(error)

    def encode():
        images = to_tensor(np.stack([pixels for _, pixels in waiting])).to(weight.device, weight.dtype)
        with torch.no_grad():
            z = vae.encode(images)
        new_rows.append(torch.cat([z.mean, z.logvar], dim=1).float().cpu())  # (B, 8, h, w)
        new_keys.extend(key for key, _ in waiting)
        waiting.clear()

    for i, pixels, key in pool.map(load, todo):
        if pixels is None:
            bad[i] = key
            continue
        keys[i] = key
        if key not in rows and key not in new_keys and all(key != other for other, _ in waiting):
            waiting.append((key, pixels))  # a file that is there twice is encoded once
        if len(waiting) == batch_size:
            encode()
    if waiting:
        encode()
    for i in todo:
        if records[i].path is not None and i not in bad and _state(records[i]) != states[i]:
            raise InputError(
                f"{records[i].path} changed while the cache was being built; start again when it is at rest"
            )
    if new_rows:
        rows.add(new_keys, torch.cat(new_rows))


def _label(record):
    return record.name if record.path is None else str(record.path.absolute())


def _state(record):
    """What the file system says of a file; the change time (ctime) betrays even a replacement with the old mtime."""
    if record.path is None:
        return None
    try:
        status = os.stat(record.path)
    except OSError as error:
        return f"{record.path}: {error.strerror}"
    return f"{record.path.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _remembered(path):
    """{a file's state: its content's hash} as written by ``_remember``."""
    if not path.is_file():
        return {}
    return {state: bytes.fromhex(key) for state, key in json.loads(path.read_text(encoding="utf-8")).items()}


def _remember(path, records, keys, block):
    now = time.time()
    states = {
        _state(records[i]): keys[i].hex()
        for i in block
        if keys[i] is not None and records[i].path is not None and now - os.stat(records[i].path).st_ctime > SETTLED
    }
    with written_beside(path) as beside:
        beside.write_text(json.dumps(states), encoding="utf-8")


class CachedContexts:
    """The text encoder's output for each of a list of prompts."""

    def __init__(self, rows, keys):
        self.rows, self.keys = rows, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        """Prompt i's context, float32 (77, D)."""
        return self.rows[self.keys[i]]


def context_cache(prompts, tokenize, text_encoder, folder, batch_size=16):
    """Encode each different prompt once, for a frozen text encoder.

    Args: tokenize: prompts -> int64 (B, 77); text_encoder: token ids -> (B, 77, D).
    Returns: CachedContexts, in the order of ``prompts``.
    """
    rows = Rows(folder, f"contexts; text encoder {weights_fingerprint(text_encoder)}")
    weight = next(text_encoder.parameters())
    keys, missing, width = [], {}, 0
    for start in range(0, len(prompts), 1024):
        for token_ids in tokenize(prompts[start : start + 1024]):
            key = hashlib.sha256(token_ids.numpy().astype("<i8").tobytes()).digest()
            keys.append(key)
            if key not in rows:
                missing[key] = token_ids
    todo = list(missing.items())
    for start in tqdm(range(0, len(todo), SHARD_ROWS), desc="caching contexts", disable=not todo):
        block, outputs = todo[start : start + SHARD_ROWS], []
        for first in range(0, len(block), batch_size):
            token_ids = torch.stack([ids for _, ids in block[first : first + batch_size]])
            with torch.no_grad():
                outputs.append(text_encoder(token_ids.to(weight.device)).float().cpu())  # (B, 77, D)
        if not width:
            width = outputs[0].shape[-1]
            rows.need(len(todo), row_bytes=outputs[0][0].numel() * 2)
        rows.add([key for key, _ in block], torch.cat(outputs))
    return CachedContexts(rows, keys)
