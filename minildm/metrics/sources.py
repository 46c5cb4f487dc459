"""What a metric reads and writes: the images of a folder, a run or a data set; a JSON file of results.

An image is given as a path or as a ``Record`` of a data set. Files are read as pytorch-fid reads them, because that
reading is part of the published metric; records are read as training reads them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minildm.data.records import BUILT_IN
from minildm.errors import InputError
from minildm.files import written_beside
from minildm.images import read_parameters

FID_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # pytorch-fid's list
RECORD_SIZE = 512  # pixels a side at which the records of a data set are read


def list_images(source):
    """The images of a folder (not of its subfolders), of a run (its samples/) or of a ``name:path`` data set.

    Returns: sorted paths, or the data set's records. Raises: FileNotFoundError or InputError if there are none.
    """
    folder = Path(source)
    if not folder.exists() and (":" in str(source) or str(source) in BUILT_IN):
        return _records(str(source))
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; expected a folder of images")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder of images")
    if (folder / "config.json").is_file() and (folder / "samples").is_dir():
        folder = folder / "samples"
    entries = sorted(folder.iterdir())
    images = [entry for entry in entries if entry.suffix.lower() in FID_SUFFIXES and entry.is_file()]
    if folder.name == "samples" and (folder.parent / "config.json").is_file():
        single = [path for path in images if not _is_sheet(path)]
        if images and not single:
            raise InputError(
                f"{folder} holds only the contact sheets of a training run; generate images with: python "
                f"sample.py --adapter {folder.parent} --prompts FILE --out FOLDER"
            )
        images = single
    if not images:
        content = "is empty" if not entries else f"has {len(entries)} entries but no image"
        raise InputError(
            f"{folder} {content}; expected files ending in {' '.join(FID_SUFFIXES)}, subfolders are not searched"
        )
    return images


def _is_sheet(path):
    """Whether a PNG's own text says that it is a contact sheet."""
    return path.suffix.lower() == ".png" and (read_parameters(path) or "").startswith("contact sheet")


def _records(spec):
    from minildm.data.open import open_data_set

    return list(open_data_set(spec).records)


def image_name(image):
    """The name of the file or of the record."""
    return Path(image).name if isinstance(image, str | Path) else image.name


def open_rgb(image):
    """An image as 8-bit Pillow RGB.

    A path is opened as pytorch-fid does, ``Image.open(path).convert("RGB")``. A record is read as training reads it,
    at RECORD_SIZE. Raises: InputError naming a file that cannot be decoded, or one of more than 8 bits per channel,
    which ``convert`` would clip.
    """
    if not isinstance(image, str | Path):
        from minildm.data.reading import Transform, read

        return Image.fromarray(read(image, Transform(size=RECORD_SIZE))[0])
    path = image
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise InputError(
                    f"{path} has more than 8 bits per channel (mode {image.mode}); FID is defined on 8-bit images: "
                    "rescale it to 8 bits first"
                )
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError | FileNotFoundError):
            raise
        raise InputError(f"{path} cannot be decoded ({error}); replace or remove it, no image is skipped") from None


def as_tensor(image):
    """Pillow RGB -> uint8 (3, H, W)"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_json(path, content):
    """Write results to a file that is whole or absent."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")
