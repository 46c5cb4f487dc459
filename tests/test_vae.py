"""The autoencoder against diffusers' AutoencoderKL at equal weights."""

import copy

import peers
import pytest
import torch
import torch.nn.functional as F
from peers import PARITY, noise, relative_error

from minildm.checkpoint.folder import vae_from_json
from minildm.config import VAEConfig
from minildm.vae import VAE, Gaussian

LAYOUTS = {
    "tiny": VAEConfig.tiny(),
    "as deep as SD's": VAEConfig(widths=(32, 64, 96, 96)),
    "uneven": VAEConfig.tiny(widths=(24, 48, 24, 72), norm_groups=12, latent_channels=3),
}
SIZES = [(64, 64), (32, 88), (8, 8), (56, 24)]


@torch.no_grad()
def encoder_error(vae, peer, images):
    ours, theirs = vae.encode(images), peer.encode(images).latent_dist
    return max(relative_error(ours.mean, theirs.mean), relative_error(ours.logvar, theirs.logvar))


@torch.no_grad()
def decoder_error(vae, peer, z):
    return relative_error(vae.decode(z), peer.decode(z).sample)


@pytest.mark.parametrize("quiet", [False, True], ids=["ordinary", "small activations"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_vae_matches_diffusers(name, quiet):
    config = LAYOUTS[name]
    vae = peers.random_network(config, seed=1, quiet=quiet)
    peer = peers.diffusers_vae(vae)
    for h, w in SIZES:
        assert encoder_error(vae, peer, noise(2, 3, h, w).clamp(-1, 1)) <= PARITY
        assert decoder_error(vae, peer, noise(2, config.latent_channels, h // 8, w // 8)) <= PARITY


def pad_all_around(vae):
    for level in list(vae.encoder.down_blocks)[:-1]:
        conv = level.downsamplers[0].conv
        level.downsamplers[0].forward = lambda x, conv=conv: F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)


# The two usual mistakes of reimplementations, norm by norm.
ENCODER_MISTAKES = {
    "padding on all sides": pad_all_around,
    "eps 1e-5 in the encoder's resnets": lambda vae: peers.set_eps(vae, 1e-5, where="encoder.down_blocks"),
    "eps 1e-5 in the encoder's attention": lambda vae: peers.set_eps(vae, 1e-5, where="encoder.mid_block.attentions"),
    "eps 1e-5 in the encoder's last norm": lambda vae: peers.set_eps(vae, 1e-5, where="encoder.conv_norm_out"),
}
DECODER_MISTAKES = {
    "eps 1e-5 in the decoder's resnets": lambda vae: peers.set_eps(vae, 1e-5, where="decoder.up_blocks"),
    "eps 1e-5 in the decoder's attention": lambda vae: peers.set_eps(vae, 1e-5, where="decoder.mid_block.attentions"),
    "eps 1e-5 in the decoder's last norm": lambda vae: peers.set_eps(vae, 1e-5, where="decoder.conv_norm_out"),
}


@pytest.mark.parametrize("mistake", [*ENCODER_MISTAKES, *DECODER_MISTAKES])
def test_the_tolerance_catches(mistake):
    config = LAYOUTS["tiny"]
    vae = peers.random_network(config, seed=2, quiet=True)
    if "attention" in mistake:  # its residual branch was scaled down for the norms' sake, too much to show a wrong eps
        for part in (vae.encoder, vae.decoder):
            part.mid_block.attentions[0].to_out[0].weight.data *= 30
    peer = peers.diffusers_vae(vae)
    if mistake in ENCODER_MISTAKES:
        error, inputs = encoder_error, noise(1, 3, 32, 32)
    else:
        error, inputs = decoder_error, noise(1, 4, 4, 4)
    assert error(vae, peer, inputs) <= PARITY
    wrong = copy.deepcopy(vae)
    (ENCODER_MISTAKES | DECODER_MISTAKES)[mistake](wrong)
    assert error(wrong, peer, inputs) > 2 * PARITY


def test_log_variance_is_clamped_as_in_diffusers():
    vae = peers.random_network(LAYOUTS["tiny"], seed=3)
    vae.quant_conv.weight.data[4:] *= 100
    images = noise(1, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = vae.encode(images), peers.diffusers_vae(vae).encode(images).latent_dist
    assert relative_error(ours.logvar, theirs.logvar) <= PARITY
    assert ours.logvar.min() == -30 and ours.logvar.max() == 20


def test_sampling_a_code_matches_diffusers():
    vae = peers.random_network(LAYOUTS["tiny"], seed=4)
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = vae.encode(images), peers.diffusers_vae(vae).encode(images).latent_dist
    ours = ours.sample(torch.Generator().manual_seed(7))
    assert relative_error(ours, theirs.sample(torch.Generator().manual_seed(7))) <= PARITY


def test_samples_of_a_gaussian_have_its_mean_and_variance():
    mean, logvar = torch.full((1, 4, 128, 128), 2.0), torch.full((1, 4, 128, 128), 0.25).log()
    samples = Gaussian(mean, logvar).sample(torch.Generator().manual_seed(0))
    assert samples.mean() == pytest.approx(2.0, abs=4 * 0.5 / samples.numel() ** 0.5)
    assert samples.var() == pytest.approx(0.25, rel=4 * (2 / samples.numel()) ** 0.5)


def test_half_precision_uses_the_noise_of_float32():
    """One seed gives one image, whatever the precision of the networks."""
    mean, logvar = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    exact = Gaussian(mean, logvar).sample(torch.Generator().manual_seed(0))
    half = Gaussian(mean.half(), logvar.half()).sample(torch.Generator().manual_seed(0))
    assert half.dtype == torch.float16
    assert relative_error(half, exact) <= 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_rounds_no_worse_than_diffusers(dtype):
    vae = peers.random_network(LAYOUTS["as deep as SD's"], seed=5)
    images, z = noise(1, 3, 32, 32), noise(1, 4, 4, 4)
    with torch.no_grad():
        exact = vae.encode(images).mean, vae.decode(z)
        vae = vae.to(dtype)
        peer = peers.diffusers_vae(vae)
        ours = vae.encode(images.to(dtype)).mean, vae.decode(z.to(dtype))
        theirs = peer.encode(images.to(dtype)).latent_dist.mean, peer.decode(z.to(dtype)).sample
    for our, their, right in zip(ours, theirs, exact):
        assert 0 < relative_error(our, right) <= 1.5 * relative_error(their, right)
        assert relative_error(our, right) <= 10 * torch.finfo(dtype).eps


def test_gradients_match_diffusers():
    vae = peers.random_network(LAYOUTS["uneven"], seed=6).requires_grad_(
        True
    )  # norms over one channel would hide biases
    peer = copy.deepcopy(peers.diffusers_vae(vae)).requires_grad_(True)
    images = noise(1, 3, 16, 16)
    vae.decode(vae.encode(images).mean).square().mean().backward()
    peer.decode(peer.encode(images).latent_dist.mean).sample.square().mean().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in vae.named_parameters():
        if not name.endswith("to_k.bias"):  # shifts all of a query's scores equally: its gradient is rounding noise
            assert relative_error(parameter.grad, theirs[name].grad) <= 1e-4, name


def test_vae_leaves_its_inputs_alone():
    vae = peers.random_network(LAYOUTS["tiny"], seed=7)
    images, z = noise(1, 3, 16, 16), noise(1, 4, 2, 2)
    before = images.clone(), z.clone()
    with torch.no_grad():
        vae.encode(images), vae.decode(z)
    assert torch.equal(images, before[0]) and torch.equal(z, before[1])


def test_full_size_parameters_are_those_of_diffusers():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        ours, theirs = VAE(vae_from_json(peers.SD15_VAE)), AutoencoderKL.from_config(peers.SD15_VAE)
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_653_863
