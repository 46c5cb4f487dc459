"""The memorisation audit finds planted copies and raises no alarm without them; prompt adherence."""

import csv
import io
import json

import made_data
import numpy as np
import pytest
import torch
from metrics_helpers import grid_extractor, smooth_noise
from PIL import Image, ImageChops, ImageEnhance

from minildm.__main__ import main
from minildm.data.open import DataSettings
from minildm.data.reading import Transform
from minildm.errors import InputError
from minildm.images import save_png
from minildm.metrics.adherence import prompt_adherence
from minildm.metrics.audit import (
    _coarse_similarity,
    _fine_similarity,
    _standardised,
    audit,
    detail,
    pixel_distances,
    share_test,
)
from minildm.metrics.sources import as_tensor, list_as_training, list_images
from minildm.teaching import phantom

COPIES = (
    (0.03, -0.02, 1.15, 40),
    (0.05, 0.02, 0.85, 60),
    (-0.04, 0.04, 1.2, 75),
    (0.06, 0, 0.9, 50),
    (0, -0.05, 1.1, 30),
)  # shift right, shift down, brightness, JPEG quality


def near_copy(image, dx, dy, brightness, quality):
    """Shifted (a share of the width), brightened, JPEG-compressed."""
    image = ImageChops.offset(image.convert("L"), round(dx * image.width), round(dy * image.height))
    buffer = io.BytesIO()
    ImageEnhance.Brightness(image).enhance(brightness).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def save(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{folder.name}_{i:03d}.png")
    return list_images(folder)


def plant(folder, images, train):
    """``images`` with five of them replaced by near-copies of training images; {name: name of the source}."""
    images, sources = list(images), {}
    for k, how in enumerate(COPIES):
        images[7 + 11 * k] = near_copy(train[3 + 13 * k], *how)
        sources[f"{folder.name}_{7 + 11 * k:03d}.png"] = f"train_{3 + 13 * k:03d}.png"
    return save(folder, images), sources


def chest_like(n, seed):
    """Images with a common part, about as similar to each other as radiographs are."""
    common, different = smooth_noise(1, 96, seed=0)[0], smooth_noise(n, 96, seed=seed)
    return [Image.fromarray(((0.6 * common + 0.4 * x)[0].numpy() * 255).astype(np.uint8)) for x in different]


def phantoms(n, seed):
    seeds = [(seed, i) for i in range(n)]
    return [Image.fromarray(x) for x in phantom.render_batch([phantom.labels(s) for s in seeds], seeds, 96)]


def check(comparisons, expected_copies):
    """By pixels exactly the expected copies are found, by features no others."""
    pixels = comparisons[0]
    assert set(np.flatnonzero(pixels.near_copy)) == expected_copies
    assert not len(pixels.leaked)
    for comparison in comparisons:
        assert set(np.flatnonzero(comparison.near_copy)) <= expected_copies


@pytest.mark.parametrize("make", [chest_like, pytest.param(phantoms, marks=pytest.mark.slow)])
def test_planted_copies_are_found_and_independent_images_raise_no_alarm(make, tmp_path):
    train, holdout, generated = make(200, 101), make(100, 102), make(200, 103)
    lists = save(tmp_path / "train", train), save(tmp_path / "hold", holdout)
    clean = audit(save(tmp_path / "clean", generated), *lists, grid_extractor(), transform=Transform(96))
    check(clean, set())
    assert all(comparison.p > 0.01 for comparison in clean)
    paths, sources = plant(tmp_path / "planted", generated, train)
    comparisons = audit(paths, *lists, grid_extractor(), transform=Transform(96))
    check(comparisons, {7, 18, 29, 40, 51})
    pixels = comparisons[0]
    found = {paths[i].name: lists[0][pixels.nearest_train[i]].name for i in np.flatnonzero(pixels.near_copy)}
    assert found == sources


def test_real_radiographs_of_other_patients_raise_no_alarm_and_copies_among_them_are_found(shared_data, tmp_path):
    """The hard case: real chests, split by patient into three; then five copies among them."""
    with open(shared_data / "cxr" / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    patients = sorted({row["patient_id"] for row in rows})
    np.random.default_rng(0).shuffle(patients)
    third = {patient: i * 3 // len(patients) for i, patient in enumerate(patients)}
    lists = [[shared_data / "cxr" / row["file"] for row in rows if third[row["patient_id"]] == k] for k in range(3)]
    check(audit(*lists, grid_extractor()), set())
    sources = [Image.open(path) for path in lists[1][:70]]
    copies = save(tmp_path / "copies", [near_copy(sources[3 + 13 * k], *how) for k, how in enumerate(COPIES)])
    n = len(lists[0])
    check(audit(lists[0] + copies, *lists[1:], grid_extractor()), set(range(n, n + 5)))


def test_correlations_by_fourier_transform_equal_those_by_hand():
    a, b = (torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    candidates = torch.tensor([[0, 2], [1, 0], [2, 1]])
    fine = _fine_similarity(a, b[:, 0], candidates)
    for i, row in enumerate(candidates):
        for k, j in enumerate(row):
            windows = torch.stack([b[j, 0], b[j, 0].flip(-1)]).unfold(1, 54, 1).unfold(2, 54, 1).reshape(-1, 54 * 54)
            by_hand = (_standardised(a[i, :, 5:-5, 5:-5].flatten(1)) @ _standardised(windows).T).max()
            torch.testing.assert_close(fine[i, k], by_hand)


def test_shift_brightness_contrast_and_mirroring_do_not_hide_a_copy():
    image = chest_like(1, seed=5)[0]
    other = [detail(as_tensor(x.convert("RGB"))) for x in chest_like(30, seed=6)]
    train = torch.stack([*other, detail(as_tensor(image.convert("RGB")))])
    for changed in (
        image,
        ImageChops.offset(image, 4, -3),
        image.point(lambda v: 0.7 * v + 40),
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        image.resize((61, 61)),
    ):
        distances = pixel_distances(detail(as_tensor(changed.convert("RGB")))[None], train)[0]
        assert distances.argmin() == 30 and distances[30] < 0.25 * distances[:30].min()
    coarse = _coarse_similarity(torch.randn(2, 32, 32), torch.randn(70, 32, 32))
    assert coarse.shape == (2, 70) and coarse.abs().max() <= 1.001


def test_share_is_tested_by_relabelling():
    rng = np.random.default_rng(0)
    near, far = (torch.from_numpy(rng.random((60, 40))) for _ in range(2))
    share, expected, p = share_test(near, far, seed=0)
    assert expected == 0.5 and 0.3 < share < 0.7 and p > 0.01
    share, _, p = share_test(near * 1e-3, far, seed=0)
    assert share > 0.95 and p < 0.001


def test_held_out_twins_of_training_images_are_reported_and_do_not_hide_copies(tmp_path):
    train, holdout, generated = chest_like(60, 1), chest_like(40, 2), chest_like(20, 3)
    generated[4] = near_copy(train[9], *COPIES[0])
    holdout[7] = near_copy(train[9], *COPIES[3])
    pixels = audit(
        *(save(tmp_path / name, images) for name, images in (("fake", generated), ("train", train), ("hold", holdout))),
        grid_extractor(),
    )[0]
    assert list(pixels.leaked) == [7] and list(np.flatnonzero(pixels.near_copy)) == [4]
    assert pixels.nearest_holdout[4] != 7


def test_command_lists_and_shows_the_copies(tmp_path, capsys):
    train = chest_like(24, 1)
    run = tmp_path / "run"
    save(run / "samples", [*chest_like(7, 2), near_copy(train[5], *COPIES[0])])
    (run / "config.json").write_text("{}")
    save(tmp_path / "train", train)
    save(tmp_path / "hold", chest_like(24, 3))
    torch.jit.trace(torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten()), torch.rand(2, 3, 224, 224)).save(
        str(tmp_path / "grid.pt")
    )
    command = ["audit", str(run), "--train", str(tmp_path / "train"), "--holdout", str(tmp_path / "hold")]
    assert main([*command, "--features", str(tmp_path / "grid.pt")]) == 0
    output = capsys.readouterr().out
    assert "near-copy: samples_007.png of train_005.png (pixels" in output and "8 generated, 24 training" in output
    result = json.loads((run / "audit" / "audit.json").read_text())
    assert result["views"][0]["near_copies"] == 1 and result["views"][1]["view"] == "FD-grid"
    with Image.open(run / "audit" / "audit.png") as image:
        assert image.width > 400 and image.height > image.width
    assert not list(run.glob("**/.*"))


def test_mistakes_are_answered_in_one_line(tmp_path):
    images = chest_like(12, 1)
    save(tmp_path / "train", images)
    save(tmp_path / "few", chest_like(3, 2))
    leaked = save(tmp_path / "leaked", [*chest_like(9, 3), *images[:3]])
    few, train = str(tmp_path / "few"), str(tmp_path / "train")
    lists = [list_images(folder) for folder in (few, train, few)]
    calls = [
        (lambda: main(["audit", few, "--train", train, "--holdout", train]), "both"),
        (lambda: audit(*lists, grid_extractor()), "at least 10"),
        (lambda: audit(lists[0], lists[1], leaked, grid_extractor()), "give images of other patients"),
    ]
    for call, message in calls:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_prompt_adherence_counts_agreement_and_what_chance_gives(tmp_path):
    def measure(pixels):
        assert pixels.shape == (8, 8)
        return {"tone": "bright" if pixels.mean() > 127 else "dark", "level": int(pixels.mean())}

    def obeys(reading, wanted):
        verdict = {"tone": reading["tone"] == wanted["tone"]}
        return verdict | ({"level": abs(reading["level"] - wanted["level"]) <= 10} if "level" in wanted else {})

    paths = save(tmp_path / "tones", [Image.new("L", (8, 8), value) for value in (200, 210, 50, 60)])
    wanted = [{"tone": "bright", "level": 195}, {"tone": "dark", "level": 100}, {"tone": "dark"}, {"tone": "dark"}]
    result = prompt_adherence(paths, wanted, measure, obeys)
    assert set(result) == {"tone", "level"}
    assert (result["tone"].share, result["tone"].n) == (0.75, 4)
    assert result["tone"].chance == pytest.approx(5 / 12)  # of 16 pairs 8 agree, 3 of them an image with its own prompt
    assert (result["level"].share, result["level"].n) == (0.5, 2)
    with pytest.raises(InputError, match="one prompt per image"):
        prompt_adherence(paths, wanted[:2], measure, obeys)


def test_data_sets_can_be_audited_and_a_runs_sheets_cannot(tmp_path, monkeypatch):
    """Records are not paths, and the samples/ of a training run may hold contact sheets only."""
    monkeypatch.chdir(tmp_path)
    generated = save(tmp_path / "fake", chest_like(4, 1))
    data = [
        list_images(f"folder:{save(tmp_path / name, chest_like(12, seed))[0].parent}")
        for name, seed in (("train", 2), ("hold", 3))
    ]
    by_path = [list_images(tmp_path / name) for name in ("train", "hold")]
    for ours, theirs in zip(audit(generated, *data, grid_extractor()), audit(generated, *by_path, grid_extractor())):
        assert list(ours.nearest_train) == list(theirs.nearest_train) and len(ours.score) == 4

    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    save_png(chest_like(1, 4)[0], run / "samples" / "step-000010.png", "contact sheet of step 10")
    with pytest.raises(InputError, match="contact sheets of a training run"):
        list_images(run)
    save_png(chest_like(1, 5)[0], run / "samples" / "a.png", "chest x-ray\nSteps: 2")
    assert [path.name for path in list_images(run)] == ["a.png"]


# --- images are read as training reads them ---------------------------------------------------------------------------
def on_their_side(folder, images):
    """The images, stored on their side with the EXIF orientation that turns them upright."""
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = 8
    for i, image in enumerate(images):
        image.transpose(Image.Transpose.ROTATE_270).save(folder / f"train_{i:03d}.jpg", quality=95, exif=exif)


def transparent(folder, images):
    """White everywhere, and the image as transparency, on which training puts black."""
    folder.mkdir()
    for i, image in enumerate(images):
        white = Image.new("L", image.size, 255)
        Image.merge("LA", (white, image)).save(folder / f"train_{i:03d}.png")


def of_12_bits(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(np.asarray(image).astype(np.uint16) * 16).save(folder / f"train_{i:03d}.png")


def as_dicom(folder, images):
    """Below a subfolder, and inverted."""
    pytest.importorskip("pydicom", reason="needs the dicom extra")
    (folder / "p1").mkdir(parents=True)
    for i, image in enumerate(images):
        data = made_data.dicom(4095 - np.asarray(image).astype(np.uint16) * 16, 12, "MONOCHROME1")
        (folder / "p1" / f"train_{i:03d}.dcm").write_bytes(data)


def by_links(folder, images):
    on_their_side(folder.with_name("disk2"), images)
    folder.mkdir()
    (folder / "more").symlink_to(folder.with_name("disk2"))


@pytest.mark.parametrize("store", [on_their_side, transparent, of_12_bits, as_dicom, by_links])
@pytest.mark.parametrize("form", ["{}", "folder:{}"])
def test_copies_are_found_however_the_training_images_are_stored(store, form, tmp_path):
    images = chest_like(60, 1)
    train, hold = (image_list[:30] for image_list in (images, chest_like(30, 2)))
    store(tmp_path / "train", train)
    save(tmp_path / "hold", hold)
    generated = save(tmp_path / "fake", [*train[:4], *chest_like(4, 3)])
    lists = [list_as_training(form.format(tmp_path / name), DataSettings()) for name in ("train", "hold")]
    assert len(lists[0]) == 30
    pixels, _ = audit(generated, *lists, grid_extractor(), transform=Transform(96))
    assert set(np.flatnonzero(pixels.near_copy)) == {0, 1, 2, 3}
    assert list(pixels.nearest_train[:4]) == [0, 1, 2, 3]


def test_an_audit_leaves_no_image_out_in_silence(tmp_path, capsys):
    """DreamBooth trains on images without captions, and lateral views are left out only with a note."""
    folder = made_data.folder(tmp_path / "data", 12)
    table = folder / "metadata.csv"
    lines = table.read_text().replace("a chest x-ray, number", "").splitlines()
    lines[1] = lines[1].replace("PA", "lateral")
    table.write_text("\n".join(lines) + "\n")
    (folder / "images" / "._000.png").write_bytes(b"\0\5\x16\7")
    assert len(list_as_training(f"folder:{folder}", DataSettings())) == 11
    assert "1 of 12 left out: lateral" in capsys.readouterr().err
    assert len(list_as_training(f"folder:{folder}", DataSettings(views="all"))) == 12
    assert len(list_as_training(folder, DataSettings())) == 12


def test_the_results_for_a_data_set_lie_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, n in (("fake", 4), ("train", 12), ("hold", 12)):
        save(tmp_path / name, chest_like(n, len(name)))
    flags = ["--train", "train", "--holdout", "hold", "--features", "random"]
    assert main(["audit", "folder:fake", *flags]) == 0
    assert (tmp_path / "audit" / "audit.json").is_file() and not (tmp_path / "folder:fake").exists()
