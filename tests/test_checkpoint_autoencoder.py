"""--vae: an autoencoder of its own, in every layout, in place of the base's."""

import dataclasses
import json
import re

import peers
import pytest
import torch
from peers import assert_says, noise, relative_error
from safetensors.torch import save_file

import minildm
from minildm.checkpoint import autoencoder, config_json, single_file
from minildm.config import ModelConfig, VAEConfig
from minildm.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*states neither its scaling factor")
OTHER = VAEConfig.tiny(widths=(32, 64, 64, 64), layers_per_block=2)  # other sizes than the base's
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def vae():
    return peers.random_network(OTHER, seed=7)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return peers.write_folder(peers.random_model(ModelConfig.tiny(), seed=1), tmp_path_factory.mktemp("base") / "base")


def diffusers_names(vae):
    return dict(vae.state_dict())


def old_diffusers_names(vae):
    """Those of diffusers before 0.17, such as sd-vae-ft-mse's folder has."""
    state = {}
    for name, tensor in vae.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor
    return state


def compvis_names(vae):
    """Those of vae-ft-mse-840000-ema-pruned, by diffusers' own rules (`convert_ldm_vae_checkpoint`, backwards)."""
    state, levels = {}, len(vae.config.widths)
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
        for ours, theirs in (
            ("encoder.down_blocks.", "encoder.down."),
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            (".resnets.", ".block."),
            ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            name = name.replace(ours, theirs)
        is_attention = "mid.attn_1" in name and tensor.dim() == 2
        state[name] = tensor[:, :, None, None] if is_attention else tensor
    return state


def mixed_names(vae):
    """CompVis' names around diffusers' attention, as some converters write."""
    state = {}
    for name, tensor in compvis_names(vae).items():
        for theirs, compvis in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f"mid.attn_1.{compvis}.", f"mid.attn_1.{theirs}.")
        state[name] = tensor[..., 0, 0] if "mid.attn_1.to_" in name and tensor.dim() == 4 else tensor
    return state


def training_file(vae):
    """CompVis' training file: with the loss, its discriminator, and a moving average."""
    extra = {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(4, 3, 3, 3),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.encoderconv_inweight": torch.zeros(32, 3, 3, 3),
        "discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
    }
    return compvis_names(vae) | extra


def prefixed(vae):
    return {f"first_stage_model.{name}": tensor for name, tensor in training_file(vae).items()}


NAMINGS = [diffusers_names, old_diffusers_names, compvis_names, mixed_names, training_file, prefixed]


def write(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state} if path.suffix == ".ckpt" else state, path)
    return path


def write_config(path, config=OTHER, **changes):
    path.mkdir(parents=True, exist_ok=True)
    document = {name: value for name, value in (config_json.vae_to_json(config) | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(document))
    return path


def same_weights(model, vae):
    return all(torch.equal(value, vae.state_dict()[name]) for name, value in model.vae.state_dict().items())


# --- layouts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", NAMINGS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_of_any_naming_gives_diffusers_latents_and_images(names, suffix, vae, base, tmp_path):
    model = minildm.load(base, device="cpu", vae=write(names(vae), tmp_path / f"vae{suffix}"))
    assert model.config.vae == OTHER and model.config.unet == ModelConfig.tiny().unet
    theirs, images, latents = peers.diffusers_vae(vae), noise(1, 3, 32, 32).clamp(-1, 1), noise(1, 4, 4, 4)
    with torch.no_grad():
        expected = theirs.encode(images).latent_dist
        encoded = model.vae.encode(images)
        assert relative_error(encoded.mean, expected.mean) < peers.PARITY
        assert relative_error(encoded.logvar, expected.logvar) < peers.PARITY
        assert relative_error(model.decode_latents(latents), theirs.decode(latents / 0.18215).sample) < peers.PARITY


def test_the_published_form_at_full_size_is_found_by_names_and_shapes_alone(tmp_path):
    """vae-ft-mse-840000: 248 tensors, 83,653,863 parameters. Only the header is read."""
    with torch.device("meta"):
        vae = minildm.vae.VAE(VAEConfig())
    names = compvis_names(vae)
    assert len(names) == 248 and sum(tensor.numel() for tensor in names.values()) == 83_653_863
    header, at = {}, 0
    for name, tensor in names.items():
        header[name] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + 2 * tensor.numel()],
        }
    text = json.dumps(header).encode()
    path = tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # sparse: takes no space
    assert autoencoder.inspect(path).config == VAEConfig()


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("inner", ["", "vae"])
def test_a_folder_states_its_own_factor_and_groups(file, inner, base, tmp_path):
    config = dataclasses.replace(OTHER, scaling_factor=0.31, norm_groups=16)
    vae = peers.random_network(config, seed=8)
    write(old_diffusers_names(vae), write_config(tmp_path / inner, config) / file)
    for path in (tmp_path, tmp_path / inner / file):  # the file finds the config.json beside it
        model = minildm.load(base, device="cpu", vae=path)
        assert model.config.vae == config and same_weights(model, vae)
    latents = noise(1, 4, 4, 4)
    with torch.no_grad():
        theirs = peers.diffusers_vae(vae).decode(latents / 0.31).sample
    assert relative_error(model.decode_latents(latents), theirs) < peers.PARITY
    images = noise(1, 3, 32, 32)
    z = model.vae.encode(images).sample(torch.Generator().manual_seed(0))
    assert torch.equal(model.encode_images(images, torch.Generator().manual_seed(0)), z * 0.31)


def test_a_folder_without_a_factor_has_that_of_stable_diffusion(vae, base, tmp_path):
    write_config(tmp_path, scaling_factor=...)
    write(diffusers_names(vae), tmp_path / "diffusion_pytorch_model.safetensors")
    assert minildm.load(base, device="cpu", vae=tmp_path).config.vae.scaling_factor == 0.18215


def test_a_whole_checkpoint_lends_its_autoencoder(base, tmp_path):
    other = peers.random_model(peers.single_file_config(), seed=3)
    path = peers.write_single_file(other, tmp_path / "other.safetensors")
    model = minildm.load(base, device="cpu", vae=path)
    assert same_weights(model, other.vae) and model.config.unet == ModelConfig.tiny().unet
    model = minildm.load(base, device="cpu", vae=peers.write_folder(other, tmp_path / "folder"))
    assert same_weights(model, other.vae)


def test_a_single_file_base_takes_one_too_and_its_own_is_never_read(vae, tmp_path):
    other = peers.shared_model()
    base = peers.write_single_file(other, tmp_path / "base.safetensors")
    model = minildm.load(base, device="cpu", vae=write(prefixed(vae), tmp_path / "vae.ckpt"), dtype=torch.bfloat16)
    assert model.vae.quant_conv.weight.dtype == torch.bfloat16
    assert torch.equal(model.unet.conv_in.weight, other.unet.conv_in.weight.bfloat16())
    assert torch.equal(model.vae.quant_conv.weight, vae.quant_conv.weight.bfloat16())


def test_the_hash_is_the_files_and_none_without(vae, base, tmp_path):
    from hashlib import sha256

    path = write(compvis_names(vae), tmp_path / "vae.safetensors")
    assert minildm.load(base, device="cpu", vae=path).vae_hash == sha256(path.read_bytes()).hexdigest()
    assert minildm.load(base, device="cpu").vae_hash is None


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, says",
    [
        ({"shift_factor": 0.1159}, ("shift_factor", "0.1159")),
        ({"latents_mean": [0.1] * 4}, ("latents_mean",)),
        ({"latents_std": [0.1] * 4}, ("latents_std",)),
        ({"latent_channels": 16}, ("16", "SD 3 or Flux")),
        ({"latent_channels": 8}, ("latents of 8 channels",)),
        ({"use_quant_conv": False}, ("use_quant_conv",)),
        ({"_class_name": "AutoencoderTiny"}, ("AutoencoderTiny", "AutoencoderKL")),
        ({"scaling_factor": 0}, ("scaling_factor", "positive")),
        ({"scaling_factor": "big"}, ("config.json", "scaling_factor is 'big', expected a number")),
        ({"scaling_factor": None}, ("config.json", "scaling_factor is None, expected a number")),
        ({"block_out_channels": ...}, ("config.json", "block_out_channels")),
        ({"block_out_channels": [32, 64, 64]}, ("4 levels",)),
        ({"block_out_channels": [32, 32, 64, 64]}, ("do not match", "of another shape", "encoder.down_blocks.1")),
        ({"layers_per_block": 1}, ("do not match", "not used by the model", "resnets.2")),
        ({"layers_per_block": 3}, ("do not match", "missing")),
    ],
)
def test_a_folder_of_another_kind_is_refused_in_one_line(changes, says, vae, base, tmp_path):
    write(diffusers_names(vae), write_config(tmp_path, **changes) / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError) as error:
        minildm.load(base, device="cpu", vae=tmp_path)
    assert_says(error, tmp_path, *says)


def sixteen_channels():
    return compvis_names(peers.random_network(dataclasses.replace(OTHER, latent_channels=16)))


OTHER_FILES = {
    "tiny": (lambda: {"0.weight": torch.zeros(64, 4, 3, 3)}, ("not an autoencoder", "0.weight", "encoder.conv_in")),
    "adapter": (lambda: {"lora_unet_mid.lora_down.weight": torch.zeros(4, 8)}, ("an adapter (LoRA)",)),
    "unet": (lambda: dict(peers.shared_model().unet.state_dict()), ("a U-Net",)),
    "channels": (sixteen_channels, ("16 channels", "SD 3 or Flux")),
    "decoder": (
        lambda: {k: v for k, v in compvis_names(peers.random_network(OTHER)).items() if k.startswith("dec")},
        ("not an autoencoder", "encoder.conv_in"),
    ),
    "surplus": (
        lambda: compvis_names(peers.random_network(OTHER)) | {"quantize.embedding.weight": torch.zeros(8, 4)},
        ("not used", "quantize.embedding.weight"),
    ),
    "missing": (
        lambda: {k: v for k, v in prefixed(peers.random_network(OTHER)).items() if "encoder.mid.attn_1.q" not in k},
        ("2 missing", "mid_block.attentions.0.to_q.weight"),
    ),
    "no convolutions": (
        lambda: {f"{part}.conv_in.weight": torch.zeros(4) for part in ("encoder", "decoder")},
        ("(4,)", "0 levels"),
    ),
    "empty": (dict, ("its tensors: none",)),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_refused_in_one_line(kind, base, tmp_path):
    state, says = OTHER_FILES[kind]
    path = write(state(), tmp_path / "other.safetensors")
    with pytest.raises(InputError) as error:
        minildm.load(base, device="cpu", vae=path)
    assert_says(error, path, *says)


def test_a_path_that_leads_nowhere_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        minildm.load(base, device="cpu", vae=tmp_path / "none.safetensors")
    assert_says(error, "no such autoencoder", "none.safetensors")
    with pytest.raises(FileNotFoundError) as error:
        minildm.load(base, device="cpu", vae=tmp_path)
    assert_says(error, tmp_path, "diffusion_pytorch_model.safetensors")


def test_the_factor_of_sdxl_is_believed_and_warned_about(vae, base, tmp_path):
    write(diffusers_names(vae), write_config(tmp_path, scaling_factor=0.13025) / "diffusion_pytorch_model.safetensors")
    with pytest.warns(UserWarning, match="0.13025 of SDXL"):
        model = minildm.load(base, device="cpu", vae=tmp_path)
    assert model.config.vae.scaling_factor == 0.13025


def test_our_names_for_a_single_file_are_those_by_diffusers_rules():
    vae = peers.random_network(OTHER)
    ours = {single_file.vae_name(name, OTHER).removeprefix("first_stage_model.") for name in vae.state_dict()}
    assert ours == set(compvis_names(vae))


def test_a_file_of_unusual_sizes_is_loaded_with_a_warning_of_what_is_assumed(vae, base, tmp_path):
    with pytest.warns(UserWarning, match="assuming 0.18215 and 32"):
        minildm.load(base, device="cpu", vae=write(compvis_names(vae), tmp_path / "vae.safetensors"))
