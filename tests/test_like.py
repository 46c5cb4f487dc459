"""The record in a PNG, and sample.py --like: the same image again, bit for bit, or one line that says why not."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import peers
import pytest
import torch
from peers import assert_says
from PIL import Image
from test_sample_command import ROOT, sample_py

import minildm
from minildm import kernels
from minildm.adapters import add_adapter, save_adapter
from minildm.config import ModelConfig
from minildm.errors import InputError
from minildm.files import sha256
from minildm.images import FROM_IMAGE, RECORD, SYNTHETIC, parameters_text, read_text, save_png
from minildm.record import FORM, read_record

QUICK = ["--steps", "2", "--sampler", "dpm++"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a base, an adapter and an image: base/, a.safetensors, init.png."""
    folder = tmp_path_factory.mktemp("models")
    peers.write_folder(peers.random_model(ModelConfig.tiny(), seed=1), folder / "base")
    model = minildm.load(folder / "base", device="cpu")
    add_adapter(model, "lora", rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * peers.noise(*parameter.shape)
    save_adapter(model, folder / "a.safetensors")
    Image.fromarray(np.arange(70 * 50, dtype=np.uint16).reshape(50, 70) * 18).save(folder / "init.png")
    return folder


def run(out, *arguments):
    """Run the command. Returns: the path of the last image in ``out``."""
    assert sample_py.main([*map(str, arguments), "--out", str(out)]) == 0
    return sorted(out.glob("*.png"))[-1]


def make(folder, out, *arguments):
    return run(out, *(arguments or ["a cat"]), *QUICK, "--base", folder / "base", "--device", "cpu")


def refused(*arguments, error=InputError):
    with pytest.raises(error) as caught:
        sample_py.main(list(map(str, arguments)))
    return caught


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def edit_record(path, change):
    """Write the PNG again with another record: ``change`` of the old one; None = none at all."""
    with Image.open(path) as image:
        text, record = image.info["parameters"], json.loads(image.info[RECORD])
        image.load()
    save_png(image, path, text, record=change(record))
    return path


# --- the same again --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        ["--sampler", "ddim", "--steps", "4", "--eta", "0.7"],
        ["--sampler", "ddpm", "--steps", "4", "--negative", 'blurry, "text"\nSteps: 3'],
        ["--sampler", "plms", "--steps", "4", "--guidance", "1", "--height", "40", "--width", "72"],
        ["--sampler", "dpm++", "--steps", "3", "--karras", "--dtype", "bfloat16", "--prediction", "v"],
        ["--sampler", "dpm++", "--steps", "3", "--adapter", "{}/a.safetensors:0.3", "--adapter", "{}/a.safetensors"],
        ["--sampler", "ddim", "--steps", "5", "--init-image", "{}/init.png", "--strength", "0.5", "--eta", "0.3"],
        ["--sampler", "dpm++", "--steps", "5", "--init-image", "{}/init.png", "--width", "96"],
    ],
    ids=lambda flags: " ".join(flags[:2] + flags[4:7]),
)
def test_an_image_is_made_again_bit_for_bit_whatever_batch_it_was_in(flags, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("chest x-ray\na cat, two “dogs”\nthree\nfour\nfive\n", encoding="utf-8")
    flags = [flag.format(folder) for flag in flags]
    base = ["--base", folder / "base", "--device", "cpu"]
    run(tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--seed", 11, "--batch-size", 3, *base, *flags)
    for name, size, index in (("00001-seed12", 3, 1), ("00004-seed15", 2, 1)):
        path = tmp_path / "out" / f"{name}.png"
        again = run(tmp_path / "again", "--like", path)
        assert np.array_equal(pixels(again), pixels(path))
        assert read_record(again) == read_record(path)
        assert read_record(path)["batch"] == {"size": size, "index": index}
        with Image.open(path) as before, Image.open(again) as after:
            assert before.info == after.info
            assert before.info["Description"] == (FROM_IMAGE if "--init-image" in flags else SYNTHETIC)


def test_the_batch_is_as_large_as_it_was_and_only_its_row_is_kept(folder, tmp_path, monkeypatch):
    make(folder, tmp_path / "out", "a", "-n", 3, "--batch-size", 3)
    sizes, sample = [], minildm.LatentDiffusion.sample

    def recording(self, prompts, *arguments, **options):
        sizes.append((len(prompts), options["seed"]))
        return sample(self, prompts, *arguments, **options)

    monkeypatch.setattr(minildm.LatentDiffusion, "sample", recording)
    run(tmp_path / "again", "--like", tmp_path / "out" / "00002-seed2.png")
    assert sizes == [(3, [2, 2, 2])]
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["00000-seed2.png"]


def test_the_result_is_compared_with_the_original(folder, tmp_path, capsys):
    path = make(folder, tmp_path / "out")
    run(tmp_path / "again", "--like", path)
    assert f"the same as {path}, bit for bit\n" in capsys.readouterr().out
    record, changed = json.loads(Image.open(path).info[RECORD]), pixels(path).copy()
    changed[3, 4] += np.array([1, 0, 2], dtype=np.uint8)
    save_png(Image.fromarray(changed), path, "x", record=record)
    run(tmp_path / "again", "--like", path)
    assert f"not the same as {path}: 2 of 12,288 values differ, by up to 2 of 255\n" in capsys.readouterr().out
    save_png(Image.fromarray(changed[:32]), path, "x", record=record)
    run(tmp_path / "again", "--like", path)
    assert f"not the same as {path}, which has other dimensions" in capsys.readouterr().out


def test_the_command_makes_an_image_of_the_embedded_model_again_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MINILDM_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    path = run(tmp_path / "out", "chest x-ray, age 47 male", "-n", 2, *QUICK, "--device", "cpu")
    command = [sys.executable, str(ROOT / "sample.py"), "--like", str(path), "--out", "again"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("warning") == 0, done.stderr
    assert np.array_equal(pixels(tmp_path / "again" / "00000-seed1.png"), pixels(path))


@pytest.mark.skipif(torch.get_num_threads() > 1 or torch.multiprocessing.cpu_count() < 2, reason="needs a spare core")
def test_the_number_of_threads_is_as_it_was(folder, tmp_path):
    path = make(folder, tmp_path / "out")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = run(tmp_path / "again", "--like", path)
        assert torch.get_num_threads() == before == read_record(again)["machine"]["threads"]
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(pixels(again), pixels(path))


def test_a_vae_that_had_overflowed_decodes_in_float32_at_once(folder, tmp_path, monkeypatch):
    """A batch overflows, those after it are decoded in float32; made again alone, nothing would overflow."""
    load = minildm.loading.load
    monkeypatch.setattr(kernels, "float32_is_faster", lambda *_: False)
    monkeypatch.setattr(minildm.loading, "load", lambda *a: half_after_overflow(load(*a), overflowed))
    overflowed = True
    path = make(folder, tmp_path / "out", "a", "--dtype", "bfloat16")
    assert read_record(path)["vae_dtype"] == "float32"
    overflowed = False
    assert np.array_equal(pixels(run(tmp_path / "again", "--like", path)), pixels(path))
    other = edit_record(path, lambda record: record | {"vae_dtype": "bfloat16"})
    assert not np.array_equal(pixels(run(tmp_path / "other", "--like", other)), pixels(path))


@pytest.mark.parametrize("faster", [True, False])
def test_products_in_float32_are_recorded_and_kept_whatever_is_faster_later(folder, tmp_path, monkeypatch, faster):
    monkeypatch.setattr(kernels, "float32_is_faster", lambda dtype, device: faster)
    path = make(folder, tmp_path / "out", "a", "--dtype", "bfloat16")
    record = read_record(path)
    assert record["dtype"] == "bfloat16" and record["products"] == ("float32" if faster else "bfloat16")
    assert "Precision: bfloat16" in read_text(path)["parameters"]
    monkeypatch.setattr(kernels, "float32_is_faster", lambda dtype, device: not faster)
    assert np.array_equal(pixels(run(tmp_path / "again", "--like", path)), pixels(path))
    plain = read_record(run(tmp_path / "plain", "--like", path, "--plain"))
    assert plain["products"] == "bfloat16"
    other = read_record(run(tmp_path / "float32", "--like", path, "--dtype", "float32"))
    assert other["dtype"] == other["products"] == "float32"


def half_after_overflow(model, overflowed):
    if overflowed:
        model.vae.float()
    return model


# --- other flags, other files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, unlike",
    [
        (["--seed", "3"], "seed"),
        (["--steps", "4"], "steps"),
        (["--negative", "x"], "negative prompt"),
        (["another prompt"], "prompt"),
        (["--dtype", "bfloat16"], "dtype, products"),
        (["--adapter", "none"], "adapters"),
        (["--guidance", "1", "--width", "72"], "guidance, width"),
        (["--init-image", "{}/init.png"], "strength, initial image"),
    ],
)
def test_explicit_flags_override_the_record(flags, unlike, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "float32_is_faster", lambda *_: False)  # whatever this processor does
    adapter = ["--adapter", folder / "a.safetensors"]
    path = make(folder, tmp_path / "out", "a cat", *adapter, "--seed", 5)
    flags = [flag.format(folder) for flag in flags]
    capsys.readouterr()
    ours = run(tmp_path / "ours", "--like", path, *flags)
    assert f"unlike {path}: {unlike}\n" in capsys.readouterr().out
    same = [*([] if flags[0] == "another prompt" else ["a cat"]), *([] if "--adapter" in flags else adapter)]
    same += [*QUICK, "--base", folder / "base", "--device", "cpu"]
    same += [] if "--seed" in flags else ["--seed", 5]
    assert np.array_equal(pixels(ours), pixels(run(tmp_path / "expected", *same, *flags)))


def test_several_images_and_other_prompts_can_be_made_like_one(folder, tmp_path):
    path = make(folder, tmp_path / "out", "a cat", "--seed", 5)
    run(tmp_path / "more", "--like", path, "-n", 3)
    assert [read_record(each)["sampling"]["seed"] for each in sorted((tmp_path / "more").glob("*.png"))] == [5, 6, 7]
    (tmp_path / "prompts.txt").write_text("x\ny\n")
    run(tmp_path / "others", "--like", path, "--prompts", tmp_path / "prompts.txt")
    assert [read_record(each)["prompt"] for each in sorted((tmp_path / "others").glob("*.png"))] == ["x", "y"]


def copied(folder, tmp_path):
    """(a copy of the folder, an image made from all its files)."""
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    flags = ["--adapter", f"{mine / 'a.safetensors'}:0.5", "--init-image", mine / "init.png"]
    return mine, make(mine, tmp_path / "out", "a", *flags)


@pytest.mark.parametrize(
    "file, flag, what",
    [
        ("base", "--base", "base"),
        ("a.safetensors", "--adapter", "adapter"),
        ("init.png", "--init-image", "initial image"),
    ],
)
def test_a_file_that_has_moved_is_named_with_the_flag_that_helps(file, flag, what, folder, tmp_path, capsys):
    mine, path = copied(folder, tmp_path)
    (mine / file).rename(tmp_path / file)
    error = refused("--like", path, "--out", tmp_path / "again", error=FileNotFoundError)
    assert_says(error, f"the {what} of {path}, {mine / file}, is not there; say where it is with {flag}")
    value = f"{tmp_path / file}{':0.5' if flag == '--adapter' else ''}"
    capsys.readouterr()
    again = run(tmp_path / "again", "--like", path, flag, value)
    assert "unlike" not in capsys.readouterr().out and np.array_equal(pixels(again), pixels(path))


def test_a_file_that_has_changed_is_refused_unless_it_is_given_explicitly(folder, tmp_path, capsys):
    mine, path = copied(folder, tmp_path)
    kept = (mine / "a.safetensors").read_bytes()
    model = minildm.load(mine / "base", device="cpu")
    add_adapter(model, "lora", rank=1)
    save_adapter(model, mine / "a.safetensors")
    error = refused("--like", path, "--out", tmp_path / "again")
    assert_says(error, f"the adapter {mine / 'a.safetensors'} is not the one that {path} was made with", "--adapter")
    run(tmp_path / "again", "--like", path, "--adapter", mine / "a.safetensors")
    assert f"unlike {path}: adapters" in capsys.readouterr().out
    (mine / "a.safetensors").write_bytes(kept)

    Image.new("L", (64, 64), 77).save(mine / "init.png")
    assert_says(refused("--like", path, "--out", tmp_path / "again"), "the initial image", "--init-image")
    run(tmp_path / "again", "--like", path, "--init-image", mine / "init.png")
    assert f"unlike {path}: initial image" in capsys.readouterr().out
    shutil.copy(folder / "init.png", mine / "init.png")

    peers.write_folder(peers.random_model(ModelConfig.tiny(), seed=9), mine / "base")
    assert_says(refused("--like", path, "--out", tmp_path / "again"), "another base", mine / "base", "--base")
    run(tmp_path / "again", "--like", path, "--base", mine / "base")
    assert f"unlike {path}: base" in capsys.readouterr().out


def test_a_base_that_was_found_by_default_must_be_found_again(folder, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    shutil.copytree(folder / "base", weights / "sd")
    monkeypatch.setenv("MINILDM_WEIGHTS", str(weights))
    path = run(tmp_path / "out", "a", *QUICK, "--device", "cpu")
    assert read_record(path)["base"]["given"] is False
    assert "/" not in read_record(path)["base"]["path"]  # where minildm is installed is nobody's business
    assert np.array_equal(pixels(run(tmp_path / "again", "--like", path)), pixels(path))
    peers.write_folder(peers.random_model(ModelConfig.tiny(), seed=9), weights / "sd")
    error = refused("--like", path, "--out", tmp_path / "again")
    assert_says(
        error,
        path,
        "another base",
        "--base",
        sha256(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")[:10],
    )
    again = run(tmp_path / "again", "--like", path, "--base", folder / "base")
    assert np.array_equal(pixels(again), pixels(path))


def test_an_adapter_below_a_given_one_is_recorded_by_name_alone_and_found_again(folder, tmp_path, capsys):
    model = minildm.load(folder / "base", [folder / "a.safetensors"], device="cpu")
    for layer in add_adapter(model, "lora", rank=1).values():
        layer.lora_B.data.fill_(0.1)
    save_adapter(model, tmp_path / "b.safetensors")
    words = ["chest x-ray", *QUICK, "--device", "cpu", "--base", folder / "base"]
    path = run(tmp_path / "out", *words, "--adapter", tmp_path / "b.safetensors")
    below, given = read_record(path)["adapters"]
    assert (below["path"], below["given"]) == ("a.safetensors", False)
    assert (given["path"], given["given"]) == (str(tmp_path / "b.safetensors"), True)
    assert np.array_equal(pixels(run(tmp_path / "again", "--like", path)), pixels(path))


def test_another_machine_or_version_is_warned_of(folder, tmp_path):
    path = make(folder, tmp_path / "out")
    edit_record(path, lambda record: record | {"versions": record["versions"] | {"torch": "2.6.0"}})
    with pytest.warns(UserWarning, match=r"torch 2\.6\.0.*its last bits may differ"):
        run(tmp_path / "again", "--like", path)


# --- the web UI's text -----------------------------------------------------------------------------------------------
def write_text(path, text):
    save_png(Image.new("RGB", (64, 64)), path, text)
    return path


def test_without_a_record_the_text_gives_prompts_and_settings(folder, tmp_path):
    pairs = {"Steps": 3, "Sampler": "DPM++ 2M Karras", "CFG scale": 2.5, "Seed": 77, "Size": "72x40", "Model": "x, y"}
    path = write_text(tmp_path / "a.png", parameters_text("a cat,\n(fur:1.2)", "blurry", **pairs))
    base = ["--base", folder / "base", "--device", "cpu"]
    with pytest.warns(UserWarning, match=r"a\.png holds the web UI's text only"):
        ours = run(tmp_path / "ours", "--like", path, *base)
    flags = ["--negative", "blurry", "--sampler", "dpm++", "--karras", "--steps", 3, "--guidance", 2.5, "--seed", 77]
    theirs = run(tmp_path / "theirs", "a cat,\n(fur:1.2)", *flags, "--width", 72, "--height", 40, *base)
    assert np.array_equal(pixels(ours), pixels(theirs))


@pytest.mark.filterwarnings("ignore:.*web UI's text only")
def test_an_old_image_of_ours_is_made_again_from_its_text(folder, tmp_path):
    path = make(folder, tmp_path / "out", "a", "--dtype", "bfloat16", "--prediction", "v")
    edit_record(path, lambda record: None)
    again = run(tmp_path / "again", "--like", path, "--base", folder / "base", "--device", "cpu")
    assert np.array_equal(pixels(again), pixels(path))
    path = make(folder, tmp_path / "out", "a", "--init-image", folder / "init.png", "--strength", 0.5)
    edit_record(path, lambda record: None)
    assert_says(refused("--like", path, "--base", folder / "base"), path, "from another image", "--init-image")
    again = run(tmp_path / "again", "--like", path, "--base", folder / "base", "--init-image", folder / "init.png")
    assert np.array_equal(pixels(again), pixels(path))


@pytest.mark.filterwarnings("ignore:.*web UI's text only")
def test_what_the_text_says_is_checked_like_flags(folder, tmp_path, capsys):
    path = write_text(tmp_path / "a.png", "a\nSteps: 20, Sampler: Euler a, Seed: 1, Size: 64x64")
    assert_says(refused("--like", path), "--sampler must be one of ddim, ddpm, plms, dpm++, got 'Euler a'")
    run(tmp_path / "out", "--like", path, *QUICK, "--base", folder / "base", "--device", "cpu")
    for pairs, says in (("Seed: -1", "--seed"), ("Size: 60x64", "--width"), ("Sampler: DDIM, Eta: 7", "--eta")):
        assert_says(refused("--like", write_text(path, f"a\nSteps: 20, {pairs}")), says)
    for pairs in ("Seed: x", "CFG scale: nan", "Size: 64"):
        error = refused("--like", write_text(path, f"a\nSteps: 1e9, {pairs}"), error=SystemExit)
        assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["no text", "other text", "sheet", "not an image", "folder", "absent", "cut short"])
def test_a_file_without_settings_is_refused(kind, folder, tmp_path):
    path = tmp_path / "a.png"
    if kind == "no text":
        Image.new("L", (8, 8)).save(path)
    elif kind in ("other text", "sheet"):
        write_text(path, "contact sheet of 3 images" if kind == "sheet" else "hello")
    elif kind == "not an image":
        path.write_text("hello")
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut short":
        path.write_bytes(make(folder, tmp_path / "out").read_bytes()[:3000])
    missing = kind in ("folder", "absent")
    assert_says(refused("--like", path, error=FileNotFoundError if missing else InputError), path)


# --- damaged records -------------------------------------------------------------------------------------------------
def leaves(form, path=()):
    """The path of every value that a record must have."""
    for key, part in form.items():
        yield (*path, key)
        if isinstance(part, dict):
            yield from leaves(part, (*path, key))


def changed(record, path, value):
    record = copy.deepcopy(record)
    part = record
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return record


def test_a_record_with_any_value_missing_or_of_another_kind_is_refused_by_name(folder, tmp_path):
    path = make(folder, tmp_path / "out", "a", "--adapter", folder / "a.safetensors")
    original = read_record(path)
    for place in leaves(FORM):
        for value in (..., [1], {}, "x" if not isinstance(original[place[0]], str) else 3, 10**30, 1.5, True):
            record = changed(original, place, value)
            edit_record(path, lambda _, record=record: record)
            try:
                found = read_record(path)
            except InputError as error:
                assert_says(error, path, "its record", "damaged at", "batch" if "batch" in place else ".".join(place))
            else:  # the same kind
                assert value is not ... and (found == record)
    for adapters in ([1], [{}], [{"path": 3}], "x", {"a": 1}):
        edit_record(path, lambda _, adapters=adapters: original | {"adapters": adapters})
        with pytest.raises(InputError, match="damaged at adapters"):
            read_record(path)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"schema": ' + "1" * 5000 + "}", "record"),
        ("[]", "holds a list, expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"schema": 2}', "schema '2', expected 1; it was written by another version"),
        ('{"schema": 1}', "damaged at prompt"),
    ],
)
def test_a_chunk_that_is_no_record_is_refused(text, says, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    monkeypatch.setattr(minildm.images.json, "dumps", lambda record: record)
    save_png(Image.new("L", (8, 8)), path, "x", record=text)
    monkeypatch.undo()
    assert_says(refused("--like", path), path, says)


@pytest.mark.parametrize(
    "place, value, says",
    [
        (("sampling", "steps"), 0, "--steps"),
        (("sampling", "seed"), -1, "--seed"),
        (("sampling", "height"), 12, "--height"),
        (("sampling", "guidance"), float("nan"), "--guidance"),
        (("sampling", "sampler"), "euler", "--sampler"),
        (("sampling", "strength"), 2.0, "--strength"),
        (("dtype",), "float8", "dtype"),
        (("prediction",), "x", "prediction"),
        (("machine", "device"), "toaster", "device"),
        (("batch", "size"), 0, "batch"),
        (("batch", "size"), 10**9, "batch"),
        (("batch", "index"), -1, "batch"),
        (("batch", "index"), 4, "batch"),
        (("prompt",), "\udcff", "UTF-8"),
    ],
)
def test_values_out_of_range_in_a_record_are_refused(place, value, says, folder, tmp_path):
    path = make(folder, tmp_path / "out")
    edit_record(path, lambda record: changed(record, place, value))
    assert_says(refused("--like", path, "--out", tmp_path / "again"), says)


def test_a_record_holds_every_flag_that_changes_an_image():
    """A new sampling flag belongs into the record; its field must be named in FORM."""
    from dataclasses import fields

    from minildm.config import SamplingSettings

    assert set(FORM["sampling"]) == {field.name for field in fields(SamplingSettings)}
