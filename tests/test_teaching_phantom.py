"""The chest phantom: reproducible, and each finding changes the image where and as it should."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minildm.data.open import DataSettings, open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.reading import Transform, read
from minildm.data.sets import phantom as phantom_set
from minildm.errors import InputError
from minildm.teaching import phantom
from minildm.teaching.frontal import Frontal
from minildm.teaching.phantom import FINDINGS, FRONTAL_ONLY, LOBES, PhantomLabels, fields, labels, render, render_batch


def person(**changes):
    base = PhantomLabels(50, "male", "PA", "normal", "", 0.0, 0.44, "0")
    return dataclasses.replace(base, **changes)


def difference(**changes):
    """A patient's image with a finding minus the same patient's image without it, (256, 256)."""
    with_it, without = render_batch([person(**changes), person()], [7, 7], 256)
    return with_it.astype(float) - without.astype(float)


def test_an_image_depends_on_its_labels_and_seed_alone():
    seeds = [(3, i) for i in range(24)]
    batch = [labels(seed) for seed in seeds]
    together = render_batch(batch, seeds, 64)
    assert together.dtype == np.uint8 and together.shape == (24, 64, 64)
    for i in (0, 5, 17):
        np.testing.assert_array_equal(render(batch[i], seeds[i], 64), together[i])
    np.testing.assert_array_equal(render_batch(batch[::-1], seeds[::-1], 64)[::-1], together)
    assert (render(batch[0], (3, 99), 64) != together[0]).any()


def test_size_samples_the_same_patient_more_finely():
    label = labels((1, 2), view="PA")
    small = render(label, 5, 128).astype(float)
    large = render(label, 5, 256).reshape(128, 2, 128, 2).mean((1, 3))
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.99


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from((None, *phantom.VIEWS)))
def test_labels_are_plausible_and_reproducible(seed, view):
    label = labels(seed, view=view)
    assert label == labels(seed, view=view)
    assert 18 <= label.age <= 92 and label.view in phantom.VIEWS
    assert label.place in FINDINGS[label.finding][1]
    assert (label.finding == "cardiomegaly") == (label.ctr > 0.53)
    assert not (label.view == "lateral" and label.finding in FRONTAL_ONLY)


def test_frequencies_are_those_of_the_table():
    frontal = [label.finding for label in (labels((8, i)) for i in range(1500)) if label.view != "lateral"]
    for finding, (share, *_) in FINDINGS.items():
        deviation = (share * (1 - share) / len(frontal)) ** 0.5
        assert frontal.count(finding) / len(frontal) == pytest.approx(share, abs=3 * deviation)


def test_fields_are_in_the_terms_of_captions():
    label = PhantomLabels(47, "male", "PA", "calcified granuloma", "right upper lobe", 0.4, 0.44, "0-12")
    assert fields(label) == {
        "patient_id": "phantom-0-12",
        "age": "47",
        "sex": "male",
        "view": "PA",
        "projection": "PA",
        "modality": "DX",
        "diagnosis": "calcified granuloma",
        "loc": "right upper lobe",
    }


def test_a_frontal_view_has_dark_lungs_a_bright_middle_and_the_heart_on_the_right_of_the_image():
    image = render_batch([person()] * 8, list(range(8)), 128).astype(float).mean(0)
    lung_right, lung_left, spine = image[45:70, 25:45].mean(), image[45:70, 83:100].mean(), image[45:70, 60:68].mean()
    assert lung_right < 0.7 * spine and lung_left < 0.7 * spine
    below = image[76:88]
    assert below[:, 70:82].mean() > below[:, 46:58].mean() + 20


def test_an_effusion_whitens_the_base_of_its_side_only():
    for place, near, far in (
        ("right", np.s_[:, 20:90], np.s_[:, 166:236]),
        ("left", np.s_[:, 166:236], np.s_[:, 20:90]),
    ):
        change = difference(finding="pleural effusion", place=place, size=0.5)
        assert change[near][150:185].mean() > 30
        assert np.abs(change[far]).mean() < 12


def test_the_upper_edge_of_an_effusion_climbs_the_chest_wall():
    change = difference(finding="pleural effusion", place="right", size=0.4) > 40
    wall, middle = (np.argmax(change[100:, x].mean(1) > 0.5) for x in (slice(32, 40), slice(72, 84)))
    assert wall < middle


def test_a_pneumothorax_darkens_the_rim_and_spares_the_other_lung():
    change = difference(finding="pneumothorax", place="left", size=3.5)
    assert change[60:140, 205:218].mean() < -8
    assert np.abs(change[60:140, 40:110]).mean() < 10


@pytest.mark.parametrize("lobe", LOBES)
def test_a_consolidation_lies_in_its_lobe(lobe):
    change = difference(finding="consolidation", place=lobe, size=1.0)
    weight = np.clip(change - 20, 0, None)
    y, x = (np.average(axis, weights=weight) for axis in np.mgrid[:256, :256])
    assert (x < 128) == lobe.startswith("right")
    assert (y < 120) == ("upper" in lobe)


def test_a_wider_heart_is_wider_in_the_image():
    narrow, wide = render_batch([person(ctr=0.42), person(finding="cardiomegaly", ctr=0.62)], [7, 7], 256).astype(float)
    grown = (wide - narrow)[150:172] > 25
    assert 25 < grown.sum(1).mean() < 95


def test_a_pacemaker_is_the_brightest_thing_in_the_upper_chest_and_has_leads_to_the_heart():
    patients = [Frontal([person(finding=finding)], [7], 256) for finding in ("pacemaker", "normal")]
    for patient in patients:
        patient.trace()
    change = patients[0].path[0] - patients[1].path[0]  # nothing else differs
    can = change > 1
    y, x = np.argwhere(can).mean(0)
    assert can.sum() > 500 and 50 < y < 90 and 165 < x < 215
    assert (change[140:190] > 0.05).sum() > 100 and (change != 0).mean() < 0.05  # leads over the heart
    upper = render(person(finding="pacemaker"), 7, 256)[40:140]
    assert upper[can[40:140]].mean() > np.percentile(upper[~can[40:140]], 99)


def test_a_breast_shadow_whitens_the_lower_lungs_of_a_woman():
    change = difference(sex="female")
    assert change[150:175, 30:80].mean() > change[60:90, 40:80].mean() + 5


@pytest.mark.parametrize(
    "changes",
    [
        {"view": "oblique"},
        {"sex": "F"},
        {"finding": "fracture"},
        {"finding": "nodule", "place": "left"},
        {"finding": "scoliosis", "view": "lateral"},
    ],
)
def test_impossible_labels_are_refused_in_one_line(changes):
    with pytest.raises(InputError, match="no phantom for") as error:
        person(**changes)
    assert "\n" not in str(error.value)


def test_a_bad_size_is_refused():
    with pytest.raises(InputError, match="whole number of pixels"):
        render(person(), 0, 16)


def test_the_data_set_opens_with_prompts_in_the_full_grammar():
    data_set = open_data_set("phantom", DataSettings(views="all"))
    assert len(data_set) == phantom_set.N_RECORDS == len({record.patient for record in data_set.records})
    prompts = prompts_for(data_set)
    one = next(i for i, record in enumerate(data_set.records) if record.fields.get("loc") == "left")
    fields = data_set.records[one].fields
    assert prompts[one] == (
        f"chest x-ray, age {fields['age']} {fields['sex']}, view {fields['view']}, projection "
        f"{fields['projection']}, modality {fields['modality']}, diagnosis {fields['diagnosis']}, "
        "loc left"
    )
    normal = next(i for i, record in enumerate(data_set.records) if record.fields["diagnosis"] == "normal")
    assert prompts[normal].endswith("diagnosis normal")
    pixels = read(data_set.records[one], Transform(size=64))[0]
    again = read(phantom_set.records(n=one + 1)[0][one], Transform(size=64))[0]
    assert pixels.shape == (64, 64, 3) and (pixels == again).all()
    assert len(open_data_set("phantom")) == sum(record.frontal for record in data_set.records)
