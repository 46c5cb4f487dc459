"""Find images that should perhaps not be trained on: flat, saturated, bordered, oddly shaped, inverted, duplicated.

The thresholds were set on 303 real chest X-rays (counts in docs/data.md). A warning is only a proposal: ``check`` lists
the images with the reasons, a person decides, and ``--exclude`` leaves out those that stay on the list.
"""

import hashlib
from collections import defaultdict

import numpy as np
from PIL import Image

SCREENING_SIDE = 128  # pixels: images are measured at this size
MIN_CONTRAST = 60  # grey levels between the 5th and the 95th percentile
MAX_SATURATED = 0.45  # share of pixels that are black, or white
MAX_BORDER = 0.25  # share of the area taken by uniform rows and columns at the edges
MAX_ASPECT = 1.6  # longer side / shorter side
HASH_SIDE = 16  # a perceptual hash has 16 x 16 bits
MAX_HASH_DISTANCE = 15  # bits of 256 in which two images of one exposure may differ
MIN_CORRELATION = 0.993  # of their greys at 32 x 32 pixels: brain slices of two people reach 0.989
BIT_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint16)


def find_warnings(pixels):
    """Why a person should look at an image, as a list of phrases; empty for an ordinary image.

    Args: pixels: uint8 (H, W) or (H, W, 3), whole, before any crop.
    """
    height, width = pixels.shape[:2]
    grey = _greys(pixels, SCREENING_SIDE, SCREENING_SIDE)
    warnings = []
    low, high = np.percentile(grey, (5, 95))
    if high - low < MIN_CONTRAST:
        warnings.append(f"low contrast: 90 % of its greys within {high - low:.0f} levels")
    black, white = np.mean(grey <= 3), np.mean(grey >= 252)
    if max(black, white) > MAX_SATURATED:
        warnings.append(f"saturated: {max(black, white):.0%} {'black' if black > white else 'white'}")
    if (border := border_share(grey)) > MAX_BORDER:
        warnings.append(f"empty borders: {border:.0%} of the area")
    if (aspect := max(height, width) / min(height, width)) > MAX_ASPECT:
        warnings.append(f"unusual shape: {width} x {height}, {aspect:.1f} to 1")
    if looks_inverted(grey):
        warnings.append("greys look inverted: the middle is darker than both sides of it")
    return warnings


def border_share(grey, tolerance=6):
    """The share of the area that is lost when uniform rows and columns are trimmed from the edges."""
    busy_rows = np.flatnonzero(np.ptp(grey, axis=1) > tolerance)
    busy_columns = np.flatnonzero(np.ptp(grey, axis=0) > tolerance)
    if not len(busy_rows) or not len(busy_columns):
        return 1.0
    inner_area = (busy_rows[-1] - busy_rows[0] + 1) * (busy_columns[-1] - busy_columns[0] + 1)
    return 1 - inner_area / grey.size


def looks_inverted(grey):
    """Whether a chest radiograph is a negative: its spine is then darker than the lungs on both sides.

    Args: grey: (SCREENING_SIDE, SCREENING_SIDE).
    """
    rows = slice(SCREENING_SIDE // 4, SCREENING_SIDE * 5 // 8)  # the height of the lungs
    spine = grey[rows, SCREENING_SIDE * 7 // 16 : SCREENING_SIDE * 9 // 16].mean()
    lungs = (
        grey[rows, SCREENING_SIDE * 3 // 16 : SCREENING_SIDE * 6 // 16].mean()
        + grey[rows, SCREENING_SIDE * 10 // 16 : SCREENING_SIDE * 13 // 16].mean()
    ) / 2
    return bool(spine + 12 < lungs)


# --- duplicates -------------------------------------------------------------------------------------------------------
def perceptual_hash(pixels):
    """Difference hash: for each of 16 x 16 places, whether it is lighter than its left neighbour.

    Scaling, mild compression and brightness change hardly any bits.

    Returns: uint8 (32,), 256 bits.
    """
    grey = _greys(pixels, HASH_SIDE + 1, HASH_SIDE).astype(np.int16)
    bits = grey[:, 1:] > grey[:, :-1]
    # near_hashes compares words of 16 bits. Bits are taken along diagonals, so that each word covers all rows and
    # columns: along a flat edge all bits of a word would agree.
    return np.packbits(np.stack([np.roll(row, shift) for shift, row in enumerate(bits)]).T)


def small_grey(pixels):
    """The image's greys at 32 x 32 pixels, uint8 (1024,), to tell similar images from copies."""
    return _greys(pixels, 32, 32).ravel()


def _greys(pixels, width, height):
    """uint8 (height, width): the image in grey, averaged over boxes."""
    return np.asarray(Image.fromarray(pixels).convert("L").resize((width, height), Image.Resampling.BOX))


def near_duplicates(hashes, greys):
    """Groups of images that show one exposure: rescaled, recompressed or brightened copies.

    Copies of copies belong to one group. Of images that look the same, but for a constant, one is compared, and
    images that are already in one group not again, so thousands of blank images cost little more than others.

    Args: hashes: uint8 (n, 32) from perceptual_hash; greys: uint8 (n, 1024) from small_grey.
    Returns: lists of indices, each of two or more, ascending.
    """
    alike = defaultdict(list)
    for i, (bits, grey) in enumerate(zip(hashes, greys)):
        alike[hashlib.sha256(bits.tobytes() + (grey - grey.min()).tobytes()).digest()].append(i)
    alike = list(alike.values())
    firsts = np.array([members[0] for members in alike])
    hashes, greys, group_of = hashes[firsts], greys[firsts], np.arange(len(firsts))
    for i, near in near_hashes(hashes, group_of):
        for others in np.array_split(near, len(near) // 4096 + 1):  # 16 MB of greys at a time
            for other in others[same_greys(greys[i], greys[others])]:
                if group_of[other] != group_of[i]:
                    group_of[group_of == group_of[other]] = group_of[i]
    groups = defaultdict(list)
    for group, members in zip(group_of.tolist(), alike):
        groups[group] += members
    return [sorted(members) for members in groups.values() if len(members) > 1]


def same_greys(a, others):
    """Whether small_grey ``a`` (1024,) and each of ``others`` (n, 1024) correlate as copies do: bool (n,)."""
    a, others = a.astype(np.float32), others.astype(np.float32)
    a, others = a - a.mean(), others - others.mean(axis=1, keepdims=True)
    lengths = np.sqrt((a @ a) * np.einsum("nd,nd->n", others, others))
    return others @ a >= MIN_CORRELATION * lengths  # two flat images: 0 >= 0


def near_hashes(hashes, group_of=None):
    """Yield (i, indices j > i whose hashes differ from i's in at most MAX_HASH_DISTANCE bits), each pair once.

    Two hashes of 16 words that differ in at most 15 bits agree in at least one whole word, so only images that share a
    word are compared. For 160,000 images this avoids 13 billion comparisons.

    Args: group_of: int (n,), which the caller may change; images with one number are not compared.
    """
    words = np.ascontiguousarray(hashes).view(np.uint16)  # (n, 16)
    for column in range(words.shape[1]):
        images_with_word = defaultdict(list)
        for i, word in enumerate(words[:, column].tolist()):
            images_with_word[word].append(i)
        for members in images_with_word.values():
            members = np.array(members)
            for place, i in enumerate(members[:-1].tolist()):
                others = members[place + 1 :]
                if group_of is not None:
                    others = others[group_of[others] != group_of[i]]
                    if not others.size:
                        continue
                others = others[BIT_COUNTS[hashes[others] ^ hashes[i]].sum(axis=1) <= MAX_HASH_DISTANCE]
                others = others[(words[others, :column] != words[i, :column]).all(axis=1)]  # else it came before
                if others.size:
                    yield i, others
