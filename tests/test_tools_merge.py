"""python -m minildm merge: base + delta, in every layout and precision, and nothing else changed."""

import json

import peers
import pytest
import torch
from peers import assert_says, edit_json, noise, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minildm
from minildm.__main__ import main
from minildm.adapters import adapter_layers, add_adapter, save_adapter
from minildm.checkpoint import TensorFile
from minildm.config import VAEConfig
from minildm.errors import InputError
from minildm.tools.merge import merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:an SD v2 single file"),
    pytest.mark.filterwarnings("ignore:.*states nei"),
]


def model_of(v2=False):
    return peers.random_model(peers.single_file_config(v2), seed=3 if v2 else 1)


def write_adapter(path, v2=False, seed=0, kind="lora", rank=3, alpha=6.0, size=0.1):
    """A trained adapter's file. Returns: {module path: delta, float32}."""
    model = model_of(v2)
    add_adapter(model, kind, rank=rank, alpha=alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, layer in adapter_layers(model).items():
        layer.lora_B.data = size * torch.randn(layer.lora_B.shape, generator=generator)
        deltas[name] = layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
    save_adapter(model, path)
    return deltas


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Bases of both versions in both layouts, and an adapter for each."""
    root = tmp_path_factory.mktemp("merge")
    deltas = {}
    for v2, name in ((False, "v1"), (True, "v2")):
        peers.write_single_file(model_of(v2), root / f"{name}.safetensors")
        peers.write_folder(model_of(v2), root / name)
        deltas[name] = write_adapter(root / f"adapter-{name}.safetensors", v2)
    return root, deltas


def state(path, **options):
    return minildm.load(path, device="cpu", **options).state_dict()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("source", ["{}.safetensors", "{}"])
@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_the_difference_of_the_checkpoints_is_the_delta(version, source, target, place, tmp_path):
    root, deltas = place
    base = root / source.format(version)
    merge(base, [f"{root / f'adapter-{version}.safetensors'}:0.5"], tmp_path / target)
    before, after = state(base), state(tmp_path / target)
    for name, tensor in before.items():
        delta = deltas[version].get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if delta is None:
            assert torch.equal(after[name], tensor), name
        else:  # the difference of float32 weights is known to half a unit in their last place
            error = (after[name].double() - tensor.double() - 0.5 * delta.double()).abs().max()
            assert error <= 1e-5 * 0.5 * delta.abs().max(), name
    assert len(deltas[version]) == sum(not torch.equal(after[name], before[name]) for name in before)


def test_several_adapters_ranks_and_multipliers_give_what_loading_gives(place, tmp_path):
    root, _ = place
    write_adapter(tmp_path / "nested.safetensors", kind="dylora", rank=4, seed=5)
    write_adapter(tmp_path / "run.safetensors", seed=6)
    (tmp_path / "run").mkdir()
    (tmp_path / "run.safetensors").rename(tmp_path / "run" / "adapter.safetensors")
    adapters = [f"{root}/adapter-v1.safetensors:-0.3", f"{tmp_path}/nested.safetensors@2:0.7", f"{tmp_path}/run"]
    merge(root / "v1", adapters, tmp_path / "out.safetensors")
    expected = state(root / "v1", adapters=adapters)
    for name, tensor in state(tmp_path / "out.safetensors").items():
        assert relative_error(tensor, expected[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_each_weight_is_rounded_once(dtype, place, tmp_path):
    """Two adapters into a half-precision base: rounding after each would give other bits."""
    root, deltas = place
    other = write_adapter(tmp_path / "other.safetensors", seed=8, size=1e-3)
    peers.write_folder(model_of(), tmp_path / "base", torch.float16)
    adapters = [root / "adapter-v1.safetensors", tmp_path / "other.safetensors"]
    merge(tmp_path / "base", map(str, adapters), tmp_path / "out", dtype)
    stored = load_file(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    merged = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in merged.items():
        module = f"unet.{name.removesuffix('.weight')}"
        expected = stored[name].double()
        if module in other and name.endswith(".weight"):
            expected = expected + deltas["v1"][module].double() + other[module].double()
        step = torch.finfo(dtype).eps * expected.abs()  # at least a unit in the last place
        assert tensor.dtype == dtype
        assert ((tensor.double() - expected).abs() <= 0.502 * step + 1e-6 * expected.abs().max() + 1e-7).all(), name


def test_without_a_dtype_every_tensor_keeps_its_own(place, tmp_path):
    root, _ = place
    tensors = load_file(root / "v1.safetensors")
    half = {
        k: v.half() if k.startswith("model.") else v.bfloat16() if k.startswith("first") else v
        for k, v in tensors.items()
    }
    save_file(half, tmp_path / "mixed.safetensors")
    merge(tmp_path / "mixed.safetensors", [f"{root}/adapter-v1.safetensors"], tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() <= half.keys() and {k: v.dtype for k, v in merged.items()} == {
        k: half[k].dtype for k in merged
    }
    assert all(torch.equal(merged[k], half[k]) for k in merged if k.startswith("first_stage_model."))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_merged_folder_is_a_whole_pipeline_for_diffusers(version, place, tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    root, _ = place
    prediction = "v" if version == "v2" else None
    adapter = f"{root}/adapter-{version}.safetensors:0.2"
    merge(root / f"{version}.safetensors", [adapter], tmp_path / "out", prediction=prediction)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents, options = noise(1, 4, 8, 8), {"height": 64, "width": 64}
    theirs = pipe(
        "chest x-ray", latents=latents, num_inference_steps=3, guidance_scale=3, output_type="latent", **options
    ).images
    model = minildm.load(root / f"{version}.safetensors", [adapter], "cpu", prediction=prediction)
    ours = model.sample(["chest x-ray"], steps=3, guidance=3, latents=latents, output="latent", **options)
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_the_prediction_type_survives(target, place, tmp_path):
    root, _ = place
    base = root / "v2.safetensors"
    merge(base, [f"{root}/adapter-v2.safetensors"], tmp_path / target, prediction="v")
    assert minildm.load(tmp_path / target, device="cpu").config.schedule.prediction == "v"
    edited = tmp_path / "edited"
    peers.write_folder(model_of(True), edited)
    edit_json(
        edited / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", _class_name="DDIMScheduler"
    )
    merge(edited, [f"{root}/adapter-v2.safetensors"], tmp_path / "again")
    scheduler = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["_class_name"] == "DDIMScheduler"


def test_a_prediction_that_was_only_assumed_is_not_stated(place, tmp_path):
    root, _ = place
    merge(root / "v2.safetensors", [f"{root}/adapter-v2.safetensors"], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "modelspec.title" in file.metadata() and "modelspec.prediction_type" not in file.metadata()
    with pytest.warns(UserWarning, match="does not say what the U-Net predicts"):
        minildm.load(tmp_path / "out.safetensors", device="cpu")


def test_a_single_files_metadata_follows_the_modelspec(place, tmp_path):
    root, _ = place
    merge(root / "v1.safetensors", [f"{root}/adapter-v1.safetensors:0.5"], tmp_path / "mine.safetensors")
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata.pop("minildm"))
    model = minildm.load(root / "v1.safetensors", [f"{root}/adapter-v1.safetensors:0.5"], "cpu")
    assert about == {"base": model.base_hash, "vae": None, "merged": model.merged}
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "mine",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
    }


def test_another_autoencoder_can_be_put_in(place, tmp_path):
    root, _ = place
    vae = peers.random_network(VAEConfig.tiny(layers_per_block=2), seed=9)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    merge(root / "v1", [f"{root}/adapter-v1.safetensors"], tmp_path / "out", vae=tmp_path / "vae.safetensors")
    merged = minildm.load(tmp_path / "out", device="cpu")
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in merged.vae.state_dict().items())


# --- the command -----------------------------------------------------------------------------------------------------
def test_the_command_says_what_it_wrote_and_what_to_type_next(place, tmp_path, capsys):
    root, _ = place
    adapter = f"{root}/adapter-v1.safetensors"
    assert main(["merge", adapter, "--base", str(root / "v1"), "--out", str(tmp_path / "new" / "out.safetensors")]) == 0
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'new' / 'out.safetensors'}" in said and "next: python sample.py" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{v1}.safetensors", "--out", "{tmp}/o"], ("adapter",)),  # a checkpoint in place of an adapter
        (["{v1}-none", "--out", "{tmp}/o"], ("no such adapter",)),
        (["{a}:nan", "--out", "{tmp}/o"], ("multiplier",)),
        (["{a}@2", "--out", "{tmp}/o"], ("one rank only", "@2")),
        (["{a2}", "--out", "{tmp}/o"], ("adapter-v2", "another base")),
        (["{a}", "--base", "{a}", "--out", "{tmp}/o"], ("an adapter (LoRA)",)),
        (["{a}", "--base", "{tmp}/none", "--out", "{tmp}/o"], ("no such base model",)),
        (["{a}", "--out", "{tmp}/o.ckpt"], ("--out", "safetensors", "suffix")),
        (["{a}", "--out", "{tmp}"], ("--out", "a folder already")),
        (["{a}", "--out", "{a}"], ("--out", "a file already")),
        (["{a}", "--out", "{tmp}/folder.safetensors"], ("--out", "a folder already")),
        (["{a}", "--out", "{a}/below"], ("is a file", "expected a folder")),
        (["{big}", "--out", "{tmp}/o", "--dtype", "float16"], ("float16 cannot hold", "--dtype")),
        (["{a}", "--vae", "{a}", "--out", "{tmp}/o"], ("not an autoencoder",)),
    ],
)
def test_a_wrong_input_gives_one_line_and_no_output(arguments, says, place, tmp_path):
    root, _ = place
    (tmp_path / "folder.safetensors").mkdir()
    write_adapter(tmp_path / "big.safetensors", size=1e6)
    names = {"tmp": tmp_path, "v1": root / "v1", "a": root / "adapter-v1.safetensors"}
    names |= {"a2": root / "adapter-v2.safetensors", "big": tmp_path / "big.safetensors"}
    command = [argument.format(**names) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((InputError, FileNotFoundError, NotADirectoryError)) as error:
        main(["merge", *command, *([] if "--base" in command else ["--base", str(root / "v1")])])
    assert_says(error, *says)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(place, tmp_path, monkeypatch):
    root, _ = place
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    for out in ("out", "out.safetensors"):
        with pytest.raises(InputError) as error:
            main(["merge", f"{root}/adapter-v1.safetensors", "--base", str(root / "v1"), "--out", str(tmp_path / out)])
        assert_says(error, "its disk has 0.00 GB free", "make room")
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_interruption_leaves_nothing(out, place, tmp_path, monkeypatch):
    root, _ = place
    reader, reads = TensorFile.reader, []

    def interrupted(file):
        read = reader(file)

        def counted(name):
            reads.append(name)
            if len(reads) == 200:
                raise KeyboardInterrupt
            return read(name)

        return counted

    monkeypatch.setattr(TensorFile, "reader", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(root / "v1.safetensors", [f"{root}/adapter-v1.safetensors"], tmp_path / out)
    assert not any(tmp_path.iterdir())


def test_a_ckpt_base_gives_the_same_as_the_safetensors_file(place, tmp_path):
    root, _ = place
    peers.write_single_file(model_of(), tmp_path / "base.ckpt")
    for base in (tmp_path / "base.ckpt", root / "v1.safetensors"):
        merge(base, [f"{root}/adapter-v1.safetensors"], tmp_path / f"{base.suffix[1:]}.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("ckpt", "safetensors"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_base_with_missing_tensors_is_refused(place, tmp_path):
    root, _ = place
    tensors = load_file(root / "v1.safetensors")
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(InputError) as error:
        merge(tmp_path / "cut.safetensors", [f"{root}/adapter-v1.safetensors"], tmp_path / "out")
    assert_says(error, "cut.safetensors", "1 missing", "model.diffusion_model.out.2.bias")
