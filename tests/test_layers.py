"""The building blocks and the faster kernels, one by one, against their definitions."""

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from benchmarks.trace_calls import guided_ddim_step, trace
from peers import PARITY, noise, randomize, relative_error

from minildm import kernels
from minildm.layers import (
    GEGLU,
    Attention,
    Conv3x3,
    Downsample,
    ResnetBlock,
    SpatialTransformer,
    Upsample,
    attend,
    timestep_embedding,
    to_map,
    to_tokens,
)
from minildm.winograd import transformed_bytes, winograd, winograd_gradient, winograd_weight


@pytest.mark.parametrize("dim", [2, 32, 320])
def test_timestep_embedding_matches_diffusers(dim):
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0, 1, 17, 500, 999])
    theirs = get_timestep_embedding(timesteps, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, dim), theirs, rtol=0, atol=0)


def test_timestep_embedding_is_cosines_then_sines_of_decreasing_frequencies():
    t, dim = 999, 8
    angles = [t * 10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
    expected = torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]])
    # float32 holds an angle near 1000 to 3e-5
    torch.testing.assert_close(timestep_embedding(torch.tensor([t]), dim), expected, rtol=0, atol=1e-4)


def test_attention_is_the_softmax_of_scaled_products_head_by_head():
    query, key, value = (noise(2, n, 12, seed=n).double() for n in (5, 7, 8))
    value = value[:, :7]
    out = attend(query, key, value, n_heads=3)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (query[..., part] @ key[..., part].mT / 2).softmax(dim=-1)  # sqrt(d_head) = 2
        torch.testing.assert_close(out[..., part], weights @ value[..., part])


def test_attention_without_context_is_self_attention():
    attention = peers.randomize(Attention(16, 2))
    x = noise(1, 5, 16)
    torch.testing.assert_close(attention(x), attention(x, x), rtol=0, atol=0)


def test_geglu_matches_diffusers():
    from diffusers.models.activations import GEGLU as DiffusersGEGLU

    ours, theirs = GEGLU(16, 24), DiffusersGEGLU(16, 24)
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, 5, 16)
    assert relative_error(ours(x), theirs(x)) <= PARITY


def test_a_linear_projection_equals_the_convolution_with_the_same_weights():
    conv = peers.randomize(SpatialTransformer(32, 4, 24, 8, linear_projection=False))
    linear = SpatialTransformer(32, 4, 24, 8, linear_projection=True)
    linear.load_state_dict(
        {name: tensor.flatten(1) if tensor.dim() == 4 else tensor for name, tensor in conv.state_dict().items()}
    )
    x, context = noise(2, 32, 5, 7), noise(2, 77, 24)
    assert relative_error(linear(x, context), conv(x, context)) <= PARITY


@pytest.mark.parametrize("h, w, half", [(8, 8, (4, 4)), (7, 30, (4, 15)), (9, 13, (5, 7)), (1, 1, (1, 1))])
def test_downsampling_halves_rounding_up_and_upsampling_restores_a_given_size(h, w, half):
    x = noise(1, 8, h, w)
    down = Downsample(8)(x)
    assert down.shape[2:] == half
    assert Upsample(8)(down, size=(h, w)).shape == x.shape
    assert Upsample(8)(down).shape[2:] == (2 * half[0], 2 * half[1])


def test_upsampling_repeats_pixels_then_convolves():
    up = Upsample(4)
    x = noise(1, 4, 3, 5)
    expected = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(x), expected, rtol=1e-6, atol=1e-6)


def test_a_resnet_block_adds_the_time_embedding_at_every_position():
    block = peers.randomize(ResnetBlock(8, 8, 4, 1e-5, time_dim=6))
    block.conv1.weight.data.zero_(), block.conv1.bias.data.zero_()
    x, time = noise(2, 8, 4, 4), noise(2, 6)
    shift = block.time_emb_proj(time)[:, :, None, None].expand(2, 8, 4, 4)
    expected = x + block.conv2(F.silu(block.norm2(shift)))
    assert relative_error(block(x, time), expected) <= PARITY


@pytest.mark.parametrize("c_out, has_shortcut", [(8, False), (16, True)])
def test_a_resnet_block_has_a_shortcut_only_where_the_width_changes(c_out, has_shortcut):
    block = ResnetBlock(8, c_out, 4, 1e-6)
    assert (block.conv_shortcut is not None) is has_shortcut
    assert block.time_emb_proj is None
    assert block(noise(1, 8, 3, 3)).shape == (1, c_out, 3, 3)


def test_maps_and_tokens_are_views_of_the_same_memory():
    x = noise(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.shape == (2, 20, 3)
    assert torch.equal(tokens[1, 7], x[1, :, 1, 2])  # row by row: position 7 in rows of 5 is (1, 2)
    back = to_map(tokens, 4, 5)
    assert torch.equal(back, x)
    assert back.data_ptr() == tokens.data_ptr() == x.data_ptr()


# --- kernels ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_kernels_do_not_run_in_plain_blocks(monkeypatch):
    def fail(*arguments):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(kernels, "convolution", fail)
    layer, x = conv3x3(6, 10), noise(1, 6, 3, 3)
    with pytest.raises(AssertionError, match="a kernel ran"):
        layer(x)
    with kernels.plain():
        layer(x)
        with kernels.plain():
            pass
        assert not kernels.enabled
    with pytest.raises(ZeroDivisionError), kernels.plain():
        1 / 0  # noqa: B018
    assert kernels.enabled


# --- how deep a reader must go ---------------------------------------------------------------------------------------
def test_one_guided_ddim_step_crosses_four_files_and_seven_nested_calls():
    files, depth, stack = trace(guided_ddim_step())
    assert len(files) <= 4, files
    assert depth <= 7, stack


def conv3x3(c_in, c_out):
    return randomize(Conv3x3(c_in, c_out), seed=2).requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 5, 9), (2, 8, 8), (3, 1, 1), (1, 2, 31), (2, 17, 4)])
@pytest.mark.parametrize("tiles", [1, 7, 10**6])
def test_winograd_is_the_convolution_whatever_the_size_and_the_strips(shape, tiles):
    layer, x = conv3x3(6, 10), noise(shape[0], 6, *shape[1:])
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    for bias in (layer.bias, None):
        ours = winograd(x, winograd_weight(layer), bias, tiles)
        assert relative_error(ours, exact if bias is not None else exact - layer.bias[:, None, None]) <= PARITY
        assert ours.is_contiguous(memory_format=torch.channels_last) or 1 in shape


@pytest.mark.parametrize("shape", [(1, 5, 9), (2, 8, 8), (3, 1, 1), (1, 2, 31), (2, 17, 4)])
@pytest.mark.parametrize("tiles", [1, 7, 10**6])
def test_winograds_gradient_is_the_convolutions(shape, tiles):
    layer, dy = conv3x3(6, 10), noise(shape[0], 10, *shape[1:])
    x_shape = (shape[0], 6, *shape[1:])
    exact = torch.nn.grad.conv2d_input(x_shape, layer.weight.double(), dy.double(), padding=1)
    ours = winograd_gradient(dy, winograd_weight(layer), x_shape, tiles)
    assert ours.shape == x_shape and relative_error(ours, exact) <= PARITY


@pytest.mark.parametrize("c_out, runs", [(640, True), (641, False)])
def test_winograd_trains_layers_of_up_to_640_channels(c_out, runs):
    layer, x, dy = conv3x3(320, c_out), noise(1, 320, 6, 7).requires_grad_(), noise(1, c_out, 6, 7)
    with kernels.plain():
        (exact,) = torch.autograd.grad(layer(x), x, dy)
    y = layer(x)
    (ours,) = torch.autograd.grad(y, x, dy)
    assert (y.grad_fn.name() == "WinogradConvolutionBackward") == runs
    assert relative_error(ours, exact) <= PARITY
    with torch.no_grad():
        assert kernels.winograd_pays(layer, x)
        with kernels.lean():
            assert kernels.winograd_pays(layer, x) == runs


@pytest.mark.parametrize("shape", [(640, 640, 4, 4), (320, 320, 6, 6)])
def test_a_bias_that_is_trained_gets_its_gradient(shape):
    layer = conv3x3(*shape[:2])
    layer.bias.requires_grad_(True)
    layer(noise(1, shape[0], *shape[2:])).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((shape[1],), float(shape[2] * shape[3])))


@torch.no_grad()
def test_winograd_runs_where_it_pays_and_is_within_parity_there():
    layer, x = conv3x3(320, 320), noise(1, 320, 6, 7)
    assert kernels.winograd_pays(layer, x)
    with kernels.plain():
        plain = layer(x)
    assert transformed_bytes(torch.nn.Sequential(layer)) == 0
    assert not torch.equal(layer(x), plain) and relative_error(layer(x), plain) <= PARITY
    assert transformed_bytes(torch.nn.Sequential(layer)) == 16 * 320 * 320 * 4
    assert not kernels.winograd_pays(layer, x[:, :, :4, :4])
    assert not kernels.winograd_pays(layer, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.winograd_pays(layer, x)
    assert not kernels.winograd_pays(conv3x3(319, 320), x[:, :319])
    layer.requires_grad_(True)
    assert torch.equal(layer(x), plain)


@torch.no_grad()
def test_winograd_follows_the_weight_when_it_changes():
    layer, x = conv3x3(320, 320), noise(1, 320, 6, 6)

    def error():
        with kernels.plain():
            plain = layer(x)
        return relative_error(layer(x), plain)

    assert error() <= PARITY
    for _ in range(3):  # as a merge does; the second might land where the first weight lay
        layer.weight.data = layer.weight + 0.1 * torch.rand_like(layer.weight)
        assert error() <= PARITY
    layer.weight.mul_(-2)
    assert error() <= PARITY
    layer.load_state_dict(conv3x3(320, 320).state_dict(), assign=True)
    layer.requires_grad_(False)
    assert error() <= PARITY


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 1, 3), (3, 7, 2), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_as_one_product_has_its_values_and_its_gradient(shape, dtype):
    """Against float64: within parity in float32, and hardly less exact than the convolution in either precision. (In
    bfloat16 the gradient's nine terms are rounded before their sum: a factor of 1.4.)"""
    layer = conv3x3(640, 640).to(dtype)
    x, dy = (noise(shape[0], 640, *shape[1:], seed=i).to(dtype) for i in (0, 1))
    assert kernels.product_pays(layer, x)

    def values_and_gradient(convolve, kind):
        given = x.to(kind, copy=True).requires_grad_()
        y = convolve(given)
        y.backward(dy.to(kind))
        return y.detach(), given.grad

    exact = values_and_gradient(
        lambda given: F.conv2d(given, layer.weight.double(), layer.bias.double(), padding=1), torch.float64
    )
    plain = values_and_gradient(lambda given: F.conv2d(given, layer.weight, layer.bias, padding=1), dtype)
    for ours, theirs, truth in zip(values_and_gradient(layer, dtype), plain, exact):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert relative_error(ours, truth) <= PARITY
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()
    without_bias = exact[0] - layer.bias.double()[:, None, None]
    layer.bias = None
    with torch.no_grad():
        assert relative_error(layer(x), without_bias) <= (PARITY if dtype == torch.float32 else 0.01)


def test_a_convolution_becomes_one_product_where_it_pays():
    layer, x = conv3x3(640, 640), noise(1, 640, 5, 6)
    assert kernels.product_pays(layer, x) and not kernels.product_pays(layer, noise(1, 640, 32, 32))
    assert not kernels.product_pays(conv3x3(320, 640), x[:, :320])
    assert not kernels.product_pays(layer, x.double()) and not kernels.product_pays(layer, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.product_pays(layer, x)
    layer.requires_grad_(True)
    assert not kernels.product_pays(layer, x)
