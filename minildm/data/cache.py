"""The latent cache: what the frozen VAE (and a frozen text encoder) makes of the data, computed once.

A latent row is the VAE's mean and logvar in float16, (8, size/8, size/8), so z can be sampled anew at every epoch. A
context row is the text encoder's output, (77, D). Rows lie in safetensors files (shards) of up to 128 rows that are
memory-mapped, so memory use does not grow with the data.

Everything is found by content. A cache folder's name is the hash of its recipe (transform, VAE weights), a row's key is
the hash of the image file's bytes. What has changed has another hash, so nothing stale is ever used. To avoid reading
every file again, hashes are remembered with the file's size, times and inode, as git does, and those
of rendered images with their recipe.

Records are encoded in blocks of 128. A block is locked (``flock``, which the system releases when a process dies) and
its shard is written whole or not at all. A build may therefore be killed at any time, and processes that build at the
same time, such as those that torchrun starts, share the blocks among them.
"""

import contextlib
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

from minildm.config import MAX_TOKENS
from minildm.data.reading import read, to_tensor
from minildm.distributed import own_first, wait_for_all
from minildm.errors import InputError
from minildm.files import locked, read_json, shown, writable_folder, written_beside
from minildm.progress import Progress

ROWS_PER_SHARD = 128  # an interruption loses at most this many; a build holds this many in memory
SETTLED_SECONDS = 2.0  # a file changed later than this could change again within the clock's resolution


def weights_fingerprint(module):
    """SHA-256, 64 hex digits, of a module's weights (names, types, shapes, bytes), whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- rows on disk -----------------------------------------------------------------------------------------------------
class Rows:
    """A folder of shards: rows of one shape and type, found by their 32-byte key.

    Args: folder: of all caches; recipe: text that names everything the rows depend on besides their key; row_shape: of
        a row, None for a size that is not known yet; dtype: of the rows on disk.
    Raises: InputError for a file that is no whole shard of such rows. Whether a row's numbers are finite is checked
        when the row is read, since a cache may be larger than the memory.
    """

    def __init__(self, folder, recipe, row_shape, dtype=torch.float16):
        self.row_shape, self.dtype = row_shape, dtype
        self.folder = writable_folder(Path(folder) / short_hash(recipe), "--cache")
        if not (self.folder / "recipe.txt").is_file():
            with written_beside(self.folder / "recipe.txt") as path:
                path.write_text(recipe + "\n", encoding="utf-8")
        self.shards = {}  # file name -> tensor (n, ...), memory-mapped
        self.locations = {}  # key -> (file name, row)
        self.refresh()

    def refresh(self):
        """Add the shards that this or another process has written since."""
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path.name not in self.shards:
                try:
                    with safe_open(path, framework="pt") as shard:
                        keys, rows = shard.get_tensor("keys"), shard.get_tensor("rows")
                    self._check(keys, rows)
                except Exception as error:  # of many types
                    raise InputError(
                        f"{path} is not a complete cache file ({error}); delete it, it will be built again"
                    ) from None
                self.shards[path.name] = rows
                for row, key in enumerate(keys.numpy()):
                    self.locations[key.tobytes()] = (path.name, row)

    def _check(self, keys, rows):
        """Raise ValueError unless these are the keys and rows of one shard."""
        if keys.dtype != torch.uint8 or keys.ndim != 2 or keys.shape[1] != 32:
            raise ValueError(f"keys of {keys.dtype}, shape {tuple(keys.shape)}")
        shape = tuple(rows.shape[1:])
        fits = len(shape) == len(self.row_shape) and all(
            size == wanted or wanted is None for size, wanted in zip(shape, self.row_shape)
        )
        if rows.dtype != self.dtype or len(rows) != len(keys) or not fits:
            raise ValueError(f"rows of {rows.dtype}, shape {tuple(rows.shape)}, for {len(keys)} keys")

    def __contains__(self, key):
        return key in self.locations

    def __getitem__(self, key):
        """A copy of the row, float32."""
        name, row = self.locations[key]
        values = self.shards[name][row].float()
        if not values.isfinite().all():
            raise InputError(
                f"{self.folder / name} is damaged: row {row} holds NaN or infinite numbers; delete it, it will be "
                "built again"
            )
        return values

    def add(self, keys, rows):
        """Write ``rows`` (n, ...) under ``keys`` as one shard."""
        if not torch.isfinite(rows).all() or rows.abs().max() > torch.finfo(self.dtype).max:
            name = str(self.dtype).removeprefix("torch.")
            raise InputError(
                f"the network returned values that {name} cannot hold: NaN, infinite or too large; its weights may be "
                "damaged, or, for a text encoder, try --dtype float32"
            )
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32).copy()),
            "rows": rows.to(self.dtype).contiguous(),
        }
        with written_beside(self.folder / f"{short_hash(b''.join(keys))}.safetensors") as path:
            save_file(tensors, path)
        self.refresh()

    def require_space(self, count, row_bytes):
        """Raise InputError before any work is done if ``count`` more rows do not fit on the disk."""
        needed, free = int(count * row_bytes * 1.02), shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"the cache needs {needed / 1e9:.2f} GB for {count:,} rows, {self.folder} has {free / 1e9:.2f} GB "
                "free; free some space or give another --cache"
            )

    @contextlib.contextmanager
    def locked(self, name, wait):
        """Hold the lock ``name``. Yields False, without it, if another process holds it and ``wait`` is False."""
        file = locked(self.folder / f"{name}.lock", wait)
        with file or contextlib.nullcontext():  # closing the file releases the lock
            yield file is not None

    def fill(self, names, encode):
        """Call encode(block) for each block of ``names`` {block: name of its lock}, holding the block's lock, after
        loading the rows that other processes have written. Blocks that no other process works on come first; then it
        waits for the rest."""
        for wait in (False, True):
            for block in own_first(list(names)):
                with self.locked(names[block], wait) as locked:
                    if locked:
                        self.refresh()
                        encode(block)
                        del names[block]


def short_hash(content):
    """The 24 hex digits that name a folder or file."""
    if isinstance(content, str):  # paths may hold bytes that are not UTF-8, as half pairs of surrogates
        content = content.encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()[:24]


# --- latents ----------------------------------------------------------------------------------------------------------
class CachedLatents:
    """The VAE's moments for ``records``, in their order. ``keys``: the record's key in ``rows``."""

    def __init__(self, rows, records, keys):
        self.rows, self.records, self.keys = rows, records, keys

    def __len__(self):
        return len(self.records)

    def moments(self, i):
        """Record i's (mean, logvar), each float32 (4, h, w), without the scaling factor."""
        return self.rows[self.keys[i]].chunk(2)


def latent_cache(records, transform, vae, folder, batch_size=4, workers=2, skip_bad=False):
    """Encode the images that are not in the cache yet.

    Args:
        records: of an opened data set; transform: reading.Transform.
        vae: on the device and in the dtype to run in.
        folder: of all caches; data sets, sizes and VAEs may share it.
        workers: threads that read and decode while the VAE encodes.
        skip_bad: leave out images that cannot be decoded. Otherwise they are an error, once all others are cached.
    Returns: CachedLatents.
    Raises: InputError for images that cannot be decoded (their number and the first five), for a file that changes
        during the build, and for a disk that is too small.
    """
    rows = Rows(
        folder,
        f"latents (mean, logvar) of {transform}; VAE {weights_fingerprint(vae)}",
        (8, transform.size // 8, transform.size // 8),
    )
    build = _LatentBuild(records, transform, vae, rows, batch_size)
    missing = {block: len(indices) for block in build.blocks if (indices := build.look_up(block))}
    rows.require_space(sum(missing.values()), row_bytes=8 * (transform.size // 8) ** 2 * 2)
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress("caching latents", "image", sum(missing.values()), hidden=not missing) as progress,
    ):

        def encode(block):
            encoded = build.encode(block, pool, progress)
            progress.update(missing[block] - encoded)  # what another process has encoded

        rows.fill({block: build.names[block] for block in missing}, encode)
    if build.errors and not skip_bad:
        first = [build.errors[i] for i in sorted(build.errors)[:5]]
        raise InputError(
            f"{len(build.errors):,} of {len(records):,} images cannot be used: {'; '.join(first)}; "
            "replace them, or leave them out with --skip-bad"
        )
    usable = [i for i in range(len(records)) if i not in build.errors]
    return CachedLatents(rows, tuple(records[i] for i in usable), [build.keys[i] for i in usable])


class _LatentBuild:
    """The state of one build: which records have a row, and which cannot be decoded."""

    def __init__(self, records, transform, vae, rows, batch_size):
        self.records, self.transform, self.vae, self.rows, self.batch_size = records, transform, vae, rows, batch_size
        starts = range(0, len(records), ROWS_PER_SHARD)
        self.blocks = [range(start, min(start + ROWS_PER_SHARD, len(records))) for start in starts]
        self.names = {block: short_hash("\n".join(_label(records[i]) for i in block)) for block in self.blocks}
        self.keys = [None] * len(records)  # a record's key, once known
        self.states = [None] * len(records)  # the image_state that the key belongs to
        self.errors = {}  # record's index -> why it cannot be decoded

    def look_up(self, block):
        """Fill in the keys of the block's records whose file is unchanged. Returns: the indices of the others."""
        hashes = _load_hashes(self.rows.folder / f"{self.names[block]}.json")
        for i in block:
            self.states[i] = image_state(self.records[i])
            key = hashes.get(self.states[i])
            self.keys[i] = key if key in self.rows else None
        return [i for i in block if self.keys[i] is None and i not in self.errors]

    def encode(self, block, pool, progress):
        """Read the block's records that are still missing, encode those without a row, and write them as one shard.
        Returns: how many were missing."""
        missing = self.look_up(block)  # another process may have encoded the block meanwhile
        new_keys, new_rows, batch = [], [], []

        def load(i):
            self.states[i] = image_state(self.records[i])
            try:
                pixels, _, key = read(self.records[i], self.transform)
                return i, key, pixels
            except InputError as error:
                self.errors[i] = str(error)
                return i, None, None

        for i, key, pixels in pool.map(load, missing):
            self.keys[i] = key
            progress.update()
            if key is None or key in self.rows or key in new_keys:  # a file that occurs twice is encoded once
                continue
            new_keys.append(key)
            batch.append(pixels)
            if len(batch) == self.batch_size:
                new_rows.append(self._moments(batch))
                batch.clear()
        if batch:
            new_rows.append(self._moments(batch))
        for i in missing:
            if (
                self.records[i].path is not None
                and i not in self.errors
                and image_state(self.records[i]) != self.states[i]
            ):
                raise InputError(
                    f"{self.records[i].path} changed while the cache was being built; run again once the files no "
                    "longer change"
                )
        if new_rows:
            self.rows.add(new_keys, torch.cat(new_rows))
        known = [(self.records[i], self.states[i], self.keys[i]) for i in block]
        _save_hashes(self.rows.folder / f"{self.names[block]}.json", known)
        return len(missing)

    def _moments(self, batch):
        """List of uint8 (H, W, 3) -> mean and logvar, float32 (B, 8, h, w) on the CPU."""
        weight = next(self.vae.parameters())
        images = to_tensor(np.stack(batch)).to(weight.device, weight.dtype)
        with torch.no_grad():
            z = self.vae.encode(images)
        return torch.cat([z.mean, z.logvar], dim=1).float().cpu()


def _label(record):
    return record.name if record.path is None else str(record.path.absolute())


def image_state(record):
    """Text that changes if the record's image does: the file's path, size, times and inode, or the recipe of a rendered
    image; None if there is no recipe. The change time (ctime) reveals a file that was replaced by one with the old
    modification time."""
    if record.path is None:
        return record.recipe
    try:
        status = os.stat(record.path)
    except OSError as error:
        return f"{shown(record.path)}: {error.strerror}"
    return f"{record.path.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _load_hashes(path):
    """{file state: SHA-256 of the content}, as written by _save_hashes. Nothing, if that is damaged: the files are then
    read again."""
    try:
        return {state: bytes.fromhex(key) for state, key in read_json(path).items()}
    except (FileNotFoundError, InputError, TypeError, ValueError):
        return {}


def _save_hashes(path, known):
    """Remember the content hashes of (record, state, key), except of files that have changed since or moments ago."""
    now = time.time()
    states = {
        state: key.hex()
        for record, state, key in known
        if None not in (state, key) and state == image_state(record) and _is_settled(record, now)
    }
    with written_beside(path) as beside:
        beside.write_text(json.dumps(states), encoding="utf-8")


def _is_settled(record, now):
    return record.path is None or now - os.stat(record.path).st_ctime > SETTLED_SECONDS


# --- contexts ---------------------------------------------------------------------------------------------------------
class CachedContexts:
    """The text encoder's output for each prompt of a list. ``keys``: the prompt's key in ``rows``."""

    def __init__(self, rows, keys):
        self.rows, self.keys = rows, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        """Prompt i's context, float32 (77, D)."""
        return self.rows[self.keys[i]]


def context_cache(prompts, tokenize, text_encoder, folder, batch_size=16):
    """Encode each different prompt once, with a frozen text encoder.

    Args: tokenize: prompts -> int64 (B, 77); text_encoder: token ids -> (B, 77, D); folder: of all caches.
    Returns: CachedContexts, in the order of ``prompts``.
    """
    recipe = f"contexts; text encoder {weights_fingerprint(text_encoder)}"
    rows = Rows(folder, recipe, (MAX_TOKENS, text_encoder.config.width))
    device = next(text_encoder.parameters()).device
    keys, missing = [], {}
    for start in range(0, len(prompts), 1024):
        for token_ids in tokenize(prompts[start : start + 1024]):
            key = hashlib.sha256(token_ids.numpy().astype("<i8").tobytes()).digest()
            keys.append(key)
            if key not in rows:
                missing[key] = token_ids
    missing = list(missing.items())
    rows.require_space(len(missing), row_bytes=MAX_TOKENS * text_encoder.config.width * 2)
    wait_for_all()  # all have the same list of what is missing, before one of them adds to the cache
    shards = {start: missing[start : start + ROWS_PER_SHARD] for start in range(0, len(missing), ROWS_PER_SHARD)}
    with Progress("caching contexts", "prompt", len(missing), hidden=not missing) as progress:

        def encode(start):
            shard, contexts = shards[start], []
            if all(key in rows for key, _ in shard):  # another process has encoded it
                progress.update(len(shard))
                return
            for first in range(0, len(shard), batch_size):
                token_ids = torch.stack([ids for _, ids in shard[first : first + batch_size]])
                with torch.no_grad():
                    contexts.append(text_encoder(token_ids.to(device)).float().cpu())  # (B, 77, D)
                progress.update(len(token_ids))
            rows.add([key for key, _ in shard], torch.cat(contexts))

        rows.fill({start: short_hash(b"".join(key for key, _ in shards[start])) for start in shards}, encode)
    return CachedContexts(rows, keys)
