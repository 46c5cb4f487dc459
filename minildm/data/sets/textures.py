"""``--data textures``, for a decoder that keeps fine detail: grey textures (teaching/textures.py) and as many images of
``procedural``, rendered on demand. No chests.
"""

import functools

from minildm.data.records import Record
from minildm.data.sets import procedural
from minildm.teaching import source_hash
from minildm.teaching.textures import render_batch

PROMPT = "{text}"
N_RECORDS = 40_000


def records(n=N_RECORDS, seed=0):
    """``n`` images; record i depends on (seed, i) alone, and has no patient."""
    others, notes = procedural.records(n // 2, seed)
    textures = [
        Record(
            name=f"texture-{i:06d}",
            patient=f"texture-{i}",
            fields={"text": "a gray texture"},
            render=functools.partial(_render, (seed, i)),
            recipe=f"texture {seed} {i} {source_hash()}",
        )
        for i in range(n - len(others))
    ]
    return [*others, *textures], notes


def _render(seed, size):
    return render_batch([seed], size)[0]
