"""Pictures to features: a folder, a run or a data set in; statistics and a bounded sample of features out.

An extractor is a name, a way to read one picture and a network. Only the published Inception weights make a FID; every
other network's number is labelled by its name (``FD-random``, ``FD-vae``, ``FD-clip``, ``FD-<file>``) and comparable
with itself alone.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from minildm.data.records import BUILT_IN
from minildm.errors import InputError
from minildm.files import sha256
from minildm.images import read_parameters
from minildm.metrics.frechet import Statistics
from minildm.metrics.inception import DEFAULT_WEIGHTS, DIMS, WEIGHTS_SHA256, InceptionV3, prepare

FID_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # pytorch-fid's list


def list_images(source):
    """Sorted picture paths of a folder (not of its subfolders), of a run (its samples/) or of a ``name:path`` data set.

    Raises: FileNotFoundError or InputError, in words, when there are none.
    """
    folder = Path(source)
    if not folder.exists() and (":" in str(source) or str(source) in BUILT_IN):
        return _records(str(source))
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; expected a folder of pictures")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder of pictures")
    if (folder / "config.json").is_file() and (folder / "samples").is_dir():
        folder = folder / "samples"
    entries = sorted(folder.iterdir())
    pictures = [entry for entry in entries if entry.suffix.lower() in FID_SUFFIXES and entry.is_file()]
    if folder.name == "samples" and (folder.parent / "config.json").is_file():
        drawn = [path for path in pictures if not _is_sheet(path)]
        if pictures and not drawn:
            raise InputError(
                f"{folder} holds the contact sheets of a training run, not pictures; draw some: python "
                f"sample.py --adapter {folder.parent} --prompts FILE --out FOLDER"
            )
        pictures = drawn
    if not pictures:
        held = "is empty" if not entries else f"holds {len(entries)} entries but no picture"
        raise InputError(
            f"{folder} {held}; expected files ending in {' '.join(FID_SUFFIXES)}, subfolders are not searched"
        )
    return pictures


def _is_sheet(path):
    """Whether a PNG says that it is a sheet of several."""
    return path.suffix.lower() == ".png" and (read_parameters(path) or "").startswith("contact sheet")


def _records(spec):
    from minildm.data.open import open_data_set

    return list(open_data_set(spec).records)


def open_rgb(picture):
    """One picture as pytorch-fid reads it: ``Image.open(path).convert("RGB")``, 8 bits a channel.

    More bits would be clipped by that conversion, so such files are refused; so is what cannot be decoded. A record of
    a data set is read as training reads it, at 512 px.
    """
    if not isinstance(picture, str | Path):
        from minildm.data.reading import Transform, read

        return Image.fromarray(read(picture, Transform(size=512))[0])
    path = picture
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise InputError(
                    f"{path} has more than 8 bits a channel (mode {image.mode}); FID reads 8-bit "
                    "pictures: rescale it to 8 bits first"
                )
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError | FileNotFoundError):
            raise
        raise InputError(f"{path} cannot be decoded ({error}); replace or remove it, no picture is skipped") from None


def image_name(picture):
    """The file's name, or the record's."""
    return Path(picture).name if isinstance(picture, str | Path) else picture.name


def as_tensor(image):
    """Pillow RGB -> uint8 (3, H, W)"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Extractor:
    """``prepare``: Pillow RGB -> float32 (3, s, s);  ``network``: a stack of these -> {dim: (B, dim)}."""

    label: str
    dims: tuple
    prepare: object
    network: object
    facts: dict = field(default_factory=dict)  # what a reader of the number must know: weights, hash, resize


def inception_extractor(weights=DEFAULT_WEIGHTS, dims=DIMS, device="cpu"):
    """The FID network. Weights with another hash than the published file's still run, but are said to be unverified."""
    network = InceptionV3.from_file(weights).to(device)
    digest = sha256(weights)
    label = "FID" if digest == WEIGHTS_SHA256 else "FID (unverified weights)"
    facts = {"weights": str(weights), "sha256": digest, "resize": "299 x 299 bilinear, no antialias"}
    return Extractor(label, tuple(dims), _for_inception, lambda x: network.features(x, dims), facts)


def random_extractor(dims=DIMS, device="cpu", seed=0):
    """An untrained Inception network: needs no weights; what it gives is FD-random, never FID."""
    network = InceptionV3.random(seed).to(device)
    facts = {"weights": f"random, seed {seed}", "resize": "299 x 299 bilinear, no antialias"}
    return Extractor("FD-random", tuple(dims), _for_inception, lambda x: network.features(x, dims), facts)


def _for_inception(image):
    return prepare(as_tensor(image)[None])[0]


def vae_extractor(base=None, device="cpu"):
    """The mean latents of a Stable Diffusion VAE at 256 px, averaged to 4 x 8 x 8 = 256 numbers."""
    import minildm

    model = minildm.load(base, device=device, dtype=torch.float32)

    def network(images):
        z = model.vae.encode(2 * images.to(device) - 1).mean  # (B, 4, 32, 32), unscaled
        return {256: F.adaptive_avg_pool2d(z, 8).flatten(1)}

    facts = {"weights": f"{model.files.path.name} {model.base_hash[:10]}", "resize": "256 x 256 bilinear, antialias"}
    return Extractor("FD-vae", (256,), lambda image: _squeezed(image, 256), network, facts)


def clip_extractor(model_name, pretrained, device="cpu"):
    """Unit-length image embeddings of an open_clip model, with that model's own resize and crop."""
    from minildm.metrics.clip import load_clip

    model, preprocess, _ = load_clip(model_name, pretrained, device)
    dim = model.encode_image(preprocess(Image.new("RGB", (64, 64)))[None].to(device)).shape[1]

    def network(images):
        return {dim: F.normalize(model.encode_image(images.to(device)), dim=1)}

    facts = {"weights": f"{model_name}, {pretrained}", "resize": "open_clip's for this model"}
    return Extractor("FD-clip", (dim,), preprocess, network, facts)


def script_extractor(path, device="cpu"):
    """A user's TorchScript encoder: (B, 3, 224, 224) float32 in [0, 1] -> (B, d)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no TorchScript file at {path}; --features is inception, random, vae, clip or FILE.pt")
    try:
        script = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise InputError(
            f"{path} is no TorchScript file ({str(error).splitlines()[0][:80]}); save it with "
            "torch.jit.trace(network, example).save(path)"
        ) from None
    probe = script(torch.zeros(2, 3, 224, 224, device=device))
    if not isinstance(probe, torch.Tensor) or probe.ndim != 2 or len(probe) != 2:
        shape = tuple(probe.shape) if isinstance(probe, torch.Tensor) else type(probe).__name__
        raise InputError(f"{path} must map (B, 3, 224, 224) in [0, 1] to (B, d), gave {shape}; pool it in the script")
    facts = {"weights": str(path), "sha256": sha256(path), "resize": "224 x 224 bilinear, antialias"}
    return Extractor(
        f"FD-{path.stem}",
        (probe.shape[1],),
        lambda image: _squeezed(image, 224),
        lambda images: {probe.shape[1]: script(images.to(device))},
        facts,
    )


def _squeezed(image, size):
    images = as_tensor(image)[None].float() / 255
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def open_extractor(
    features,
    weights=None,
    dims=DIMS,
    base=None,
    clip_model="ViT-L-14-336",
    clip_pretrained="openai",
    device="cpu",
    seed=0,
):
    """``--features``: inception | random | vae | clip | FILE.pt -> Extractor."""
    if features == "inception":
        return inception_extractor(DEFAULT_WEIGHTS if weights is None else weights, dims, device)
    if features == "random":
        return random_extractor(dims, device, seed)
    if features == "vae":
        return vae_extractor(base, device)
    if features == "clip":
        return clip_extractor(clip_model, clip_pretrained, device)
    return script_extractor(features, device)


@dataclass
class Collected:
    """What is known of one set of pictures after one pass; memory does not grow with n."""

    n: int
    statistics: dict  # {dim: Statistics or SavedStatistics}
    rows: dict  # {dim: float32 (k, dim)}, k <= keep: every row, or a uniform sample of them
    image_paths: list

    @property
    def complete(self):
        """Whether rows holds every picture (intervals need that)."""
        return bool(self.rows) and all(len(rows) == self.n for rows in self.rows.values())


def collect(paths, extractor, keep=2000, batch_size=16, seed=0, progress=None):
    """One pass over the pictures: statistics of all, and the features of at most ``keep`` of them, drawn at random.

    Raises: InputError naming the picture that cannot be read or whose features are not finite.
    """
    if len(paths) < 2:
        raise InputError(f"{image_name(paths[0])} is the only picture: a distribution needs at least 2; give more")
    kept = np.random.default_rng(seed).permutation(len(paths))[:keep]
    slot = {int(index): k for k, index in enumerate(np.sort(kept))}  # picture index -> row
    rows = {dim: np.empty((len(slot), dim), np.float32) for dim in extractor.dims}
    statistics = {dim: Statistics(dim) for dim in extractor.dims}
    for start, batch in batches(paths, extractor, batch_size, progress):
        for dim, values in batch.items():
            statistics[dim].add(values)
            for offset, row in enumerate(values):
                if start + offset in slot:
                    rows[dim][slot[start + offset]] = row
    return Collected(len(paths), statistics, rows if keep else {}, list(paths))


def batches(paths, extractor, batch_size=16, progress=None, prepare=None):
    """Yield (start, {dim: (b, dim) numpy}). Pictures are decoded and resized by threads, two batches ahead.

    ``prepare``: picture -> what the network eats, where it is more than to open and to prepare.
    """
    from tqdm import tqdm

    prepare = prepare or (lambda picture: extractor.prepare(open_rgb(picture)))
    workers = min(8, os.cpu_count() or 1)
    starts = range(0, len(paths), batch_size)
    bar = tqdm(total=len(paths), desc=progress, unit="picture", disable=progress is None, delay=1)
    with ThreadPoolExecutor(workers) as pool, bar:
        ahead = deque()
        todo = iter(starts)
        try:
            for start in starts:
                while len(ahead) < 3 and (upcoming := next(todo, None)) is not None:
                    ahead.append([pool.submit(prepare, p) for p in paths[upcoming : upcoming + batch_size]])
                images = torch.stack([future.result() for future in ahead.popleft()])
                with torch.inference_mode():
                    batch = {dim: values.float().cpu().numpy() for dim, values in extractor.network(images).items()}
                for values in batch.values():
                    broken = ~np.isfinite(values).all(axis=1)
                    if broken.any():
                        first = image_name(paths[start + int(broken.argmax())])
                        raise InputError(
                            f"{first} gives NaN or infinite features; look at the picture, and at the "
                            "weights if every picture does"
                        )
                yield start, batch
                bar.update(len(images))
        finally:
            pool.shutdown(cancel_futures=True)
