"""Settings: published config.json files are read and written back, anything else is refused."""

import dataclasses
import json
import subprocess
import sys

import peers
import pytest
from peers import assert_says

from minildm.checkpoint import config_json
from minildm.config import ModelConfig, SamplingSettings, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.errors import InputError
from minildm.samplers import SAMPLERS

READERS = {
    "unet": (config_json.unet_from_json, config_json.unet_to_json),
    "vae": (config_json.vae_from_json, config_json.vae_to_json),
    "text_encoder": (config_json.text_encoder_from_json, config_json.text_encoder_to_json),
    "schedule": (config_json.schedule_from_json, config_json.schedule_to_json),
}


def test_the_defaults_are_sd_15_as_published():
    assert config_json.unet_from_json(peers.SD15_UNET) == UNetConfig()
    assert config_json.vae_from_json(peers.SD15_VAE) == VAEConfig()
    assert config_json.text_encoder_from_json(peers.SD15_TEXT) == TextEncoderConfig()
    assert config_json.schedule_from_json(peers.SD15_SCHEDULER) == ScheduleConfig()
    assert ModelConfig().image_size == 512


def test_sd_21_is_read_as_published():
    unet = config_json.unet_from_json(peers.SD21_UNET)
    assert unet == UNetConfig(n_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, latent_size=96)
    assert [width // heads for width, heads in zip(unet.widths, unet.n_heads)] == [64] * 4
    assert config_json.text_encoder_from_json(peers.SD21_TEXT) == TextEncoderConfig(1024, 23, 16, 4096, "gelu")
    schedule = config_json.schedule_from_json(peers.SD15_SCHEDULER | {"prediction_type": "v_prediction"})
    assert schedule == ScheduleConfig(prediction="v")


@pytest.mark.parametrize("network", READERS)
@pytest.mark.parametrize(
    "config", [ModelConfig(), ModelConfig.tiny(), ModelConfig.tiny(v2=True)], ids=["SD 1.5", "tiny", "tiny v2"]
)
def test_a_config_survives_a_round_trip_through_json(network, config):
    read, write = READERS[network]
    part = getattr(config, network)
    assert read(json.loads(json.dumps(write(part)))) == part


def test_the_number_of_heads_is_read_under_both_of_its_names():
    document = config_json.unet_to_json(UNetConfig.tiny())
    del document["attention_head_dim"]
    assert config_json.unet_from_json(document | {"num_attention_heads": 2}).n_heads == (2, 2)
    both = document | {"num_attention_heads": None, "attention_head_dim": [4, 8]}
    assert config_json.unet_from_json(both).n_heads == (4, 8)


@pytest.mark.parametrize(
    "fixed, network",
    [(config_json.UNET_FIXED, "unet"), (config_json.VAE_FIXED, "vae"), (config_json.SCHEDULE_FIXED, "schedule")],
    ids=["unet", "vae", "schedule"],
)
def test_any_other_value_of_a_fixed_key_is_refused_by_name(fixed, network):
    read, write = READERS[network]
    document = write(getattr(ModelConfig(), network))
    for key, value in fixed.items():
        assert read(document | {key: value}) == getattr(ModelConfig(), network)
        with pytest.raises(InputError) as caught:
            read(document | {key: "something else"})
        assert_says(caught, key, "'something else'", repr(value))


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: UNetConfig(widths=(32, 64)), "lengths"),
        (lambda: UNetConfig.tiny(widths=(30, 64)), "norm_groups = 32 does not divide the width 30"),
        (lambda: UNetConfig.tiny(n_heads=(5, 4)), "32 channels cannot be split into 5 heads"),
        (lambda: VAEConfig(widths=(32, 32, 32)), "must have 4 levels"),
        (lambda: VAEConfig.tiny(norm_groups=24), "norm_groups = 24 does not divide the width 32"),
        (lambda: TextEncoderConfig.tiny(activation="silu"), "must be quick_gelu or gelu, got 'silu'"),
        (lambda: TextEncoderConfig.tiny(n_heads=5), "width 32 cannot be split into 5 heads"),
        (lambda: ScheduleConfig(prediction="x0"), "'epsilon' or 'v', got 'x0'"),
        (
            lambda: ModelConfig(UNetConfig.tiny(), VAEConfig.tiny(), TextEncoderConfig.tiny(width=64)),
            "different models",
        ),
        (
            lambda: ModelConfig(UNetConfig.tiny(), VAEConfig.tiny(latent_channels=8), TextEncoderConfig.tiny()),
            "4 latent channels, the VAE 8",
        ),
    ],
)
def test_impossible_networks_are_refused(build, says):
    with pytest.raises(InputError) as caught:
        build()
    assert_says(caught, says)


@pytest.mark.parametrize("v2", [False, True])
def test_settings_are_frozen_and_can_be_written_as_json(v2):
    config = ModelConfig.tiny(v2=v2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.unet.context_dim = 5
    document = json.loads(json.dumps(dataclasses.asdict(config)))
    assert document["unet"]["widths"] == [32, 64]
    assert document["pad_token_id"] == (0 if v2 else 49407)


def test_sampling_settings_name_the_samplers_that_exist():
    choices = next(field for field in dataclasses.fields(SamplingSettings) if field.name == "sampler").metadata[
        "choices"
    ]
    assert list(choices) == list(SAMPLERS)


def test_settings_do_not_import_torch():
    code = "import sys, minildm.config, minildm.sampling; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
