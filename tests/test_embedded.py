"""The embedded model: its files match its card, it loads, and its images show what their prompts ask for."""

import json
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_sample_command import sample_py

import minildm
from minildm.data.reading import to_tensor
from minildm.errors import InputError
from minildm.images import read_parameters
from minildm.latent_diffusion import usual_guidance
from minildm.loading import EMBEDDED, EMBEDDED_ADAPTER, find_base, is_embedded
from minildm.metrics.adherence import prompt_adherence
from minildm.teaching import phantom, procedural, ruler, shape_check, shapes
from minildm.training.command_line import parse
from minildm.training.config import PRESETS


@pytest.fixture(scope="module")
def model():
    return minildm.load(EMBEDDED, device="cpu")


def test_the_files_are_small_and_match_the_hashes_on_the_card():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\S+\.safetensors)` \| [\d,]+ \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    hashes = {
        path.relative_to(EMBEDDED).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.suffix == ".safetensors"
    }
    assert listed == hashes and len(hashes) == 4  # three networks and the adapter


def test_it_is_the_base_if_there_is_no_other(tmp_path):
    (tmp_path / "tiny").symlink_to(EMBEDDED)
    assert find_base(tmp_path) == tmp_path / "tiny" and is_embedded(tmp_path / "tiny")
    assert is_embedded(EMBEDDED) and not is_embedded(tmp_path)
    assert is_embedded(Path(minildm.__file__).parent / ".." / "weights" / "tiny")


def test_the_adapter_is_selora_on_this_base_with_uneven_ranks(model):
    with safe_open(EMBEDDED_ADAPTER, "pt") as file:
        about = json.loads(file.metadata()["minildm"])
    assert about["kind"] == "selora" and about["base"] == model.base_hash
    assert len(set(about["ranks"].values())) > 2


def test_the_base_without_adapter_generates_two_shapes_as_the_prompt_asks(model):
    """bench_embedded.py finds 95 % of 200 images right at 50 steps; with 16 images two colour or order errors pass."""
    prompts = [shapes.shape_prompt((7, i)) for i in range(16)]
    images = model.sample(prompts, steps=20, sampler="dpm++", guidance=usual_guidance(model.config))
    checks = [shape_check.check_shapes(np.asarray(image), prompt) for image, prompt in zip(images, prompts)]
    assert sum(check.colour and check.order for check in checks) >= 14
    assert sum(check.right for check in checks) >= 10


@torch.no_grad()
def test_the_autoencoder_reconstructs_held_out_images(model):
    seeds = [(7, i) for i in range(16)]
    phantoms = phantom.render_batch([phantom.labels(seed) for seed in seeds], seeds, 128)
    for uint8_images, least in ((procedural.render_batch(seeds, 128)[0], 28), (np.stack([phantoms] * 3, -1), 26)):
        images = to_tensor(uint8_images)
        reconstructions = model.vae.decode(model.vae.encode(images).mean).clamp(-1, 1)
        psnr = 10 * torch.log10(4 / (reconstructions - images).square().mean((1, 2, 3)))  # dB; images span 2
        assert psnr.mean() >= least


@pytest.mark.slow
def test_with_its_adapter_view_and_sex_follow_the_prompt(tmp_path):
    model = minildm.load(EMBEDDED, [str(EMBEDDED_ADAPTER)], device="cpu")
    wanted = [{"view": view, "sex": sex} for view in ("PA", "AP") for sex in ("male", "female") for _ in range(4)]
    prompts = [
        f"chest x-ray, age 60 {fields['sex']}, view {fields['view']}, projection {fields['view']}, "
        f"modality {'DX' if fields['view'] == 'PA' else 'CR'}, diagnosis normal"
        for fields in wanted
    ]
    paths = [tmp_path / f"{i}.png" for i in range(len(prompts))]
    images = model.sample(prompts, steps=20, sampler="dpm++", guidance=usual_guidance(model.config))
    for image, path in zip(images, paths):
        image.save(path)
    agreement = prompt_adherence(paths, wanted, ruler.measure, ruler.obeys)
    assert agreement["view"].share >= 0.7 and agreement["sex"].share >= 0.7


# --- the commands ----------------------------------------------------------------------------------------------------
def first_line(capsys, out, *arguments):
    """Run sample.py. Returns: the first line it prints, and the settings stored in its last image."""
    settings = ["--base", str(EMBEDDED), "--steps", "2", "--device", "cpu", "--out", str(out)]
    assert sample_py.main(["chest x-ray, age 47 male", *settings, *arguments]) == 0
    path = max(out.glob("*.png"))
    return capsys.readouterr().out.splitlines()[0], read_parameters(path)


def test_sample_uses_the_adapter_beside_the_base_and_says_so(capsys, tmp_path):
    line, parameters = first_line(capsys, tmp_path)
    assert "adapter for chest radiographs" in line and "--adapter none" in line
    assert "Adapter: tiny/adapter.safetensors" in parameters


def test_sample_uses_the_base_alone_with_adapter_none(capsys, tmp_path):
    line, parameters = first_line(capsys, tmp_path, "--adapter", "none")
    assert "adapter" not in line and "Adapter" not in parameters


def test_the_embedded_base_has_its_own_settings_which_flags_override(tmp_path):
    plan = parse(["--base", str(EMBEDDED), "--lr", "0.5"])
    assert plan.config.lr == 0.5 and plan.config.steps == PRESETS["tiny"]["reading"]["steps"] and plan.preset == "tiny"
    assert parse(["--base", str(tmp_path)]).config.lr == 1e-4
    assert parse(["--base", str(EMBEDDED), "--preset", "selora-iu"]).config.steps is None
    assert parse(["--base", str(EMBEDDED), "--epochs", "100"]).config.steps is None  # no limit on the epochs


def test_adapter_none_beside_another_adapter_is_an_error(tmp_path):
    with pytest.raises(InputError, match="--adapter none means no adapter"):
        sample_py.main(["x", "--base", str(EMBEDDED), "--adapter", "none", "--adapter", "a", "--out", str(tmp_path)])
