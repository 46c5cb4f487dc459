"""Procedural images: reproducible and captioned; the shape checker judges them correctly."""

import numpy as np
import pytest

from minildm.data.open import DataSettings, open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.reading import Transform, read
from minildm.data.sets.procedural import records
from minildm.errors import InputError
from minildm.teaching.procedural import IMAGE_KINDS, render_batch
from minildm.teaching.shape_check import check_shapes
from minildm.teaching.shapes import COLOURS, RELATIONS, SHAPES, shape_prompt


@pytest.fixture(scope="module")
def shapes():
    return render_batch([(1, i) for i in range(120)], 128, "shapes")


def test_an_image_depends_on_its_seed_alone():
    seeds = [(4, i) for i in range(12)]
    images, captions = render_batch(seeds, 64)
    assert images.shape == (12, 64, 64, 3) and images.dtype == np.uint8
    for i in (0, 7):
        alone, text = render_batch([seeds[i]], 64)
        np.testing.assert_array_equal(alone[0], images[i])
        assert text == [captions[i]]


def test_a_caption_does_not_depend_on_the_size():
    seeds = [(6, i) for i in range(150)]
    captions = render_batch(seeds, 32)[1]
    assert render_batch(seeds, 64)[1] == captions
    assert render_batch(seeds[:20], 200)[1] == captions[:20]


def test_records_depend_on_seed_and_number_alone():
    few, notes = records(12, seed=3)
    more, others = records(40, seed=3)[0], records(12, seed=4)[0]
    assert notes == []
    assert [(r.name, r.patient, r.fields) for r in few] == [(r.name, r.patient, r.fields) for r in more[:12]]
    assert [r.fields for r in few] != [r.fields for r in others]
    assert len({r.name for r in more}) == len({r.patient for r in more}) == 40
    for one, same, other in zip(few, more, others):
        np.testing.assert_array_equal(one.render(48), same.render(48))
        assert not np.array_equal(one.render(48), other.render(48))


def test_records_render_at_any_size():
    for record in records(8)[0]:
        for size in (32, 56, 200):
            image = record.render(size)
            assert image.shape == (size, size, 3) and image.dtype == np.uint8
            expected, (caption,) = render_batch([(0, int(record.name))], size)
            np.testing.assert_array_equal(image, expected[0])
            assert record.fields == {"text": caption}


def test_the_data_set_opens_by_its_name(monkeypatch):
    monkeypatch.setattr(records, "__defaults__", (60, 0))  # of 40,000, whose captions take half a minute
    data = open_data_set("procedural", DataSettings(limit=20))
    assert len(data) == 20 and data.notes == ("20 of 60 sampled with seed 0 (--limit)",)
    made = {record.name: record.fields["text"] for record in records()[0]}
    assert prompts_for(data) == [made[record.name] for record in data.records]
    pixels, image, _ = read(data.records[0], Transform(40))
    assert pixels.shape == (40, 40, 3) and image.kind == "rendered"


def test_no_caption_speaks_of_a_chest():
    _, captions = render_batch([(9, i) for i in range(400)], 32)
    words = {word.strip(",") for text in captions for word in text.split()}
    assert not words & {"chest", "thorax", "lung", "lungs", "heart", "rib", "ribs", "PA", "AP"}
    assert len(set(captions)) > 200


def test_every_kind_can_be_rendered():
    for kind in IMAGE_KINDS:
        images, _ = render_batch([(2, i) for i in range(10)], 64, kind)
        assert images.std() > 10


def test_radiographs_are_grey_and_scenes_are_not():
    grey, _ = render_batch([(3, i) for i in range(10)], 64, "radiographs")
    assert (grey[..., 0] == grey[..., 2]).all()
    scene, _ = render_batch([(3, i) for i in range(10)], 64, "scenes")
    assert (scene[..., 0] != scene[..., 2]).any()


def test_the_checker_accepts_images_with_their_own_captions(shapes):
    checks = [check_shapes(image, text) for image, text in zip(*shapes)]
    assert np.mean([check.right for check in checks]) > 0.98


def test_the_checker_sees_a_wrong_colour_shape_or_order(shapes):
    for image, text in zip(*shapes):
        plain = text.split(" on ")[0]  # a background may have the name of a colour
        first = next(c for c in COLOURS if f"{c} " in plain)
        other = next(c for c in COLOURS if c not in plain)
        assert not check_shapes(image, plain.replace(first, other, 1)).colour
        shape = next(s for s in SHAPES if s in plain)
        assert not check_shapes(image, plain.replace(shape, "ring" if shape != "ring" else "star")).right
        if " above " in plain:
            check = check_shapes(image, plain.replace(" above ", " below "))
            assert check.colour and check.shape and not check.order


def test_the_checker_tolerates_blur_and_noise(shapes):
    rng = np.random.default_rng(0)
    right = []
    for image, text in zip(*shapes):
        soft = (image[:-1, :-1].astype(float) + image[1:, :-1] + image[:-1, 1:] + image[1:, 1:]) / 4
        rough = np.clip(soft + rng.normal(0, 12, soft.shape), 0, 255).astype(np.uint8)
        right.append(check_shapes(rough, text).right)
    assert np.mean(right) > 0.95


def test_shape_prompts_can_be_checked():
    blank = np.full((64, 64, 3), 128, np.uint8)
    for i in range(50):
        prompt = shape_prompt((5, i))
        assert any(f" {relation} " in prompt for relation in RELATIONS)
        assert not check_shapes(blank, prompt).right


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(InputError, match="cannot check the prompt"):
        check_shapes(np.zeros((8, 8, 3), np.uint8), "a bird on a tree")
    for prompt in ("two red circles above a blue square", "a red circle below a red circle"):
        with pytest.raises(InputError, match="which of several equal shapes"):
            check_shapes(np.zeros((64, 64, 3), np.uint8), prompt)
    with pytest.raises(InputError, match="RGB uint8"):
        check_shapes(np.zeros((8, 8), np.uint8), "a red circle")
    with pytest.raises(InputError, match="no kind"):
        render_batch([1], 64, "cats")
