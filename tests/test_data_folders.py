"""Finding files: what systems leave behind, links, loops, names of any form, and paths that lead out of a data set."""

import os
import unicodedata
from pathlib import Path

import made_data
import pytest

from minildm.__main__ import main
from minildm.data.folders import Finder, files_below, outside, paths_below
from minildm.data.open import DataSettings, open_data_set
from minildm.errors import InputError
from minildm.files import file_bytes
from minildm.metrics.sources import list_as_training, list_images

LEFT_BEHIND = (
    *("._000.png", ".ipynb_checkpoints/000-checkpoint.png", "__MACOSX/000.png", "@eaDir/000.png/SYNOPHOTO_THUMB_M.png"),
    *(
        "#recycle/000.png",
        "$RECYCLE.BIN/000.png",
        "lost+found/000.png",
        ".git/000.png",
        "System Volume Information/a.png",
    ),
    *("Thumbs.db", ".DS_Store", "desktop.ini"),
)
PLAIN = DataSettings(prompt_template="chest x-ray")


def left_behind(root):
    for name in LEFT_BEHIND:
        made_data.save(root / name) if name.endswith(".png") else (root / name).write_bytes(b"\0\5\x16\7")


def names(root, settings=PLAIN):
    return [record.name for record in open_data_set(f"folder:{root}", settings).records]


# --- what is no image -------------------------------------------------------------------------------------------------
def test_what_systems_leave_behind_is_no_image_anywhere(tmp_path):
    for i in range(3):
        made_data.save(tmp_path / f"{i:03}.png", i)
    left_behind(tmp_path)
    expected = [f"{i:03}.png" for i in range(3)]
    assert names(tmp_path) == expected
    assert [path.name for path in list_as_training(tmp_path, PLAIN)] == expected
    assert [path.name for path in list_images(tmp_path)] == expected
    assert sorted(files_below(tmp_path, ".png")) == expected


@pytest.mark.parametrize("name, make", [
    ("padchest", made_data.padchest), ("montgomery", made_data.montgomery), ("iu-xray", made_data.iu_kaggle),
    ("patch-gastric", made_data.patch_gastric), ("mimic-cxr", made_data.mimic),
])  # fmt: skip
def test_every_data_set_passes_over_a_zip_files_shadow(name, make, tmp_path):
    """macOS adds a tree of ._ files in __MACOSX, Synology a folder per image in @eaDir."""
    root = make(tmp_path)
    root = tmp_path if root is None else root
    expected = [(record.name, record.path) for record in open_data_set(f"{name}:{root}", PLAIN).records]
    for path in [path for path in sorted(root.rglob("*")) if path.is_file()]:
        for shadow in ("__MACOSX", ".ipynb_checkpoints"):
            copy = root / shadow / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"\0\5\x16\7")
        (path.parent / "@eaDir" / path.name).mkdir(parents=True)
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert [(record.name, record.path) for record in open_data_set(f"{name}:{root}", PLAIN).records] == expected


# --- links ------------------------------------------------------------------------------------------------------------
def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    root, disk = tmp_path / "data", tmp_path / "disk2"
    made_data.save(root / "a" / "0.png")
    made_data.save(disk / "1.png")
    (root / "a" / "more").symlink_to(disk)
    (root / "again").symlink_to(disk)
    (root / "0loop").symlink_to(root)
    (disk / "back").symlink_to(root / "a")
    (root / "itself").symlink_to("itself")
    assert names(root) == ["a/0.png", "a/more/1.png"] or names(root) == ["a/0.png", "again/1.png"]
    assert any("1 of 2 images lie outside" in note for note in open_data_set(f"folder:{root}", PLAIN).notes)


def test_a_linked_folder_of_a_publishers_data_set_is_read(tmp_path):
    made_data.padchest(tmp_path / "set")
    records = open_data_set(f"padchest:{tmp_path / 'set'}").records
    for folder in {record.path.parent for record in records} - {tmp_path / "set"}:
        folder.rename(tmp_path / folder.name)
        folder.symlink_to(tmp_path / folder.name)
    assert open_data_set(f"padchest:{tmp_path / 'set'}").records == records


def test_a_link_that_leads_nowhere_is_broken_not_absent(tmp_path):
    made_data.save(tmp_path / "0.png")
    (tmp_path / "1.png").symlink_to("gone.png")
    assert names(tmp_path) == ["0.png", "1.png"]
    with pytest.raises(InputError, match=r"1.png: cannot be read \(No such file"):
        file_bytes(tmp_path / "1.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    made_data.save(tmp_path / "a" / "0.png")
    (tmp_path / "a").chmod(0)
    with pytest.raises(InputError, match=r"cannot be listed \(Permission denied\)"):
        paths_below(tmp_path, ".png")


# --- names ------------------------------------------------------------------------------------------------------------
def table(root, rows):
    return made_data.write_csv(root / "metadata.csv", ["file_name", "text"], rows)


@pytest.mark.parametrize("stored, listed", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
@pytest.mark.parametrize("name", ["Köln 1.png", "Málaga/señal.png", "각/각.png"])
def test_accents_are_found_in_either_form(stored, listed, name, tmp_path):
    path = made_data.save(tmp_path / unicodedata.normalize(stored, name))
    table(tmp_path, [[unicodedata.normalize(listed, name), "chest x-ray"]])
    (record,) = open_data_set(f"folder:{tmp_path}").records
    assert record.path == path and file_bytes(record.path)


def test_names_without_a_table_are_the_same_on_every_machine(tmp_path):
    for form in ("NFC", "NFD"):
        made_data.save(tmp_path / form / unicodedata.normalize(form, "Köln.png"))
        caption = tmp_path / form / unicodedata.normalize("NFC", "Köln.txt")
        caption.write_text("chest x-ray")
        (record,) = open_data_set(f"folder:{tmp_path / form}").records
        assert record.name == unicodedata.normalize("NFC", "Köln.png") and record.fields == {"text": "chest x-ray"}


def test_windows_paths_are_found(tmp_path):
    path = made_data.save(tmp_path / "images" / "p1" / "0.png")
    backslash = made_data.save(tmp_path / "a\\b.png")  # a name here, not a path
    assert Finder(tmp_path).find("images\\p1\\0.png") == Finder(tmp_path).find(".\\images/p1\\0.png") == path
    assert Finder(tmp_path).find("a\\b.png") == backslash
    assert Finder(tmp_path).find("images\\absent.png") == tmp_path / "images" / "absent.png"


def test_names_that_are_not_utf8_can_be_printed_and_written(tmp_path, capsys):
    root = tmp_path / "data"
    for i in range(14):
        made_data.save(root / f"{i:03}.png", i)
    os.rename(os.fsencode(root / "000.png"), os.fsencode(root) + b"/R\xf6ntgen.png")
    Path(os.fsdecode(os.fsencode(root) + b"/R\xf6ntgen.txt")).write_text("a caption")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.png")).write_bytes(b"broken")
    flags = ["--prompt-template", "chest x-ray", "--skip-bad", "--out", str(tmp_path / "out")]
    assert main(["check", f"folder:{root}", *flags]) == 0
    assert "\\xff.png: cannot be decoded" in (tmp_path / "out" / "check.json").read_text(encoding="utf-8").replace(
        "\\\\", "\\"
    )
    assert "R\\xf6ntgen.png" in names(root)


# --- what a table may name --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png", "{root}/../secret.png", "/etc/hostname",
                                  "..\\secret.png"])  # fmt: skip
def test_files_outside_the_data_set_need_a_flag(name, tmp_path):
    root = tmp_path / "data"
    made_data.save(tmp_path / "secret.png")
    made_data.save(root / "0.png")
    (root / "images").mkdir()
    table(root, [["0.png", "a"], [name.format(root=root), "b"]])
    with pytest.raises(InputError, match=r"1 of 2 listed images are outside .*--outside-files"):
        open_data_set(f"folder:{root}")
    assert names(root, DataSettings(skip_bad=True)) == ["0.png"]
    if "secret" in name:
        assert len(names(root, DataSettings(outside_files=True))) == 2


def test_absolute_paths_and_dots_inside_the_data_set_need_none(tmp_path, monkeypatch):
    made_data.save(tmp_path / "data" / "0.png")
    made_data.save(tmp_path / "data" / "1.png")
    table(tmp_path / "data", [[str(tmp_path / "data" / "0.png"), "a"], ["./1.png", "b"]])
    monkeypatch.chdir(tmp_path / "data")
    for root in (tmp_path / "data", "../data", ".", "../../" + tmp_path.name + "/data"):
        assert len(names(root, DataSettings())) == 2
    assert outside([Path("../data/../x.png")], "../data") and not outside([Path("../data/x.png")], "../data")


@pytest.mark.parametrize("target", ["/dev/zero", "fifo", "folder.png"])
def test_devices_and_pipes_are_refused_without_waiting(target, tmp_path):
    """By the table's own text, or through a link inside the data set."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "1.png").symlink_to(target)
    with pytest.raises(InputError, match=r"a device or pipe, expected a regular file|a folder, expected a file"):
        file_bytes(tmp_path / target)
    with pytest.raises(InputError, match=r"1.png: a (device|folder)"):
        file_bytes(tmp_path / "1.png")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_files_that_are_made_up_while_they_are_read_are_empty():
    """/proc/kmsg would wait for the kernel's next message."""
    assert file_bytes("/proc/self/status") == b""


def test_check_counts_a_pipe_as_broken(tmp_path, capsys):
    root = made_data.folder(tmp_path / "data", 30)
    (root / "images" / "003.png").unlink()
    os.mkfifo(root / "images" / "003.png")
    assert main(["check", f"folder:{root}", "--skip-bad", "--out", str(tmp_path / "out")]) == 0
    assert "003.png: a device or pipe, expected a regular file" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["metadata.csv", "0.txt"])
def test_a_table_or_caption_that_is_a_pipe_is_not_waited_for(file, tmp_path):
    made_data.save(tmp_path / "0.png")
    os.mkfifo(tmp_path / file)
    assert names(tmp_path) == ["0.png"]
