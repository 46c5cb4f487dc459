"""``--data phantom``: procedural chest radiographs with exact labels (teaching/phantom.py), rendered on demand."""

import functools

from minildm.data.records import Record
from minildm.teaching import source_hash
from minildm.teaching.phantom import fields, labels, render

PROMPT = "full"
N_RECORDS = 2000


def records(n=N_RECORDS, seed=0):
    """``n`` patients with one image each. Record i depends on (seed, i) alone."""
    sampled = [labels((seed, i)) for i in range(n)]
    return [
        Record(
            name=f"{i:05d}",
            patient=label.patient,
            frontal=label.view != "lateral",
            fields={name: value for name, value in fields(label).items() if value and name != "patient_id"},
            render=functools.partial(render, label, (seed, i)),
            recipe=f"phantom {seed} {i} {source_hash()}",
        )
        for i, label in enumerate(sampled)
    ], []
