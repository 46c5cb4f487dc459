"""Publishers' folders -> records: a synthetic copy of each layout, and the real tables where they are available."""

import collections
import csv
import gzip
import json
import shutil

import made_data
import pytest

from minildm.data.open import DataSettings, open_data_set
from minildm.data.prompts import prompts_for
from minildm.data.sets import iu_xray, montgomery, padchest
from minildm.errors import InputError
from minildm.tables import read_table


def fields_of(data_set, name):
    return next(record for record in data_set.records if record.name == name).fields


# --- PadChest ---------------------------------------------------------------------------------------------------------
def test_padchest_rows_become_records(tmp_path):
    data_set = open_data_set(f"padchest:{made_data.padchest(tmp_path)}")
    assert [record.name for record in data_set.records] == ["a_1.png", "b_1.png", "c_1.png"]
    assert fields_of(data_set, "a_1.png") == {
        "age": "47",
        "sex": "male",
        "view": "PA",
        "projection": "PA",
        "modality": "DX",
        "diagnosis": "calcified granuloma",
        "loc": "right upper lobe",
        "report": "sin hallazg .",
        "labelled_by": "physician",
        "pediatric": "no",
    }
    assert fields_of(data_set, "b_1.png") == {
        "age": "5",
        "sex": "female",
        "projection": "AP horizontal",
        "modality": "CR",
        "diagnosis": "alveolar pattern",
        "loc": "tracheal, left",
        "labelled_by": "model",
        "pediatric": "yes",
    }
    assert fields_of(data_set, "c_1.png") == {
        "projection": "PA",
        "modality": "CR",
        "labelled_by": "model",
        "pediatric": "no",
    }  # missing values are left out
    assert data_set.records[0].path == tmp_path / "0" / "a_1.png" and data_set.records[0].patient == "7"
    assert data_set.notes == (
        "1 of 5 left out: known to be broken in the distribution",
        "1 of 4 left out: lateral and other views that are not frontal (--views all keeps them)",
    )


def test_padchest_views_children_and_ages_are_options(tmp_path):
    spec = f"padchest:{made_data.padchest(tmp_path)}"
    assert len(open_data_set(spec, DataSettings(views="all"))) == 4
    assert len(open_data_set(spec, DataSettings(drop_pediatric=True))) == 2
    adults = open_data_set(spec, DataSettings(min_age=18))
    assert [record.name for record in adults.records] == ["a_1.png"]  # c_1.png: age unknown


def test_padchest_is_also_read_from_a_flat_folder_and_a_compressed_table(tmp_path):
    made_data.padchest(tmp_path)
    for path in list(tmp_path.glob("[01]/*.png")):
        path.rename(tmp_path / path.name)
    table = next(tmp_path.glob("*.csv"))
    (tmp_path / f"{table.name}.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    assert len(open_data_set(f"padchest:{tmp_path}")) == 3


def test_real_padchest_tables_are_read(shared_data, tmp_path):
    listed, notes = padchest.records(shared_data / "padchest")
    assert len(listed) == 67 and not notes
    assert {record.fields["labelled_by"] for record in listed} == {"physician", "model"}
    assert sum("diagnosis" in record.fields for record in listed) == 66
    for name in ("neumo_pneumonia_f.tsv", "neumo_pneumonia_m.tsv"):
        shutil.copy(shared_data / "padchest" / name, tmp_path)
    listed, notes = padchest.records(tmp_path)
    assert len(listed) == 5920 and notes == ["1 of 5,921 left out: known to be broken in the distribution"]
    ages = [int(record.fields["age"]) for record in listed]
    assert (min(ages), max(ages)) == (0, 99)
    assert {record.fields["projection"] for record in listed} == {"PA", "L", "AP", "AP horizontal", "COSTAL"}
    assert {record.fields.get("view") for record in listed} == {None, "PA", "AP", "L"}
    words = [part for record in listed for part in record.fields.get("diagnosis", "").split(", ")]
    assert all(word == word.strip() for word in words) and "exclude" not in words


def test_padchest_lists_and_ages_are_read_in_all_their_forms():
    assert padchest.items("['consolidation', ' pneumonia', '', 'consolidation']") == ["consolidation", "pneumonia"]
    assert padchest.items("['loc  tracheal, loc  left']") == ["loc tracheal", "loc left"]
    assert padchest.items("[]") == padchest.items(None) == []
    assert padchest.age("20140915", "1930.0") == "84" and padchest.age("20140915", "nan") == "20140915 - nan"


# --- Montgomery -------------------------------------------------------------------------------------------------------
def test_montgomery_readings_become_records(tmp_path):
    data_set = open_data_set(f"montgomery:{made_data.montgomery(tmp_path)}")
    assert fields_of(data_set, "MCUCXR_0001_0.png") == {
        "age": "32",
        "sex": "female",
        "findings": "normal",
        "diagnosis": "normal",
    }
    assert fields_of(data_set, "MCUCXR_0113_1.png")["findings"] == "miliary nodules; right effusion"
    assert fields_of(data_set, "MCUCXR_0166_1.png") == {"age": "49", "diagnosis": "tuberculosis"}  # O; NO REPORT
    assert [record.patient for record in data_set.records] == ["0001", "0113", "0113", "0113"]
    assert all("CXR_png" in str(record.path) for record in data_set.records)  # not the masks of the same name


def test_real_montgomery_readings_are_read(shared_data):
    listed, _ = montgomery.records(shared_data / "montgomery")
    assert len(listed) == 138 and len({record.patient for record in listed}) == 135
    by_number = {record.name[7:11]: record for record in listed}
    assert by_number["0117"].patient == "0113" and by_number["0170"].patient == by_number["0166"].patient == "0162"
    assert by_number["0170"].fields["findings"].endswith("will switch to HR only")
    assert "sex" not in by_number["0080"].fields and "findings" not in by_number["0166"].fields
    assert collections.Counter(record.fields["diagnosis"] for record in listed) == {"normal": 80, "tuberculosis": 58}
    ages = sorted(int(record.fields["age"]) for record in listed)
    assert (ages[0], ages[-1]) == (4, 89)


# --- IU X-ray ---------------------------------------------------------------------------------------------------------
def test_iu_xray_kaggle_tables_become_records(tmp_path):
    data_set = open_data_set(f"iu-xray:{made_data.iu_kaggle(tmp_path)}")
    assert [record.name for record in data_set.records] == ["1_IM-0001-4001.dcm.png"]
    assert data_set.records[0].fields == {
        "findings": "Lungs are clear.",
        "impression": "Normal.",
        "indication": "Cough.",
        "diagnosis": "normal",
    }
    assert data_set.notes[1] == "1 of 2 left out: without a prompt from '{findings}', such as 2_IM-0652-1001.dcm.png"
    impressions = open_data_set(f"iu-xray:{tmp_path}", DataSettings(prompt_template="impression"))
    assert [record.fields["impression"] for record in impressions.records] == ["Normal.", "Cardiomegaly."]


def test_real_iu_xray_has_the_papers_number_of_frontal_images_with_findings(shared_data, tmp_path):
    for name in ("indiana_reports.csv", "indiana_projections.csv"):
        shutil.copy(shared_data / "iu_xray" / name, tmp_path)
    listed, _ = iu_xray.records(tmp_path)
    assert len(listed) == 7466
    frontal = [record for record in listed if record.frontal and "findings" in record.fields]
    assert len(frontal) == 3307 and round(0.04 * len(frontal)) == 132
    assert sum("impression" in record.fields for record in listed if record.frontal) == 3788


def test_real_iu_xray_xml_reports_are_read(shared_data, tmp_path):
    shutil.copytree(shared_data / "iu_xray" / "NLMCXR_reports", tmp_path / "NLMCXR_reports")
    listed, _ = iu_xray.records(tmp_path)
    first = next(record for record in listed if record.name == "CXR1_1_IM-0001-3001.png")
    assert first.fields["findings"].startswith("The cardiac silhouette") and first.fields["diagnosis"] == "normal"
    assert {record.frontal for record in listed} == {None}
    shutil.copy(shared_data / "iu_xray" / "indiana_projections.csv", tmp_path)
    listed, _ = iu_xray.records(tmp_path)  # views from the table, texts from the XML
    listed = [record for record in listed if "findings" in record.fields]
    views = collections.Counter(record.frontal for record in listed)
    assert views == {True: 164, False: 150, None: views[None]} and views[None] <= 3
    kaggle = {
        row["uid"]: row.get("findings") for _, row in read_table(shared_data / "iu_xray" / "indiana_reports.csv", ())
    }
    same = [
        record.fields["findings"] == " ".join(kaggle[record.patient].split())
        for record in listed
        if kaggle.get(record.patient)
    ]
    assert len(same) > 300 and sum(same) / len(same) > 0.95


def test_xml_without_projections_cannot_be_trained_frontal_only(shared_data, tmp_path):
    shutil.copytree(shared_data / "iu_xray" / "NLMCXR_reports", tmp_path / "NLMCXR_reports")
    with pytest.raises(InputError, match=r"do not say whether they are frontal; put Kaggle's indiana_projections.csv"):
        open_data_set(f"iu-xray:{tmp_path}")


# --- the others -------------------------------------------------------------------------------------------------------
def test_patch_gastric_patches_have_their_slide_as_patient(tmp_path):
    data_set = open_data_set(f"patch-gastric:{made_data.patch_gastric(tmp_path)}")
    assert [record.patient[0] for record in data_set.records] == ["a", "a", "b", "b"]
    assert data_set.records[0].fields == {
        "subtype": "Signet ring cell carcinoma",
        "text": "Cells of signet ring cell carcinoma.",
    }
    assert data_set.notes == ("2 of 6 left out: their slide is not in captions.csv",)


def test_real_patch_gastric_captions_are_read(shared_data, tmp_path):
    shutil.copy(shared_data / "patchgastric" / "captions.csv", tmp_path)
    slides = [row["id"] for _, row in read_table(tmp_path / "captions.csv", ("id", "subtype", "text"))]
    assert len(slides) == len(set(slides)) == 991
    for slide in slides[:5]:
        made_data.save(tmp_path / "patches_captions" / f"{slide}_7c.jpg")
    assert len(open_data_set(f"patch-gastric:{tmp_path}")) == 5


def test_mimic_cxr_joins_metadata_labels_and_reports(tmp_path):
    spec = f"mimic-cxr:{made_data.mimic(tmp_path)}"
    first, second = open_data_set(spec, captioned=False).records
    assert first.name == "p10/p10000032/s50414267/d1.jpg" and first.patient == "10000032"
    assert first.fields == {
        "view": "PA",
        "projection": "PA",
        "diagnosis": "No Finding",
        "findings": "There is no focal consolidation. The heart is normal: no change.",
        "impression": "No acute process.",
        "indication": "___F with cough",
    }
    assert second.fields == {"view": "AP", "projection": "AP", "diagnosis": "Edema"}
    assert open_data_set(spec).notes == (
        "1 of 4 left out: lateral and other views that are not frontal (--views all keeps them)",
        "1 of 3 left out: of unknown view: 1 blank (--views all keeps them)",
        "1 of 2 left out: without a prompt from '{impression}', such as p10/p10000764/s57375967/d3.jpg",
    )


def test_mimic_cxr_sections_are_read_under_every_heading(tmp_path):
    made_data.mimic(tmp_path)
    report = tmp_path / "files" / "p10" / "p10000032" / "s50414267.txt"

    def read(text):
        report.write_text(f"        FINAL REPORT\n EXAMINATION:  CHEST\n\n{text}\n NOTIFICATION:  By phone.\n")
        fields = open_data_set(f"mimic-cxr:{tmp_path}", captioned=False).records[0].fields
        return fields.get("findings"), fields.get("impression")

    assert read(" FINDINGS AND IMPRESSION:\n\n Normal.") == ("Normal.", "Normal.")
    assert read(" FINDINGS/IMPRESSION: Normal.") == ("Normal.", "Normal.")
    for heading in ("IMPRESSION AND RECOMMENDATIONS", "Impression", "IMPRESSIONS", "impression :", "CONCLUSION"):
        assert read(f" FINDINGS:  Clear.\n {heading}:\n\n Normal.".replace("::", ":")) == ("Clear.", "Normal.")
    assert read(" FINDINGS:  Clear.\n\n IMPRESSION\n\n Normal.\n RECOMMENDATION(S):  None.") == ("Clear.", "Normal.")
    both = " PROVISIONAL FINDINGS IMPRESSION (PFI): First.\n IMPRESSION: Last.\n FINDINGS AND IMPRESSION: Other."
    assert read(both) == ("Other.", "Last.")  # the section that is only an impression, and not the provisional findings
    assert read(" IMPRESSION: First.\n ADDENDUM: x\n IMPRESSION: Second.\n IMPRESSION:  \n") == (None, "Second.")
    assert read(" FINDINGS: As in the prior\n findings\n of May: the impression: stable.") == (
        "As in the prior findings of May: the impression: stable.",
        None,
    )


def test_mimic_cxr_without_reports_has_the_prompts_of_its_tables(tmp_path):
    made_data.mimic(tmp_path)
    next(tmp_path.rglob("*.txt")).unlink()
    data_set = open_data_set(f"mimic-cxr:{tmp_path}")
    assert prompts_for(data_set) == [
        "chest x-ray, view PA, projection PA, diagnosis No Finding",
        "chest x-ray, view AP, projection AP, diagnosis Edema",
    ]


def test_labels_that_are_no_numbers_are_counted_not_guessed(tmp_path):
    made_data.mimic(tmp_path)
    table = tmp_path / "mimic-cxr-2.0.0-chexpert.csv"
    table.write_text(table.read_text().replace(",1.0,,-1.0", ",1.0,yes,-1.0") + "\n,,,1.0,\n")
    data_set = open_data_set(f"mimic-cxr:{tmp_path}", captioned=False)
    assert data_set.records[1].fields["diagnosis"] == "Edema"
    assert data_set.notes[:2] == (
        "1 row of mimic-cxr-2.0.0-chexpert.csv left out: without study_id (row 5)",
        "labels of mimic-cxr-2.0.0-chexpert.csv that are none of 1, 0 and -1 and are not used: 1, such as 'yes' in row "
        "3",
    )


def test_names_that_are_too_long_for_the_file_system_are_missing_images(tmp_path):
    made_data.mimic(tmp_path)
    for name in ("mimic-cxr-2.0.0-metadata.csv", "mimic-cxr-2.0.0-chexpert.csv"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("57375967", "5" * 5000))
    with pytest.raises(InputError, match="1 of 2 listed images are missing") as caught:
        open_data_set(f"mimic-cxr:{tmp_path}", captioned=False)
    assert len(str(caught.value)) < 300


# --- all: blank lines and blank cells ---------------------------------------------------------------------------------
TABLES = {  # data set: its maker, the table, and a column without which a row is of no use
    "folder": (made_data.folder, "metadata.csv", "file_name"),
    "padchest": (made_data.padchest, "PADCHEST_*.csv", "PatientID"),
    "iu-xray": (made_data.iu_kaggle, "indiana_projections.csv", "filename"),
    "patch-gastric": (made_data.patch_gastric, "captions.csv", "id"),
    "mimic-cxr": (made_data.mimic, "mimic-cxr-2.0.0-metadata.csv", "study_id"),
}


@pytest.mark.parametrize("name", TABLES)
def test_blank_lines_in_a_table_are_skipped(tmp_path, name):
    make, pattern, _ = TABLES[name]
    spec, table = f"{name}:{make(tmp_path)}", next(tmp_path.glob(pattern))
    lines = table.read_bytes().split(b"\r\n")[:-1]
    records = open_data_set(spec).records
    for end, last in ((b"\n", b"\n\n"), (b"\r\r\n", b""), (b"\n\n", b"," * lines[0].count(b",") + b"\n")):
        table.write_bytes(end.join(lines) + end + last)
        assert open_data_set(spec).records == records, end


@pytest.mark.parametrize("name", TABLES)
def test_a_row_without_a_cell_it_needs_is_left_out_and_its_number_told(tmp_path, name):
    make, pattern, column = TABLES[name]
    spec, table = f"{name}:{make(tmp_path)}", next(tmp_path.glob(pattern))
    with open(table, newline="") as file:
        header, *rows = csv.reader(file)
    rows[0][header.index(column)] = "NA"
    made_data.write_csv(table, header, rows)
    settings = DataSettings(views="all")
    data_set = open_data_set(spec, settings, captioned=False)
    assert len(data_set) > 0
    note = next(note for note in data_set.notes if note.startswith(f"1 row of {table.name} left out: without "))
    assert column in note and note.endswith("(row 2)")


def test_unusable_dates_and_years_of_birth_are_unknown_ages(tmp_path):
    table = next(made_data.padchest(tmp_path).glob("*.csv"))
    whole = table.read_text()
    for birth in ("inf", "9" * 5000, "1867.0", "2100", "born", "1e3", "-5"):
        table.write_text(whole.replace("2011.0", birth))
        data_set = open_data_set(f"padchest:{tmp_path}")
        assert "age" not in fields_of(data_set, "b_1.png"), birth
        assert data_set.notes[-1].startswith("age of 1 of 3 not understood, so it counts as missing: "), birth
        assert len(data_set.notes[-1]) < 200


def test_a_report_in_an_unknown_encoding_is_named(tmp_path):
    report = tmp_path / "ecgen-radiology" / "7.xml"
    report.parent.mkdir()
    for declared in ("no-such-encoding", "utf-7", "cp1026"):
        report.write_bytes(f'<?xml version="1.0" encoding="{declared}"?><eCitation/>'.encode())
        with pytest.raises(InputError, match=r"7.xml: not an Open-i report"):
            open_data_set(f"iu-xray:{tmp_path}")


def test_images_of_one_patient_are_linked_in_either_direction(tmp_path):
    made_data.montgomery(tmp_path)
    readings = next(tmp_path.rglob("ClinicalReadings"))
    for stem, links in (("MCUCXR_0900_0", ("0902",)), ("MCUCXR_0901_0", ()), ("MCUCXR_0902_0", ("0901",))):
        text = "".join(f"normal (same pt as MCUCXR_{link}_0)\n" for link in links) or "normal\n"
        (readings / f"{stem}.txt").write_text(f"Patient's Sex: F\nPatient's Age: 027Y\n{text}")
    listed, _ = montgomery.records(tmp_path)
    patients = {record.name: record.patient for record in listed}
    assert {patients[f"MCUCXR_090{i}_0.png"] for i in range(3)} == {"0900"}


def test_a_montgomery_reading_with_blank_or_odd_entries_is_read(tmp_path):
    made_data.montgomery(tmp_path)
    reading = next(tmp_path.rglob("MCUCXR_0001_0.txt"))
    reading.write_text("Patient's Sex: \nPatient's Age: 16 months\nnormal\n")
    data_set = open_data_set(f"montgomery:{tmp_path}")
    assert fields_of(data_set, "MCUCXR_0001_0.png") == {"age": "1", "findings": "normal", "diagnosis": "normal"}
    assert data_set.notes == ("sex of 1 of 4 not understood, so it counts as missing: 'O' (1)",)


# --- folder -----------------------------------------------------------------------------------------------------------
def test_a_folder_with_metadata_csv_is_read(tmp_path):
    data_set = open_data_set(f"folder:{made_data.folder(tmp_path, 4)}")
    assert data_set.prompt == "{text}" and not data_set.notes
    assert data_set.records[1].patient == "p1" and data_set.records[1].fields == {
        "age": "31",
        "sex": "female",
        "view": "PA",
        "finding": "Edema",
        "diagnosis": "Edema",
        "text": "a chest x-ray, number 1",
    }


def test_captions_that_are_not_used_are_noted(tmp_path):
    table = tmp_path / "metadata.csv"
    made_data.folder(tmp_path, 4)
    whole = table.read_text()
    without = whole.replace("a chest x-ray, number 1", "").replace("a chest x-ray, number 2", "")
    table.write_text(without.replace('""', ""))
    data_set = open_data_set(f"folder:{tmp_path}")
    assert data_set.prompt == "full" and "2 of 4 images have no text" in data_set.notes[0]
    table.write_text(whole.replace("text", "caption", 1))
    data_set = open_data_set(f"folder:{tmp_path}")
    assert data_set.prompt == "full" and "column caption is not used" in data_set.notes[0]


@pytest.mark.parametrize("column", ["file_name", "file", "image", "path"])
def test_metadata_jsonl_is_read_under_every_name_of_the_image_column(tmp_path, column):
    made_data.save(tmp_path / "a.png")
    row = {column: "a.png", "text": "né\nau", "age": 3, "sex": None}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    data_set = open_data_set(f"folder:{tmp_path}")
    assert data_set.records[0].fields == {"text": "né au", "age": "3"}
    assert "each image counts as a patient" in data_set.notes[0]


def test_captions_beside_images_are_read(tmp_path):
    for name in ("a.png", "sub/b.jpg"):
        made_data.save(tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n", encoding="utf-8")
    data_set = open_data_set(f"folder:{tmp_path}")
    assert [record.fields["text"] for record in data_set.records] == ["caption of a.png", "caption of sub/b.jpg"]
    (tmp_path / "a.txt").unlink()
    data_set = open_data_set(f"folder:{tmp_path}")
    assert [record.name for record in data_set.records] == ["sub/b.jpg"] and "such as a.png" in data_set.notes[-1]
    (tmp_path / "sub/b.txt").unlink()
    assert open_data_set(f"folder:{tmp_path}").prompt is None  # images alone: the user must say what they are


def test_the_real_folder_is_read(shared_data):
    data_set = open_data_set(f"folder:{shared_data / 'cxr'}")
    assert len(data_set) == 289 and data_set.prompt == "full"  # 207 of 303 have no text
    assert len(open_data_set(f"folder:{shared_data / 'cxr'}", DataSettings(views="all"))) == 303
    brats = open_data_set(f"folder:{shared_data / 'brats' / 'trainset'}")
    assert len(brats) == 160 and brats.prompt == "{text}"


def test_lists_and_missing_words_are_no_captions(tmp_path):
    """Values as pandas, R and json write them."""
    for i in range(4):
        made_data.save(tmp_path / f"{i}.png")
    lines = [{"text": float("nan")}, {"text": ["a film", "a view"]}, {"text": "N/A"}, {"text": "Normal."}]
    rows = [{"file_name": f"{i}.png", **line} for i, line in enumerate(lines)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_set = open_data_set(f"folder:{tmp_path}")
    assert prompts_for(data_set) == ["a film, a view", "Normal."]
    assert data_set.notes[-1] == "2 of 4 left out: without a prompt from '{text}', such as 0.png, 2.png"
    (tmp_path / "metadata.jsonl").unlink()
    findings = ["['Edema', 'Effusion']", "NA", "['Edema' 'Mass']", "Edema|Mass"]
    made_data.write_csv(
        tmp_path / "metadata.csv",
        ["file_name", "view", "finding"],
        [[f"{i}.png", "PA", f] for i, f in enumerate(findings)],
    )
    assert prompts_for(open_data_set(f"folder:{tmp_path}")) == [
        "chest x-ray, view PA, diagnosis Edema, Effusion",
        "chest x-ray, view PA",
        "chest x-ray, view PA, diagnosis Edema, Mass",
        "chest x-ray, view PA, diagnosis Edema, Mass",
    ]


def test_beside_codes_of_another_language_m_is_not_taken_for_male(tmp_path):
    root = made_data.folder(tmp_path, 4)
    table = root / "metadata.csv"
    table.write_text(table.read_text().replace(",F,", ",H,"))  # hombre and mujer
    data_set = open_data_set(f"folder:{root}")
    assert all("sex" not in record.fields for record in data_set.records)
    assert data_set.notes == ("sex of 4 of 4 not understood, so it counts as missing: 'M' (2), 'H' (2)",)
