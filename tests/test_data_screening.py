"""Screening warnings and near-duplicates; thresholds checked on real chest X-rays."""

import time

import numpy as np
import pytest
from made_data import encoded, grey_image
from PIL import Image

from minildm.data.open import open_data_set
from minildm.data.reading import decode, file_bytes
from minildm.data.screening import (
    find_warnings,
    looks_inverted,
    near_duplicates,
    near_hashes,
    perceptual_hash,
    small_grey,
)


def bordered():
    pixels = np.zeros((128, 128), np.uint8)
    pixels[:, 40:88] = grey_image(side=128)[:, 40:88]
    return pixels


@pytest.mark.parametrize(
    "pixels, phrase",
    [
        (grey_image(side=256) // 8 + 100, "low contrast"),
        (np.where(grey_image() > 90, 255, grey_image()), "saturated"),
        (bordered(), "empty borders"),
        (grey_image(side=128)[:60], "unusual shape"),
        (255 - grey_image(), "greys look inverted"),
    ],
)
def test_what_is_unusual_is_named(pixels, phrase):
    assert any(warning.startswith(phrase) for warning in find_warnings(pixels.astype(np.uint8)))


def test_an_ordinary_image_gives_no_warning():
    assert find_warnings(grey_image(side=128)) == []


def duplicates(images):
    """Groups of near-duplicates among arrays of pixels."""
    return near_duplicates(
        np.stack([perceptual_hash(pixels) for pixels in images]), np.stack([small_grey(pixels) for pixels in images])
    )


def test_near_duplicates_are_found_and_others_are_not():
    images = [
        np.asarray(Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9), np.uint8)).resize((200, 200)))
        for i in range(300)
    ]
    copy = Image.fromarray(images[7]).resize((150, 150)).point(lambda value: value * 0.9 + 10)
    images.append(decode(encoded(copy, "JPEG", quality=60), "copy.jpg").pixels)
    assert duplicates(images) == [[7, 300]]


def test_near_hashes_equal_the_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (40, 32), np.uint8)
    for copy in range(1, 20):  # copies with 0 to 19 bits changed
        bits = np.unpackbits(hashes[0])
        bits[rng.choice(256, copy, replace=False)] ^= 1
        hashes[copy] = np.packbits(bits)
    distances = np.unpackbits(hashes[:, None] ^ hashes, axis=2).sum(axis=2)
    found = [(i, j) for i, others in near_hashes(hashes) for j in others.tolist()]
    assert sorted(found) == [(i, j) for i in range(40) for j in range(i + 1, 40) if distances[i, j] <= 15]


def blank_images(n):
    """Images without content, no two alike: a level of its own, and a corner that is a little lighter."""
    images = np.full((n, 64, 64), 0, np.uint8)
    images += (np.arange(n) % 250).astype(np.uint8)[:, None, None]
    images[np.arange(n), np.arange(n) % 61, 0] += 1
    return images


def test_copies_of_copies_are_one_group():
    image = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)).resize((200, 200)))
    sizes = [np.asarray(Image.fromarray(image).resize((side, side))) for side in (200, 180, 160)]
    other = np.random.default_rng(1).integers(0, 256, (200, 200), np.uint8)
    assert duplicates([sizes[0], other, sizes[1], sizes[2]]) == [[0, 2, 3]]


def test_thousands_of_blank_images_take_no_longer_than_others():
    def seconds(n):
        images = blank_images(n)
        hashes = np.stack([perceptual_hash(pixels) for pixels in images])
        greys = np.stack([small_grey(pixels) for pixels in images])
        start = time.process_time()
        groups = near_duplicates(hashes, greys)
        assert sum(map(len, groups)) > 0.9 * n
        return time.process_time() - start

    assert seconds(2000) < 5


def test_real_chest_x_rays_give_few_warnings_and_their_negatives_are_recognized(shared_data):
    data_set = open_data_set(f"folder:{shared_data / 'cxr'}")
    small = []
    for record in data_set.records:
        pixels = decode(file_bytes(record.path), record.path).pixels
        small.append(np.asarray(Image.fromarray(pixels).convert("L").resize((128, 128), Image.Resampling.BOX)))
    positives = sum(looks_inverted(grey) for grey in small)
    negatives = sum(looks_inverted(255 - grey) for grey in small)
    assert positives <= 3 and negatives >= 0.9 * len(small)  # 1 and 271 of 289
    assert sum(bool(find_warnings(grey)) for grey in small) <= 5
    assert duplicates(small) == []


def test_real_brain_slices_of_different_people_are_not_duplicates(shared_data):
    data_set = open_data_set(f"folder:{shared_data / 'brats' / 'trainset'}")
    assert duplicates([decode(file_bytes(record.path), record.path).pixels for record in data_set.records]) == []
