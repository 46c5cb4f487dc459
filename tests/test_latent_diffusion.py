"""The assembled model: prompts in, images out; refused input; overflow in half precision."""

import copy
import math
import warnings
from dataclasses import replace

import numpy as np
import peers
import pytest
import torch
from peers import assert_says, relative_error, shared_model
from PIL import Image

import minildm
from minildm.config import ModelConfig
from minildm.errors import InputError
from minildm.latent_diffusion import to_pil, usual_guidance
from minildm.loading import find_base
from minildm.schedule import NoiseSchedule

PROMPTS = ["chest x-ray, age 47 male", "a cat", ""]
SAMPLERS = {
    "ddim": {},
    "ddim, eta 0.7": {"eta": 0.7},
    "ddpm": {},
    "plms": {},
    "dpm++": {},
    "dpm++, karras": {"karras": True},
}
KINDS = pytest.mark.parametrize("kind", SAMPLERS)


@pytest.fixture(scope="module")
def model():
    return peers.random_model(ModelConfig.tiny(), seed=1)


def sample(model, prompts, kind="ddim", **options):
    return model.sample(
        prompts, sampler=kind.partition(",")[0], **({"steps": 4, "output": "latent"} | SAMPLERS[kind] | options)
    )


# --- whole images against diffusers' pipeline ------------------------------------------------------------------------
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("kind", ["ddim", "plms", "dpm++", "dpm++, karras"])
def test_images_match_diffusers_pipeline(kind, v2, tmp_path):
    """Tokens, text features, guided sampling and decoding together; only the initial noise is shared."""
    model = peers.random_model(ModelConfig.tiny(v2=v2), seed=2)
    peers.write_folder(model, tmp_path)
    peers.write_tokenizer(tmp_path / "tokenizer")
    pipe = peers.diffusers_pipeline(tmp_path)
    pipe.tokenizer.pad_token = "!" if v2 else "<|endoftext|>"
    sampler = kind.partition(",")[0]
    pipe.scheduler = peers.diffusers_scheduler(sampler, "v" if v2 else "epsilon", "karras" in kind)
    latents = torch.randn(2, 4, 8, 10, generator=torch.Generator().manual_seed(0))
    prompts, negative = PROMPTS[:2], "blurry, text"
    theirs = pipe(
        prompts,
        negative_prompt=[negative] * 2,
        num_inference_steps=8,
        guidance_scale=5.0,
        height=64,
        width=80,
        latents=latents,
        output_type="pt",
    ).images
    ours = sample(
        model,
        prompts,
        kind,
        negative_prompt=negative,
        steps=8,
        guidance=5.0,
        height=64,
        width=80,
        latents=latents,
        output="tensor",
    )
    assert relative_error((ours + 1) / 2, theirs) <= 1e-4
    assert theirs.std() > 0.1  # not saturated by clamping
    inside = (theirs > 0) & (theirs < 1)
    assert inside.float().mean() > 0.3


# --- one generator per image ----------------------------------------------------------------------------------------
@KINDS
def test_image_i_of_seed_s_is_the_image_of_seed_s_plus_i(kind, model):
    together = sample(model, PROMPTS, kind, seed=40)
    for i, prompt in enumerate(PROMPTS):
        assert relative_error(together[i : i + 1], sample(model, [prompt], kind, seed=40 + i)) <= 1e-4
    assert relative_error(together[1:], sample(model, PROMPTS[1:], kind, seed=41)) <= 1e-4


@pytest.mark.parametrize("seeds", [[7, 3], (7, 3), np.array([7, 3]).tolist(), [np.int64(7), torch.tensor(3)]])
def test_a_list_of_seeds_gives_each_image_its_own(seeds, model):
    both = sample(model, PROMPTS[:2], "ddpm", seed=seeds)
    one = sample(model, PROMPTS[:2], "ddpm", seed=7)
    assert torch.equal(both[0], one[0])
    assert relative_error(both[1:], sample(model, PROMPTS[1:2], "ddpm", seed=3)) <= 1e-4


def test_what_the_other_rows_of_a_batch_hold_changes_not_a_bit(model):
    """--like relies on it. The number of rows does matter: matrix products of other shapes round differently."""
    together = sample(model, [*PROMPTS, "b"], seed=[5, 6, 7, 8])
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(sample(model, [prompt] * 4, seed=[5 + i] * 4)[i], together[i])


@KINDS
def test_the_same_seed_gives_the_same_image_and_another_seed_another_image(kind, model):
    first = sample(model, PROMPTS[:1], kind, seed=7)
    torch.manual_seed(123)  # the global generator has no effect
    assert torch.equal(sample(model, PROMPTS[:1], kind, seed=7), first)
    assert relative_error(sample(model, PROMPTS[:1], kind, seed=8), first) > 0.1


@pytest.mark.parametrize("kind", ["ddpm", "ddim, eta 0.7"])
def test_generators_give_the_initial_latents_first_and_then_noise_once_per_step(kind, model):
    """So that other tools can reproduce an image."""
    path = []
    sample(model, ["a"], kind, seed=5, guidance=1.0, callback=lambda step, latents: path.append(latents))
    generator = torch.Generator("cpu").manual_seed(5)
    initial = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler = peers.diffusers_scheduler(kind.partition(",")[0])
    scheduler.set_timesteps(4)
    latents, unet = initial, peers.diffusers_unet(model.unet)
    context = model.encode_prompt(["a"])
    extra = {"eta": 0.7} if "eta" in kind else {}
    with torch.no_grad():
        for t, ours in zip(scheduler.timesteps, path):
            predicted = unet(latents, t, context).sample
            latents = scheduler.step(predicted, t, latents, generator=generator, **extra).prev_sample
            assert relative_error(ours, latents) <= 1e-4


def test_sampling_starts_from_given_latents_and_does_not_change_them(model):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    before = latents.clone()
    given = sample(model, ["a"], seed=99, latents=latents)
    assert torch.equal(given, sample(model, ["a"], seed=3))  # the initial noise of seed 3
    assert torch.equal(latents, before)


# --- outputs ---------------------------------------------------------------------------------------------------------
def test_the_three_kinds_of_output_are_the_same_image(model):
    options = {"steps": 3, "seed": 1, "height": 40, "width": 72}
    latents = model.sample(PROMPTS, output="latent", **options)
    images = model.sample(PROMPTS, output="tensor", **options)
    pil_images = model.sample(PROMPTS, output="pil", **options)
    assert latents.shape == (3, 4, 5, 9) and images.shape == (3, 3, 40, 72)
    assert latents.dtype == images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(model.decode_latents(latents).clamp(-1, 1), images)
    assert {(image.size, image.mode) for image in pil_images} == {((72, 40), "RGB")}
    for pil_image, image in zip(pil_images, images):
        expected = np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5)
        assert np.abs(np.asarray(pil_image, dtype=float) - expected).max() <= 1


def test_pixels_are_rounded_and_clamped_to_eight_bits():
    values = torch.tensor([-5.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    (image,) = to_pil(values.expand(1, 3, 1, 7))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]  # 0.1275, 127.5, 191.25


@pytest.mark.parametrize("height, width", [(224, 224), (8, 8), (16, 120), (None, None), (None, 32)])
def test_any_multiple_of_eight_is_a_size(height, width):
    """224 px give latents of height 28, 14, 7 and 4 on the four levels."""
    config = ModelConfig.tiny()
    config = replace(
        config,
        unet=peers.UNetConfig.tiny(
            widths=(32,) * 4, attention=(False, False, True, False), n_heads=(4,) * 4, latent_size=6
        ),
    )
    model = peers.random_model(config, seed=3)
    images = model.sample(["a"], steps=1, height=height, width=width, output="tensor")
    assert images.shape == (1, 3, height or 48, width or 48)
    assert images.isfinite().all()


def test_returned_tensors_can_be_used_in_training(model):
    for output in ("latent", "tensor"):
        result = model.sample(["a"], steps=1, output=output)
        assert not result.is_inference() and not result.requires_grad
        weight = torch.ones(1, requires_grad=True)
        (result * weight).square().sum().backward()
        assert weight.grad.item() == pytest.approx(2 * result.square().sum().item(), rel=1e-4)


@KINDS
@pytest.mark.parametrize("steps", [1, 5])
def test_the_callback_is_called_after_every_network_call(kind, steps, model):
    calls = []
    latents = sample(model, ["a", "b"], kind, steps=steps, callback=lambda *arguments: calls.append(arguments))
    expected = steps + (kind == "plms" and steps > 1)
    assert [step for step, _ in calls] == list(range(1, expected + 1))
    assert all(preview.shape == latents.shape for _, preview in calls)
    assert torch.equal(calls[-1][1], latents)


def test_integers_and_floats_of_numpy_are_accepted(model):
    ours = sample(model, ["a"], steps=np.int64(2), guidance=np.float32(2), height=np.int64(16))
    assert torch.equal(ours, sample(model, ["a"], steps=2, guidance=2.0, height=16))


def test_guidance_none_is_the_guidance_that_suits_the_model(model):
    assert usual_guidance(model.config) == 3.0 and usual_guidance(ModelConfig()) == 7.5
    assert torch.equal(sample(model, ["a"], guidance=None), sample(model, ["a"], guidance=3.0))
    assert torch.equal(sample(model, ["a"]), sample(model, ["a"], guidance=3.0))  # as on the command line


# --- prompts and guidance --------------------------------------------------------------------------------------------
def count_batches(model, monkeypatch):
    batches, forward = [], model.unet.forward

    def counting(latents, timesteps, context):
        batches.append((len(latents), len(context)))
        return forward(latents, timesteps, context)

    monkeypatch.setattr(model.unet, "forward", counting)
    return batches


@pytest.mark.parametrize("guidance, rows", [(0, 2), (0.5, 2), (1, 2), (1.1, 4), (7.5, 4)])
def test_guidance_up_to_one_runs_half_the_batch(guidance, rows, model, monkeypatch):
    batches = count_batches(model, monkeypatch)
    sample(model, ["a", "b"], guidance=guidance, steps=2)
    assert batches == [(rows, rows)] * 2


def test_without_guidance_the_negative_prompt_has_no_effect(model):
    with pytest.warns(UserWarning, match="negative prompt is not used: guidance 1 is off"):
        unguided = sample(model, ["a"], guidance=1, negative_prompt="x")
    assert torch.equal(unguided, sample(model, ["a"], guidance=1))
    assert relative_error(sample(model, ["a"], negative_prompt="x y z"), sample(model, ["a"])) > 1e-3


def test_a_negative_prompt_is_for_all_images_or_for_one_each(model):
    one = sample(model, ["a", "b"], negative_prompt="x")
    assert torch.equal(sample(model, ["a", "b"], negative_prompt=["x", "x"]), one)
    each = sample(model, ["a", "b"], negative_prompt=["x", "y"])
    assert torch.equal(each[0], one[0]) and not torch.equal(each[1], one[1])
    assert relative_error(each[1:], sample(model, ["b"], negative_prompt="y", seed=1)) <= 1e-4


def test_a_single_string_is_one_prompt(model):
    assert torch.equal(sample(model, "a cat"), sample(model, ["a cat"]))


def test_sample_warns_of_a_cut_prompt(model):
    with pytest.warns(UserWarning, match="has 80 tokens and only the first 75 are read; cut: 'word( word){4}'"):
        sample(model, ["word " * 80], steps=1)


# --- refused input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, says",
    [
        ({"prompts": []}, ["no prompts", "give at least one"]),
        ({"steps": 0}, ["--steps must be a number at least 1 and at most 1000, got 0"]),
        ({"steps": -1}, ["--steps must be a number at least 1 and at most 1000, got -1"]),
        ({"steps": 1001}, ["--steps must be a number at least 1 and at most 1000, got 1001"]),
        ({"guidance": -0.1}, ["--guidance must be a number at least 0", "-0.1"]),
        ({"guidance": math.nan}, ["--guidance must be a number at least 0", "nan"]),
        ({"guidance": math.inf}, ["--guidance must be a number at least 0", "inf"]),
        ({"sampler": "euler"}, ["--sampler must be one of ddim, ddpm, plms, dpm++, got 'euler'"]),
        ({"eta": -0.1}, ["--eta must be a number at least 0 and at most 1, got -0.1"]),
        ({"eta": 1.5}, ["--eta must be a number at least 0 and at most 1, got 1.5"]),
        ({"eta": math.nan}, ["--eta must be a number at least 0 and at most 1, got nan"]),
        ({"eta": 0.5, "sampler": "plms"}, ["--eta is for the ddim sampler only", "0.5", "plms"]),
        ({"karras": True}, ["--karras is for the dpm++ sampler only", "ddim"]),
        ({"height": 500}, ["height must be a positive multiple of 8, got 500; try 496"]),
        ({"width": 30}, ["width must be a positive multiple of 8, got 30; try 32"]),
        ({"height": 0}, ["height must be a positive multiple of 8, got 0; try 8"]),
        ({"width": -64}, ["width must be a positive multiple of 8, got -64"]),
        ({"seed": -1}, ["seed must be in [0, 2^63), got -1"]),
        ({"seed": 2**63}, ["seed must be in [0, 2^63), got 9223372036854775808"]),
        ({"seed": 2**63 - 1, "prompts": ["a", "b"]}, ["seed must be in [0, 2^63), got 9223372036854775808"]),
        ({"seed": [1, 2]}, ["2 seeds for 1 prompts; give one, or one for each"]),
        ({"seed": []}, ["0 seeds for 1 prompts"]),
        ({"seed": [-1]}, ["seed must be in [0, 2^63), got -1"]),
        ({"seed": 1.5}, ["seed must be a whole number, or a list of one per prompt, got 1.5"]),
        ({"seed": None}, ["seed must be a whole number", "None"]),
        ({"seed": "3"}, ["seed must be a whole number", "'3'"]),
        ({"seed": ["3"]}, ["seed must be a whole number", "['3']"]),
        ({"output": "numpy"}, ["output must be pil, tensor or latent, got 'numpy'"]),
        ({"negative_prompt": ["x", "y"]}, ["2 negative prompts for 1 prompts", "give one, or one for each"]),
        ({"latents": torch.zeros(1, 4, 8, 9)}, ["latents must be (1, 4, 8, 8)", "(1, 4, 8, 9)"]),
        ({"latents": torch.zeros(2, 4, 8, 8)}, ["latents must be (1, 4, 8, 8) for 1 images", "(2, 4, 8, 8)"]),
    ],
)
def test_invalid_arguments_are_refused_before_any_work(options, says, model, monkeypatch):
    batches = count_batches(model, monkeypatch)
    with pytest.raises(InputError) as caught:
        model.sample(**({"prompts": ["a"], "steps": 2} | options))
    assert_says(caught, *says)
    assert not batches


# --- latents and images ----------------------------------------------------------------------------------------------
def test_the_scaling_factor_is_applied_on_the_way_in_and_out(model):
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = model.encode_images(images, torch.Generator().manual_seed(1))
        z = model.vae.encode(images).sample(torch.Generator().manual_seed(1))
        torch.testing.assert_close(latents, 0.18215 * z)
        torch.testing.assert_close(model.decode_latents(latents), model.vae.decode(z), rtol=1e-4, atol=1e-5)


def test_images_of_every_clear_shape_are_encoded(model):
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grey = image[:, :1]

    def encode(images):
        return model.encode_images(images, torch.Generator().manual_seed(1))

    assert encode(image).shape == (1, 4, 2, 3)
    assert torch.equal(encode(image[0]), encode(image))
    expected = encode(grey.expand(-1, 3, -1, -1))
    assert torch.equal(encode(grey), expected) and torch.equal(encode(grey[0]), expected)
    assert torch.equal(encode(image.double()), encode(image))
    assert encode(image.expand(5, -1, -1, -1)).shape == (5, 4, 2, 3)
    beyond = 1.5 * image  # what a decoder or a filter may give
    assert encode(beyond).isfinite().all()


@pytest.mark.parametrize(
    "images, says",
    [
        (torch.zeros(16, 16), "got shape (16, 16)"),
        (torch.zeros(2, 16, 16), "got shape (2, 16, 16)"),
        (torch.zeros(1, 4, 16, 16), "got shape (1, 4, 16, 16)"),
        (torch.zeros(1, 16, 16, 3), "got shape (1, 16, 16, 3)"),
        (torch.zeros(1, 1, 3, 16, 16), "got shape (1, 1, 3, 16, 16)"),
        (torch.zeros(0, 3, 16, 16), "got shape (0, 3, 16, 16)"),
        (torch.zeros(1, 3, 16, 20), "multiples of 8, got (16, 20)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8; divide 8-bit pixels by 127.5 and subtract 1"),
        (torch.full((1, 3, 16, 16), 200.0), "got values from 200 to 200; scale them first"),
        (torch.full((1, 3, 16, 16), math.nan), "got values from nan to nan"),
        (np.zeros((1, 3, 16, 16), np.float32), "got a ndarray"),
        ([Image.new("L", (16, 16))], "got a list"),
    ],
)
def test_images_of_another_shape_kind_or_range_are_refused(images, says, model):
    with pytest.raises(InputError) as caught:
        model.encode_images(images)
    assert_says(caught, says)


def overflowing_model(seed=4):
    """(float16, float32): a model whose decoder exceeds the largest float16 on the way to ordinary pixels."""
    exact = peers.random_model(ModelConfig.tiny(), seed=seed)
    weight = exact.vae.decoder.up_blocks[1].resnets[-1].conv2.weight  # its output is normalised later on
    weight.data = (weight.data * 3e5).half().float()
    assert weight.isfinite().all()
    return copy.deepcopy(exact).half(), exact


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32_with_a_warning():
    half, exact = overflowing_model()
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not half.vae.decode((latents / 0.18215).half()).isfinite().all()
        with pytest.warns(UserWarning, match="non-finite pixels in torch.float16; it decodes in float32 from here on"):
            images = half.decode_latents(latents)
        assert images.dtype == torch.float32
        assert relative_error(images, exact.decode_latents(latents)) <= 1e-2  # the weights were rounded to half
        assert half.unet.conv_in.weight.dtype == torch.float16  # the U-Net does not change
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one warning only
            assert torch.equal(half.decode_latents(latents), images)


def test_after_an_overflow_in_sample_the_vae_can_still_be_trained():
    model, _ = overflowing_model()
    with pytest.warns(UserWarning, match="decodes in float32 from here on"):
        images = model.sample(["a"], steps=1, output="tensor")
    assert images.isfinite().all()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    # Training continues with the same VAE, so its weights must not be inference tensors.
    latents = torch.randn(1, 4, 2, 2, requires_grad=True)
    model.decode_latents(latents).square().mean().backward()
    assert latents.grad.isfinite().all()


def test_images_can_be_encoded_after_the_vae_has_changed_to_float32():
    model, _ = overflowing_model()
    with pytest.warns(UserWarning, match="decodes in float32"):
        model.sample(["a"], steps=1, output="tensor")
    latents = model.encode_images(torch.zeros(1, 3, 16, 16), torch.Generator().manual_seed(0))
    assert latents.shape == (1, 4, 2, 2) and latents.isfinite().all()
    assert latents.dtype == torch.float16  # what the U-Net reads


def test_non_finite_pixels_in_float32_are_an_error():
    model = peers.random_model(ModelConfig.tiny(), seed=4)
    model.vae.decoder.conv_out.bias.data[:] = math.nan
    with torch.no_grad(), pytest.raises(InputError, match="non-finite pixels in float32"):
        model.decode_latents(torch.zeros(1, 4, 2, 2))


def test_non_finite_latents_are_an_error():
    model = peers.random_model(ModelConfig.tiny(), seed=4).to(torch.bfloat16)
    model.unet.conv_out.bias.data[:] = math.nan
    with pytest.raises(InputError, match=r"non-finite latents in torch\.bfloat16"):
        model.sample(["a"], steps=2)
    assert model.vae.post_quant_conv.weight.dtype == torch.bfloat16  # the VAE was not converted in vain


def first_timestep(model, monkeypatch, **options):
    """(the first timestep the U-Net sees, the warnings)."""
    seen, forward = [], model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, t, c: seen.append(int(t)) or forward(x, t, c))

    class Seen(Exception):
        pass

    def stop(step, latents):
        raise Seen

    with warnings.catch_warnings(record=True) as caught, pytest.raises(Seen):
        warnings.simplefilter("always")
        model.sample(["a"], guidance=1, callback=stop, **options)
    monkeypatch.undo()
    return seen[0], [str(warning.message) for warning in caught]


@KINDS
def test_a_first_timestep_far_from_the_end_is_warned_of_for_every_number_of_steps(kind, model, monkeypatch):
    """1 to 9 steps start at 1 to 889, 334 at 667, 600 at 600; 10 start at 901. DPM-Solver++ starts at 999."""
    options = {"sampler": kind.partition(",")[0], **SAMPLERS[kind]}
    for steps in (*range(1, 13), 20, 50, 91, 100, 300, 334, 400, 500, 501, 600, 999, 1000):
        t, messages = first_timestep(model, monkeypatch, steps=steps, **options)
        assert len(messages) == (t < 900), (steps, t, messages)
        if messages:
            assert_says(messages[0], f"{options['sampler']} with {steps} steps", f"timestep {t} of 1000", "dpm++")
        if "dpm++" in kind:
            assert t == 999


def test_an_image_to_start_from_may_start_anywhere(model, monkeypatch):
    image = torch.zeros(1, 3, 64, 64)
    assert first_timestep(model, monkeypatch, steps=20, init_images=image, strength=0.3) == (251, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_samples_near_float32(dtype):
    exact = peers.random_model(ModelConfig.tiny(), seed=5)
    options = {"steps": 3, "guidance": 2.0, "output": "latent"}
    expected = exact.sample(["a cat"], **options)
    ours = copy.deepcopy(exact).to(dtype).sample(["a cat"], **options)
    assert ours.dtype == torch.float32  # the sampler computes in float32
    assert 0 < relative_error(ours, expected) <= 30 * torch.finfo(dtype).eps


# --- the model as a whole --------------------------------------------------------------------------------------------
def test_sampling_changes_no_weight_and_no_setting(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sample(model, PROMPTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameter_names_start_with_their_network(model):
    assert {name.partition(".")[0] for name in model.state_dict()} == {"unet", "vae", "text_encoder"}


def test_the_schedule_and_the_padding_are_those_of_the_config():
    model = peers.random_model(ModelConfig.tiny(v2=True))
    assert isinstance(model.schedule, NoiseSchedule) and model.schedule.prediction == "v"
    assert model.tokenize(["a"])[0, -1] == 0


def test_the_base_hash_is_that_of_the_file_with_the_unet(tmp_path):
    import hashlib

    path = peers.write_single_file(shared_model(), tmp_path / "model.safetensors")
    loaded = minildm.load(path, device="cpu")
    assert loaded.base_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.dtype == torch.float32 and loaded.device == torch.device("cpu") and not loaded.training
    folder = peers.write_folder(shared_model(), tmp_path / "folder")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert minildm.load(folder, device="cpu").base_hash == hashlib.sha256(unet.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_given_by_its_name(dtype, tmp_path):
    folder = peers.write_folder(peers.random_model(ModelConfig.tiny()), tmp_path)
    assert minildm.load(folder, device="cpu", dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["complex64", "fp16", "int8", torch.int8, torch.float8_e4m3fn, 16, "nn", ""])
def test_other_dtypes_are_refused(dtype, tmp_path):
    with pytest.raises(InputError) as caught:
        minildm.load(tmp_path, device="cpu", dtype=dtype)
    assert_says(caught, "dtype must be one of float32, float16, bfloat16, float64, got", repr(dtype))


# --- which base ------------------------------------------------------------------------------------------------------
def test_a_published_model_in_weights_takes_precedence_over_the_embedded_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        find_base(tmp_path)
    assert_says(caught, tmp_path, "v1-5-pruned-emaonly.safetensors", "--base")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "tiny" / "unet").mkdir(parents=True)
    assert find_base(tmp_path) == tmp_path / "tiny"
    (tmp_path / "sd.safetensors").write_text("")
    assert find_base(tmp_path) == tmp_path / "sd.safetensors"
    (tmp_path / "other" / "unet").mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        find_base(tmp_path)
    assert_says(caught, "several base models", "other, sd.safetensors", "--base")


def test_to_pil_gives_rows_of_pixels_in_order():
    image = torch.full((1, 3, 2, 3), -1.0)
    image[0, 0, 0, 2] = 1.0  # red, first row, last column
    (pil_image,) = to_pil(image)
    assert isinstance(pil_image, Image.Image) and pil_image.size == (3, 2) and pil_image.mode == "RGB"
    assert pil_image.getpixel((2, 0)) == (255, 0, 0) and pil_image.getpixel((0, 1)) == (0, 0, 0)
