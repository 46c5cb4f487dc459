"""sample.py from the command line: its images and their text, continued runs, one-line errors."""

import importlib.util
import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from peers import assert_says
from PIL import Image
from safetensors.torch import save_file

import minildm
from minildm import loading
from minildm.config import ModelConfig, VAEConfig
from minildm.errors import InputError
from minildm.images import SYNTHETIC
from minildm.sampling import model_name

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--steps", "2", "--guidance", "1"]


def load_command():
    spec = importlib.util.spec_from_file_location("sample_command", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample_py = load_command()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-sd"
    return peers.write_folder(peers.random_model(ModelConfig.tiny(), seed=1), folder)


def generate(base, out, *arguments):
    """Run the command. Returns: the images in ``out``."""
    assert sample_py.main([*map(str, arguments), "--base", str(base), "--out", str(out), "--device", "cpu"]) == 0
    return sorted(out.glob("*.png"))


def refused(base, out, *arguments, error=InputError):
    """Run the command, which must fail. Returns: the error."""
    with pytest.raises(error) as caught:
        sample_py.main([*map(str, arguments), "--base", str(base), "--out", str(out), "--device", "cpu"])
    return caught


def read_as_the_web_ui(text):
    """(prompt, negative prompt, {key: value}), parsed like AUTOMATIC1111's infotext: with its regular expression for
    pairs and its minimum of three pairs."""
    pairs = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    *lines, last = text.strip().split("\n")
    if len(re.findall(pairs, last)) < 3:
        lines, last = [*lines, last], ""
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    values = {key: json.loads(value) if value[:1] == '"' else value for key, value in re.findall(pairs, last)}
    return "\n".join(lines[:at]), negative, values


# --- one prompt ------------------------------------------------------------------------------------------------------
def test_images_equal_those_of_the_python_interface(base, tmp_path):
    paths = generate(
        base,
        tmp_path,
        "chest x-ray, age 47 male",
        "-n",
        3,
        "--seed",
        5,
        "--steps",
        3,
        "--guidance",
        2,
        "--negative",
        "blurry",
        "--height",
        40,
        "--width",
        64,
        "--batch-size",
        2,
    )
    assert [path.name for path in paths] == ["00000-seed5.png", "00001-seed6.png", "00002-seed7.png"]
    expected = minildm.load(base, device="cpu").sample(
        ["chest x-ray, age 47 male"] * 3, "blurry", steps=3, guidance=2, seed=5, height=40, width=64
    )
    for path, theirs in zip(paths, expected):
        with Image.open(path) as ours:
            assert ours.size == (64, 40)
            difference = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
            assert np.abs(difference).max() <= 1  # another batch size may round a pixel differently


@pytest.mark.parametrize(
    "arguments, name, extra",
    [
        (["--sampler", "ddim", "--eta", "0.5"], "DDIM", {"Eta": "0.5"}),
        (["--sampler", "ddpm"], "DDPM", {}),
        (["--sampler", "plms"], "PLMS", {}),
        (["--sampler", "dpm++"], "DPM++ 2M", {}),
        (["--sampler", "dpm++", "--karras"], "DPM++ 2M Karras", {}),
    ],
)
def test_every_sampler_runs_and_is_named_in_the_png(arguments, name, extra, base, tmp_path):
    (path,) = generate(base, tmp_path, "a", "--steps", 3, *arguments)
    values = read_as_the_web_ui(Image.open(path).info["parameters"])[2]
    assert values["Sampler"] == name and values["Steps"] == "3"
    assert {key: values.get(key) for key in extra} == extra and ("Eta" in values) == ("Eta" in extra)


def test_a_png_records_how_it_was_made_and_that_it_is_synthetic(base, tmp_path):
    (path,) = generate(
        base,
        tmp_path,
        "chest x-ray: PA, upright",
        "--steps",
        2,
        "--guidance",
        1.5,
        "--negative",
        "text, marks",
        "--seed",
        11,
    )
    with Image.open(path) as image:
        assert image.info["Description"] == SYNTHETIC and "Not for clinical use" in SYNTHETIC
        text = image.info["parameters"]
    prompt, negative, values = read_as_the_web_ui(text)
    assert prompt == "chest x-ray: PA, upright" and negative == "text, marks"
    assert values | {"Version": ""} == {
        "Steps": "2",
        "Sampler": "DDIM",
        "CFG scale": "1.5",
        "Seed": "11",
        "Size": "64x64",
        "Model hash": sha256((base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:10],
        "Model": "tiny-sd",
        "Prediction": "epsilon",
        "Precision": "float32",
        "Version": "",
    }
    assert text.splitlines()[1] == "Negative prompt: text, marks"


def test_another_autoencoder_is_used_and_named_in_the_png_and_a_continued_call_needs_the_same(base, tmp_path, capsys):
    vae = tmp_path / "vae-ft.safetensors"
    save_file(peers.random_network(VAEConfig.tiny(), seed=5).state_dict(), vae)
    (tmp_path / "list.txt").write_text("a\n")
    prompts = ["--prompts", tmp_path / "list.txt", *QUICK]
    (path,) = generate(base, tmp_path / "out", *prompts, "--vae", vae)
    assert f"tiny-sd with the autoencoder {vae}: " in capsys.readouterr().out
    values = read_as_the_web_ui(Image.open(path).info["parameters"])[2]
    assert values["VAE"] == "vae-ft.safetensors"
    assert values["VAE hash"] == sha256(vae.read_bytes()).hexdigest()[:10]
    model = minildm.load(base, device="cpu", vae=vae)
    assert np.array_equal(np.asarray(Image.open(path)), model.sample(["a"], steps=2, guidance=1)[0])
    assert "VAE" not in Image.open(generate(base, tmp_path / "own", "a", *QUICK)[0]).info["parameters"]
    save_file(peers.random_network(VAEConfig.tiny(), seed=6).state_dict(), vae)  # another one under the same name
    error = refused(base, tmp_path / "out", *prompts, "--vae", vae)
    assert_says(error, "was made with other settings", "VAE hash")


def test_prompts_in_any_script_are_stored_in_the_png(base, tmp_path):
    prompt = "épanchement — 胸部X線 🫁"
    (path,) = generate(base, tmp_path, prompt, *QUICK)
    assert read_as_the_web_ui(Image.open(path).info["parameters"])[0] == prompt


@pytest.mark.parametrize(
    "name",
    ["v1.5.final", "a, b: c", 'say "x"', "胸部.X線 🫁", "back\\slash", "two\nlines", "Seed: 9, Steps: 77", " x "],
)
def test_the_whole_name_of_a_base_is_stored_whatever_characters_it_has(name, base, tmp_path):
    (tmp_path / name).symlink_to(base)
    (path,) = generate(tmp_path / name, tmp_path / "out", "x", *QUICK)
    values = read_as_the_web_ui(Image.open(path).info["parameters"])[2]
    assert values["Model"] == name and values["Seed"] == "0" and values["Steps"] == "2"


@pytest.mark.parametrize(
    "path, name",
    [
        ("weights/v1.5", "v1.5"),
        ("weights/v1.5.safetensors", "v1.5"),
        ("weights/v1.5-fp16.final.CKPT", "v1.5-fp16.final"),
        ("weights/model.v2", "model.v2"),
        ("weights/sd.v1/", "sd.v1"),
        ("weights/x/../sd.v1", "sd.v1"),
    ],
)
def test_only_a_checkpoints_suffix_is_cut_from_its_name(path, name):
    assert model_name(path) == name


def test_a_base_in_the_current_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "a.folder").mkdir()
    monkeypatch.chdir(tmp_path / "a.folder")
    assert model_name(".") == "a.folder" and model_name("..") == tmp_path.name


def test_numbers_of_a_second_call_go_on_from_the_first(base, tmp_path):
    generate(base, tmp_path, "a", *QUICK, "-n", 2)
    paths = generate(base, tmp_path, "b", *QUICK, "--seed", 0)
    assert [path.name for path in paths] == ["00000-seed0.png", "00001-seed1.png", "00002-seed0.png"]


def test_a_contact_sheet_in_its_own_folder_shows_the_images_in_order(base, tmp_path):
    paths = generate(base, tmp_path, "a", *QUICK, "-n", 3)
    (sheet,) = (tmp_path / "sheets").glob("*.png")
    with Image.open(sheet) as image:
        assert image.size == (2 * 64 + 4, 2 * 64 + 4)
        for path, corner in zip(paths, ((0, 0), (68, 0), (0, 68))):
            with Image.open(path) as part:
                assert image.crop((*corner, corner[0] + 64, corner[1] + 64)).tobytes() == part.tobytes()
    generate(base, tmp_path / "single", "a", *QUICK)
    assert not (tmp_path / "single" / "sheets").exists()


def test_the_output_names_the_images_and_the_next_command(base, tmp_path, capsys):
    paths = generate(base, tmp_path, "a", *QUICK, "-n", 2, "--seed", 3)
    printed = capsys.readouterr().out
    for part in (*map(str, paths), "epsilon-prediction", "64 px", "float32 on cpu", "next:", "--seed 5"):
        assert part in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_generates_an_image(dtype, base, tmp_path, capsys):
    generate(base, tmp_path, "a", *QUICK, "--dtype", dtype)
    assert dtype in capsys.readouterr().out


# --- many prompts ----------------------------------------------------------------------------------------------------
def test_each_line_of_a_text_file_is_a_prompt(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffchest x-ray\n\n  a cat  \r\nnaïve\n", encoding="utf-8")
    paths = generate(base, tmp_path / "out", "--prompts", tmp_path / "prompts.txt", *QUICK, "-n", 2, "--seed", 10)
    prompts = [read_as_the_web_ui(Image.open(path).info["parameters"])[0] for path in paths]
    assert prompts == ["chest x-ray"] * 2 + ["a cat"] * 2 + ["naïve"] * 2
    assert [path.name for path in paths] == [f"{i:05d}-seed{10 + i}.png" for i in range(6)]


@pytest.mark.parametrize("arguments, column", [([], "prompt"), (["--column", "finding"], "finding")])
def test_each_row_of_a_csv_column_is_a_prompt(arguments, column, base, tmp_path):
    (tmp_path / "p.csv").write_text('id,prompt,finding\n1,"a, b",x\n2,"c ""d""",y\n3,"two\nlines",z\n')
    paths = generate(base, tmp_path / "out", "--prompts", tmp_path / "p.csv", *QUICK, *arguments)
    prompts = [read_as_the_web_ui(Image.open(path).info["parameters"])[0] for path in paths]
    assert prompts == {"prompt": ["a, b", 'c "d"', "two\nlines"], "finding": ["x", "y", "z"]}[column]


def test_a_tsv_is_read_by_columns_and_a_row_without_a_prompt_is_named(base, tmp_path):
    (tmp_path / "p.tsv").write_text("id\tprompt\n1\ta, b\n2\tc\n")
    paths = generate(base, tmp_path / "out", "--prompts", tmp_path / "p.tsv", *QUICK)
    assert [read_as_the_web_ui(Image.open(path).info["parameters"])[0] for path in paths] == ["a, b", "c"]
    (tmp_path / "p.csv").write_text("id,prompt\n1,a\n2, \n3,NA\n")
    with pytest.raises(InputError, match="2 of 3 rows, the first of them row 3"):
        generate(base, tmp_path / "more", "--prompts", tmp_path / "p.csv", *QUICK)


def test_repeating_an_interrupted_call_continues_it(base, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\n")
    command = ["--prompts", tmp_path / "prompts.txt", *QUICK, "--batch-size", 2]
    paths = generate(base, tmp_path / "out", *command)
    whole = {path.name: path.read_bytes() for path in paths}
    times = {path.name: path.stat().st_mtime_ns for path in paths}
    for i in (1, 3, 4):
        paths[i].unlink()
    capsys.readouterr()
    paths = generate(base, tmp_path / "out", *command)
    assert "2 images are already in" in capsys.readouterr().out
    assert [path.name for path in paths] == list(whole)
    for path in paths:
        kept = path.name in ("00000-seed0.png", "00002-seed2.png")
        assert (path.stat().st_mtime_ns == times[path.name]) == kept
        ours, before = np.asarray(Image.open(path), dtype=int), tmp_path / "before.png"
        before.write_bytes(whole[path.name])
        assert np.abs(ours - np.asarray(Image.open(before), dtype=int)).max() <= 1
    generate(base, tmp_path / "out", *command)  # nothing left to generate is no error
    assert "0 to generate" in capsys.readouterr().out


def test_ctrl_c_leaves_only_whole_images(base, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    sample, calls = minildm.LatentDiffusion.sample, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(minildm.LatentDiffusion, "sample", interrupted)
    command = ["--prompts", tmp_path / "prompts.txt", *QUICK, "--batch-size", 1]
    refused(base, tmp_path / "out", *command, error=KeyboardInterrupt)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000-seed0.png"]
    monkeypatch.undo()
    assert len(generate(base, tmp_path / "out", *command)) == 3


def test_existing_images_with_other_settings_are_an_error(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    paths = generate(base, tmp_path / "out", "--prompts", tmp_path / "prompts.txt", *QUICK)
    caught = refused(base, tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--steps", 3, "--guidance", 1)
    assert_says(caught, paths[0], "Steps: 2", "Steps: 3", "give another --out")


# --- refused input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], ["one prompt", "--prompts FILE"]),
        (["a", "--column", "x"], ["--column x is for --prompts FILE.csv"]),
        (["a", "--prompts", "x.txt"], ["one prompt", "--prompts FILE"]),
        (["a", "--steps", 0], ["--steps must be a number at least 1 and at most 1000, got 0"]),
        (["a", "--steps", 1001], ["--steps must be a number at least 1 and at most 1000, got 1001"]),
        (["a", "--guidance", -1], ["--guidance must be a number at least 0, got -1"]),
        (["a", "--height", 100], ["height must be a positive multiple of 8, got 100; try 96"]),
        (["a", "--width", 0], ["width must be a positive multiple of 8, got 0"]),
        (["a", "--eta", 0.5, "--sampler", "plms"], ["--eta is for the ddim sampler only", "plms"]),
        (["a", "--karras"], ["--karras is for the dpm++ sampler only", "ddim"]),
        (["a", "--seed", -1], ["--seed must be in [0, 2^63), got -1"]),
        (["a", "-n", 3, "--seed", 2**63 - 2], ["--seed must be at most 2^63 - 3 for 3 images", str(2**63 - 2)]),
        (["a\udcff"], ["not valid UTF-8"]),
        (["a", "--adapter", "none", "--adapter", "x"], ["--adapter none means no adapter"]),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(arguments, says, base, tmp_path):
    assert_says(refused(base, tmp_path / "out", *arguments), *says)
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["-n", 0], "argument -n: must be at least 1 and below 2^63, got 0"),
        (["--batch-size", 0], "argument --batch-size: must be at least 1 and below 2^63, got 0"),
        (["--seed", 2**64], f"argument --seed: must be a whole number of at most 64 bits, got {2**64}"),
        (["--guidance", "nan"], "argument --guidance: must be a finite number, got nan"),
        (["--steps", "ten"], "argument --steps: must be a whole number, got 'ten'"),
        (["--sampler", "euler"], "argument --sampler: invalid choice: 'euler'"),
        (["--n", 4], "unrecognized arguments: --n 4"),  # not short for --negative
        (["--guid", 4], "unrecognized arguments: --guid 4"),
    ],
)
def test_malformed_and_abbreviated_flags_are_refused_by_name(arguments, says, base, tmp_path, capsys):
    assert refused(base, tmp_path / "out", "a", *arguments, error=SystemExit).value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, suffix, says",
    [
        ("", "txt", "holds no prompt"),
        ("\n \n", "txt", "holds no prompt"),
        ("", "csv", "no column 'prompt or text'"),
        ("id,caption\n1,x\n", "csv", "its columns are id, caption"),
        ("prompt\n", "csv", "holds no prompt"),
    ],
)
def test_a_prompt_file_without_prompts_is_refused(content, suffix, says, base, tmp_path):
    path = tmp_path / f"prompts.{suffix}"
    path.write_text(content)
    assert_says(refused(base, tmp_path / "out", "--prompts", path), path, says)


def test_a_missing_or_binary_prompt_file_is_refused(base, tmp_path):
    assert_says(refused(base, tmp_path, "--prompts", tmp_path / "none.txt", error=FileNotFoundError), "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert_says(refused(base, tmp_path, "--prompts", tmp_path / "binary.txt"), "binary.txt", "not UTF-8")
    assert_says(refused(base, tmp_path, "--prompts", tmp_path, error=IsADirectoryError), "--prompts", "is a folder")


@pytest.mark.parametrize(
    "content, says",
    [
        ("id,prompt\n1,chest x-ray, age 58 male, view PA\n2,chest x-ray\n", "row 2: 4 fields where the header has 2"),
        ('id,prompt\n1,chest a\n2,"chest b\n3,chest c\n4,chest d\n', "row 3: not CSV"),
        ("id;prompt\n1;chest x-ray\n", "separated by semicolons, expected commas"),
    ],
)
def test_a_table_of_prompts_that_says_less_than_it_seems_is_refused(content, says, base, tmp_path):
    (tmp_path / "prompts.csv").write_text(content)
    assert_says(
        refused(base, tmp_path / "out", "--prompts", tmp_path / "prompts.csv"), "--prompts", "prompts.csv", says
    )


def test_a_prompt_with_odd_line_separators_is_one_prompt_and_json_lines_are_read(base, tmp_path):
    (tmp_path / "p.txt").write_text("chest x-ray\u2028age 47\x0cmale\x85end\n", encoding="utf-8")
    assert len(generate(base, tmp_path / "one", "--prompts", tmp_path / "p.txt", *QUICK)) == 1
    (tmp_path / "p.jsonl").write_text('{"prompt": "a, b"}\n{"prompt": "c"}\n')
    paths = generate(base, tmp_path / "two", "--prompts", tmp_path / "p.jsonl", *QUICK)
    assert [read_as_the_web_ui(Image.open(path).info["parameters"])[0] for path in paths] == ["a, b", "c"]


def test_an_unwritable_folder_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loading, "load", lambda *arguments, **options: pytest.fail("loaded first"))
    with pytest.raises(NotADirectoryError) as caught:
        sample_py.main(["a", "--out", str(tmp_path / "file")])
    assert_says(caught, tmp_path / "file", "give another --out")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_an_unknown_device_is_refused(device, base, tmp_path):
    with pytest.raises(InputError) as caught:
        sample_py.main(["a", "--base", str(base), "--out", str(tmp_path), "--device", device])
    assert_says(caught, repr(device), "--device cpu always can")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(base, tmp_path):
    with pytest.raises(InputError) as caught:
        sample_py.main(["a", "--base", str(base), "--out", str(tmp_path), "--device", "cuda"])
    assert_says(caught, "cuda", "cpu")


def run(*arguments):
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_ends_with_code_zero_and_an_image(base, tmp_path):
    done = run("chest x-ray", "--base", base, "--out", tmp_path, "--device", "cpu", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "00000-seed0.png").is_file()


def test_a_mistake_ends_with_code_two_and_one_line(tmp_path):
    done = run("chest x-ray", "--base", tmp_path / "none.safetensors", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such base model: ") and done.stderr.count("\n") == 1


def test_a_mistake_on_the_command_line_is_reported_before_torch_is_imported(tmp_path):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    code = f"import sys; sys.argv = {[str(ROOT / 'sample.py'), 'a', '--steps', '0', '--out', str(tmp_path)]}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout.strip() == "False"
    assert done.stderr == "error: --steps must be a number at least 1 and at most 1000, got 0\n"
