"""python -m minildm info: adapters of every tool, told from names and shapes."""

import json

import peers
import pytest
import torch
from safetensors.torch import save_file

from minildm.__main__ import main
from minildm.adapters import add_adapter, save_adapter
from minildm.adapters.formats import kohya_name
from minildm.adapters.reading import read_adapter
from minildm.errors import InputError
from minildm.tools.info import inspect


def write(path, state, dtype=torch.float32, metadata=None):
    tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in state.items()}
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata)
    return path


UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


V1, V2, SDXL = "Stable Diffusion v1.x", "Stable Diffusion v2.x", "SDXL"
TRANSFORMER = "a diffusion transformer (SD 3, Flux or the like)"


def pair(module, suffixes="lora_A.weight lora_B.weight", r=4, width=768, out=320):
    """Shapes of a layer's factors; the suffixes stand for A and B."""
    down, up = suffixes.split()
    join = "" if down.startswith(":") else "."
    return {f"{module}{join}{down}": (r, width), f"{module}{join}{up}": (out, r)}


def kohya(path, **sizes):
    return pair(path.replace(".", "_"), "lora_down.weight lora_up.weight", **sizes)


PEFT = "lora_A.default.weight lora_B.default.weight"
LINEAR = "lora_linear_layer.down.weight lora_linear_layer.up.weight"
DIALECTS = {
    "kohya": ("kohya", kohya(f"lora_unet_{UNET}") | kohya(f"lora_te_{TEXT}")),
    "diffusers": ("diffusers", pair(f"unet.{UNET}") | pair(f"text_encoder.{TEXT}")),
    "older diffusers": (
        "diffusers",
        pair(f"unet.{UNET}", "lora.down.weight lora.up.weight") | pair(f"text_encoder.{TEXT}", LINEAR),
    ),
    "PEFT": ("PEFT", pair(f"base_model.model.{UNET}", PEFT) | pair(f"base_model.model.{TEXT}")),
    "cloneofsimo": ("cloneofsimo", pair("unet:0", ":down :up") | pair("text_encoder:0", ":down :up")),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_dialect_is_told_with_its_networks_and_ranks(name, suffix, tmp_path, capsys):
    dialect, state = DIALECTS[name]
    path = write(tmp_path / f"adapter{suffix}", state, torch.float16)
    report = inspect(path)
    assert (report["kind"], report["dialect"], report["adapter_kind"]) == ("adapter", dialect, "LoRA")
    assert report["family"] == V1 and report["supported"] and not report["other_tensors"]
    for network in ("unet", "text_encoder"):
        size = report["networks"][network]
        assert (size["layers"], size["ranks"], size["parameters"]) == (1, {"4": 1}, 4 * (768 + 320))
        assert size["precision"] == {"float16": size["parameters"]}
    assert report["scale"] == {"1": 2} and "alpha = rank" in report["scale_from"]
    main(["info", str(path)])
    assert "unet: 1 layer, 4,352 parameters, float16, rank 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "family"),
    [
        (pair(f"unet.{UNET}", width=1024), V2),
        (pair(f"text_encoder.{TEXT}", width=1024), V2),
        (pair(f"unet.{UNET}", width=2048), SDXL),
        (kohya("lora_te2_text_model_a", width=1280), SDXL),
        (kohya("lora_unet_double_blocks_0_img_attn_proj"), TRANSFORMER),
        (pair("transformer.transformer_blocks.0.attn.to_q"), TRANSFORMER),
        (pair(f"unet.{UNET}", width=80), "a base whose context has 80 channels"),
        (pair("unet.conv_in", width=36), "a base that cannot be told"),
    ],
)
def test_the_family_of_bases_is_told_by_widths(state, family, tmp_path):
    report = inspect(write(tmp_path / "a.safetensors", state))
    assert report["family"] == family
    assert report["supported"] == (family not in (SDXL, TRANSFORMER))


def test_kohyas_alphas_mixed_ranks_convolutions_and_metadata_without_captions(tmp_path, capsys):
    linear, convolution = kohya_name(f"unet.{UNET}"), kohya_name("unet.down_blocks.0.resnets.0.conv1")
    state = kohya(linear)
    state |= {f"{convolution}.lora_down.weight": (16, 320, 3, 3), f"{convolution}.lora_up.weight": (320, 16, 1, 1)}
    tensors = {name: torch.zeros(shape) for name, shape in state.items()}
    tensors |= {f"{linear}.alpha": torch.tensor(2.0), f"{convolution}.alpha": torch.tensor(16.0)}
    metadata = {
        "ss_network_dim": "Dynamic",
        "ss_tag_frequency": '{"x": {"jane roe": 2}}',
        "ss_base_model_version": "sd_v1",
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    report = inspect(tmp_path / "a.safetensors")
    assert report["adapter_kind"] == "LoRA with convolutions"
    assert report["networks"]["unet"]["ranks"] == {"4": 1, "16": 1} and report["networks"]["unet"]["rank_mean"] == 10
    assert report["alpha"] == {"2": 1, "16": 1} and report["scale"] == {"0.5": 1, "1": 1}
    assert report["scale_from"] == "the alpha tensors" and "jane" not in json.dumps(report)
    main(["info", str(tmp_path / "a.safetensors")])
    said = capsys.readouterr().out
    assert "rank 4 to 16, mean 10.00" in said and "metadata ss_network_dim: Dynamic" in said
    assert "not shown, as they may hold captions: ss_tag_frequency" in said and "jane" not in said


def test_where_diffusers_and_peft_state_alpha(tmp_path):
    state = pair(f"unet.{UNET}")
    stated = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 4, "unet.target_modules": ["to_k"]})}
    report = inspect(write(tmp_path / "a.safetensors", state, metadata=stated))
    assert (report["scale_from"], report["scale"], report["alpha"]) == ("lora_adapter_metadata", {"2": 1}, {"8": 1})
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 4, "peft_type": "LORA"}')
    state = pair(f"base_model.model.{UNET}")
    write(tmp_path / "adapter_model.safetensors", state)
    for path in (tmp_path / "adapter_model.safetensors", tmp_path):  # PEFT's folder
        report = inspect(path)
        assert (report["scale_from"], report["scale"]) == ("adapter_config.json", {"1.5": 1})


@pytest.mark.parametrize(
    ("name", "kind"), [("hada_w1_b", "LoHa"), ("lokr_w1", "LoKr"), ("oft_blocks", "OFT"), ("dora_scale", "DoRA")]
)
def test_other_kinds_of_adapters_are_named_and_not_supported(name, kind, tmp_path):
    report = inspect(write(tmp_path / "a.safetensors", {f"lora_unet_a.{name}": (4, 320)}))
    assert kind in report["adapter_kind"] and not report["supported"] and kind in report["problem"]


def test_info_says_why_a_file_cannot_be_loaded_in_the_words_of_loading(tmp_path, capsys):
    state = pair(f"unet.{UNET}")
    for name, change, says in (
        ("half", {f"unet.{UNET.replace('to_k', 'to_v')}.lora_A.weight": (4, 768)}, "has no partner"),
        ("unknown", pair("unet.nonsense"), "belongs to no layer"),
        ("rank", {f"unet.{UNET}.lora_B.weight": (320, 3)}, "(320, 3)"),
        ("alpha", {f"unet.{UNET}.alpha": (3,)}, "must be one positive number"),
    ):
        path = write(tmp_path / name, state | change)
        with pytest.raises(InputError) as error:
            read_adapter(path)
        report = inspect(path)
        assert report["problem"] == str(error.value) and says in report["problem"] and not report["supported"]
        assert main(["info", str(path)]) == 0
        assert f"not usable with minildm: {report['problem']}" in capsys.readouterr().out


def test_our_own_file_and_a_run(tmp_path):
    model = peers.random_model(peers.single_file_config(), seed=1)
    add_adapter(model, "selora", rank=2, alpha=4.0)
    (tmp_path / "run").mkdir()
    save_adapter(model, tmp_path / "run" / "adapter.safetensors", settings={"lr": 0.1})
    report = inspect(tmp_path / "run")
    assert (report["dialect"], report["adapter_kind"], report["scale"]) == (
        "native",
        "selora",
        {"2": len(report["rank_of"])},
    )
    assert report["alpha"] == {"4": len(report["rank_of"])} and set(report["rank_of"].values()) == {2}
    assert report["metadata"]["minildm"]["settings"] == {"lr": 0.1} and "ranks" not in report["metadata"]["minildm"]
    assert report["family"] == "a base whose context has 64 channels"


def facts(report):
    return report["dialect"], report["family"], {name: size["layers"] for name, size in report["networks"].items()}


PROCESSORS = ("diffusers", V1, {"unet": 128})


def test_the_real_adapters(shared_data):
    files = [path for path in (shared_data / "lora").iterdir() if path.suffix in (".bin", ".safetensors")]
    found = {path.name: inspect(path) for path in files}
    simo = ("cloneofsimo", V1, {"text_encoder": 48, "unet": 144})
    assert {name: facts(report) for name, report in found.items()} == {
        "axe_attnprocs_rank4.bin": PROCESSORS,
        "axe_attnprocs_rank4.safetensors": PROCESSORS,
        "cloneofsimo_analog_svd_rank4.safetensors": simo,
        "cloneofsimo_lora_disney.safetensors": simo,
    }
    assert found["cloneofsimo_lora_disney.safetensors"]["other_tensors"] == ["<s1>", "<s2>"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diffusers_sd2_bf16_rank4", ("diffusers", V2, {"unet": 128})),
        ("diffusers_unet_prefix_old_processor", PROCESSORS),
        ("diffusers_unet_prefix_rank4", ("diffusers", V1, {"unet": 128})),
        ("kohya_like_double_unet_prefix", ("kohya", "a base that cannot be told", {"unet": 128})),
        ("kohya_sd15_names_constructed_rank4", ("kohya", V1, {"text_encoder": 72, "unet": 192})),
        ("peft_base_model_rank4", ("PEFT", V1, {"unet": 128})),
    ],
)
def test_the_key_lists_of_other_tools(name, expected, shared_data, tmp_path):
    tensors = json.loads((shared_data / "lora" / "key_dumps" / f"{name}.json").read_text())["tensors"]
    shapes = {key: value["shape"] if isinstance(value, dict) else value for key, value in tensors.items()}
    report = inspect(write(tmp_path / "a.safetensors", shapes, torch.bfloat16))
    assert facts(report) == expected and report["supported"] == (name != "kohya_like_double_unet_prefix")
