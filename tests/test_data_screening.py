"""Pictures that should not train, found by measurement; thresholds held against real chest X-rays."""

import io

import numpy as np
import pytest
from made_data import picture
from PIL import Image

from minildm.data.reading import decode, file_bytes
from minildm.data.records import open_data_set
from minildm.data.screening import looks_inverted, near_duplicates, near_hashes, perceptual_hash, reasons, small_grey


def bordered():
    pixels = np.zeros((128, 128), np.uint8)
    pixels[:, 40:88] = picture(side=128)[:, 40:88]
    return pixels


@pytest.mark.parametrize(
    "pixels, phrase",
    [
        (picture(side=256) // 8 + 100, "low contrast"),
        (np.where(picture() > 90, 255, picture()), "saturated"),
        (bordered(), "empty borders"),
        (picture(side=128)[:60], "unusual shape"),
        (255 - picture(), "greys look inverted"),
    ],
)
def test_what_is_wrong_is_named(pixels, phrase):
    assert any(reason.startswith(phrase) for reason in reasons(pixels.astype(np.uint8)))
    assert not reasons(picture(side=128))


def test_near_duplicates_are_found_and_others_are_not():
    made = [
        np.asarray(Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9), np.uint8)).resize((200, 200)))
        for i in range(300)
    ]
    buffer = io.BytesIO()
    Image.fromarray(made[7]).resize((150, 150)).point(lambda value: value * 0.9 + 10).save(buffer, "JPEG", quality=60)
    made.append(np.asarray(Image.open(buffer)))
    assert duplicates(made) == [(7, 300)]


def duplicates(pictures):
    return near_duplicates(
        np.stack([perceptual_hash(pixels) for pixels in pictures]),
        np.stack([small_grey(pixels) for pixels in pictures]),
    )


def test_near_hashes_equal_the_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (40, 32), np.uint8)
    for copy in range(1, 20):  # copies with 0 to 19 bits changed
        bits = np.unpackbits(hashes[0])
        bits[rng.choice(256, copy, replace=False)] ^= 1
        hashes[copy] = np.packbits(bits)
    distances = np.unpackbits(hashes[:, None] ^ hashes, axis=2).sum(axis=2)
    assert near_hashes(hashes) == [(i, j) for i in range(40) for j in range(i + 1, 40) if distances[i, j] <= 15]


def test_real_chest_x_rays_pass_and_their_negatives_are_found(shared_data):
    data_set = open_data_set(f"folder:{shared_data / 'cxr'}")
    small = []
    for record in data_set.records:
        pixels = decode(file_bytes(record.path), record.path).pixels
        small.append(np.asarray(Image.fromarray(pixels).convert("L").resize((128, 128), Image.Resampling.BOX)))
    wrong = sum(looks_inverted(grey) for grey in small)
    found = sum(looks_inverted(255 - grey) for grey in small)
    assert wrong <= 3 and found >= 0.9 * len(small)  # 1 and 271 of 289
    assert sum(bool(reasons(grey)) for grey in small) <= 5
    assert duplicates(small) == []


def test_real_brain_slices_of_different_people_are_no_duplicates(shared_data):
    data_set = open_data_set(f"folder:{shared_data / 'brats' / 'trainset'}")
    assert duplicates([decode(file_bytes(record.path), record.path).pixels for record in data_set.records]) == []
