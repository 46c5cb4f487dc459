"""Textures: reproducible, and a data set together with procedural images."""

import numpy as np
import pytest

from minildm.data.open import open_data_set
from minildm.data.sets.textures import records
from minildm.teaching.textures import render_batch


def test_a_texture_depends_on_its_seed_alone_and_hardly_on_the_size():
    seeds = [(4, i) for i in range(6)]
    images = render_batch(seeds, 128)
    assert images.shape == (6, 128, 128) and images.dtype == np.uint8
    np.testing.assert_array_equal(render_batch(seeds[3:4], 128)[0], images[3])
    small = render_batch(seeds, 64).astype(float)
    halved = images.reshape(6, 64, 2, 64, 2).mean((2, 4))
    assert all(np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9 for a, b in zip(small, halved))


@pytest.mark.parametrize("n", [1, 7])
def test_every_other_record_is_a_texture(n):
    made, notes = records(n)
    assert len(made) == len({record.name for record in made}) == len({record.patient for record in made}) == n
    assert notes == [] and all(record.fields["text"] for record in made)
    images = [record.render(40) for record in made]
    assert sum(image.ndim == 2 for image in images) == (n + 1) // 2
    assert len(open_data_set(f"textures:{n}")) == n
