"""Files that are never half-written, and one-line errors with an exit code."""

import hashlib
import os
import sys

import pytest
from peers import assert_says

from minildm import files
from minildm.errors import InputError, exit_cleanly
from minildm.files import input_file, replaced_folder, sha256, writable_file, writable_folder, written_beside


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "result.png"
    with written_beside(path) as beside:
        beside.write_text("half")
        assert not path.exists()
        assert beside.parent == tmp_path and beside.suffix == ".png"
    assert path.read_text() == "half"
    assert os.listdir(tmp_path) == ["result.png"]


def test_a_files_permissions_are_those_of_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    with written_beside(tmp_path / "result.bin") as beside:
        os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "result.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="out of luck"), written_beside(path) as beside:
        beside.write_text("half")
        raise RuntimeError("out of luck")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with written_beside(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"


def test_a_writable_folder_is_created_and_left_empty(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and not list(folder.iterdir())
    assert writable_folder(folder) == folder


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        writable_folder(tmp_path / "file")
    assert_says(caught, tmp_path / "file", "is a file", "give another --out")
    with pytest.raises(NotADirectoryError) as caught:
        writable_folder(tmp_path / "file" / "below")
    assert_says(caught, tmp_path / "file" / "below", "parent", "give another --out")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc cannot be written to, even by root, on Linux only")
def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(PermissionError) as caught:
        writable_folder("/proc/minildm")
    assert_says(caught, "/proc/minildm", "cannot write", "give another --out")


def test_a_hash_is_sha256_for_any_chunk_size(tmp_path):
    data = os.urandom(100_003)
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == sha256(tmp_path / "file", chunk_bytes=1000) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "error, code, says",
    [
        (InputError("rank must be in [1, 4], got 9"), 2, "error: rank must be in [1, 4], got 9\n"),
        (FileNotFoundError("no such base model: x"), 2, "error: no such base model: x\n"),
        (PermissionError("cannot write"), 2, "error: cannot write\n"),
        (NotADirectoryError("is a file"), 2, "error: is a file\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (InputError("two\nlines"), 2, "error: two lines\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(error, code, says, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_cleanly(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == says


def test_success_is_exit_code_zero_and_a_bug_keeps_its_traceback():
    with pytest.raises(SystemExit) as caught:
        exit_cleanly(lambda value: value, 0)
    assert caught.value.code == 0
    with pytest.raises(ZeroDivisionError):
        exit_cleanly(lambda: 1 / 0)
    with pytest.raises(ValueError, match="ours"):  # an InputError is a ValueError, not the other way round
        exit_cleanly(lambda: (_ for _ in ()).throw(ValueError("ours")))


# --- folders ---------------------------------------------------------------------------------------------------------
def write_version(path, text):
    with replaced_folder(path) as folder:
        (folder / "a.txt").write_text(text)


def test_a_folder_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    (tmp_path / ".model-backup2").mkdir()  # not one of ours
    for text in ("one", "two", "three"):
        write_version(tmp_path / "model", text)
        assert (tmp_path / "model" / "a.txt").read_text() == text
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_fails_leaves_the_version_before(tmp_path):
    write_version(tmp_path / "model", "one")
    with pytest.raises(ZeroDivisionError), replaced_folder(tmp_path / "model") as folder:
        (folder / "a.txt").write_text("two")
        raise ZeroDivisionError
    assert (tmp_path / "model" / "a.txt").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("at", ["replace", "rmtree"])
def test_an_interruption_around_the_rename_leaves_a_whole_version(tmp_path, monkeypatch, at):
    write_version(tmp_path / "model", "one")
    module = {"replace": files.os, "rmtree": files.shutil}[at]
    ordinary = getattr(module, at)

    def interrupted(*arguments, **options):
        if at == "replace":
            ordinary(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_version(tmp_path / "model", "two")
    monkeypatch.undo()
    assert (tmp_path / "model" / "a.txt").read_text() == "two"
    write_version(tmp_path / "model", "three")
    assert (tmp_path / "model" / "a.txt").read_text() == "three"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_real_folder_in_the_way_is_not_touched(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="in the way"):
        write_version(tmp_path / "model", "one")


def test_a_file_for_results_is_checked_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "folder" / "f.json"
    assert writable_file(path) == path and path.parent.is_dir() and not path.exists()
    with pytest.raises(IsADirectoryError, match=r"--save-stats .* is a folder, expected a file"):
        writable_file(tmp_path, "--save-stats")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"is a file, expected a folder.*--out"):
        writable_file(tmp_path / "file" / "f.json")


def test_a_file_to_read_exists_and_is_a_regular_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    assert input_file(str(tmp_path / "file"), "--prompts") == tmp_path / "file"
    for name, error, says in (
        ("absent", FileNotFoundError, "--prompts .*absent: no such file"),
        (".", IsADirectoryError, "--prompts .* is a folder, expected a file"),
        ("pipe", FileNotFoundError, "--prompts .*pipe is not a regular file"),
    ):
        with pytest.raises(error, match=says):
            input_file(tmp_path / name, "--prompts")
