"""The ruler reads held-out phantoms well enough to score generated ones, at any size, blurred or not."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from minildm.errors import InputError
from minildm.metrics.adherence import prompt_adherence
from minildm.teaching import phantom, ruler


@pytest.fixture(scope="module")
def held_out():
    seeds = [(1234, i) for i in range(300)]
    batch = [phantom.labels(seed) for seed in seeds]
    return batch, phantom.render_batch(batch, seeds, 128)


@pytest.fixture(scope="module")
def read(held_out):
    batch, images = held_out
    return list(zip(batch, ruler.measure(images)))


def rates(pairs, finding, seen):
    """(sensitivity, specificity) among frontal images read as frontal."""
    frontal = [(label, bool(seen(reading))) for label, reading in pairs if "lateral" not in (label.view, reading.view)]
    return tuple(
        np.mean([hit == ill for label, hit in frontal if (label.finding == finding) == ill]) for ill in (True, False)
    )


def test_view_and_sex_are_read(read):
    assert np.mean([label.view == reading.view for label, reading in read]) > 0.95
    assert np.mean([label.sex == reading.sex for label, reading in read]) > 0.95


def test_the_cardiothoracic_ratio_is_measured(read):
    errors = [abs(label.ctr - reading.ctr) for label, reading in read if "lateral" not in (label.view, reading.view)]
    assert np.mean(errors) < 0.02
    assert all(np.isnan(reading.ctr) for _, reading in read if reading.view == "lateral")


@pytest.mark.parametrize(
    ("finding", "field", "floor"),
    [
        ("cardiomegaly", "cardiomegaly", 0.9),
        ("pacemaker", "pacemaker", 0.85),
        ("scoliosis", "scoliosis", 0.85),
        ("pleural effusion", "effusion", 0.8),
        ("pneumothorax", "pneumothorax", 0.85),
        ("consolidation", "consolidation", 0.8),
        ("calcified granuloma", "granuloma", 0.6),
    ],
)
def test_findings_are_read(read, finding, field, floor):
    sensitivity, specificity = rates(read, finding, lambda reading: getattr(reading, field))
    assert sensitivity > floor and specificity > floor


def test_sides_are_read(read):
    for finding, field in (("pleural effusion", "effusion"), ("pneumothorax", "pneumothorax")):
        found = [(label.place, getattr(reading, field)) for label, reading in read if label.finding == finding]
        assert np.mean([place == seen for place, seen in found if seen]) > 0.95


def test_size_blur_and_noise_change_little(held_out, read):
    _, images = held_out
    rng = np.random.default_rng(0)
    soft = [ndimage.gaussian_filter(i.astype(float), 0.7) + rng.normal(0, 4, i.shape) for i in images[:80]]
    soft = [np.clip(i, 0, 255).astype(np.uint8) for i in soft]
    large = [np.asarray(Image.fromarray(i).resize((300, 300), Image.Resampling.BICUBIC)) for i in images[:80]]
    for other in (soft, large):
        pairs = list(zip((reading for _, reading in read[:80]), ruler.measure(other)))
        for field in ("view", "sex", "effusion", "pacemaker"):
            assert np.mean([getattr(a, field) == getattr(b, field) for a, b in pairs]) > 0.88


def test_one_image_gives_one_reading(held_out, read):
    _, images = held_out
    alone = ruler.measure(images[3])
    for field in dataclasses.fields(alone):
        assert getattr(alone, field.name) == pytest.approx(getattr(read[3][1], field.name), nan_ok=True)


def test_obeys_judges_only_what_was_asked(read):
    reading = dataclasses.replace(read[0][1], view="PA", sex="male", effusion="left", effusion_size=0.4)
    assert ruler.obeys(reading, {"view": "PA", "sex": "female"}) == {"view": True, "sex": False}
    asked = {"diagnosis": "pleural effusion", "loc": "right"}
    assert ruler.obeys(reading, asked) == {"diagnosis": True, "loc": False}
    assert ruler.obeys(reading, {"diagnosis": "normal"}) == {"diagnosis": False}


def test_colour_images_are_refused():
    with pytest.raises(InputError, match="grey uint8"):
        ruler.measure([np.zeros((64, 64, 3), np.uint8)])


def test_phantoms_adhere_to_their_prompts_and_not_to_each_others(tmp_path):
    paths, wanted = [], []
    for i in range(40):
        label = phantom.labels((77, i))
        wanted.append(phantom.fields(label))
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(phantom.render(label, (77, i), 128)).save(paths[-1])
    agreement = prompt_adherence(paths, wanted, ruler.measure, ruler.obeys)
    assert agreement["view"].share >= 0.95 and agreement["view"].chance < 0.8
    assert agreement["sex"].share >= 0.9 and agreement["sex"].chance < 0.7
    assert agreement["diagnosis"].share >= 0.75 and agreement["diagnosis"].chance < 0.5
