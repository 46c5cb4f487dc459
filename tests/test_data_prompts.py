"""Caption fields -> prompts, checked character by character against the papers' prompts."""

import itertools

import made_data
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minildm.data.open import open_data_set
from minildm.data.prompts import TEMPLATES, check_template, prompts_for, render
from minildm.errors import InputError

FIELDS = {
    "age": "47",
    "sex": "male",
    "view": "PA",
    "projection": "PA",
    "modality": "DX",
    "diagnosis": "calcified granuloma",
    "loc": "right upper lobe",
}


def without(*names):
    return {name: value for name, value in FIELDS.items() if name not in names}


def test_the_chest_x_ray_levels_are_as_documented_character_by_character():
    assert render("plain", FIELDS) == "chest x-ray"
    assert render("person", FIELDS) == "chest x-ray, age 47 male"
    assert render("view", FIELDS) == "chest x-ray, age 47 male, view PA, projection PA, modality DX"
    assert render("full", FIELDS) == (
        "chest x-ray, age 47 male, view PA, projection PA, modality DX, "
        "diagnosis calcified granuloma, loc right upper lobe"
    )


def test_the_selora_papers_prompts_character_by_character():
    fields = {"age": "32", "sex": "male", "findings": "normal"}
    assert render("montgomery", fields) == " age:32, gender:Male, findings:normal"
    assert render("findings", {"findings": "The heart is normal, lungs clear."}) == "The heart is normal, lungs clear."


def test_padchest_rows_give_the_full_prompt(tmp_path):
    data_set = open_data_set(f"padchest:{made_data.padchest(tmp_path)}")
    assert prompts_for(data_set) == [
        "chest x-ray, age 47 male, view PA, projection PA, modality DX, diagnosis calcified granuloma, "
        "loc right upper lobe",
        "chest x-ray, age 5 female, projection AP horizontal, modality CR, diagnosis alveolar pattern, "
        "loc tracheal, left",
        "chest x-ray, projection PA, modality CR",
    ]


@pytest.mark.parametrize(
    "missing, prompt",
    [
        (("age",), "chest x-ray, male, view PA"),
        (("sex",), "chest x-ray, age 47, view PA"),
        (("view",), "chest x-ray, age 47 male"),
        (("age", "sex"), "chest x-ray, view PA"),
        (("age", "sex", "view"), "chest x-ray"),
    ],
)
def test_a_missing_field_leaves_no_hole(missing, prompt):
    assert render("chest x-ray, age {age} {sex}, view {view}", without(*missing)) == prompt


@pytest.mark.parametrize(
    "template, missing, prompt",
    [
        ("{age}-year-old {sex} patient; {view} view", (), "47-year-old male patient; PA view"),
        ("{age}-year-old {sex} patient; {view} view", ("age",), "male patient; PA view"),
        ("{age}-year-old {sex} patient; {view} view", ("sex", "view"), "47-year-old patient"),
        ("{sex}, {view}, {loc}", ("sex",), "PA, right upper lobe"),
        ("{sex}, {view}, {loc}", ("view",), "male, right upper lobe"),
        (" age:{age}, gender:{Sex}", ("age",), " gender:Male"),
        ("an x-ray, {sex}, of a chest", ("sex",), "an x-ray, of a chest"),
    ],
)
def test_templates_of_other_shapes_leave_no_hole(template, missing, prompt):
    assert render(template, without(*missing)) == prompt


@given(st.sets(st.sampled_from(sorted(FIELDS))), st.sampled_from(sorted(TEMPLATES)))
def test_no_template_ever_leaves_a_stray_comma_or_blank(missing, template):
    prompt = render(template, without(*missing))
    body = prompt.removeprefix(" ") if TEMPLATES[template].startswith(" ") else prompt  # that blank is the template's
    assert "  " not in body and ",," not in body and ", ," not in body and body == body.strip(" ,")


def test_the_full_prompt_with_any_subset_of_fields_is_the_list_of_their_parts():
    for count in range(len(FIELDS) + 1):
        for names in itertools.combinations(FIELDS, count):
            fields = {name: FIELDS[name] for name in names}
            person = " ".join(part for part in ("age 47" * ("age" in fields), fields.get("sex", "")) if part)
            others = [f"{name} {fields[name]}" for name in list(FIELDS)[2:] if name in fields]
            assert render("full", fields) == ", ".join(part for part in ("chest x-ray", person, *others) if part)


def test_an_unknown_field_lists_the_known_ones(tmp_path):
    data_set = open_data_set(f"folder:{made_data.folder(tmp_path, 2)}")
    with pytest.raises(InputError, match=r"unknown field \{agee\} .* known: age, diagnosis, finding, findings,"):
        prompts_for(data_set, "chest x-ray, age {agee}")
    assert prompts_for(data_set, "x-ray, {finding} in {sex}")[1] == "x-ray, Edema in female"
    with pytest.raises(InputError, match=r"a brace that is not part of a field"):
        check_template("chest {", data_set.records)
    with pytest.raises(InputError, match=r"neither a prompt template nor one of: plain, person, view"):
        check_template("fulll", data_set.records)


def test_empty_prompts_are_an_error_not_a_caption(tmp_path):
    data_set = open_data_set(f"folder:{made_data.folder(tmp_path, 3)}")
    with pytest.raises(InputError, match=r"3 of 3 prompts are empty with the template '\{loc\}', such as that of "):
        prompts_for(data_set, "{loc}")


def test_images_without_captions_need_a_template(tmp_path):
    made_data.save(tmp_path / "a.png")
    data_set = open_data_set(f"folder:{tmp_path}")
    with pytest.raises(InputError, match=r"has no captions; give --prompt-template"):
        prompts_for(data_set)
    assert prompts_for(data_set, "chest x-ray") == ["chest x-ray"]
