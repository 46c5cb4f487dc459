"""Adapter files of every tool: names, reading, writing."""

import contextlib
import copy
import functools
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch
from made_runs import short_run
from peers import assert_says, noise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minildm import kernels
from minildm.__main__ import main
from minildm.adapters import adapter_layers, add_adapter, merge_adapter, merge_file, save_adapter
from minildm.adapters.formats import kohya_name, read_name
from minildm.adapters.reading import Factors, read_adapter
from minildm.adapters.writing import FORMATS, write_adapter
from minildm.checkpoint import build_networks, single_file
from minildm.config import ModelConfig, UNetConfig
from minildm.errors import InputError
from minildm.latent_diffusion import LatentDiffusion
from minildm.training.command_line import parse

BLOCK = "down_blocks.0.attentions.0"
TO_Q, TO_OUT = (f"{BLOCK}.transformer_blocks.0.attn1.{layer}" for layer in ("to_q", "to_out.0"))
TO_K = TO_Q.replace("attn1.to_q", "attn2.to_k")
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
WIDTH, TEXT = 32, 64


def full_blocks():
    """A small model with the blocks of SD v1.x, so that every published name exists."""
    config = peers.single_file_config()
    unet = UNetConfig.tiny(
        widths=(WIDTH,) * 4,
        attention=(True, True, True, False),
        n_heads=(8,) * 4,
        layers_per_block=2,
        context_dim=TEXT,
        latent_size=16,
    )
    return replace(config, unet=unet, text_encoder=replace(config.text_encoder, n_layers=2))


def few_blocks():
    """Every kind of layer once or twice."""
    config = full_blocks()
    levels = {"widths": (WIDTH,) * 2, "attention": (True, False), "n_heads": (8, 8), "layers_per_block": 1}
    return replace(config, unet=replace(config.unet, **levels))


@pytest.fixture(scope="module")
def model():
    return peers.random_model(full_blocks(), seed=5)


@functools.cache
def published(v2=False):
    """SD v1.5 or v2.1 without memory; a test that merges into it restores it."""
    unet = UNetConfig(context_dim=1024, linear_projection=True, n_heads=(5, 10, 20, 20)) if v2 else UNetConfig()
    text = replace(ModelConfig().text_encoder, width=1024, n_layers=23, n_heads=16, mlp_width=4096)
    config = replace(ModelConfig(), unet=unet, text_encoder=text) if v2 else ModelConfig()
    with torch.device("meta"):
        networks = build_networks(config)
    return LatentDiffusion(config, **networks)


def layers_of(model, kinds=(torch.nn.Linear, torch.nn.Conv2d)):
    """{module path: layer} of all that an adapter can change."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, kinds) and path.startswith(("unet.", "text_encoder."))
    }


def few_layers(model, kinds=(torch.nn.Linear, torch.nn.Conv2d)):
    """`layers_of` with every kind of layer at least once."""
    some = re.compile(r"down_blocks\.[03]|mid_block|up_blocks\.1|layers\.1|time_embedding|unet\.conv")
    return {path: layer for path, layer in layers_of(model, kinds).items() if some.search(path)}


def random_factors(model, ranks, layers=None, seed=0):
    """{module path: (A, B)}, ranks taken by turns."""
    ranks, factors = itertools.cycle(ranks), {}
    for i, (path, layer) in enumerate((layers or layers_of(model)).items()):
        out, inputs, *kernel = layer.weight.shape
        rank = next(ranks)
        A = noise(rank, inputs, *kernel, seed=seed + 2 * i) / math.sqrt(inputs * max(math.prod(kernel), 1))
        B = 0.1 * noise(out, rank, *[1 for _ in kernel], seed=seed + 2 * i + 1)
        factors[path] = (A, B)
    return factors


def delta(A, B, scale=1.0):
    return scale * (B.double().flatten(1) @ A.double().flatten(1))


@contextlib.contextmanager
def restored(model):
    """Give a model its weights back after the block (merging replaces weights, it changes none in place)."""
    weights = {layer: layer.weight.data for layer in layers_of(model).values()}
    try:
        yield model
    finally:
        model.merged.clear()
        for layer, weight in weights.items():
            layer.weight.data = weight


def changed(model, path, **options):
    """{module path: what merging the file adds to the weights}."""
    layers = layers_of(model)
    before = {name: layer.weight.data for name, layer in layers.items()}
    with restored(model):
        merge_file(model, path, **options)
        return {
            name: (layer.weight.double() - before[name].double()).flatten(1)
            for name, layer in layers.items()
            if not torch.equal(layer.weight, before[name])
        }


def assert_near(values, expected, rtol, atol):
    """Two dicts have the same keys and, within the tolerances, the same tensors."""
    assert set(values) == set(expected)
    for name, tensor in expected.items():
        assert values[name].shape == tensor.shape and torch.allclose(values[name], tensor, rtol, atol), name


def assert_changes(changes, factors, scales=None, atol=1e-6):
    expected = {name: delta(A, B, 1.0 if scales is None else scales[name]) for name, (A, B) in factors.items()}
    assert_near(changes, expected, 1e-4, atol)


# --- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("v2", [False, True])
def test_every_layer_of_a_published_model_has_a_name_in_every_dialect(v2):
    paths = list(layers_of(published(v2)))
    kohya = {path: f"{kohya_name(path)}.lora_up.weight" for path in paths}
    assert len(set(kohya.values())) == len(paths) > 300
    for path in paths:
        for name, dialect in (
            (f"{path}.lora_B", "native"),
            (f"{path}.lora_B.weight", "diffusers"),
            (f"base_model.model.{path.partition('.')[2]}.lora_B.weight", "PEFT"),
            (kohya[path], "kohya"),
        ):
            assert read_name(name) == (dialect, path, "B"), name


def old_names(path):
    """{dialect and spelling: (name of A, of B)} of a layer, in older spellings."""
    network, _, inside = path.partition(".")
    parent, _, last = inside.replace("to_out.0", "to_out").rpartition(".")
    names = {
        "lora": (f"{path}.lora.down.weight", f"{path}.lora.up.weight"),
        "linear layer": (f"{path}.lora_linear_layer.down.weight", f"{path}.lora_linear_layer.up.weight"),
        "bare": (f"{inside}.lora_A.weight", f"{inside}.lora_B.weight"),
        "PEFT's adapter name": tuple(f"base_model.model.{inside}.lora_{x}.default.weight" for x in "AB"),
        "PEFT on both": tuple(f"base_model.model.{path}.lora_{x}.weight" for x in "AB"),
    }
    if network == "unet" and "attn" in parent.rpartition(".")[2]:
        names["processor"] = tuple(f"{parent}.processor.{last}_lora.{x}.weight" for x in ("down", "up"))
        names["unet processor"] = tuple(f"unet.{name}" for name in names["processor"])
    if network == "text_encoder":
        short = inside.removeprefix("text_model.")
        names["no text_model"] = (f"text_encoder.{short}.lora_A.weight", f"text_encoder.{short}.lora_B.weight")
        if "self_attn" in inside:
            last = f"to_{last.removesuffix('_proj')}_lora"
            names["text attention"] = tuple(f"text_encoder.{parent}.{last}.{x}.weight" for x in ("down", "up"))
        names["kohya te1"] = tuple(f"lora_te1_{inside.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up"))
    return names


SPELLINGS = sorted({s for path in (f"unet.{TO_Q}", f"text_encoder.{Q_PROJ}") for s in old_names(path)})


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.filterwarnings("ignore:.*alpha = rank")
def test_older_spellings_change_the_same_weights(spelling, model, tmp_path):
    layers = {path: layer for path, layer in few_layers(model, torch.nn.Linear).items() if spelling in old_names(path)}
    factors = random_factors(model, (2, 1, 3), layers)
    tensors = {n: t for path, pair in factors.items() for n, t in zip(old_names(path)[spelling], pair)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.bin")
    assert_changes(changed(model, tmp_path / "a.safetensors"), factors)
    assert_changes(changed(model, tmp_path / "a.bin"), factors)


@functools.cache
def single_file_names():
    config = full_blocks()
    with torch.device("meta"):
        return single_file.names(config, build_networks(config))["unet"]


def compvis(path):
    """kohya's name of a U-Net layer in the numbering of the single file, by that file's own table."""
    theirs = single_file_names()[f"{path.removeprefix('unet.')}.weight"][0].removesuffix(".weight")
    return f"lora_unet_{theirs.removeprefix('model.diffusion_model.').replace('.', '_')}"


def test_kohyas_convolutions_alphas_and_both_numberings(model, tmp_path):
    chosen = [path for i, path in enumerate(layers_of(model)) if i % 9 == 0 or "conv" in path]
    factors = random_factors(model, (4, 1, 2), {path: layers_of(model)[path] for path in chosen})
    tensors, scales = {}, {}
    for i, (path, (A, B)) in enumerate(factors.items()):
        name = compvis(path) if i % 2 and "unet" in path and "time_embedding" not in path else kohya_name(path)
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        scales[path] = 1.0
        if i % 3:  # without alpha: alpha = rank
            tensors[f"{name}.alpha"] = torch.tensor(i + 0.5)
            scales[path] = (i + 0.5) / len(A)
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "Dynamic"})
    assert any(A.shape[2:] == (3, 3) for A, _ in factors.values())
    assert_changes(changed(model, tmp_path / "a.safetensors"), factors, scales, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_files_lose_nothing(dtype, model, tmp_path):
    factors = {
        path: tuple(factor.to(dtype) for factor in pair)
        for path, pair in random_factors(model, (2,), {f"unet.{TO_Q}": layers_of(model)[f"unet.{TO_Q}"]}).items()
    }
    ((A, B),) = factors.values()
    save_file({f"unet.{TO_Q}.lora_A.weight": A, f"unet.{TO_Q}.lora_B.weight": B}, tmp_path / "a.safetensors")
    assert_changes(changed(model, tmp_path / "a.safetensors"), factors)


def test_a_1x1_convolution_and_a_linear_layer_take_each_others_shapes(model, tmp_path):
    layers = layers_of(model)
    paths = [f"unet.{BLOCK}.proj_in", f"unet.{TO_Q}"]
    factors = random_factors(model, (2,), {path: layers[path] for path in paths})
    flipped = {
        path: (A.flatten(1), B.flatten(1)) if A.dim() == 4 else (A[..., None, None], B[..., None, None])
        for path, (A, B) in factors.items()
    }
    tensors = {
        f"{path}.lora_{letter}.weight": factor.contiguous()
        for path, pair in flipped.items()
        for letter, factor in zip("AB", pair)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert_changes(changed(model, tmp_path / "a.safetensors"), factors)


def test_cloneofsimos_numbers_and_unused_tokens(model, tmp_path):
    order = []  # as the classes of its time were created: down, up, middle; attn1, GEGLU, attn2
    for block in ("down_blocks", "up_blocks", "mid_block"):
        transformers = [p for p, _ in model.unet.named_modules() if p.startswith(block) and p.endswith("blocks.0")]
        for path in (p for p in transformers if "transformer" in p):
            attention = ("to_q", "to_k", "to_v", "to_out.0")
            order += [f"unet.{path}.attn1.{layer}" for layer in attention]
            order += [f"unet.{path}.ff.net.0.proj", *(f"unet.{path}.attn2.{layer}" for layer in attention)]
    assert len(order) == 144
    text = [f"text_encoder.{Q_PROJ[:-6]}{layer}_proj" for layer in "kvq"] + [f"text_encoder.{Q_PROJ[:-6]}out_proj"]
    layers = layers_of(model)
    factors = random_factors(model, (1, 3), {path: layers[path] for path in (*order, *text)})
    tensors = {"<s1>": torch.ones(TEXT), "<s2>": torch.ones(TEXT)}
    metadata = {"unet": '["GEGLU", "CrossAttention", "Attention"]', "text_encoder": '["CLIPAttention"]'}
    for network, paths in (("unet", order), ("text_encoder", text)):
        for i, path in enumerate(paths):
            tensors[f"{network}:{i}:down"], tensors[f"{network}:{i}:up"] = factors[path]
            metadata[f"{network}:{i}:rank"] = str(len(factors[path][0]))
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.warns(UserWarning, match="2 textual-inversion vectors.*<s1>, <s2>"):
        assert_changes(changed(model, tmp_path / "a.safetensors"), factors)


# --- what the metadata say -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["diffusers", "PEFT"])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_and_patterns_of_the_metadata_are_used(where, rslora, model, tmp_path):
    layers = layers_of(model)
    paths = [f"unet.{TO_Q}", f"unet.{TO_OUT}", f"text_encoder.{Q_PROJ}"]
    factors = random_factors(model, (4, 2, 4), {path: layers[path] for path in paths})
    config = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {f"^{TO_OUT}": 2},
        "alpha_pattern": {"attn1.to_out.0": 3, "encoder.layers.0.self_attn.q_proj": 5},
        "use_rslora": rslora,
        "peft_type": "LORA",
    }
    if where == "PEFT":
        start, metadata = "base_model.model.", None
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8-sig")  # as Windows writes it
    else:
        start = ""
        flat = {f"{network}.{key}": value for network in ("unet", "text_encoder") for key, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(flat)}
    name = "adapter_model.safetensors" if where == "PEFT" else "pytorch_lora_weights.safetensors"
    tensors = {f"{start}{p}.lora_{x}.weight": t for p, pair in factors.items() for x, t in zip("AB", pair)}
    save_file(tensors, tmp_path / name, metadata)
    divisor = {p: math.sqrt(len(A)) if rslora else len(A) for p, (A, _) in factors.items()}
    scales = {p: alpha / divisor[p] for p, alpha in zip(paths, (8, 3, 5))}
    assert_changes(changed(model, tmp_path), factors, scales)  # the folder


# --- the published files ---------------------------------------------------------------------------------------------
def test_real_adapters_fit_sd15(shared_data):
    counts = {"axe_attnprocs_rank4.bin": 128, "axe_attnprocs_rank4.safetensors": 128,
              "cloneofsimo_analog_svd_rank4.safetensors": 192, "cloneofsimo_lora_disney.safetensors": 192}  # fmt: skip
    with pytest.warns(UserWarning, match="<s1>, <s2>"), restored(published()) as base:
        for name, n in counts.items():
            path = shared_data / "lora" / name
            merge_file(base, path)
            assert len(read_adapter(path).factors) == n
    with pytest.raises(InputError) as error:
        merge_file(published(v2=True), shared_data / "lora" / "axe_attnprocs_rank4.bin")
    assert_says(error, "is for Stable Diffusion v1.x", "the base is Stable Diffusion v2.x")


REFUSED = {"diffusers_sd2_bf16_rank4": "Stable Diffusion v2.x", "kohya_like_double_unet_prefix": "doubled prefix"}


@pytest.mark.filterwarnings("ignore:.*alpha = rank", "ignore:.*textual-inversion")
def test_the_nine_key_lists_are_recognized(shared_data, tmp_path):
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    listed = [p for p in sorted((shared_data / "lora" / "key_dumps").glob("*.json")) if "config" not in p.name]
    assert len(listed) == 9
    for path in listed:
        document = json.loads(path.read_text())
        tensors = {
            name: torch.ones(entry["shape"], dtype=dtypes[entry["dtype"]])
            if isinstance(entry, dict)
            else torch.ones(entry)
            for name, entry in document["tensors"].items()
        }
        save_file(tensors, tmp_path / path.stem, document.get("metadata"))
        if path.stem in REFUSED:
            with pytest.raises(InputError, match=REFUSED[path.stem]):
                merge_file(published(), tmp_path / path.stem)
        else:
            with restored(published()) as base:
                merge_file(base, tmp_path / path.stem)


# --- what is refused -------------------------------------------------------------------------------------------------
A, B = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
GOOD = {f"unet.{TO_Q}.lora_A.weight": A, f"unet.{TO_Q}.lora_B.weight": B}
K = f"lora_unet_{TO_Q.replace('.', '_')}"
KOHYA = {f"{K}.lora_down.weight": A, f"{K}.lora_up.weight": B}
SIMO = {"unet:0:down": A, "unet:0:up": B}
NATIVE_NAMES = {f"unet.{TO_Q}.lora_A": A, f"unet.{TO_Q}.lora_B": B}


def native(scale="1", kind='"lora"'):
    return {"minildm": f'{{"format": 1, "scale": {scale}, "kind": {kind}}}'}


def kohya(name, last="lora_up.weight"):
    return KOHYA | {f"{name}.{last}": B}


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({}, None, ["not an adapter", "none"]),
        ({"x": A}, None, ["not an adapter", "x"]),
        (GOOD | {"unet.nonsense.lora_A.weight": A}, None, ["unet.nonsense.lora_A.weight", "no layer"]),
        (GOOD | {f"unet.{TO_OUT}.lora_A.weight": A}, None, [f"unet.{TO_OUT}.lora_A.weight", "no partner"]),
        (KOHYA | {f"{kohya_name(f'unet.{TO_OUT}')}.alpha": torch.tensor(1.0)}, None, ["alpha has no partner"]),
        (GOOD | KOHYA, None, ["mixes the names of diffusers and kohya"]),
        (GOOD | {f"{TO_Q}.lora_A.weight": A}, None, ["same layer"]),
        (GOOD | {f"unet.{TO_Q}.lora_B.weight": torch.ones(WIDTH, 3)}, None, ["(32, 3)", "expected (rank, in)"]),
        (GOOD | {f"unet.{TO_Q}.lora_B.weight": torch.tensor(1.0)}, None, ["has shape", "()"]),
        (GOOD | {f"unet.{TO_Q}.lora_A.weight": torch.ones(2, 7)}, None, ["another base", "(2, 7)", "(2, 32)"]),
        (GOOD | {f"unet.{TO_Q}.lora_A.weight": A * math.nan}, None, ["NaN"]),
        (GOOD | {f"unet.{TO_Q}.lora_A.weight": A.to(torch.float8_e4m3fn)}, None, ["float8_e4m3fn", "float16"]),
        (GOOD | {f"unet.{TO_Q}.lora_A.weight": A.to(torch.int8)}, None, ["int8"]),
        (KOHYA | {f"{K}.alpha": torch.tensor(-1.0)}, None, ["alpha", "positive", "-1"]),
        (KOHYA | {f"{K}.alpha": torch.tensor(0.0)}, None, ["alpha", "positive"]),
        (KOHYA | {f"{K}.alpha": torch.tensor(math.inf)}, None, ["alpha", "positive", "inf"]),
        (KOHYA | {f"{K}.alpha": torch.tensor(math.nan)}, None, ["alpha", "positive", "nan"]),
        (KOHYA | {f"{K}.alpha": torch.ones(3)}, None, ["alpha", "(3,)"]),
        ({f"unet.{TO_Q}.lora_A": A, f"unet.{TO_Q}.lora_B": B}, None, ["its scale is unknown"]),
        # other models and kinds
        (kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1"), None, ["an adapter for SDXL"]),
        (kohya("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"), None, ["an adapter for SDXL"]),
        ({f"unet.{TO_K}.lora_A.weight": torch.ones(2, 2048), f"unet.{TO_K}.lora_B.weight": B}, None,
         ["an adapter for SDXL"]),
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": A}, None, ["an adapter for SDXL"]),
        (kohya("lora_unet_double_blocks_0_img_attn_proj"), None, ["Flux"]),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": A}, None, ["SD 3"]),
        (kohya(K, "dora_scale"), None, ["DoRA"]),
        (GOOD | {f"unet.{TO_Q}.lora_magnitude_vector": B}, None, ["DoRA"]),
        ({f"{K}.hada_w1_a": A}, None, ["LoHa"]),
        ({f"{K}.lokr_w1": A}, None, ["LoKr"]),
        ({f"{K}.oft_blocks": A}, None, ["OFT"]),
        ({f"{K}.diff": A}, None, ["whole differences"]),
        (kohya(K, "lora_mid.weight"), None, ["Tucker"]),
        (GOOD | {f"unet.{TO_Q}.lora_B.bias": torch.ones(2)}, None, ["biases"]),
        ({"emp_params": A}, None, ["textual-inversion embedding"]),
        ({"lora_unet_unet_x_lora_up.weight": A}, None, ["doubled prefix"]),
        # cloneofsimo's counting
        (SIMO, {"unet": '["ResnetBlock2D"]'}, ["numbers the layers", "ResnetBlock2D"]),
        (SIMO, {"unet": "{"}, ["metadata unet", "not valid JSON"]),
        (SIMO, {"unet": '"CrossAttention"'}, ["metadata unet", "holds a str, expected a JSON array"]),
        (SIMO, {"unet:0:rank": "3"}, ["unet:0:down", "rank 3"]),
        ({"unet:144:down": A, "unet:144:up": B}, None, ["unet:144:down"]),
        # metadata
        (GOOD, {"lora_adapter_metadata": '{"unet.r": 3}'}, ["has rank 2", "says 3"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.lora_alpha": -4}'}, ["lora_alpha", "positive", "-4"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, ["lora_alpha", "positive"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.lora_alpha": "a"}'}, ["lora_alpha", "positive"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(a+)+": 1}}'}, ["regular expression"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.use_dora": true}'}, ["DoRA"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.peft_type": "IA3"}'}, ["IA3"]),
        (GOOD | {f"unet.{TO_Q}.alpha": torch.tensor(1.0)}, {"lora_adapter_metadata": '{"unet.lora_alpha": 4}'},
         ["alpha of 1", "say 4"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.lora_alpha": 1' + "0" * 400 + "}"}, ["lora_alpha", "positive"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.lora_alpha": 1e300}'}, ["scale", "between 1e-12 and 1e+12"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.use_rslora": [1]}'}, ["use_rslora", "true or false", "[1]"]),
        (GOOD, {"lora_adapter_metadata": '{"unet.init_lora_weights": "pissa_niter_4"}'}, ["pissa", "changed the base"]),
        (NATIVE_NAMES, native(scale="1" + "0" * 400), ["scale", "positive number"]),
        (NATIVE_NAMES, native(scale="1e400"), ["scale", "positive number"]),
        (NATIVE_NAMES, native(scale="NaN"), ["scale", "positive number"]),
        (NATIVE_NAMES, native(scale="1e-320"), ["scale", "positive number"]),
        (NATIVE_NAMES, native(scale="true"), ["scale", "positive number"]),
        (NATIVE_NAMES, native(kind="[1]"), ["metadata are damaged", "kind [1]"]),
        ({name: 1e30 * factor for name, factor in GOOD.items()}, None, ["by up to 2.0e+60", "lower the multiplier"]),
        (KOHYA | {f"{K}.alpha": torch.tensor(True)}, None, ["alpha", "bool"]),
        ({"unet:\u0663:down": A, "unet:\u0663:up": B}, None, ["not an adapter"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_names_it(tensors, metadata, says, model, tmp_path):
    path, before = tmp_path / "a.safetensors", model.unet.get_submodule(TO_Q).weight.clone()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    with pytest.raises(InputError) as error:
        merge_file(model, path)
    assert_says(error, path, *says)
    assert model.merged == [] and torch.equal(model.unet.get_submodule(TO_Q).weight, before)


@pytest.mark.parametrize("key", ["minildm", "minildm_origin", "lora_adapter_metadata"])
@pytest.mark.parametrize("value", ["", "{", "[]", "3", "null", '"x"', "NaN", "[" * 100_000, '{"unet.r": []}', "{}"])
def test_damaged_metadata_never_give_a_traceback(key, value, tmp_path):
    save_file(GOOD, tmp_path / "a.safetensors", {key: value})
    try:
        read_adapter(tmp_path / "a.safetensors")
    except InputError as error:
        assert_says(error, tmp_path)
    else:
        assert value == "{}" or (key == "minildm_origin" and value.startswith('{"unet'))


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type"])
@pytest.mark.parametrize("value", [[], {}, "x", True, -1, 0, {"": 1}, {TO_Q: None}, {TO_Q: []}, 1e400])
def test_a_damaged_configuration_is_one_line(field, value, tmp_path):
    save_file(GOOD, tmp_path / "a", {"lora_adapter_metadata": json.dumps({f"unet.{field}": value})})
    try:
        adapter = read_adapter(tmp_path / "a")
    except InputError as error:
        assert_says(error, tmp_path)
    else:  # what says nothing about this layer
        assert value == {} or {None} == set(getattr(value, "values", list)()), adapter


@pytest.mark.parametrize("multiplier", [math.nan, math.inf, 10**400, "2", None, True, 1e38])
def test_a_multiplier_that_no_weight_can_take_changes_and_records_nothing(multiplier, model, tmp_path):
    save_file(GOOD, tmp_path / "a")
    before = model.unet.get_submodule(TO_Q).weight.data
    with pytest.raises(InputError, match="multiplier") as error:
        merge_file(model, tmp_path / "a", multiplier)
    assert_says(error, tmp_path / "a")
    assert model.merged == [] and torch.equal(model.unet.get_submodule(TO_Q).weight, before)


def test_what_half_precision_cannot_hold_is_refused_before_any_weight_changes(tmp_path):
    half = peers.random_model(few_blocks(), seed=5).half()
    write_adapter(mixed(half, (1.0,)), tmp_path / "a", "lora", {})
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(InputError, match="more than float16 can hold"):
        merge_file(half, tmp_path / "a", 1e6)
    assert half.merged == [] and all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())


def test_whole_numbers_as_alpha_and_unused_words_beside_any_dialect(model, tmp_path):
    save_file(KOHYA | {f"{K}.alpha": torch.tensor(3), "<s1>": torch.ones(TEXT)}, tmp_path / "a")
    with pytest.warns(UserWarning, match="<s1>"):
        assert_changes(changed(model, tmp_path / "a"), {f"unet.{TO_Q}": (A, B)}, {f"unet.{TO_Q}": 1.5})


def test_a_long_table_of_patterns_is_read_once(tmp_path):
    patterns = {f"a{i}": 1 for i in range(100_000)} | {"attn1.to_q": 6, f"^{TO_Q}$": 8}
    save_file(GOOD, tmp_path / "a", {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": patterns})})
    assert read_adapter(tmp_path / "a").factors[f"unet.{TO_Q}"].scale == 3  # the first that fits


def test_kernels_do_not_keep_transformed_weights_of_before_a_merge(tmp_path):
    layer = torch.nn.Conv2d(320, 320, 3, padding=1).requires_grad_(False)
    model = peers.random_model(few_blocks(), seed=5)
    model.unet.down_blocks[0].resnets[0].conv1 = layer
    path, x = "unet.down_blocks.0.resnets.0.conv1", noise(1, 320, 8, 8, seed=3)
    write_adapter({path: Factors(noise(2, 320, 3, 3), noise(320, 2, 1, 1), 0.1)}, tmp_path / "a", "lora", {}, "kohya")
    with torch.no_grad():
        assert kernels.winograd_pays(layer, x)
        before = kernels.convolution(layer, x)
        for _ in range(2):
            merge_file(model, tmp_path / "a")
            after = kernels.convolution(layer, x)
            assert peers.relative_error(after, layer(x)) < 1e-5 < peers.relative_error(before, after)


def test_a_pickle_that_asks_for_a_call_runs_nothing(model, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"unet.a.lora_A.weight": A, "x": Hostile()}, tmp_path / "a.bin")
    with pytest.raises(InputError) as error:
        merge_file(model, tmp_path / "a.bin")
    assert_says(error, "a.bin", "its tensors: unet.a.lora_A.weight")  # read as data, without the call
    assert not (tmp_path / "ran").exists()


def test_adapters_of_two_bases_do_not_mix(tmp_path):
    for width in (768, 1024):
        tensors = {f"unet.{TO_K}.lora_A.weight": torch.ones(2, width), f"unet.{TO_K}.lora_B.weight": torch.ones(320, 2)}
        save_file(tensors, tmp_path / f"{width}.safetensors")
    with restored(published()) as base:
        merge_file(base, tmp_path / "768.safetensors")
        with pytest.raises(InputError) as error:
            merge_file(base, tmp_path / "1024.safetensors")
        assert_says(error, "1024.safetensors is for Stable Diffusion v2.x", "the base is Stable Diffusion v1.x (768)")
        assert len(base.merged) == 1


# --- writing ---------------------------------------------------------------------------------------------------------
def deltas(path):
    return {name: delta(*entry) for name, entry in read_adapter(path).factors.items()}


def mixed(model, scales, ranks=(3, 1, 4), kinds=(torch.nn.Linear,), choose=few_layers):
    pairs, scales = random_factors(model, ranks, choose(model, kinds)), itertools.cycle(scales)
    return {path: Factors(A, B, next(scales)) for path, (A, B) in pairs.items()}


CHAINS = [["native", *chain, "native"] for chain in itertools.permutations(FORMATS[1:])]


@pytest.mark.parametrize("scales", [(1.0,), (8 / 6,), (0.3, 2.0, 1.0, 5e-3)])
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_every_chain_of_conversions_keeps_the_changes(chain, scales, model, tmp_path):
    factors = mixed(model, scales, kinds=(torch.nn.Linear, torch.nn.Conv2d))
    write_adapter(factors, tmp_path / "0.safetensors", "selora", {"base": "b" * 64, "on_top_of": [], "settings": None})
    for i, format in enumerate(chain):
        arguments = [
            str(tmp_path / f"{i}.safetensors"),
            "--to",
            format,
            "--out",
            str(tmp_path / f"{i + 1}.safetensors"),
        ]
        assert main(["convert", *arguments]) == 0
        adapter = read_adapter(tmp_path / f"{i + 1}.safetensors")
        assert (adapter.dialect, adapter.kind, adapter.about["base"]) == (format, "selora", "b" * 64)
    expected = {name: delta(*entry) for name, entry in factors.items()}
    assert_near(deltas(tmp_path / f"{len(chain)}.safetensors"), expected, 1e-6, 1e-6)


def test_a_kohya_round_trip_keeps_every_bit_where_alphas_are_equal(model, tmp_path):
    factors = {path: entry._replace(scale=2.7 / len(entry.A)) for path, entry in mixed(model, (1.0,)).items()}
    write_adapter(factors, tmp_path / "a.safetensors", "lora", {}, "kohya")
    read = read_adapter(tmp_path / "a.safetensors").factors
    for path, (A, B, scale) in factors.items():
        assert torch.equal(read[path].A, A) and torch.equal(read[path].B, B)
        assert read[path].scale == pytest.approx(scale, rel=1e-7)
    write_adapter(read, tmp_path / "b.safetensors", "lora", {}, "kohya")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_kohyas_file_has_one_alpha_and_technical_metadata_only(model, tmp_path):
    below = {"adapter": "d" * 64, "multiplier": 1.0, "path": f"{tmp_path}/secret/adapter.safetensors"}
    about = {"settings": {"instance_prompt": "secret patient"}, "base": None, "on_top_of": [below]}
    write_adapter(mixed(model, (1.0,)), tmp_path / "a.safetensors", "selora", about, "kohya")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        alphas = {file.get_tensor(name).item() for name in names if name.endswith(".alpha")}
    assert len(alphas) == 1 and len(names) == 3 * len(mixed(model, (1.0,)))
    assert metadata["ss_network_dim"] == "Dynamic" and metadata["ss_network_module"] == "networks.lora"
    assert "secret" not in str(metadata) and str(tmp_path) not in str(metadata) and "d" * 64 in str(metadata)


@pytest.mark.parametrize("kind", ["lora", "selora", "adalora", "dylora"])
def test_the_live_adapter_of_every_method_is_saved_in_every_format(kind, tmp_path):
    model = peers.random_model(ModelConfig.tiny())
    trained = copy.deepcopy(model)
    for i, layer in enumerate(add_adapter(trained, kind, rank=3, alpha=2.0).values()):
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_"):
                parameter.data = 0.1 * noise(*parameter.shape, seed=i)
        if kind == "adalora":
            kept = torch.tensor([[True, False, True], [False] * 3][i % 2])
            layer.freeze(kept, int(kept.sum()))  # ranks 2 and 0
    for format in FORMATS:
        save_adapter(trained, tmp_path / f"{format}.safetensors", format)
    merge_adapter(trained)
    for format in FORMATS:
        with restored(model):
            assert merge_file(model, tmp_path / f"{format}.safetensors")["kind"] == kind
            assert_near(model.state_dict(), trained.state_dict(), 1e-6, 1e-6)
            assert not adapter_layers(model)


def test_convert_takes_a_rank_of_dylora(model, tmp_path, capsys):
    trained = copy.deepcopy(model)
    for i, layer in enumerate(add_adapter(trained, "dylora", rank=3, alpha=2.0).values()):
        layer.lora_B.data = 0.1 * noise(*layer.lora_B.shape, seed=i)
    save_adapter(trained, tmp_path / "adapter.safetensors")
    assert main(["convert", str(tmp_path), "--to", "kohya", "--rank", "2"]) == 0
    assert "adapter-rank2.kohya.safetensors" in capsys.readouterr().out
    expected = changed(model, tmp_path / "adapter.safetensors", rank=2)
    assert_near(changed(model, tmp_path / "adapter-rank2.kohya.safetensors"), expected, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{a}", "--to", "kohya", "--rank", "1"], ["one rank only", "--rank"]),
        (["{a}", "--to", "kohya", "--out", "{tmp}/a.bin"], ["suffix"]),
        (["{a}", "--to", "kohya", "--out", "{a}"], ["exists already"]),
        (["{tmp}/none", "--to", "kohya"], ["no such adapter"]),
        (["{tmp}", "--to", "kohya"], ["no such adapter"]),
        (["{a}:0.5", "--to", "kohya"], ["a.safetensors:0.5", "as it is"]),
        (["{a}@2", "--to", "kohya"], ["a.safetensors@2", "as it is"]),
    ],
)
def test_convert_says_what_is_wrong(arguments, says, model, tmp_path):
    write_adapter(mixed(model, (1.0,)), tmp_path / "a.safetensors", "lora", {})
    with pytest.raises((InputError, FileNotFoundError)) as error:
        main(["convert", *(word.format(a=tmp_path / "a.safetensors", tmp=tmp_path) for word in arguments)])
    assert_says(error, *says)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_to_write_is_said(model, tmp_path):
    empty = {f"unet.{TO_Q}": Factors(torch.ones(0, WIDTH), torch.ones(WIDTH, 0), 1.0)}
    with pytest.raises(InputError, match="no layer of rank 1 or more"):
        write_adapter(empty, tmp_path / "a.safetensors", "adalora", {}, "kohya")
    with pytest.raises(InputError, match="format must be one of native, kohya, diffusers"):
        save_adapter(model, tmp_path / "a.safetensors", "ckpt")


@pytest.mark.parametrize("v2", [False, True])
def test_no_pattern_of_diffusers_metadata_fits_two_layers(v2, tmp_path):
    layers = layers_of(published(v2))
    factors = {
        path: Factors(torch.ones(1 + (i % 7 > 0), 1), torch.ones(1, 1 + (i % 7 > 0)), 1.0)
        for i, path in enumerate(layers)
    }
    write_adapter(factors, tmp_path / "a.safetensors", "lora", {}, "diffusers")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    for network in ("unet", "text_encoder"):
        names = [path.removeprefix(f"{network}.") for path in layers if path.startswith(f"{network}.")]
        patterns = config[f"{network}.rank_pattern"]
        assert len(patterns) > 5
        text = "\n".join(names)
        for pattern in patterns:  # PEFT's expression
            assert len(re.findall(rf"^(?:.*\.)?(?:{pattern})$", text, re.M)) == 1, pattern


# --- other tools' own loaders ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["few blocks", pytest.param("all blocks", marks=pytest.mark.slow)])
def base(request, tmp_path_factory):
    """A model and its folder for diffusers."""
    model = peers.random_model(full_blocks() if request.param == "all blocks" else few_blocks(), seed=5)
    folder = peers.write_folder(model, tmp_path_factory.mktemp("pipeline") / "base")
    peers.write_tokenizer(folder / "tokenizer")
    return model, folder


def assert_same_outputs(ours, pipe):
    """Text encoder and U-Net <= 1e-5, a sampled latent <= 1e-4."""
    token_ids = ours.tokenize(["chest x-ray", ""])
    latents, timesteps = noise(2, 4, 16, 16, seed=9), torch.tensor([10, 700])
    with torch.no_grad():
        context = ours.text_encoder(token_ids)
        their_context = pipe.text_encoder(token_ids).last_hidden_state
        assert peers.relative_error(context, their_context) <= peers.PARITY
        theirs = pipe.unet(latents, timesteps, context).sample
        assert peers.relative_error(ours.unet(latents, timesteps, context), theirs) <= peers.PARITY
    options = {"output": "latent", "latents": latents[:1], "guidance": 3.0, "steps": 4}
    sampled = ours.sample(["chest x-ray"], **options)
    their_sampled = pipe(
        "chest x-ray", latents=latents[:1].clone(), guidance_scale=3.0, num_inference_steps=4, output_type="latent"
    ).images
    assert peers.relative_error(sampled, their_sampled) <= 1e-4


def merged(model, path):
    ours = copy.deepcopy(model)
    merge_file(ours, path)
    return ours


@pytest.mark.parametrize("convolutions", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.filterwarnings("ignore:ddim with")
def test_diffusers_loads_what_is_written_here(format, convolutions, base, tmp_path):
    model, folder = base
    kinds = (torch.nn.Linear, torch.nn.Conv2d) if convolutions else (torch.nn.Linear,)
    factors = mixed(model, (0.5, 2.0, 1.0), kinds=kinds, choose=layers_of)
    write_adapter(factors, tmp_path / "a.safetensors", "selora", {}, format)
    pipe, ours = peers.diffusers_pipeline(folder), merged(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        token_ids = ours.tokenize(["chest x-ray"])
        plain = pipe.text_encoder(token_ids).last_hidden_state
        assert peers.relative_error(ours.text_encoder(token_ids), plain) > 1e-2  # the adapter shows
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert_same_outputs(ours, pipe)


def test_peft_loads_what_is_written_here(base, tmp_path):
    import peft

    model, folder = base
    factors = mixed(model, (0.5, 2.0, 1.0), choose=layers_of)
    write_adapter(factors, tmp_path / "a.safetensors", "selora", {}, "diffusers")
    pipe = peers.diffusers_pipeline(folder)
    tensors = load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    for network in ("unet", "text_encoder"):
        module = getattr(pipe, network)
        settings = {k.removeprefix(f"{network}."): v for k, v in config.items() if k.startswith(f"{network}.")}
        state = {k.removeprefix(f"{network}."): v for k, v in tensors.items() if k.startswith(f"{network}.")}
        if not hasattr(module, "text_model"):
            state = {k.removeprefix("text_model."): v for k, v in state.items()}
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), module)
        result = peft.set_peft_model_state_dict(module, state)
        assert not result.unexpected_keys
    assert_same_outputs(merged(model, tmp_path / "a.safetensors"), pipe)


@pytest.mark.parametrize("dialect", ["diffusers", "PEFT"])
@pytest.mark.filterwarnings("ignore:ddim with")
def test_what_diffusers_and_peft_write_loads_here(dialect, base, tmp_path):
    import diffusers
    import peft

    model, folder = base
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "to_v", "to_out.0", "proj_in", "conv1", "q_proj", "fc1"],
        rank_pattern={"to_v": 2, "attn1.to_q": 4},
        alpha_pattern={"attn2.to_q": 7, "fc1": 1},
        init_lora_weights=False,
    )
    pipe = peers.diffusers_pipeline(folder)
    torch.manual_seed(0)
    if dialect == "PEFT":
        wrapped = {network: peft.get_peft_model(getattr(pipe, network), config) for network in ("unet", "text_encoder")}
        ours = model
        for network, module in wrapped.items():
            module.save_pretrained(tmp_path / network)
            ours = merged(ours, tmp_path / network)
    else:
        pipe.unet.add_adapter(config)
        pipe.text_encoder.add_adapter(config)
        networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        states = {f"{n}_lora_layers": peft.get_peft_model_state_dict(module) for n, module in networks.items()}
        metadata = {f"{n}_lora_adapter_metadata": m.peft_config["default"].to_dict() for n, m in networks.items()}
        for value in metadata.values():
            value["target_modules"] = sorted(value["target_modules"])
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **states, **metadata)
        ours = merged(model, tmp_path)
    assert_same_outputs(ours, pipe)


# --- train.py --save-format ------------------------------------------------------------------------------------------
def test_a_run_also_writes_the_file_for_another_tool(tmp_path):
    short = {"steps": 4, "expand_interval": 2, "validation_interval": 2}
    model, *_ = short_run(tmp_path / "run", save_format="kohya", **short)
    native, kohya = (read_adapter(tmp_path / "run" / f"adapter{x}.safetensors") for x in ("", ".kohya"))
    assert (native.dialect, kohya.dialect) == ("native", "kohya")
    assert read_adapter(tmp_path / "run").path == native.path  # what --adapter RUN means
    expected = {name: delta(*entry) for name, entry in native.factors.items()}
    assert_near({name: delta(*entry) for name, entry in kohya.factors.items()}, expected, 1e-6, 1e-8)
    assert set(native.factors) == set(adapter_layers(model))


def test_full_fine_tuning_has_no_adapter_to_save():
    with pytest.raises(InputError) as error:
        parse(["--adapter", "full", "--save-format", "kohya"])
    assert_says(error, "--save-format kohya", "--adapter full")
