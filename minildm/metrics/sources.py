"""What a metric reads and writes: the images of a folder, a run or a data set; a JSON file of results.

An image is given as a path or as a ``Record`` of a data set. `read_as_training` is the reading of all metrics but two:
FID and the CLIP score read files as published, because that reading is part of their definition (`open_rgb`).
"""

import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from minildm.data.folders import IMAGE_SUFFIXES, is_left_behind, paths_below
from minildm.data.rasters import deep_colour
from minildm.data.records import BUILT_IN, Record
from minildm.errors import InputError
from minildm.files import file_bytes, shown, written_beside
from minildm.images import read_parameters
from minildm.metrics.run_split import is_run_split, open_run_split

FID_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # pytorch-fid's list
SHEETS = "sheets"  # the subfolder for sample.py's contact sheets
RECORD_SIZE = 512  # pixels a side at which the records of a data set are read


def list_images(source):
    """The images of a folder (not of its subfolders), of a run (its samples/), of a ``name:path`` data set, or of a
    run's split, ``run:FOLDER:SPLIT``.

    Returns: sorted paths, or the data set's records. Raises: FileNotFoundError or InputError if there are none.
    """
    folder = Path(source)
    if is_run_split(source):
        return list(open_run_split(source).records)
    if _is_data_set(source):
        return _records(str(source))
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; expected a folder of images")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder of images")
    if (folder / "config.json").is_file() and (folder / "samples").is_dir():
        folder = folder / "samples"
    entries = sorted(entry for entry in folder.iterdir() if not is_left_behind(entry.name))
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
    _warn_of_others(folder, entries)
    return images


def _warn_of_others(folder, entries):
    """Warn of images that pytorch-fid does not read either: in other formats, and in subfolders, except what minildm
    itself writes there (the images of an audit, sample.py's contact sheets)."""
    others = [entry for entry in entries if entry.suffix.lower() in set(IMAGE_SUFFIXES) - set(FID_SUFFIXES)]
    subfolders = [entry for entry in entries if entry.is_dir() and not (entry / "audit.json").is_file()]
    below = (path for subfolder in subfolders for path in paths_below(subfolder, *IMAGE_SUFFIXES))
    others += [path for path in below if not (path.parent.name == SHEETS and _is_sheet(path))]
    if others:
        example = shown(others[0].relative_to(folder))
        warnings.warn(
            f"{len(others)} images in {shown(folder)}, such as {example}, are not read: subfolders are not searched, "
            f"and only {' '.join(FID_SUFFIXES)} count",
            stacklevel=3,
        )


def list_as_training(source, settings):
    """The images that training reads from a folder and its subfolders, or from a ``name:path`` data set; or a run's, or
    those of a run's split, ``run:FOLDER:SPLIT``, whose own settings count.

    Args: settings: DataSettings, of which those that select records count. Images without a prompt stay: DreamBooth
        trains on them. What is left out is printed.
    """
    folder = Path(source)
    if is_run_split(source):
        return list_images(source)
    if not folder.is_dir():
        return _records(str(source), settings, captioned=False) if _is_data_set(source) else list_images(source)
    if (folder / "config.json").is_file() and (folder / "samples").is_dir():
        return list_images(source)
    images = paths_below(folder, *IMAGE_SUFFIXES)
    if not images:
        raise InputError(f"{folder} holds no image, nor do its subfolders; expected {' '.join(IMAGE_SUFFIXES)}")
    return images


def _is_data_set(source):
    return not Path(source).exists() and (":" in str(source) or str(source) in BUILT_IN)


def _is_sheet(path):
    """Whether a PNG's own text says that it is a contact sheet. Of a damaged file: no, as it says nothing."""
    try:
        return path.suffix.lower() == ".png" and (read_parameters(path) or "").startswith("contact sheet")
    except InputError:
        return False


def _records(spec, settings=None, captioned=True):
    from minildm.data.open import open_data_set

    data_set = open_data_set(spec, settings, captioned=captioned)
    for note in data_set.notes:
        print(f"note: {spec}: {note}", file=sys.stderr)
    return list(data_set.records)


def image_name(image):
    """The name of the file or of the record."""
    return shown(Path(image).name) if isinstance(image, str | Path) else image.name


def read_as_training(image, transform=None):
    """A path or record as training reads it: upright, greys of any depth, DICOM, black where transparent.

    Args: transform: how it is fitted; None: not at all (of a record that is rendered: RECORD_SIZE).
    Returns: 8-bit Pillow RGB. Raises: InputError naming a file that cannot be read.
    """
    from minildm.data.reading import Transform, decode, read

    record = Record(str(image), str(image), path=Path(image)) if isinstance(image, str | Path) else image
    if transform is None and record.path is not None:
        return Image.fromarray(decode(file_bytes(record.path), record.path).pixels).convert("RGB")
    return Image.fromarray(read(record, transform or Transform(size=RECORD_SIZE))[0])


def open_rgb(image):
    """An image as 8-bit Pillow RGB.

    A path is opened as pytorch-fid does, ``Image.open(path).convert("RGB")``. A record is read as training reads it,
    at RECORD_SIZE. Raises: InputError naming a file that cannot be decoded, or one of more than 8 bits per channel,
    which ``convert`` would clip or cut.
    """
    if not isinstance(image, str | Path):
        from minildm.data.reading import Transform

        return read_as_training(image, Transform(size=RECORD_SIZE))
    path = image
    try:
        with Image.open(io.BytesIO(file_bytes(path))) as image:
            if image.mode[0] in "IF" or deep_colour(image):
                raise InputError(
                    f"{shown(path)} has more than 8 bits per channel (mode {deep_colour(image) or image.mode}); this "
                    "metric is defined on 8-bit images: rescale it to 8 bits first"
                )
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        reason = "unknown image format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(
            f"{shown(path)} cannot be decoded ({reason}); replace or remove it, no image is skipped"
        ) from None


def as_tensor(image):
    """Pillow RGB -> uint8 (3, H, W)"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_json(path, content):
    """Write results to a file that is whole or absent."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")
