"""Damage for files: bytes, JSON documents and dictionaries of a saved state. Each is a function of its rng."""

import copy
import json
import math

import torch

NUMBERS = (0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**9, 0.5, -0.0, 1e300)
TEXTS = ("", "x", "../../etc/passwd", "\x1b[31m", "é" * 300, "nan", "None", "\0", "-" * 5000, "😀", "\ud800", "1e400")
NO_DOCUMENTS = (b"", b"[" * 20000, b'{"a":' * 20000, b"1" * 6000, b"null", b"[]", b"\xff\xfe", b'{"a": NaN}')
LEAVES = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [1, "a"], {"a": 1}, math.nan, math.inf)


def of_bytes(rng, data):
    """One to three of: bits flipped, bytes overwritten, cut, removed, repeated, inserted; a field made extreme."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(300))  # headers lie at the beginning
        length = rng.choice((1, 2, 4, 8, 50))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 100))
        elif kind == 5:
            data[at:at] = rng.randbytes(length)
        else:
            data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"9")) * length
    return bytes(data)


def of_document(rng, document):
    """The JSON text of ``document`` with up to three values replaced, keys removed or added; or no such text at all."""
    if rng.random() < 0.15:
        return rng.choice(NO_DOCUMENTS)
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        replace_one(rng, document, LEAVES)
    text = json.dumps(document)
    if rng.random() < 0.1:
        text = text.replace("1", "1" * 5000, 1)
    return text.encode()


def of_state(rng, state):
    """A copy of a nested dict of tensors and numbers in which up to two values are others."""
    state = copy.deepcopy(state)
    tensors = (torch.zeros(()), torch.zeros(3), torch.full((2, 2), math.nan), torch.zeros(1, 1, dtype=torch.int64))
    for _ in range(rng.randint(1, 2)):
        replace_one(rng, state, (*LEAVES, *tensors))
    return state


def replace_one(rng, container, leaves):
    """Replace, remove or add an entry somewhere in nested dicts and lists, in place."""
    places = list(_places(container))
    if not places:
        return
    parent, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = rng.choice(leaves)
    else:
        parent[key] = copy.deepcopy(rng.choice(leaves))


def _places(container):
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(items):
        yield container, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
