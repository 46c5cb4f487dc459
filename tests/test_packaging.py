"""Which base model is found, from a checkout and from an installed package."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from peers import assert_says

from minildm import loading
from minildm.errors import InputError
from minildm.loading import EMBEDDED, find_base, weights_folders

ROOT = Path(__file__).resolve().parent.parent


# --- the search order ------------------------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The four places that are searched, empty, in the order of the search."""
    places = [tmp_path / "named", tmp_path / "current" / "weights", tmp_path / "checkout" / "weights", tmp_path / "pkg"]
    for place in places:
        place.mkdir(parents=True)
    monkeypatch.setenv("MINILDM_WEIGHTS", str(places[0]))
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(loading, "WEIGHTS", places[2])
    monkeypatch.setattr(loading, "PACKAGE", places[3])
    return places


def put_model(folder, name):
    (folder / name / "unet").mkdir(parents=True)
    return folder / name


def test_the_first_folder_that_holds_a_model_wins(folders):
    assert weights_folders() == folders
    for folder in reversed(folders):
        expected = put_model(folder, "tiny")
        assert find_base() == expected


def test_a_published_model_wins_over_the_embedded_one_in_its_folder_only(folders):
    tiny = put_model(folders[1], "tiny")
    put_model(folders[2], "sd")
    assert find_base() == tiny
    published = put_model(folders[1], "sd")
    assert find_base() == published


def test_without_the_variable_the_current_folder_is_searched_first(folders, monkeypatch):
    put_model(folders[0], "tiny")
    expected = put_model(folders[1], "tiny")
    monkeypatch.delenv("MINILDM_WEIGHTS")
    assert weights_folders() == folders[1:] and find_base() == expected
    monkeypatch.setenv("MINILDM_WEIGHTS", "")
    assert weights_folders() == folders[1:] and find_base() == expected


def test_a_relative_folder_in_the_variable_is_taken_from_the_current_folder(folders, monkeypatch):
    monkeypatch.setenv("MINILDM_WEIGHTS", "../named")
    expected = put_model(folders[0], "sd")
    assert find_base().is_absolute() and find_base().samefile(expected)


def test_a_variable_that_names_no_folder_is_an_error(folders, monkeypatch):
    monkeypatch.setenv("MINILDM_WEIGHTS", str(folders[0] / "absent"))
    with pytest.raises(FileNotFoundError) as caught:
        find_base()
    assert_says(caught, "MINILDM_WEIGHTS", folders[0] / "absent", "not a folder")


def test_finding_no_model_says_where_it_was_looked_for(folders):
    with pytest.raises(FileNotFoundError) as caught:
        find_base()
    assert_says(caught, *folders, "v1-5-pruned-emaonly.safetensors", "--base")


def test_several_models_in_the_first_folder_that_holds_any_are_an_error(folders):
    put_model(folders[1], "a"), put_model(folders[1], "b"), put_model(folders[2], "c")
    with pytest.raises(InputError) as caught:
        find_base()
    assert_says(caught, "several base models", folders[1], "a, b", "--base")


def test_a_checkout_searched_from_its_own_root_is_named_once(folders, monkeypatch):
    monkeypatch.setattr(loading, "WEIGHTS", folders[1])
    assert weights_folders() == [folders[0], folders[1], folders[3]]


# --- the installed package -------------------------------------------------------------------------------------------
def test_the_packages_to_install_are_all_there_are():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads pyproject.toml")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "minildm").rglob("*.py")}
    assert sorted(listed) == sorted([*(".".join(f.relative_to(ROOT).parts) for f in folders), "minildm.tiny"])


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    """A folder with the contents of a wheel built from a copy of the checkout."""
    copy, wheels, site = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "site"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("minildm", "weights/tiny"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", "--wheel-dir", str(wheels)]
    result = subprocess.run(command + ["--no-build-isolation"] * builds_here(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def builds_here():
    """Whether the installed setuptools can build the package; otherwise pip downloads one."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
def test_the_wheel_contains_the_whole_package_and_the_embedded_model(unpacked_wheel):
    def files(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert files(unpacked_wheel / "minildm" / "tiny") == files(ROOT / "weights" / "tiny")
    modules = {name for name in files(ROOT / "minildm") if name.endswith((".py", ".html", ".css"))}
    assert modules == {name for name in files(unpacked_wheel / "minildm") if not name.startswith("tiny/")}


@pytest.mark.slow
def test_the_installed_package_loads_its_embedded_model_and_adapter_from_any_folder(unpacked_wheel, tmp_path):
    code = (
        "import minildm; from minildm.loading import EMBEDDED_ADAPTER, is_embedded\n"
        "model = minildm.load(adapters=[EMBEDDED_ADAPTER], device='cpu')\n"
        "assert is_embedded(), model.files.path\n"
        "print(minildm.__file__, model.files.path, EMBEDDED_ADAPTER, sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(unpacked_wheel)}
    environment.pop("MINILDM_WEIGHTS", None)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    package = unpacked_wheel.resolve() / "minildm"
    paths = [package / "__init__.py", package / "tiny", package / "tiny" / "adapter.safetensors"]
    assert [Path(line).resolve() for line in result.stdout.split("\n")[:3]] == paths


def test_a_checkout_uses_its_own_copy_of_the_embedded_model():
    assert EMBEDDED == ROOT / "weights" / "tiny" and not (ROOT / "minildm" / "tiny").exists()
