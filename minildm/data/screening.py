"""What can be measured of a picture that should not train: flat, saturated, bordered, oddly shaped, inverted, doubled.

The thresholds were set on 303 real chest X-rays (docs/data.md has the counts). They only propose: ``check`` lists what
they find with the reason, a person decides, and ``--exclude`` leaves out what is listed.
"""

from collections import defaultdict

import numpy as np
from PIL import Image

MEASURED_SIDE = 128  # pixels: pictures are measured at this size
LEAST_CONTRAST = 60  # grey levels between the 5th and the 95th percentile
MOST_SATURATED = 0.45  # share of pixels at one of the two ends
WIDEST_BORDER = 0.25  # share of the area that uniform rows and columns at the edges take
WIDEST_ASPECT = 1.6  # longer side by shorter side
HASH_SIDE = 16  # a perceptual hash of 16 x 16 bits
BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint16)
NEAR = 15  # bits in which two pictures of one exposure may differ, of 256
SAME = 0.993  # and how far their greys at 32 x 32 must agree (correlation): brain slices of two people reach 0.989


def reasons(pixels):
    """Why a picture (uint8, (H, W) or (H, W, 3), whole, before any crop) should be looked at: a list of phrases."""
    height, width = pixels.shape[:2]
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.BOX))
    found = []
    low, high = np.percentile(grey, (5, 95))
    if high - low < LEAST_CONTRAST:
        found.append(f"low contrast: 90 % of its greys within {high - low:.0f} levels")
    dark, light = np.mean(grey <= 3), np.mean(grey >= 252)
    if max(dark, light) > MOST_SATURATED:
        found.append(f"saturated: {max(dark, light):.0%} {'black' if dark > light else 'white'}")
    if (border := border_share(grey)) > WIDEST_BORDER:
        found.append(f"empty borders: {border:.0%} of the area")
    if (aspect := max(height, width) / min(height, width)) > WIDEST_ASPECT:
        found.append(f"unusual shape: {width} x {height}, {aspect:.1f} to 1")
    if looks_inverted(grey):
        found.append("greys look inverted: the edges are lighter than the middle")
    return found


def border_share(grey, tolerance=6):
    """Share of the area that is cut away when uniform rows and columns are trimmed from the edges."""
    busy_rows = np.flatnonzero(np.ptp(grey, axis=1) > tolerance)
    busy_columns = np.flatnonzero(np.ptp(grey, axis=0) > tolerance)
    if not len(busy_rows) or not len(busy_columns):
        return 1.0
    kept = (busy_rows[-1] - busy_rows[0] + 1) * (busy_columns[-1] - busy_columns[0] + 1)
    return 1 - kept / grey.size


def looks_inverted(grey):
    """In a chest radiograph the spine's column is lighter than the lungs beside it; in its negative it is darker."""
    rows = slice(MEASURED_SIDE // 4, MEASURED_SIDE * 5 // 8)  # the height of the lungs
    middle = grey[rows, MEASURED_SIDE * 7 // 16 : MEASURED_SIDE * 9 // 16].mean()
    lungs = (
        grey[rows, MEASURED_SIDE * 3 // 16 : MEASURED_SIDE * 6 // 16].mean()
        + grey[rows, MEASURED_SIDE * 10 // 16 : MEASURED_SIDE * 13 // 16].mean()
    ) / 2
    return bool(middle + 12 < lungs)


def perceptual_hash(pixels):
    """Difference hash: is each of 16 x 16 places lighter than its right neighbour? Returns: 32 uint8 (256 bits).
    Scaling, mild compression and brightness leave nearly all bits as they are."""
    grey = Image.fromarray(pixels).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    grey = np.asarray(grey, dtype=np.int16)
    bits = grey[:, 1:] > grey[:, :-1]
    # 16 bits that are compared as a word (near_duplicates) come from all rows and columns: diagonals, not flat edges
    return np.packbits(np.stack([np.roll(row, shift) for shift, row in enumerate(bits)]).T)


def small_grey(pixels):
    """uint8 (1024,): the picture's greys at 32 x 32, to tell look-alikes from copies."""
    return np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BOX)).ravel()


def near_duplicates(hashes, greys):
    """Pairs of pictures that are one exposure: rescaled, recompressed or brightened copies.

    Args: hashes: uint8 (n, 32); greys: uint8 (n, 1024). Returns: list of (i, j), i < j.
    """
    return [(i, j) for i, j in near_hashes(hashes) if same_greys(greys[i], greys[j])]


def same_greys(a, b):
    a, b = a - a.mean(), b - b.mean()
    return a @ b >= SAME * np.sqrt((a @ a) * (b @ b))  # for two flat pictures 0 >= 0


def near_hashes(hashes):
    """Pairs (i, j), i < j, whose hashes differ in at most NEAR bits.

    Two hashes of 16 words that differ in at most 15 bits share a whole word, so only pictures that share one are
    compared: 160,000 need no 13 billion comparisons.
    """
    words = np.ascontiguousarray(hashes).view(np.uint16)  # (n, 16)
    near = set()
    for column in range(words.shape[1]):
        same = defaultdict(list)
        for i, word in enumerate(words[:, column].tolist()):
            same[word].append(i)
        for members in map(np.array, same.values()):
            for place, i in enumerate(members[:-1].tolist()):
                others = members[place + 1 :]
                bits = BITS[hashes[others] ^ hashes[i]].sum(axis=1)
                near.update((i, j) for j in others[bits <= NEAR].tolist())
    return sorted(near)
