"""The U-Net against diffusers' UNet2DConditionModel at equal weights."""

import copy

import peers
import pytest
import torch
import torch.nn.functional as F
from peers import PARITY, relative_error
from torch import nn

import minildm.layers
import minildm.unet
from minildm.config import UNetConfig
from minildm.unet import UNet

LAYOUTS = {
    "v1-shaped": UNetConfig.tiny(),
    "v2-shaped": UNetConfig.tiny(n_heads=(1, 2), linear_projection=True),
    "four levels as in SD 1.5": UNetConfig(widths=(32, 32, 64, 64), n_heads=(8, 8, 8, 8), context_dim=48),
    "attention at the coarse levels only": UNetConfig(
        widths=(32, 96, 64), attention=(False, True, True), n_heads=(1, 3, 2), layers_per_block=1, context_dim=40
    ),
    "narrowing, three blocks a level": UNetConfig(
        widths=(72, 24), attention=(True, True), n_heads=(3, 2), layers_per_block=3, context_dim=16, norm_groups=12
    ),
    "one level": UNetConfig(widths=(64,), attention=(True,), n_heads=(8,), layers_per_block=1, context_dim=24),
}


def inputs(config, batch=2, h=8, w=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, config.latent_channels, h, w, generator=generator),
        torch.randn(batch, 77, config.context_dim, generator=generator),
    )


def errors(ours, theirs, latents, timesteps, context):
    with torch.no_grad():
        return relative_error(ours(latents, timesteps, context), theirs(latents, timesteps, context).sample)


@pytest.mark.parametrize("quiet", [False, True], ids=["ordinary", "small activations"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_unet_matches_diffusers(name, quiet):
    config = LAYOUTS[name]
    unet = peers.random_network(config, seed=1, quiet=quiet)
    peer = peers.diffusers_unet(unet)
    for t in (0, 1, 500, 999):
        latents, context = inputs(config, h=16, w=16, seed=t)
        assert errors(unet, peer, latents, t, context) <= PARITY


@pytest.mark.parametrize("h, w", [(8, 24), (24, 8), (28, 28), (9, 13), (7, 30), (8, 8), (10, 11)])
def test_unet_matches_diffusers_at_any_size(h, w):
    """28 is halved to 14, 7 and 4, so 2x upsampling would miss the skip's size; the same for odd sizes."""
    config = LAYOUTS["four levels as in SD 1.5"]
    unet = peers.random_network(config, seed=2)
    latents, context = inputs(config, h=h, w=w)
    assert errors(unet, peers.diffusers_unet(unet), latents, 37, context) <= PARITY


def test_each_image_of_a_batch_has_its_own_timestep():
    config = LAYOUTS["v2-shaped"]
    unet = peers.random_network(config, seed=3)
    latents, context = inputs(config, batch=4)
    timesteps = torch.tensor([0, 10, 700, 999])
    assert errors(unet, peers.diffusers_unet(unet), latents, timesteps, context) <= PARITY
    with torch.no_grad():
        together = unet(latents, timesteps, context)
        for i in range(4):
            alone = unet(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1])
            assert relative_error(alone, together[i : i + 1]) <= PARITY


@pytest.mark.parametrize("timesteps", [7, torch.tensor(7), torch.tensor([7])], ids=["int", "scalar", "(1,)"])
def test_one_timestep_stands_for_the_whole_batch(timesteps):
    config = LAYOUTS["v1-shaped"]
    unet = peers.random_network(config, seed=4)
    latents, context = inputs(config, batch=3)
    with torch.no_grad():
        assert torch.equal(unet(latents, timesteps, context), unet(latents, torch.full((3,), 7), context))


def swap_sines(monkeypatch, unet):
    right = minildm.unet.timestep_embedding
    monkeypatch.setattr(minildm.unet, "timestep_embedding", lambda t, dim: right(t, dim).roll(dim // 2, dims=-1))


def pad_like_the_vae(monkeypatch, unet):
    conv = unet.down_blocks[0].downsamplers[0].conv
    conv.padding = (0, 0)
    unet.down_blocks[0].downsamplers[0].forward = lambda x: conv(F.pad(x, (0, 1, 0, 1)))


def half_as_many_heads(monkeypatch, unet):
    for module in unet.modules():
        if isinstance(module, minildm.layers.Attention):
            module.n_heads //= 2


def quick_gelu(monkeypatch, unet):
    for module in unet.modules():
        if isinstance(module, minildm.layers.GEGLU):
            monkeypatch.setattr(module, "forward", lambda x, proj=module.proj: gate_quickly(*proj(x).chunk(2, dim=-1)))


def gate_quickly(x, gate):
    return x * gate * torch.sigmoid(1.702 * gate)


MISTAKES = {
    "eps 1e-6 in the resnets": lambda _, unet: peers.set_eps(unet, 1e-6, where="resnets"),
    "eps 1e-6 in the last norm": lambda _, unet: peers.set_eps(unet, 1e-6, where="conv_norm_out"),
    "eps 1e-5 in the transformers": lambda _, unet: peers.set_eps(unet, 1e-5, where="attentions"),
    "eps 1e-6 in the layer norms": lambda _, unet: peers.set_eps(unet, 1e-6, nn.LayerNorm),
    "sines before cosines": swap_sines,
    "padding right and bottom only": pad_like_the_vae,
    "half as many heads": half_as_many_heads,
    "quick_gelu in the feed-forward layers": quick_gelu,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tolerance_catches_a(mistake, monkeypatch):
    config = UNetConfig.tiny(n_heads=(2, 4))
    unet = peers.random_network(config, seed=5, quiet=True)
    peer = peers.diffusers_unet(unet)
    latents, context = inputs(config)
    assert errors(unet, peer, latents, 300, context) <= PARITY
    wrong = copy.deepcopy(unet)
    MISTAKES[mistake](monkeypatch, wrong)
    assert errors(wrong, peer, latents, 300, context) > 2 * PARITY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["v1-shaped", "v2-shaped"])
def test_half_precision_rounds_no_worse_than_diffusers(name, dtype):
    """Both against float32. In half precision, the sinusoids of a timestep near 1000 would be off by whole periods."""
    config = LAYOUTS[name]
    unet = peers.random_network(config, seed=6)
    latents, context = inputs(config, h=16, w=16)
    with torch.no_grad():
        exact = unet(latents, 987, context)
        unet = unet.to(dtype)
        ours = relative_error(unet(latents.to(dtype), 987, context.to(dtype)), exact)
        theirs = relative_error(peers.diffusers_unet(unet)(latents.to(dtype), 987, context.to(dtype)).sample, exact)
    assert 0 < ours <= 1.5 * theirs
    assert ours <= 10 * torch.finfo(dtype).eps


def test_unet_leaves_its_inputs_alone():
    config = LAYOUTS["v1-shaped"]
    unet = peers.random_network(config, seed=7)
    latents, context = inputs(config)
    before = latents.clone(), context.clone()
    with torch.no_grad():
        unet(latents, 5, context)
    assert torch.equal(latents, before[0]) and torch.equal(context, before[1])


def test_unet_accepts_latents_in_any_memory_layout():
    config = LAYOUTS["v1-shaped"]
    unet = peers.random_network(config, seed=8)
    latents, context = inputs(config)
    strided = torch.cat([latents, latents], dim=3)[..., :8]
    with torch.no_grad():
        expected = unet(latents, 5, context)
        for other in (latents.to(memory_format=torch.channels_last), strided):
            torch.testing.assert_close(unet(other, 5, context), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter_and_match_diffusers():
    config = LAYOUTS["narrowing, three blocks a level"]  # norms over one channel would hide biases
    unet = peers.random_network(config, seed=9).requires_grad_(True)
    peer = copy.deepcopy(peers.diffusers_unet(unet)).requires_grad_(True)
    latents, context = inputs(config)
    unet(latents, 400, context).square().mean().backward()
    peer(latents, 400, context).sample.square().mean().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in unet.named_parameters():
        assert relative_error(parameter.grad, theirs[name].grad) <= 1e-4, name


@pytest.mark.parametrize(
    "document, size", [(peers.SD15_UNET, 859_520_964), (peers.SD21_UNET, 865_910_724)], ids=["v1.5", "v2.1"]
)
def test_full_size_parameters_are_those_of_diffusers(document, size):
    from diffusers import UNet2DConditionModel

    from minildm.checkpoint.config_json import unet_from_json

    with torch.device("meta"):
        ours, theirs = UNet(unet_from_json(document)), UNet2DConditionModel.from_config(document)
    assert shapes(ours) == shapes(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == size


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
