"""``--data procedural``: captioned images of anything but chests (teaching/procedural.py), rendered on demand."""

import functools

from minildm.data.records import Record
from minildm.progress import Progress
from minildm.teaching import source_hash
from minildm.teaching.procedural import render_batch

PROMPT = "{text}"
N_RECORDS = 40_000


def records(n=N_RECORDS, seed=0):
    """``n`` images with captions. Record i depends on (seed, i) alone; its caption is the same at every size."""
    numbers = Progress("writing captions", "caption", iterable=range(n))
    captions = [render_batch([(seed, i)], 32)[1][0] for i in numbers]
    return [
        Record(
            name=f"{i:06d}",
            patient=str(i),
            fields={"text": caption},
            render=functools.partial(_render, (seed, i)),
            recipe=f"procedural {seed} {i} {source_hash()}",
        )
        for i, caption in enumerate(captions)
    ], []


def _render(seed, size):
    return render_batch([seed], size)[0][0]
