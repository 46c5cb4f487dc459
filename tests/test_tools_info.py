"""python -m minildm info: what a file holds, from its header alone."""

import dataclasses
import json

import peers
import pytest
import torch
from peers import assert_says, edit_json
from safetensors.torch import load_file, save_file

from minildm.__main__ import main
from minildm.checkpoint.folder import vae_to_json
from minildm.config import ModelConfig, VAEConfig
from minildm.errors import InputError
from minildm.tools.info import inspect, shown_metadata


# --- checkpoints -----------------------------------------------------------------------------------------------------
def test_a_published_sd15_file(tmp_path, capsys):
    ema = [("model_ema.decay", ()), ("model_ema.diffusion_modelout2bias", (4,))]
    path = peers.published(ModelConfig(), tmp_path / "v1-5.safetensors", "F32", extra=ema)
    report = inspect(path)
    assert report["architecture"] == "Stable Diffusion v1.x" and report["layout"] == "single file"
    assert {name: size["parameters"] for name, size in report["networks"].items()} == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
    }
    assert report["networks"]["unet"]["precision"] == {"float32": 859_520_964}
    assert (report["prediction"], report["image_size"], report["scaling_factor"]) == ("epsilon", 512, 0.18215)
    assert report["ema_tensors"] == 2 and report["supported"] and "assumed" in report["prediction_from"]
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    for words in (
        "checkpoint, Stable Diffusion v1.x, single file, 4,26",
        "859,520,964 parameters, float32",
        "2 tensors",
    ):
        assert words in said
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("metadata", "prediction", "source", "size"),
    [
        ({}, "epsilon", "assumed; the file does not say", 512),
        ({"modelspec.prediction_type": "v"}, "v", "modelspec.prediction_type", 768),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", "modelspec.prediction_type", 512),
    ],
)
def test_a_published_sd21_file_and_where_its_prediction_is_known_from(metadata, prediction, source, size, tmp_path):
    report = inspect(peers.published(peers.SD21, tmp_path / "v2-1.safetensors", metadata=metadata))
    assert report["architecture"] == "Stable Diffusion v2.x"
    assert report["networks"]["unet"] == {"parameters": 865_910_724, "precision": {"float16": 865_910_724}}
    assert report["networks"]["text_encoder"]["parameters"] == 340_387_840
    assert report["prediction"] == prediction and report["prediction_from"].startswith(source)
    assert report["image_size"] == size


def test_a_folder_and_a_run_of_full_fine_tuning(tmp_path):
    config = dataclasses.replace(ModelConfig.tiny(v2=True), vae=VAEConfig.tiny(scaling_factor=0.5))
    folder = peers.write_folder(peers.random_model(config), tmp_path / "run" / "model", torch.bfloat16)
    for path in (folder, tmp_path / "run"):
        report = inspect(path)
        assert report["architecture"] == "small model in the layout of Stable Diffusion v2.x"
        assert report["prediction"] == "v" and report["prediction_from"] == "scheduler/scheduler_config.json"
        assert report["scaling_factor"] == 0.5 and report["image_size"] == 64
        assert set(report["networks"]["vae"]["precision"]) == {"bfloat16"}
        assert report["bytes"] == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_mixed_precision_is_shown_in_shares(tmp_path, capsys):
    path = peers.write_single_file(peers.shared_model(), tmp_path / "a.safetensors")
    tensors = load_file(path)
    save_file({k: v.half() if ".input_blocks." in k else v for k, v in tensors.items()}, path)
    precision = inspect(path)["networks"]["unet"]["precision"]
    assert set(precision) == {"float16", "float32"}
    main(["info", str(path)])
    share = 100 * precision["float16"] / sum(precision.values())
    assert f"float16 {share:.2g} %" in capsys.readouterr().out


def test_a_ckpt_is_described_too(tmp_path):
    report = inspect(peers.write_single_file(peers.shared_model(), tmp_path / "a.ckpt", torch.float16))
    assert report["networks"]["unet"]["precision"].keys() == {"float16"} and report["metadata"] == {}


def test_a_checkpoint_with_missing_tensors_is_described_and_the_problem_named(tmp_path, capsys):
    path = peers.write_single_file(peers.shared_model(), tmp_path / "a.safetensors")
    tensors = load_file(path)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, path)
    report = inspect(path)
    assert not report["supported"] and "model.diffusion_model.out.2.bias" in report["problem"]
    main(["info", str(path)])
    assert "not usable with minildm: " in capsys.readouterr().out


FOREIGN = {
    "SDXL": {
        "conditioner.embedders.1.model.ln_final.weight": (8,),
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    },
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (8, 8)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "9 input channels": {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,),
    },
}


@pytest.mark.parametrize("architecture", FOREIGN)
def test_another_model_is_named_and_not_supported(architecture, tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in FOREIGN[architecture].items()}, path)
    report = inspect(path)
    assert architecture in report["architecture"] and not report["supported"]
    assert main(["info", str(path)]) == 0
    assert "not usable with minildm" in capsys.readouterr().out


def test_a_folder_of_another_pipeline_is_named(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert inspect(tmp_path)["architecture"] == "StableDiffusionXLPipeline"


# --- autoencoders ----------------------------------------------------------------------------------------------------
def test_an_autoencoder_file_and_folder(tmp_path, capsys):
    vae = peers.random_network(VAEConfig.tiny(), seed=1)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae_to_json(VAEConfig.tiny()) | {"scaling_factor": 0.7}))
    save_file(vae.state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    report = inspect(tmp_path / "vae")
    assert report["kind"] == "autoencoder" and report["scaling_factor"] == 0.7
    assert report["scaling_factor_from"] == "config.json"
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    report = inspect(tmp_path / "vae.safetensors")
    assert report["networks"]["vae"]["parameters"] == sum(p.numel() for p in vae.parameters())
    assert report["scaling_factor"] == 0.18215 and "assumed" in report["scaling_factor_from"]
    main(["info", str(tmp_path / "vae.safetensors")])
    assert "autoencoder, Stable Diffusion's autoencoder, of other sizes" in capsys.readouterr().out


# --- metadata --------------------------------------------------------------------------------------------------------
def test_values_that_may_hold_captions_are_withheld():
    metadata = {
        "ss_network_dim": "4",
        "ss_learning_rate": "0.0001",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "ss_tag_frequency": '{"patient": {"john doe": 3}}',
        "ss_dataset_dirs": '{"10_john doe": {}}',
        "ss_datasets": "john doe",
        "ss_training_comment": "john doe",
        "modelspec.description": "john doe",
        "modelspec.trigger_phrase": "john doe",
        "modelspec.tags": "john doe",
        "unknown": "john doe",
    }
    shown = shown_metadata(metadata)
    assert "john" not in json.dumps(shown)
    assert shown.pop("withheld") == sorted(key for key, value in metadata.items() if "john" in value)
    assert shown == {key: value for key, value in metadata.items() if "john" not in value}


def test_long_values_are_cut_and_no_key_that_kohya_uses_for_text_is_shown():
    assert len(shown_metadata({"ss_network_args": "x" * 9999})["ss_network_args"]) < 200
    for key in (
        "ss_bucket_info",
        "ss_output_name",
        "ss_reg_dataset_dirs",
        "ss_caption_extension",
        "modelspec.thumbnail",
    ):
        assert shown_metadata({key: "text"}) == {"withheld": [key]}


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ("empty",)),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), ("neither a safetensors file nor a torch checkpoint",)),
        (b"a letter", ("neither",)),
        (bytes(7) + b"\x01{", ("not a whole safetensors file",)),
    ],
)
def test_a_file_of_another_kind_is_one_line(content, says, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(InputError) as error:
        main(["info", str(tmp_path / "file.safetensors")])
    assert_says(error, tmp_path, *says)


def test_unknown_tensors_missing_paths_and_empty_folders_are_one_line(tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError) as error:
        main(["info", str(tmp_path / "resnet.safetensors")])
    assert_says(error, "something else", "fc.weight")
    with pytest.raises(FileNotFoundError) as error:
        main(["info", str(tmp_path / "none")])
    assert_says(error, "no such file or folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        main(["info", str(tmp_path / "empty")])
    assert_says(error, tmp_path / "empty", "unet/")
    peers.write_folder(peers.shared_model(), tmp_path / "base")
    edit_json(tmp_path / "base" / "unet" / "config.json", in_channels=9, out_channels=4)
    with pytest.raises(InputError) as error:
        main(["info", str(tmp_path / "base")])
    assert_says(error, "an inpainting model")
