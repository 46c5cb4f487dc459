"""Damaged and hostile descriptions of a checkpoint: config.json files, headers, names, counts. One line each."""

import json
import math
import os
import time

import peers
import pytest
import torch
from peers import assert_says, shared_model
from safetensors.torch import load_file, save_file

import minildm
from minildm import checkpoint
from minildm.__main__ import main
from minildm.checkpoint import TensorFile, autoencoder, config_json
from minildm.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError, exit_cleanly, one_line
from minildm.files import parse_json, read_json

DEEP = []
for _ in range(900):
    DEEP = [DEEP]
WRONG = [
    None, True, False, "", "a", "8", [], ["a"], [None], [1, "a"], [[8, 8]], {}, {"a": 1}, 0, -1, 0.5, -0.0, 1e300,
    math.inf, -math.inf, math.nan, 2**63, 10**9, 10**30, int("9" * 4000), [10**9] * 3, [-32], [32.5, 64], DEEP,
    [math.nan], "\x1b[31m", "a" * 3_000_000,
]  # fmt: skip
CONFIGS = {
    "unet": (config_json.unet_from_json, peers.SD21_UNET, UNetConfig),
    "vae": (config_json.vae_from_json, peers.SD15_VAE, VAEConfig),
    "text_encoder": (config_json.text_encoder_from_json, peers.SD21_TEXT, TextEncoderConfig),
    "scheduler": (config_json.schedule_from_json, peers.SD15_SCHEDULER, ScheduleConfig),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", CONFIGS)
def test_any_value_of_any_key_gives_settings_or_one_line(part):
    read, document, kind = CONFIGS[part]
    keys = {*document, "text_config", *(config_json.UNET_FIXED if part == "unet" else ()), "rescale_betas_zero_snr",
            "beta_schedule", "timestep_spacing", "trained_betas", "_class_name", "vocab_size", "architectures",
            "num_attention_heads", "use_linear_projection", "up_block_types", "scaling_factor", "unknown"}  # fmt: skip
    refused = 0
    for key in sorted(keys):
        for value in WRONG:
            try:
                assert isinstance(read(document | {key: value}), kind)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 500, str(error)[:300]
    assert refused > len(keys) * 5


@pytest.mark.parametrize(
    "content, says",
    [
        (b'{"sample_size": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit (4300 digits)"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b'{"a": ' * 100_000, "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\xef\xbb\xbf{", "not valid JSON"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
        (b"[]", "holds a list"),
        (b"NaN", "holds a float"),
        (b" " * ((16 << 20) + 1), "more than any JSON file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
    ],
    ids=range(12),
)
def test_a_damaged_document_is_refused_with_its_name(content, says, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(file)
    assert_says(error, file, says, "get it again")


def test_a_byte_order_mark_is_no_damage_and_special_files_are_not_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(file) == parse_json('{"a": [1]}', "it") == {"a": [1]}
    os.mkfifo(tmp_path / "fifo")
    for other, says in (("fifo", "not a regular file"), (".", "not a regular file"), ("absent", "is missing")):
        with pytest.raises(FileNotFoundError, match=says):
            read_json(tmp_path / other)


@pytest.fixture
def folder(tmp_path):
    return peers.write_folder(shared_model(), tmp_path / "model")


def refusal(path, kind=InputError, **options):
    with pytest.raises(kind) as error:
        minildm.load(path, device="cpu", **options)
    return error


@pytest.mark.parametrize(
    "part, changes",
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"block_out_channels": [32] * 10_000}),
        ("unet", {"block_out_channels": [2**40, 64, 64]}),
        ("unet", {"cross_attention_dim": 10**9}),
        ("vae", {"layers_per_block": 10**9}),
        ("vae", {"block_out_channels": [32] * 10_000}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"vocab_size": 10**12}),
        ("text_encoder", {"intermediate_size": 10**9}),
        ("scheduler", {"num_train_timesteps": 10**9}),
    ],
)
def test_counts_are_bounded_before_anything_is_built(part, changes, folder):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    peers.edit_json(folder / part / name, **changes)
    begin = time.monotonic()
    assert_says(refusal(folder), folder)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.999999999.0.op.weight",
        "model.diffusion_model.input_blocks.9999999999.0.op.weight",
        f"model.diffusion_model.input_blocks.{'9' * 5000}.0.op.weight",
        f"first_stage_model.encoder.down.{'9' * 5000}.block.0.conv2.weight",
        "first_stage_model.encoder.down.77.block.0.conv2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1000000000.mlp.fc1.weight",
    ],
)
def test_block_numbers_are_bounded_by_what_the_file_holds(name, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(peers.single_file_state(shared_model()) | {name: torch.zeros(32)}, path)
    assert_says(refusal(path), path)
    assert main(["info", str(path)]) == 0


def test_ten_thousand_blocks_are_refused_at_once(tmp_path):
    path = tmp_path / "a.safetensors"
    many = {f"model.diffusion_model.input_blocks.{i}.0.op.bias": torch.zeros(1) for i in range(10_000)}
    save_file(peers.single_file_state(shared_model()) | many, path)
    begin = time.monotonic()
    assert_says(refusal(path), "have 10,000 numbers")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("number", ["9" * 5000, "1000000000", "77"])
def test_an_autoencoder_with_odd_block_numbers_is_refused(number, tmp_path):
    vae = shared_model().vae.state_dict()
    path = tmp_path / "vae.safetensors"
    save_file(vae | {f"encoder.down_blocks.{number}.resnets.0.conv2.weight": torch.zeros(1, 1, 3, 3)}, path)
    with pytest.raises(InputError) as error:
        autoencoder.inspect(path)
    assert_says(error, path)


# --- headers of safetensors files ------------------------------------------------------------------------------------
def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


HEADERS = {
    "an offset beyond the file": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    "more numbers than bytes": {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}},
    "a negative shape": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "an overflowing shape": {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
    "offsets as text": {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "an unknown dtype": {"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}},
    "metadata that is no text": {"__metadata__": {"a": 1}},
    "metadata that is no object": {"__metadata__": [1]},
    "a list": [1],
    "lists in lists": b"[" * 100_000,
    "no UTF-8": b'{"\xff": 1}',
    "a hole": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_damaged_header_is_one_line(what, tmp_path):
    header = HEADERS[what]
    path = with_header(tmp_path / "a.safetensors", header, bytes(4))
    if not isinstance(header, bytes) or header[:1] != b"[":
        path.write_bytes(path.read_bytes())
    with pytest.raises(InputError) as error:
        TensorFile(path)
    assert_says(error, path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "I32", "U16", "U64", "C64", "F8_E8M0", "BOOL"])
def test_tensors_of_any_type_in_the_place_of_weights_are_used_or_named(code, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(peers.single_file_state(shared_model(), extras=False), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = "model.diffusion_model.out.2.bias"
    entry = header.pop(name)
    begin, end = entry["data_offsets"]
    size = {"C64": 8, "U64": 8, "I32": 4, "U16": 2}.get(code, 1)
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] >= end:
            other["data_offsets"] = [n - (end - begin) for n in other["data_offsets"]]
    body = body[:begin] + body[end:]
    header[name] = {"dtype": code, "shape": [4], "data_offsets": [len(body), len(body) + 4 * size]}
    with_header(path, header, body + bytes(4 * size))
    if code in ("F8_E4M3", "F8_E5M2"):
        assert minildm.load(path, device="cpu").unet.conv_out.bias.tolist() == [0] * 4
    else:
        assert_says(refusal(path), path, "1 stored as other than real numbers", name)
    assert main(["info", str(path)]) == 0


# --- names and messages ----------------------------------------------------------------------------------------------
def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        exit_cleanly(main, list(arguments))
    return exit.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    "name", ["a" * 3_000_000, "\x1b[2J\x1b[31mred\x07", "a\nb\rc", "\u202egnp.exe", "\x9b31m", "é胸🫁"], ids=range(6)
)
def test_names_reach_the_terminal_short_and_escaped(name, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    state = peers.single_file_state(shared_model()) | {name: torch.zeros(1)}
    save_file(state, path)
    for arguments in (["info", path], ["merge", "--base", path, "--out", tmp_path / "o.safetensors", "none"]):
        code, said = run(capsys, *map(str, arguments))
        assert code == (0 if arguments[0] == "info" else 2)
        for line in (said.out + said.err).splitlines():
            assert len(line) <= 500 and line.isprintable(), line[:100]
    assert len(said.err.splitlines()) == 1


def test_a_message_keeps_its_beginning_and_its_end():
    line = one_line("begin " + "x" * 10_000 + "\t\n end\x1b")
    assert len(line) <= 500 and line.startswith("begin x") and line.endswith("x end\\x1b") and "[...]" in line
    assert one_line("née 胸 \ud800") == "née 胸 \\ud800"


WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel", "module._orig_mod.": ""}


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_wrapped_networks_of_a_folder_are_named_with_the_cause(network, wrapper, folder):
    (file,) = (folder / network).glob("*.safetensors")
    state = load_file(file)
    save_file({f"{wrapper}{name}": tensor for name, tensor in state.items()}, file)
    error = refusal(folder)
    assert_says(error, f"{len(state)} missing: {network}/", f"{len(state)} not used by the model", WRAPPERS[wrapper])
    assert len(str(error.value)) < 700 and str(error.value).count(f"{network}/") == 6


@pytest.mark.parametrize(
    "rename, says",
    [
        (lambda name: f"module.{name}", "DistributedDataParallel"),
        (lambda name: f"_orig_mod.{name}", "torch.compile"),
        (lambda name: f"state_dict.{name}", "place in a dictionary"),
        (lambda name: f"ema.shadow.{name}", "names begin with 'ema.shadow.'"),
        (lambda name: name.replace("diffusion_model.", "diffusion_model._orig_mod."), "torch.compile"),
        (lambda name: name.replace("diffusion_model.", "diffusion_model.module."), "DistributedDataParallel"),
        (lambda name: name.replace("model.diffusion_model.", "model_ema."), "moving average of a training run alone"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_wrapped_single_files_are_named_with_the_cause(rename, says, suffix, tmp_path):
    state = {rename(name): t.contiguous() for name, t in peers.single_file_state(shared_model(), extras=False).items()}
    path = tmp_path / f"a.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert_says(refusal(path), path, says)


NOT_CHECKPOINTS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n": "git lfs pull",
    b"\n<!DOCTYPE html><html>": "a web page",
    b"GGUF\x03\0\0\0": "GGUF",
    b"\x1f\x8b\x08\0\0\0\0\0": "a compressed archive",
    bytes(4096): "filled with zeros",
    b"\x93NUMPY\x01\0": "a NumPy file",
    b"": "empty (0 bytes)",
}


@pytest.mark.parametrize("content", NOT_CHECKPOINTS, ids=NOT_CHECKPOINTS.values())
def test_what_is_no_checkpoint_is_named_everywhere(content, folder, tmp_path):
    for name in ("a.safetensors", "a.ckpt"):
        (tmp_path / name).write_bytes(content)
        assert_says(refusal(tmp_path / name), tmp_path / name, NOT_CHECKPOINTS[content])
        assert_says(refusal(folder, vae=tmp_path / name), tmp_path / name, NOT_CHECKPOINTS[content])
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert_says(refusal(folder), folder / "unet", NOT_CHECKPOINTS[content])


def test_names_that_are_not_utf_8_are_escaped(tmp_path):
    path = tmp_path / os.fsdecode(b"model\xff.safetensors")
    peers.write_single_file(shared_model(), tmp_path / "a.safetensors").rename(path)
    with pytest.raises(InputError) as error:
        minildm.load(path, device="cpu")
    assert_says(error, r"model\xff.safetensors", "not UTF-8", "rename it")


def test_a_cut_download_says_how_much_is_there(tmp_path):
    path = peers.write_single_file(shared_model(), tmp_path / "a.safetensors")
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 1000)
    assert_says(refusal(path), f"{size - 1000:,} of {size:,} bytes are there")


# --- tensors in several files ----------------------------------------------------------------------------------------
def shard(folder, suffix, index_name):
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    file.unlink()
    weight_map, names = {}, sorted(state)
    for i in range(3):
        part = {name: state[name] for name in names[i::3]}
        name = f"{file.stem}-{i + 1:05d}-of-00003.{suffix}"
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / index_name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "network, suffix, index",
    [
        ("unet", "safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        ("unet", "safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ("unet", "bin", "diffusion_pytorch_model.bin.index.json"),
        ("vae", "safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        ("text_encoder", "safetensors", "model.safetensors.index.json"),
        ("text_encoder", "bin", "pytorch_model.bin.index.json"),
    ],
)
def test_tensors_in_several_files_load(network, suffix, index, folder):
    shard(folder / network, suffix, index)
    loaded = minildm.load(folder, device="cpu")
    peers.assert_equal_weights(loaded, shared_model())
    if network == "unet":
        before = loaded.base_hash
        (last,) = (folder / network).glob(f"*-00003-of-00003.{suffix}")
        state = dict(TensorFile(last).tensors(TensorFile(last).shapes))
        state[next(iter(state))] += 1
        save_file(state, last) if suffix == "safetensors" else torch.save(state, last)
        assert minildm.load(folder, device="cpu").base_hash != before


@pytest.mark.parametrize(
    "weight_map, says",
    [
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ({"a": "../../etc/passwd"}, "files beside it"),
        ({"a": "/etc/passwd"}, "files beside it"),
        ({"a": 5}, "are missing"),
        ({"a": "absent-1", "b": "absent-2"}, "lists 2 files, of which 2 are missing: absent-1, absent-2"),
    ],
)
def test_a_wrong_index_is_refused(weight_map, says, folder):
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shard(folder / "unet", "safetensors", index.name)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((InputError, FileNotFoundError)) as error:
        minildm.load(folder, device="cpu")
    assert_says(error, index, says)


def test_the_number_of_missing_tensors_is_told_and_three_are_named(tmp_path):
    state = peers.single_file_state(shared_model(), extras=False)
    for prefix, n in (("model.diffusion_model.output_blocks.", None), ("first_stage_model.decoder.", None)):
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix) or "conv_in" in name}
        n = len(state) - len(kept)
        path = tmp_path / "a.safetensors"
        save_file(kept, path)
        error = refusal(path)
        assert_says(error, f"{n} missing: {prefix}", ", ...")
        assert str(error.value).count(prefix) == 3 and len(str(error.value)) < 500


def test_a_config_that_expects_other_sizes_than_the_file_holds_names_both(folder):
    config = ModelConfig.tiny()
    plan = checkpoint.inspect(folder)
    assert plan.config != config
    peers.edit_json(folder / "unet" / "config.json", layers_per_block=16)
    assert_says(refusal(folder), folder, "missing", "unet/down_blocks.0.resnets.2")
