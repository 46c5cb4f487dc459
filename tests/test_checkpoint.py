"""Checkpoints in every layout: what loads, what is refused, and how much memory loading takes."""

import gc
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import peers
import pytest
import torch
from peers import PARITY, assert_says, relative_error, shared_model, single_file_config
from safetensors.torch import load_file, save_file

import minildm
from minildm import checkpoint
from minildm.checkpoint import TensorFile, build_networks, inspect, load_networks, save_folder, single_file
from minildm.checkpoint.config_json import (
    text_encoder_from_json,
    text_encoder_to_json,
    unet_from_json,
    unet_to_json,
    vae_from_json,
    vae_to_json,
)
from minildm.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError

VERSIONS = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


def load(path, dtype=torch.float32, prediction=None):
    return minildm.load(path, device="cpu", dtype=dtype, prediction=prediction)


def assert_same_weights(loaded, model, via=torch.float32):
    """Assert equal names and equal values, after those of ``model`` were rounded to ``via``, the file's precision."""
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(via).to(tensor.dtype)), name


# --- single files ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("extras", [True, False], ids=["with extras", "bare"])
@FLOATS
@VERSIONS
def test_a_single_file_loads(v2, dtype, extras, tmp_path):
    model = shared_model(v2)
    path = peers.write_single_file(model, tmp_path / "model.safetensors", dtype, extras)
    loaded = load(path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model, via=dtype)


def test_the_autoencoder_may_have_a_precision_of_its_own(tmp_path):
    """Its weights are then those of the file, not rounded to the others' precision first."""
    path = peers.write_folder(shared_model(), tmp_path / "model")
    loaded = minildm.load(path, device="cpu", dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert {loaded.dtype, next(loaded.text_encoder.parameters()).dtype} == {torch.bfloat16}
    whole = minildm.load(path, device="cpu").vae.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.vae.state_dict().items())


@FLOATS
def test_parameters_have_the_requested_dtype_are_frozen_and_channels_last(dtype, tmp_path):
    loaded = load(peers.write_single_file(shared_model(), tmp_path / "model.safetensors"), dtype)
    assert loaded.dtype == dtype and not loaded.training
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == dtype and not parameter.requires_grad, name
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
        else:
            assert parameter.is_contiguous(), name
    assert_same_weights(loaded, shared_model())


@VERSIONS
def test_a_ckpt_loads_with_or_without_a_state_dict_around_it(v2, tmp_path):
    model = shared_model(v2)
    assert_same_weights(load(peers.write_single_file(model, tmp_path / "a.ckpt")), model)
    torch.save(peers.single_file_state(model) | {"global_step": 470000}, tmp_path / "b.pt")
    assert_same_weights(load(tmp_path / "b.pt"), model)
    torch.save(
        {"state_dict": peers.single_file_state(model)}, tmp_path / "c.ckpt", _use_new_zipfile_serialization=False
    )  # the format of torch < 1.6
    assert_same_weights(load(tmp_path / "c.ckpt"), model)


def test_the_name_of_a_file_does_not_matter(tmp_path):
    model = shared_model()
    path = peers.write_single_file(model, tmp_path / "right.safetensors")
    for name in ("sd_xl_lora_vae.ckpt", "v2-1_768.pt", "no suffix at all", "model.fp16.bin"):
        misleading = path.rename(tmp_path / name)
        assert_same_weights(load(misleading), model)
        path = misleading


def test_a_text_encoder_without_its_prefix_loads(tmp_path):
    """transformers 5 saves `embeddings...` where every earlier release saved `text_model.embeddings...`."""
    model = shared_model()
    state = {name.replace(".text_model.", "."): tensor for name, tensor in peers.single_file_state(model).items()}
    assert not any("text_model" in name for name in state)
    save_file(state, tmp_path / "model.safetensors")
    assert_same_weights(load(tmp_path / "model.safetensors"), model)
    folder = peers.write_folder(model, tmp_path / "folder")
    rename_tensors(folder / "text_encoder" / "model.safetensors", lambda name: name.removeprefix("text_model."))
    assert_same_weights(load(folder), model)


def test_loaded_weights_do_not_depend_on_the_file_any_more(tmp_path):
    path = peers.write_single_file(shared_model(), tmp_path / "model.safetensors")
    loaded = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_weights(loaded, shared_model())


@pytest.mark.parametrize(
    "v2, prediction, size",
    [(False, None, 512), (False, "v", 512), (True, None, 512), (True, "epsilon", 512), (True, "v", 768)],
)
def test_a_single_file_predicts_epsilon_unless_the_user_requests_v(v2, prediction, size, tmp_path):
    """The v2 models that predict v were trained at 768 px."""
    path = peers.write_single_file(shared_model(v2), tmp_path / "model.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(path, prediction=prediction)
    guessed = v2 and prediction is None
    assert ["--prediction v" in str(warning.message) for warning in caught] == [True] * guessed
    assert loaded.schedule.prediction == loaded.config.schedule.prediction == (prediction or "epsilon")
    assert loaded.config.image_size == size


def test_a_moving_average_in_the_file_is_not_used(tmp_path):
    model = shared_model()
    state = peers.single_file_state(model)
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        state["model_ema." + name.removeprefix("model.").replace(".", "")] = torch.full_like(state[name], 7.0)
    save_file(state, tmp_path / "full.safetensors")
    assert_same_weights(load(tmp_path / "full.safetensors"), model)


def test_v2_files_without_the_unused_last_layer_load_with_all_their_layers(tmp_path):
    """Files that were converted from a folder hold only the layers that are used, and no text_projection."""
    model = shared_model(v2=True)
    path = peers.write_single_file(model, tmp_path / "model.safetensors", extras=False)
    loaded = load(path)
    assert loaded.config.text_encoder.n_layers == model.config.text_encoder.n_layers
    assert_same_weights(loaded, model)


SHAPES = {
    "one level": UNetConfig.tiny(widths=(64,), attention=(True,), n_heads=(8,), context_dim=64, latent_size=64),
    "attention only at the coarse level": UNetConfig.tiny(
        widths=(32, 64), attention=(False, True), n_heads=(8, 8), context_dim=64, latent_size=64
    ),
    "attention at every level": UNetConfig.tiny(
        widths=(32, 32, 64),
        attention=(True, True, True),
        n_heads=(8, 8, 8),
        layers_per_block=3,
        context_dim=64,
        latent_size=64,
    ),
    "four levels": UNetConfig.tiny(
        widths=(32, 64, 96, 96),
        attention=(True, True, True, False),
        n_heads=(8,) * 4,
        layers_per_block=2,
        context_dim=64,
        latent_size=64,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_read_off_the_shapes_of_tensors(name, tmp_path):
    config = replace(single_file_config(), unet=SHAPES[name])
    model = peers.random_model(config, seed=5)
    loaded = load(peers.write_single_file(model, tmp_path / "model.safetensors"))
    assert loaded.config == config
    assert_same_weights(loaded, model)


# --- the table of names against other implementations ----------------------------------------------------------------
def converted_by_diffusers(state, config):
    """A single file converted by diffusers: {network: state dict}."""
    from diffusers.loaders import single_file_utils as converters

    converted = {
        "unet": converters.convert_ldm_unet_checkpoint(dict(state), unet_to_json(config.unet)),
        "vae": converters.convert_ldm_vae_checkpoint(dict(state), vae_to_json(config.vae)),
    }
    if config.text_encoder.activation == "gelu":
        from transformers import CLIPTextConfig, CLIPTextModel

        document = text_encoder_to_json(config.text_encoder)
        with torch.device("meta"):
            peer = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in document.items() if k != "architectures"}))
        text = converters.convert_open_clip_checkpoint(peer, dict(state))
        unused = f".layers.{config.text_encoder.n_layers}."  # diffusers drops only layer 24, SD 2's own last one
        converted["text_encoder"] = {
            name: tensor for name, tensor in text.items() if unused not in name and "text_projection" not in name
        }
    else:
        text = converters.convert_ldm_clip_checkpoint(dict(state))
        converted["text_encoder"] = {name: tensor for name, tensor in text.items() if "position_ids" not in name}
    return converted


@VERSIONS
def test_diffusers_converts_our_single_file_to_our_tensors(v2):
    model = shared_model(v2)
    for network, theirs in converted_by_diffusers(peers.single_file_state(model), model.config).items():
        ours = getattr(model, network).state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name].reshape(tensor.shape)), name


def full_size_config(v2):
    unet, text = (peers.SD21_UNET, peers.SD21_TEXT) if v2 else (peers.SD15_UNET, peers.SD15_TEXT)
    return ModelConfig(
        unet_from_json(unet),
        vae_from_json(peers.SD15_VAE),
        text_encoder_from_json(text),
        ScheduleConfig(prediction="v" if v2 else "epsilon"),
        pad_token_id=0 if v2 else 49407,
    )


@VERSIONS
def test_diffusers_converts_full_size_names_to_ours(v2):
    config = full_size_config(v2)
    networks = build_networks(config)
    state = peers.single_file_state(minildm.LatentDiffusion(config, **networks), extras=False)
    for network, theirs in converted_by_diffusers(state, config).items():
        ours = {name: tensor.shape for name, tensor in networks[network].state_dict().items()}
        assert ours == {name: tensor.shape for name, tensor in theirs.items()}


def test_full_size_names_are_those_of_the_published_file():
    """Checks what diffusers' converter does not: it accepts an upsampler at position 1 or 2. In CompVis' own code
    (ldm/modules/diffusionmodules/openaimodel.py) an upsampler follows the resnet and the attention, if there is one."""
    config = full_size_config(v2=False)
    names = single_file.names(config, build_networks(config))
    unet = {theirs: ours for ours, (theirs, _) in names["unet"].items()}
    for position, level in (("2.1", 0), ("5.2", 1), ("8.2", 2)):
        assert unet[f"model.diffusion_model.output_blocks.{position}.conv.weight"] == (
            f"up_blocks.{level}.upsamplers.0.conv.weight"
        )
    # 686, 248 and 196: tensors of v1-5-pruned-emaonly.safetensors without its position_ids
    assert {network: len({theirs for theirs, _ in table.values()}) for network, table in names.items()} == {
        "unet": 686,
        "vae": 248,
        "text_encoder": 196,
    }


def test_a_text_encoder_made_by_open_clip_loads_and_gives_the_same_features(tmp_path):
    """Checks the names, the fused projections and the output of the layer before the last."""
    import open_clip

    torch.manual_seed(0)
    tower = open_clip.CLIP(
        embed_dim=24,
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
        vision_cfg={"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    ).eval()
    state = peers.single_file_state(shared_model(v2=True), extras=False)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("cond_stage_model.")}
    state |= {
        f"cond_stage_model.model.{name}": tensor
        for name, tensor in tower.state_dict().items()
        if not name.startswith("visual.")
    }
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.config.text_encoder == TextEncoderConfig(128, 3, 2, 512, "gelu")
    token_ids = loaded.tokenize(["a chest x-ray", ""])
    with torch.no_grad():  # Stability's FrozenOpenCLIPEmbedder with layer="penultimate"
        x = tower.token_embedding(token_ids) + tower.positional_embedding
        for block in list(tower.transformer.resblocks)[:-1]:
            x = block(x, attn_mask=tower.attn_mask)
        assert relative_error(loaded.text_encoder(token_ids), tower.ln_final(x)) <= PARITY


# --- folders ---------------------------------------------------------------------------------------------------------
def rename_tensors(path, rename):
    state = load_file(path)
    save_file({rename(name): tensor for name, tensor in state.items()}, path)


@FLOATS
@VERSIONS
def test_a_folder_loads(v2, dtype, tmp_path):
    model = peers.random_model(ModelConfig.tiny(v2=v2), seed=2)
    loaded = load(peers.write_folder(model, tmp_path / "model", dtype))
    assert loaded.config == model.config
    assert_same_weights(loaded, model, via=dtype)


@pytest.mark.parametrize("suffix", [".fp16.safetensors", ".bin", ".fp16.bin"])
def test_a_folder_loads_under_every_published_file_name(suffix, tmp_path):
    model = shared_model()
    folder = peers.write_folder(model, tmp_path / "model", torch.float16)
    for path in folder.glob("*/*.safetensors"):
        stem = "pytorch_model" if suffix.endswith("bin") and path.stem == "model" else path.stem
        if suffix.endswith("bin"):
            torch.save(load_file(path), path.with_name(stem + suffix))
            path.unlink()
        else:
            path.rename(path.with_name(stem + suffix))
    assert_same_weights(load(folder), model, via=torch.float16)


def test_a_folder_of_the_first_releases_loads(tmp_path):
    """Their VAE's attention has query, key, value and proj_attn, the text encoder has position_ids, the number of heads
    is one integer, and the VAE's config has no scaling factor."""
    model = shared_model()
    folder = peers.write_folder(model, tmp_path / "model")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for ours, theirs in old.items():
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid_block.attentions.0.{theirs}.")
        return name

    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    rename_tensors(vae, rename)
    assert sum("proj_attn" in name for name in load_file(vae)) == 4
    text = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(text) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, text)
    peers.edit_json(folder / "unet" / "config.json", attention_head_dim=8)
    document = json.loads((folder / "vae" / "config.json").read_text())
    del document["scaling_factor"]
    (folder / "vae" / "config.json").write_text(json.dumps(document))
    loaded = load(folder)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_a_folder_with_the_vae_attention_as_convolutions_loads(tmp_path):
    model = shared_model()
    folder = peers.write_folder(model, tmp_path / "model")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(
        {
            name: tensor[:, :, None, None].contiguous() if ".to_" in name and tensor.dim() == 2 else tensor
            for name, tensor in load_file(path).items()
        },
        path,
    )
    assert_same_weights(load(folder), model)


def test_a_folder_states_its_prediction_type_and_the_user_can_override_it(tmp_path):
    folder = peers.write_folder(shared_model(v2=True), tmp_path / "model")
    assert load(folder).schedule.prediction == "epsilon"
    peers.edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert load(folder).schedule.prediction == "v"
    assert load(folder, prediction="epsilon").schedule.prediction == "epsilon"


@pytest.mark.parametrize("v2, pad", [(False, 49407), (True, 0)], ids=["v1", "v2"])
def test_the_padding_token_is_known_with_and_without_a_tokenizer_folder(v2, pad, tmp_path):
    folder = peers.write_folder(shared_model(v2), tmp_path / "model")
    assert load(folder).tokenizer.pad_token_id == pad
    file = folder / "tokenizer" / "special_tokens_map.json"
    file.write_text(json.dumps({"pad_token": {"content": "!" if v2 else "<|endoftext|>", "lstrip": False}}))
    assert load(folder).tokenizer.pad_token_id == pad
    file.unlink()
    assert load(folder).tokenizer.pad_token_id == pad


def test_a_folder_may_hold_other_parts_and_keys(tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    for name in ("safety_checker", "feature_extractor"):
        (folder / name).mkdir()
    (folder / "model_index.json").write_text("{}")
    peers.edit_json(folder / "unet" / "config.json", _diffusers_version="0.6.0", sample_size=64, some_future_key=None)
    assert_same_weights(load(folder), shared_model())


# --- writing ---------------------------------------------------------------------------------------------------------
@FLOATS
@VERSIONS
def test_a_saved_folder_round_trips(v2, dtype, tmp_path):
    model = peers.random_model(ModelConfig.tiny(v2=v2), seed=4)
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    save_folder(networks, model.config, tmp_path / "saved", dtype)
    again = load_networks(inspect(tmp_path / "saved"), torch.device("cpu"), dtype)
    for name, network in networks.items():
        ours, theirs = network.state_dict(), again[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key].to(dtype), theirs[key]) for key in ours)
    assert inspect(tmp_path / "saved").config == model.config
    assert not [path for path in (tmp_path / "saved").rglob(".*")]  # nothing half-written is left


def test_saving_does_not_change_the_model(tmp_path):
    model = peers.random_model(ModelConfig.tiny(), seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peers.write_folder(model, tmp_path / "saved", torch.float16)
    after = model.state_dict()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)


@VERSIONS
def test_diffusers_and_transformers_read_a_saved_folder(v2, tmp_path):
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    model = peers.random_model(ModelConfig.tiny(v2=v2), seed=6)
    folder = peers.write_folder(model, tmp_path / "saved")
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        theirs, report = kind.from_pretrained(folder / name, output_loading_info=True, local_files_only=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        ours = {key.removeprefix("text_model."): tensor for key, tensor in getattr(model, name).state_dict().items()}
        theirs = {
            key.removeprefix("text_model."): tensor
            for key, tensor in theirs.state_dict().items()
            if not key.endswith("position_ids")
        }
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    scheduler = PNDMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    assert scheduler.config.prediction_type == ("v_prediction" if v2 else "epsilon")
    torch.testing.assert_close(scheduler.alphas_cumprod, model.schedule.alphas_cumprod, rtol=1e-5, atol=0)


@VERSIONS
def test_a_folder_that_diffusers_and_transformers_saved_loads(v2, tmp_path):
    model = peers.random_model(ModelConfig.tiny(v2=v2), seed=7)
    peers.diffusers_unet(model.unet).save_pretrained(tmp_path / "unet")
    peers.diffusers_vae(model.vae).save_pretrained(tmp_path / "vae")
    peers.transformers_text_encoder(model.text_encoder).save_pretrained(tmp_path / "text_encoder")
    peers.diffusers_scheduler("plms", "v" if v2 else "epsilon").save_pretrained(tmp_path / "scheduler")
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


# --- what is refused -------------------------------------------------------------------------------------------------
def refusal(path, error=InputError, **options):
    with pytest.raises(error) as caught:
        load(path, **options)
    return caught


def test_a_missing_base_is_named(tmp_path):
    assert_says(
        refusal(tmp_path / "nothing.safetensors", FileNotFoundError),
        tmp_path / "nothing.safetensors",
        ".safetensors file or a diffusers-layout folder",
    )


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty (0 bytes)"),
        (b"x", "neither a safetensors file nor a torch checkpoint"),
        (b"<!DOCTYPE html><html>404</html>", "neither a safetensors file nor a torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n", "neither a safetensors file"),
        (b"\x10\0\0\0\0\0\0\0{not json at all", "not a whole safetensors file"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "not a whole safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}", "something else"),
        (b"PK\x03\x04 but no archive", "cannot be read as a torch checkpoint"),
        (b"\x80\x02", "torch checkpoint"),
        (b"\x80\x02garbage", "cannot be read as a torch checkpoint"),
    ],
    ids=[
        "empty",
        "one byte",
        "web page",
        "git-lfs pointer",
        "broken header",
        "huge header",
        "no tensors",
        "broken zip",
        "cut pickle",
        "broken pickle",
    ],
)
def test_broken_files_are_refused_in_one_line(content, says, tmp_path):
    for name in ("broken.safetensors", "broken.ckpt"):
        (tmp_path / name).write_bytes(content)
        assert_says(refusal(tmp_path / name), tmp_path / name, says)


@pytest.mark.parametrize("kept", [0.0001, 0.5, 0.999])
def test_a_download_that_was_cut_short_is_refused(kept, tmp_path):
    for name, says in (("model.safetensors", "cut short"), ("model.ckpt", "cut short")):
        path = peers.write_single_file(shared_model(), tmp_path / name)
        data = path.read_bytes()
        path.write_bytes(data[: max(int(kept * len(data)), 10)])
        assert_says(refusal(path), path, says, "get it again")


def test_a_pickle_without_tensors_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.ckpt")
    assert_says(refusal(tmp_path / "list.ckpt"), "holds a list", "expected a dictionary of tensors")


def other_models():
    """{kind of model: (its tensors, part of the error)}; names as published."""
    t = torch.zeros(2, 2)
    sd = peers.single_file_state(shared_model())
    unet = {name: tensor for name, tensor in sd.items() if name.startswith("model.diffusion_model.")}
    vae = {name: tensor for name, tensor in sd.items() if name.startswith("first_stage_model.")}
    return {
        "SDXL": (
            {
                **unet,
                **vae,
                "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": t,
                "conditioner.embedders.1.model.ln_final.weight": t.clone(),
            },
            "SDXL",
        ),
        "LoRA of kohya": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": t}, "an adapter (LoRA)"),
        "LoRA of diffusers": ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": t}, "an adapter (LoRA)"),
        "LyCORIS": ({"lycoris_unet_mid_block_proj.hada_w1_a": t}, "an adapter (LoRA)"),
        "SD 3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight": t}, "a diffusion transformer"),
        "Flux": ({"double_blocks.0.img_attn.proj.weight": t}, "a diffusion transformer"),
        "VAE alone": ({name.removeprefix("first_stage_model."): tensor for name, tensor in vae.items()}, "a VAE alone"),
        "VAE alone, prefixed": (vae, "a VAE alone"),
        "VAE of a folder": (shared_model().vae.state_dict(), "a VAE alone"),
        "U-Net alone": (unet, "a U-Net without first_stage_model. and cond_stage_model."),
        "no text encoder": ({**unet, **vae}, "a U-Net without cond_stage_model."),
        "U-Net of a folder": (shared_model().unet.state_dict(), "the U-Net of a diffusers folder"),
        "text encoder of a folder": (shared_model().text_encoder.state_dict(), "a text encoder alone"),
        "textual inversion": ({"emb_params": t}, "a textual inversion"),
    }


@pytest.mark.parametrize("kind", other_models())
def test_other_models_are_recognised_and_refused(kind, tmp_path):
    state, says = other_models()[kind]
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    assert_says(refusal(path), path, says, "not a Stable Diffusion v1.x / v2.x model; ")


@pytest.mark.parametrize(
    "channels, kind",
    [(9, "an inpainting model"), (8, "an instruct-pix2pix model"), (5, "a depth-guided model"), (7, "an upscaler")],
)
def test_a_unet_with_other_inputs_is_refused_and_named(channels, kind, tmp_path):
    state = peers.single_file_state(shared_model())
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = torch.zeros(state[name].shape[0], channels, 3, 3)
    save_file(state, tmp_path / "model.safetensors")
    folder = peers.write_folder(shared_model(), tmp_path / "folder")
    peers.edit_json(folder / "unet" / "config.json", in_channels=channels)
    for path in (tmp_path / "model.safetensors", folder):
        assert_says(refusal(path), f"{channels} channels", kind, "expected 4", "text-to-image checkpoint")


def single_file_without(tmp_path, *names, v2=False, **more):
    state = peers.single_file_state(shared_model(v2), extras=False)
    for name in names:
        del state[name]
    path = tmp_path / "edited.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in (state | more).items()}, path)
    return path


@VERSIONS
def test_any_missing_tensor_is_named(v2, tmp_path, monkeypatch):
    path = peers.write_single_file(shared_model(v2), tmp_path / "model.safetensors")
    for gone in sorted(peers.single_file_state(shared_model(v2), extras=False))[::29]:

        class FileWithout(TensorFile):
            def __init__(self, path, gone=gone):
                super().__init__(path)
                del self.shapes[gone]

        monkeypatch.setattr(checkpoint.load, "TensorFile", FileWithout)
        assert_says(refusal(path), path, gone)


def test_every_missing_tensor_is_named_at_once(tmp_path):
    gone = [
        "model.diffusion_model.middle_block.1.norm.bias",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ]
    assert_says(refusal(single_file_without(tmp_path, *gone)), "3 missing", *gone)


def test_every_surplus_tensor_is_named(tmp_path):
    more = {
        "model.diffusion_model.extra.0.0.weight": torch.zeros(2),
        "first_stage_model.extra": torch.zeros(2),
        "cond_stage_model.transformer.vision_model.x": torch.zeros(2),
    }
    assert_says(refusal(single_file_without(tmp_path, **more)), "3 not used by the model", *more)
    more |= {"a.b": torch.zeros(2), "controlnet.y": torch.zeros(2)}
    error = refusal(single_file_without(tmp_path, **more))
    assert_says(error, "5 not used by the model: a.b, cond_stage_model.transformer.vision_model.x, controlnet.y, ...")
    assert ".extra" not in str(error.value)  # three are named


def test_missing_surplus_and_misshapen_tensors_are_named_together(tmp_path):
    gone, shape = "first_stage_model.post_quant_conv.bias", "model.diffusion_model.out.2.weight"
    path = single_file_without(tmp_path, gone, **{"model.surplus": torch.zeros(1), shape: torch.zeros(4, 32, 1, 1)})
    assert_says(
        refusal(path),
        f"1 missing: {gone}",
        "1 not used by the model: model.surplus",
        f"1 of another shape: {shape} (4, 32, 1, 1) (expected (4, 32, 3, 3))",
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.diffusion_model.time_embed.0.weight", (32, 128)),  # transposed
        ("cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight", (256, 128)),  # two thirds
        ("first_stage_model.decoder.mid.attn_1.q.weight", (64, 64, 3, 3)),
        ("cond_stage_model.model.positional_embedding", (80, 128)),
    ],
)
def test_a_tensor_of_another_shape_is_named(name, shape, tmp_path):
    path = single_file_without(tmp_path, v2=True, **{name: torch.zeros(shape)})
    assert_says(refusal(path), "1 of another shape", name)


def test_impossible_widths_are_refused_with_the_name_of_the_file(tmp_path):
    name = "first_stage_model.encoder.down.0.block.0.conv2.weight"
    path = single_file_without(tmp_path, **{name: torch.zeros(33, 32, 3, 3)})
    assert_says(refusal(path), path, "norm_groups = 32 does not divide the width 33")
    path = single_file_without(tmp_path, **{"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32)})
    assert_says(refusal(path), path, "model.diffusion_model.input_blocks.0.0.weight has the shape (32,)")


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_a_folder_is_loaded_just_as_strictly(network, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    path = next((folder / network).glob("*.safetensors"))
    state = load_file(path)
    gone, misshapen = sorted(state)[3], sorted(state)[5]
    del state[gone]
    state[misshapen] = torch.zeros(3, 5, 7)
    save_file(state | {"surplus.weight": torch.zeros(2)}, path)
    assert_says(
        refusal(folder),
        folder,
        "1 missing",
        gone,
        "1 not used by the model",
        "surplus.weight",
        f"{misshapen} (3, 5, 7) (expected ",
    )


@pytest.mark.parametrize("missing", ["unet", "vae", "text_encoder"])
def test_a_folder_without_a_network_says_which(missing, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    (folder / missing).rename(tmp_path / "elsewhere")
    assert_says(refusal(folder), folder, f"no {missing}/", "expected unet/, vae/, text_encoder/ and scheduler/")


@pytest.mark.parametrize(
    "missing", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
def test_a_folder_without_a_config_says_which(missing, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    (folder / missing).unlink()
    assert_says(refusal(folder, FileNotFoundError), folder / missing, "is missing")


def test_a_folder_without_weights_says_which_files_were_expected(tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert_says(refusal(folder, FileNotFoundError), folder / "vae", "diffusion_pytorch_model.safetensors", ".bin")


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(
    "content, says",
    [("", "not valid JSON"), ('{"a": ', "not valid JSON"), ("[1, 2]", "list")],
    ids=["empty", "cut", "no object"],
)
def test_a_broken_config_is_named(file, content, says, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    (folder / file).write_text(content)
    assert_says(refusal(folder), folder / file, says)


def test_a_binary_config_is_named(tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    (folder / "unet" / "config.json").write_bytes(b"\xff\xfe\x00{}")
    assert_says(refusal(folder), folder / "unet" / "config.json", "not valid JSON")


@pytest.mark.parametrize(
    "file, changes, says",
    [
        ("unet", {"act_fn": "mish"}, "act_fn is 'mish'"),
        ("unet", {"block_out_channels": None}, "block_out_channels is None, expected a list of whole numbers"),
        ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ("unet", {"attention_head_dim": 7}, "7 heads"),
        ("unet", {"attention_head_dim": 0}, "n_heads must be a whole number from 1"),
        ("unet", {"attention_head_dim": [8, 8]}, "lengths"),
        ("unet", {"cross_attention_dim": 1280}, "belong to different models"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),  # SDXL
        ("unet", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),  # SDXL
        ("unet", {"norm_num_groups": 5}, "norm_groups = 5 does not divide"),
        ("vae", {"block_out_channels": [32, 64]}, "4 levels"),
        ("vae", {"latent_channels": 16}, "belong to different models"),  # SD 3
        ("vae", {"shift_factor": 0.06}, "shift_factor"),
        ("text_encoder", {"hidden_act": "relu"}, "relu"),
        ("text_encoder", {"max_position_embeddings": 248}, "248 positions"),
        ("text_encoder", {"num_attention_heads": 7}, "7 heads"),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "zero terminal SNR needs v-prediction"),
    ],
)
def test_a_config_of_another_network_is_refused(file, changes, says, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    peers.edit_json(folder / file / name, **changes)
    assert_says(refusal(folder), folder, says)


@pytest.mark.parametrize("file", ["unet", "vae"])
def test_a_config_without_widths_is_refused(file, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    path = folder / file / "config.json"
    document = json.loads(path.read_text())
    del document["block_out_channels"]
    path.write_text(json.dumps(document))
    assert_says(refusal(folder), f"{file}/config.json", "block_out_channels")


def test_an_unknown_padding_token_is_refused(tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    (folder / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    assert_says(refusal(folder), "special_tokens_map.json", "'<pad>'", "'<|endoftext|>'", "'!'")


def test_an_unknown_prediction_type_is_refused_with_the_choices(tmp_path):
    path = peers.write_single_file(shared_model(), tmp_path / "model.safetensors")
    assert_says(refusal(path, prediction="x0"), "'epsilon' or 'v'", "'x0'")


def test_inspecting_a_file_gives_its_shapes_and_config(tmp_path):
    path = peers.write_single_file(shared_model(), tmp_path / "model.safetensors")
    assert TensorFile(path).shapes["betas"] == (1000,)
    assert inspect(path).config == shared_model().config


# --- memory ----------------------------------------------------------------------------------------------------------
MEASURE = """
import sys, torch
from minildm import checkpoint
def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
before = memory("VmRSS")
plan = checkpoint.inspect(sys.argv[1])
networks = checkpoint.load_networks(plan, torch.device("cpu"), getattr(torch, sys.argv[2]))
weights = sum(p.nbytes for network in networks.values() for p in network.parameters())
print((memory("VmHWM") - before) / weights)
"""


def peak_over_weights(path, dtype):
    """The growth of a new process's resident memory at its peak while loading, divided by the size of the weights."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), dtype], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.fixture(scope="module")
def half_gigabyte(tmp_path_factory):
    """A v1-shaped model of 107 M parameters, {file: path}."""
    config = ModelConfig(
        UNetConfig(widths=(192, 384, 512), attention=(True, True, False), n_heads=(8, 8, 8), context_dim=64),
        VAEConfig(widths=(64, 64, 128, 128)),
        TextEncoderConfig(width=64, n_layers=4, n_heads=1, mlp_width=256),
    )
    folder = tmp_path_factory.mktemp("half-gigabyte")
    model = peers.random_model(config)
    yield {
        "fp32": peers.write_single_file(model, folder / "fp32.safetensors"),
        "fp16": peers.write_single_file(model, folder / "fp16.safetensors", torch.float16),
        "ckpt": peers.write_single_file(model, folder / "fp32.ckpt"),
    }
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
@pytest.mark.parametrize(
    "file, wanted",
    [("fp32", "float32"), ("fp32", "bfloat16"), ("fp16", "float32"), ("fp16", "float16"), ("ckpt", "float32")],
)
def test_loading_takes_little_more_memory_than_the_weights(half_gigabyte, file, wanted):
    assert 0.9 < peak_over_weights(half_gigabyte[file], wanted) <= 1.15


# --- Stable Diffusion v1.5 at full size ------------------------------------------------------------------------------
def fill_cheaply(model, seed=0):
    """Fill 1.07 billion fp16 parameters within seconds: with slices of one pool of random numbers, scaled as usual."""
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).half()
    start = 0
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.numel(), dtype=torch.float16)
        for at in range(0, len(noise), len(pool)):
            part = noise[at : at + len(pool)]
            start = (start + 1_000_003) % len(pool)
            part.copy_(pool.roll(-start)[: len(part)])
        noise = noise.view(parameter.shape)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif parameter.dim() < 2 or "embedding.weight" in name:
            value = 0.03 * noise
        else:
            value = noise.div_(parameter[0].numel() ** 0.5)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A full-size SD v1.5 with random weights in fp16, as a single file and as a folder (2.1 GB each)."""
    folder = tmp_path_factory.mktemp("sd15")
    config = full_size_config(v2=False)
    model = fill_cheaply(minildm.LatentDiffusion(config, **build_networks(config)))
    paths = (
        peers.write_single_file(model, folder / "v1-5.safetensors", torch.float16),
        peers.write_folder(model, folder / "v1-5", torch.float16),
    )
    del model
    yield paths
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_full_size_sd15_loads_from_both_layouts_and_agrees_with_diffusers(sd15):
    single, folder = sd15
    model = load(single)  # float32: 4.3 GB
    assert model.config == full_size_config(v2=False)
    sizes = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in checkpoint.NETWORKS}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}

    other = load(folder, torch.float16)  # 2.1 GB
    assert other.config == model.config
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs.pop(name).float()), name
    assert not theirs
    del other, theirs, tensor
    gc.collect()

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        token_ids = model.tokenize(["chest x-ray, age 47 male, view PA", ""])
        context = model.text_encoder(token_ids)
        peer = peers.transformers_text_encoder(model.text_encoder, peers.SD15_TEXT)
        assert relative_error(context, peer(token_ids).last_hidden_state) <= PARITY

        latents = torch.randn(2, 4, 16, 16, generator=generator)
        peer = peers.diffusers_unet(model.unet, peers.SD15_UNET)
        timesteps = torch.tensor([981, 1])
        assert (
            relative_error(model.unet(latents, timesteps, context), peer(latents, timesteps, context).sample) <= PARITY
        )

        peer = peers.diffusers_vae(model.vae, peers.SD15_VAE)
        images = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
        assert relative_error(model.vae.encode(images).mean, peer.encode(images).latent_dist.mean) <= PARITY
        assert (
            relative_error(model.vae.decode(latents[:1, :, :8, :8]), peer.decode(latents[:1, :, :8, :8]).sample)
            <= PARITY
        )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
def test_loading_full_size_sd15_takes_little_more_memory_than_the_weights(sd15):
    assert 0.9 < peak_over_weights(sd15[0], "bfloat16") <= 1.15
