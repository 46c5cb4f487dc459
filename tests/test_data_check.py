"""``python -m minildm check`` and ``prompts``: what they find, what they write, how they exit."""

import json
import subprocess
import sys
from pathlib import Path

import made_data
import pytest
from PIL import Image

from minildm.data import check

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, data, *flags):
    code = check.main([str(data), "--out", str(tmp_path / "out"), "--size", "64", *flags])
    return code, json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))


def test_a_sound_data_set_passes(tmp_path, capsys):
    code, report = run(tmp_path, f"folder:{made_data.folder(tmp_path / 'data', 30)}")
    assert code == 0 and report["faults"] == [] and report["broken"] == []
    assert report["pictures"] == 30 and report["kinds"] == {"8-bit grey": 30}
    assert report["fields"]["sex"]["most"] == {"male": 15, "female": 15}
    assert report["captions"]["tokens"]["max"] < 20 and report["captions"]["cut"] == 0
    assert report["splits"]["train"] == {"pictures": 24, "patients": 24} and report["splits"]["leaks"] == []
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width == check.COLUMNS * check.THUMBNAIL
    assert "next: python -m minildm prompts folder:" in capsys.readouterr().out


def test_all_faults_and_suspicious_images_are_found_at_once(tmp_path, capsys):
    root = made_data.folder(tmp_path / "data", 40)
    (root / "images" / "004.png").write_bytes(b"")
    (root / "images" / "005.png").write_bytes((root / "images" / "006.png").read_bytes()[:200])
    (root / "images" / "011.png").write_bytes((root / "images" / "010.png").read_bytes())
    Image.open(root / "images" / "012.png").save(root / "images" / "013.png", compress_level=0)
    Image.new("L", (64, 64), 90).save(root / "images" / "020.png")
    table = (root / "metadata.csv").read_text()
    long = " ".join(f"finding number {i}" for i in range(40))
    (root / "metadata.csv").write_text(table.replace('a chest x-ray, number 1"', f'The XXXX is clear. {long}"'))
    code, report = run(tmp_path, f"folder:{root}", "--split", "70/10/20")
    assert code == 1 and "2 images cannot be decoded" in report["faults"][0]
    assert [line.rsplit("/", 1)[1][:7] for line in report["broken"]] == ["004.png", "005.png"]
    assert report["identical"] == [["images/010.png", "images/011.png"]]
    flagged = report["flagged"]
    assert flagged["images/011.png"] == ["the same file as images/010.png"]
    assert flagged["images/013.png"] == ["nearly the same image as images/012.png"]
    assert flagged["images/020.png"][0].startswith("low contrast")
    assert report["captions"]["cut"] == 1 and report["captions"]["deidentification_marks"] == 1
    assert report["captions"]["longest_loses"].startswith("finding number")
    leaked = {name for a, _, b, _ in report["splits"]["leaks"] for name in (a, b)}
    assert leaked <= {"images/010.png", "images/011.png", "images/012.png", "images/013.png"}
    printed = capsys.readouterr().out
    assert "a run would fail: 2 images cannot be decoded" in printed and "1 (2.5%) are longer than 77" in printed
    assert run(tmp_path, f"folder:{root}", "--skip-bad")[0] == 0


def test_a_data_set_without_a_readable_image_is_a_fault(tmp_path):
    root = made_data.folder(tmp_path / "data", 5)
    for image in (root / "images").iterdir():
        image.write_bytes(b"")
    code, report = run(tmp_path, f"folder:{root}", "--skip-bad")
    assert code == 1 and "no image can be decoded" in report["faults"]


def test_leaks_across_patients_are_reported(tmp_path):
    root = made_data.folder(tmp_path / "data", 30)
    for i in range(1, 30):
        (root / "images" / f"{i:03}.png").write_bytes((root / "images" / "000.png").read_bytes())
    _, report = run(tmp_path, f"folder:{root}")
    leaks = report["splits"]["leaks"]
    assert len(leaks) == 6 and {kept for kept, *_ in leaks} == {"images/000.png"}  # the images of validation and test
    assert all(split == "train" and other in ("validation", "test") for _, split, _, other in leaks)


def test_a_leak_is_found_between_copies_of_identical_files(tmp_path):
    """Groups of identical files are compared by one file of each, but all of their splits count."""
    root = made_data.folder(tmp_path / "data", 30)
    image = Image.open(root / "images" / "000.png")
    for i in range(1, 30):
        image.save(root / "images" / f"{i:03}.png", compress_level=9 * (i % 2))
    _, report = run(tmp_path, f"folder:{root}")
    assert len(report["splits"]["leaks"]) == 6 and len(report["identical"]) == 2


def test_check_of_many_blank_images_is_linear(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    data = made_data.encoded(Image.new("L", (64, 64)))
    for i in range(600):
        (root / f"{i:04}.png").write_bytes(data)
    made_data.save(root / "other.png")
    _, report = run(tmp_path, f"folder:{root}", "--prompt-template", "chest x-ray")
    assert len(report["flagged"]) >= 599 and (tmp_path / "out" / "check.json").stat().st_size < 500_000


def test_an_empty_split_and_empty_prompts_fail_the_check(tmp_path):
    root = made_data.folder(tmp_path / "data", 5)
    assert "the test split is empty" in run(tmp_path, f"folder:{root}")[1]["faults"][0]
    code, report = run(tmp_path, f"folder:{root}", "--prompt-template", "{loc}")
    assert code == 1 and any("5 of 5 prompts are empty" in fault for fault in report["faults"])


def test_flagged_txt_can_be_passed_to_exclude(tmp_path):
    root = made_data.folder(tmp_path / "data", 30)
    Image.new("L", (64, 64), 90).save(root / "images" / "020.png")
    run(tmp_path, f"folder:{root}")
    _, report = run(tmp_path, f"folder:{root}", "--exclude", str(tmp_path / "out" / "flagged.txt"))
    assert report["pictures"] == 29 and report["flagged"] == {}


def test_the_commands_run_and_a_mistake_is_one_line(tmp_path):
    def command(*words):
        return subprocess.run([sys.executable, "-m", "minildm", *words], cwd=ROOT, capture_output=True, text=True)

    shown = command("prompts", f"padchest:{made_data.padchest(tmp_path)}", "-n", "1")
    assert shown.returncode == 0 and shown.stdout == (
        "a_1.png\tchest x-ray, age 47 male, view PA, projection PA, modality DX, diagnosis calcified granuloma, "
        "loc right upper lobe\n"
    )
    failed = command("check", "padchst:/nowhere")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and failed.stderr.startswith("error: unknown data set 'padchst'")


def test_prompts_shows_what_is_cut(tmp_path, capsys):
    made_data.save(tmp_path / "a.png").with_suffix(".txt").write_text("lung " * 80, encoding="utf-8")
    assert check.show_prompts([f"folder:{tmp_path}"]) == 0
    assert capsys.readouterr().out.endswith("[cut: lung lung lung lung lung]\n")


def test_images_are_checked_at_512_pixels_and_flags_are_not_abbreviated(tmp_path, capsys):
    data = f"folder:{made_data.folder(tmp_path / 'data', 30)}"
    assert check.main([data, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "check.json").read_text())["transform"].startswith("reading 2, 512 px, ")
    for command in (check.main, check.show_prompts):
        with pytest.raises(SystemExit):
            command([data, "--siz", "64"])
    assert "unrecognized arguments: --siz" in capsys.readouterr().err


def test_the_real_chest_x_rays_pass(shared_data, tmp_path):
    code, report = run(tmp_path, f"folder:{shared_data / 'cxr'}")
    assert code == 0 and report["pictures"] == 289 and report["patients"] == 266
    assert report["broken"] == report["identical"] == report["splits"]["leaks"] == []
    assert sorted(report["flagged"]) == ["images/covid_covid-19-pneumonia-8.png", "images/nih_00003867_004.png"]
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png").convert("L")
    assert 90 < sum(sheet.crop((0, 0, sheet.width, 6 * check.THUMBNAIL)).resize((1, 1)).getdata()) < 170


def test_an_output_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder for the results"):
        check.main(["folder:/nowhere", "--out", str(tmp_path / "file")])


def test_the_classes_to_balance_by_are_counted_and_an_unknown_field_is_a_fault(tmp_path):
    root = made_data.folder(tmp_path / "data", 30)
    code, report = run(tmp_path, f"folder:{root}", "--balance", "finding")
    assert code == 0 and report["classes"] == {"Edema": 20, "Effusion": 10, "No Finding": 10}
    code, report = run(tmp_path, f"folder:{root}", "--balance", "nonsense")
    assert code == 1 and report["classes"] is None
    assert "nonsense" in report["faults"][0] and "finding" in report["faults"][0]


def test_what_is_not_understood_or_left_out_is_shown_and_counted(tmp_path, capsys):
    root = made_data.folder(tmp_path / "data", 30)
    table = (root / "metadata.csv").read_text()
    changed = table.replace(",30,M,PA", ",414,Multiple,RAO").replace(",31,F,PA", ",000Y,F,PA").replace("number 7", "")
    (root / "metadata.csv").write_text(changed.replace("a chest x-ray, ,", ",").replace('"a chest x-ray, "', "NA"))
    code, report = run(tmp_path, f"folder:{root}")
    assert code == 0 and report["pictures"] == 28
    assert report["unread"] == {"age": {"000Y": 1}}
    printed = capsys.readouterr().out
    assert "  age: not understood, so missing: '000Y' 1" in printed
    assert "note: 1 of 30 left out: lateral and other views" in printed
    assert "note: 1 of 29 left out: without a prompt from '{text}', such as images/007.png" in printed


def test_prompts_tells_what_was_left_out_beside_the_prompts(tmp_path, capsys):
    for name in "ab":
        made_data.save(tmp_path / f"{name}.png").with_suffix(".txt").write_text("lungs" * (name == "a"))
    assert check.show_prompts([f"folder:{tmp_path}"]) == 0
    said = capsys.readouterr()
    assert said.out == "a.png\tlungs\n" and "note: 1 of 2 left out: without a prompt" in said.err
