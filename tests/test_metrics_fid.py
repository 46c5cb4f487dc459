"""FID of folders against pytorch-fid from start to end, the command, and how it answers bad input."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from made_data import png_16_bit
from metrics_helpers import grid_extractor, random_weights, reference_fid, reference_fid_in_span, write_images
from peers import random_model, write_folder
from PIL import Image

from minildm.__main__ import main
from minildm.config import ModelConfig
from minildm.data.records import Record
from minildm.errors import InputError, exit_cleanly
from minildm.images import save_png
from minildm.metrics import fid
from minildm.metrics.extractors import Extractor, FeatureSettings, inception_extractor, open_extractor
from minildm.metrics.features import collect
from minildm.metrics.fid_score import measure, table
from minildm.metrics.sources import as_tensor, list_images, open_rgb


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """8 and 9 images of mixed sizes, RGB and grey, PNG and JPEG."""
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "real", 8, seed=1), write_images(root / "fake", 9, seed=2)


def test_fid_of_folders_matches_pytorch_fid_with_fewer_images_than_dims(folders, weights):
    values = fid(*folders, weights=weights, dims=(2048, 768, 192, 64))
    assert list(values) == [2048, 768, 192, 64]
    for dim in (192, 64):
        assert values[dim] == pytest.approx(reference_fid(*folders, random_weights(), dim), rel=1e-5)
    for dim in (2048, 768):
        assert values[dim] == pytest.approx(reference_fid_in_span(*folders, random_weights(), dim), rel=1e-5)


@pytest.mark.slow
def test_fid_of_folders_matches_pytorch_fid_with_more_images_than_dims(weights, tmp_path):
    real = write_images(tmp_path / "real", 70, seed=3, sizes=((48, 48),))
    fake = write_images(tmp_path / "fake", 66, seed=4, sizes=((48, 48),), modes=("L",))
    value = fid(real, fake, weights=weights, dims=(64,))[64]
    assert value == pytest.approx(reference_fid(real, fake, random_weights(), 64, batch_size=35), rel=1e-5)


def test_result_does_not_depend_on_the_batch_size(folders):
    extractor = grid_extractor(4)
    one, three, all_at_once = (
        [collect(list_images(folder), extractor, batch_size=size) for folder in folders] for size in (1, 3, 50)
    )
    for other in (three, all_at_once):
        assert other[0].statistics[16].distance(other[1].statistics[16]) == pytest.approx(
            one[0].statistics[16].distance(one[1].statistics[16]), rel=1e-6
        )


def test_kept_features_are_a_uniform_sample_and_bounded(folders):
    images = list_images(folders[1])
    everything = collect(images, grid_extractor(4), keep=100)
    assert everything.complete and everything.rows[16].shape == (9, 16)
    kept = np.zeros(9, int)
    for seed in range(40):
        subset = collect(images, grid_extractor(4), keep=4, batch_size=2, seed=seed)
        assert not subset.complete and subset.rows[16].shape == (4, 16)
        np.testing.assert_allclose(subset.statistics[16].mean, everything.statistics[16].mean)
        same = np.array([[np.allclose(row, other) for other in everything.rows[16]] for row in subset.rows[16]])
        assert (same.sum(1) == 1).all()  # each row is the features of one image
        kept += same.sum(0)
    assert kept.max() < 30 and kept.min() > 6  # expected 17.8, standard deviation 3.1


def test_images_are_read_as_pillow_reads_them(folders):
    for path in list_images(folders[0]):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(open_rgb(path)), np.asarray(image.convert("RGB")))


def test_command_prints_labels_floor_and_warnings_and_writes_a_manifest(folders, tmp_path, capsys):
    out = tmp_path / "fid.json"
    flags = ["--features", "random", "--dims", "192", "64", "--out", str(out), "--replicates", "5"]
    assert main(["fid", *map(str, folders), *flags]) == 0
    output = capsys.readouterr().out
    for part in ("FD-random: 8 real against 9 fake images", "n = 8 <= 64 dims", "FD-random is not FID"):
        assert part in output
    assert "floor" in output and "KID" in output and "coverage" in output and "CMMD" not in output
    manifest = json.loads(out.read_text())
    assert manifest["n_real"] == 8 and manifest["seed"] == 0 and "299" in manifest["features"]["resize"]
    entry = manifest["dims"]["192"]
    assert entry["low"] <= entry["distance"] <= entry["high"] and entry["half"] == 4


def test_the_manifest_of_a_data_set_is_written_here(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--features", "random", "--dims", "64", "--replicates", "2"]
    assert main(["fid", str(folders[0]), f"folder:{folders[1]}", *flags]) == 0
    assert json.loads((tmp_path / "fid.json").read_text())["n_fake"] == 9


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--replicates", "0"), ("--batch-size", "0"), ("--seed", "-1"), ("--seed", "1e3"), ("--keep", "1")],
)
def test_numbers_out_of_range_end_with_2_before_any_work(folders, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(main, ["fid", *map(str, folders), "--features", "random", flag, value])
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and flag in message and value in message


def test_weights_with_another_hash_are_not_called_fid(weights):
    extractor = inception_extractor(weights, (64,))
    assert extractor.label == "FID (unverified weights)" and len(extractor.facts["sha256"]) == 64


def test_saved_statistics_replace_a_folder(folders, weights, tmp_path, capsys):
    common = ["--weights", str(weights), "--dims", "64", "--replicates", "5"]
    saved, out = tmp_path / "real.npz", str(tmp_path / "fid.json")
    main(["fid", *map(str, folders), *common, "--save-stats", str(saved), "--out", out])
    expected = json.loads((tmp_path / "fid.json").read_text())["dims"]["64"]["distance"]
    main(["fid", str(saved), str(folders[1]), *common, "--out", out])
    result = json.loads((tmp_path / "fid.json").read_text())
    assert result["dims"]["64"]["distance"] == pytest.approx(expected, rel=1e-6)
    assert any("no interval" in warning for warning in result["warnings"]) and result["n_real"] == 8
    with pytest.raises(InputError, match="statistics of 64 dims"):
        main(["fid", str(saved), str(folders[1]), "--weights", str(weights), "--dims", "192"])


def test_table_says_what_is_missing_for_statistics_without_n(folders):
    extractor = grid_extractor(4)
    real, fake = (collect(list_images(folder), extractor) for folder in folders)
    real.n, real.rows = None, {}
    lines = "\n".join(table(measure(real, fake, extractor)))
    assert "unknown n" in lines and "do not say their n" in lines


def test_torchscript_encoders_are_features_too(folders, tmp_path):
    class Encoder(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    torch.jit.trace(Encoder(), torch.rand(2, 3, 224, 224)).save(str(tmp_path / "chest.pt"))
    extractor = open_extractor(FeatureSettings(features=str(tmp_path / "chest.pt"), device="cpu"))
    assert extractor.label == "FD-chest" and extractor.dims == (3,)
    assert collect(list_images(folders[0]), extractor).rows[3].shape == (8, 3)

    class Maps(torch.nn.Module):
        def forward(self, x):
            return x

    torch.jit.trace(Maps(), torch.rand(2, 3, 224, 224)).save(str(tmp_path / "maps.pt"))
    (tmp_path / "text.pt").write_text("no script")
    for name in ("maps.pt", "text.pt"):
        with pytest.raises(InputError, match=name):
            open_extractor(FeatureSettings(features=str(tmp_path / name), device="cpu"))
    with pytest.raises(FileNotFoundError, match="inception, random, vae, clip"):
        open_extractor(FeatureSettings(features="incepton"))


def test_bad_folders_are_answered_in_one_line(folders, tmp_path):
    empty, texts, one, broken, deep = (tmp_path / name for name in ("empty", "texts", "one", "broken", "deep"))
    for folder in (empty, texts, deep):
        folder.mkdir()
    (texts / "notes.txt").write_text("no image")
    write_images(one, 1, seed=0)
    (write_images(broken, 3, seed=0) / "001.png").write_bytes(b"\x89PNG but no more")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(deep / "a.png")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(deep / "b.png")
    calls = [
        (empty, "is empty"),
        (texts, "no image"),
        (one, "at least 2"),
        (broken, "001.png cannot be decoded"),
        (deep, "more than 8 bits"),
        (texts / "notes.txt", "is a file"),
        (tmp_path / "absent", "does not exist"),
    ]
    for folder, message in calls:
        with pytest.raises((InputError, FileNotFoundError)) as error:
            collect(list_images(folder), grid_extractor(4))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_folders_are_looked_for_before_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        main(["fid", str(tmp_path / "folder"), str(tmp_path / "folder"), "--weights", str(tmp_path / "weights.pth")])


def test_data_sets_are_read_as_training_reads_them(tmp_path):
    """Including more than 8 bits, which are an error in a plain folder of images."""
    folder = write_images(tmp_path / "set", 3, seed=0, modes=("L",))
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(folder / "deep.png")
    records = list_images(f"folder:{folder}")
    assert isinstance(records[0], Record) and collect(records, grid_extractor(4)).n == 4
    assert open_rgb(next(record for record in records if "deep" in record.name)).size == (512, 512)


def test_features_that_are_not_finite_name_the_image(folders):
    extractor = grid_extractor(4)

    def network(inputs):
        features = extractor.network(inputs)[16]
        features[2, 1] = torch.nan
        return {16: features}

    with pytest.raises(InputError, match=r"002\.png gives NaN"):
        collect(list_images(folders[0]), Extractor("FD-nan", (16,), extractor.prepare, network), batch_size=8)


def test_command_answers_a_mistake_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(main, ["fid", str(tmp_path / "no"), str(tmp_path / "where"), "--features", "random"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_importing_the_metrics_loads_no_slow_library():
    code = "import sys, minildm.metrics; print({'scipy', 'open_clip', 'matplotlib', 'torchvision'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_mean_latents_of_a_vae_on_an_8_x_8_grid_are_features_too(folders, tmp_path):
    model = random_model(ModelConfig.tiny())
    base = write_folder(model, tmp_path / "base")
    extractor = open_extractor(FeatureSettings(features="vae", base=base, device="cpu"))
    image = open_rgb(sorted(folders[0].glob("*.png"))[0])
    pixels = torch.nn.functional.interpolate(as_tensor(image)[None] / 255, (256, 256), mode="bilinear", antialias=True)
    with torch.no_grad():
        z = model.vae.encode(2 * pixels.clamp(0, 1) - 1).mean  # (1, 4, 32, 32)
        found = extractor.network(extractor.prepare(image)[None])[256]
    expected = z.unflatten(2, (8, 4)).unflatten(4, (8, 4)).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert extractor.label == "FD-vae"


def test_outputs_are_checked_before_any_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("minildm.metrics.fid_score.open_extractor", lambda *_: pytest.fail("opened first"))
    real, file = write_images(tmp_path / "real", 2, seed=0), tmp_path / "file"
    file.write_text("")
    for flags, error in (
        (["--out", str(tmp_path)], IsADirectoryError),
        (["--out", str(file / "f.json")], NotADirectoryError),
        (["--save-stats", str(file / "f.npz"), "--dims", "64"], NotADirectoryError),
    ):
        with pytest.raises(error):
            main(["fid", str(real), str(real), *flags])
    with pytest.raises(InputError, match="holds statistics already"):
        main(["fid", str(tmp_path / "s.npz"), str(real), "--save-stats", "t.npz", "--dims", "64"])


def test_the_folder_of_the_results_is_made(tmp_path):
    real = write_images(tmp_path / "real", 4, seed=0)
    arguments = [str(real), str(real), "--features", "random", "--dims", "64", "--replicates", "2"]
    out = tmp_path / "new" / "folder" / "f.json"
    assert main(["fid", *arguments, "--out", str(out)]) == 0 and out.is_file()


@pytest.mark.parametrize("channels, colour_type", [(3, 2), (2, 4), (4, 6)])
def test_colour_of_16_bits_is_refused_not_cut(channels, colour_type, tmp_path):
    values = np.full((8, 8, channels), 4095, np.uint16)
    (tmp_path / "deep.png").write_bytes(png_16_bit(values, colour_type))
    with pytest.raises(InputError, match=r"deep.png has more than 8 bits per channel"):
        open_rgb(tmp_path / "deep.png")


def test_images_that_fid_does_not_read_are_named(folders, tmp_path):
    for name in ("a.png", "more/b.png", "c.dcm", "._d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(sorted(folders[0].iterdir())[0].read_bytes())
    with pytest.warns(UserWarning, match=r"2 images in .*, such as c.dcm, are not read"):
        assert [path.name for path in list_images(tmp_path)] == ["a.png"]


def test_contact_sheets_need_no_warning_but_other_images_in_their_folder_do(folders, tmp_path):
    image = sorted(folders[0].iterdir())[0]
    (tmp_path / "sheets").mkdir()
    shutil.copy(image, tmp_path / "a.png")
    save_png(Image.open(image), tmp_path / "sheets" / "a.png", "contact sheet of 4 images")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list_images(tmp_path)
    shutil.copy(image, tmp_path / "sheets" / "b.png")
    (tmp_path / "sheets" / "damaged.png").write_bytes(image.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"2 images in .*, such as sheets/b.png, are not read"):
        assert [path.name for path in list_images(tmp_path)] == ["a.png"]
