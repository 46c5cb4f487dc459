"""Image-to-image sampling against diffusers' pipeline; which image is read how; what an image depends on."""

import copy
import functools
import math

import numpy as np
import peers
import pytest
import torch
from made_data import dicom
from peers import assert_says, noise, relative_error
from PIL import Image

from minildm.config import ModelConfig, SamplingSettings
from minildm.data import reading
from minildm.data.records import Record
from minildm.errors import InputError
from minildm.samplers import SAMPLERS, starting_point
from minildm.sampling import read_init_image
from minildm.schedule import NoiseSchedule

PROMPTS = ["chest x-ray, age 47 male", "a cat"]
KINDS = {
    "ddim": {},
    "ddim, eta 0.7": {"eta": 0.7},
    "ddpm": {},
    "plms": {},
    "dpm++": {},
    "dpm++, karras": {"karras": True},
}


@pytest.fixture(scope="module")
def model():
    return peers.random_model(ModelConfig.tiny(), seed=1)


def pictures(n=1, height=64, width=64, seed=0):
    """Smooth images in [-1, 1], (n, 3, height, width)."""
    coarse = noise(n, 3, height // 8, width // 8, seed=seed)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").tanh()


def sample(model, prompts=PROMPTS, kind="ddim", **options):
    defaults = {"steps": 10, "output": "latent", "init_images": pictures()}
    return model.sample(prompts, sampler=kind.partition(",")[0], **(defaults | KINDS[kind] | options))


# --- diffusers -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A function from v2 to (our model, diffusers' img2img pipeline of it)."""
    from diffusers import StableDiffusionImg2ImgPipeline

    @functools.cache
    def build(v2):
        folder = tmp_path_factory.mktemp("folder")
        model = peers.random_model(ModelConfig.tiny(v2=v2), seed=2)
        peers.write_folder(model, folder)
        peers.write_tokenizer(folder / "tokenizer")
        parts = peers.diffusers_pipeline(folder).components
        pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        pipe.tokenizer.pad_token = "!" if v2 else "<|endoftext|>"
        pipe.set_progress_bar_config(disable=True)
        return model, pipe

    return build


@pytest.mark.parametrize(
    "v2, steps, strength", [(False, 8, 0.6), (True, 8, 0.6), (False, 7, 0.2), (False, 50, 0.07), (False, 6, 1.0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_trajectories_match_diffusers(kind, v2, steps, strength, pipeline):
    """The same seeds, so the VAE's sample, the initial noise and each step's noise come in the same order."""
    model, pipe = pipeline(v2)
    pipe.scheduler = peers.diffusers_scheduler(
        kind.partition(",")[0], model.config.schedule.prediction, "karras" in kind
    )
    images, theirs, ours = pictures(2, 48, 64, seed=3), [], []

    def keep(pipe, step, t, tensors):
        theirs.append(tensors["latents"])
        return tensors

    final = pipe(
        PROMPTS,
        image=(images + 1) / 2,
        negative_prompt=["blurry"] * 2,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=4.0,
        eta=KINDS[kind].get("eta", 0.0),
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        callback_on_step_end=keep,
        output_type="latent",
    ).images
    result = sample(
        model,
        kind=kind,
        negative_prompt="blurry",
        steps=steps,
        strength=strength,
        guidance=4.0,
        seed=5,
        init_images=images,
        callback=lambda step, latents: ours.append(latents),
    )
    settings = SamplingSettings(kind.partition(",")[0], steps, strength=strength)
    assert len(ours) == len(theirs) == settings.network_calls
    for our, their in zip(ours, theirs):
        assert relative_error(our, their) <= 1e-4
    assert relative_error(result, final) <= 1e-4


@pytest.mark.parametrize("steps", [1, 3, 20, 37, 50, 999])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_skipped_steps_are_those_of_diffusers_for_every_strength(sampler, steps):
    from diffusers import StableDiffusionImg2ImgPipeline

    class Pipeline:
        scheduler = peers.diffusers_scheduler(sampler)

    Pipeline.scheduler.set_timesteps(steps)
    for percent in range(1, 101):
        strength = percent / 100
        theirs, _ = StableDiffusionImg2ImgPipeline.get_timesteps(Pipeline, steps, strength, "cpu")
        if len(theirs) == 0:
            with pytest.raises(InputError, match="leaves no step to run"):
                SamplingSettings(sampler, steps, strength=strength)
            continue
        settings = SamplingSettings(sampler, steps, strength=strength)
        assert settings.network_calls == len(theirs)
        assert starting_point(sampler, NoiseSchedule(), steps, settings.skipped_steps)[0] == theirs[0]


# --- strength --------------------------------------------------------------------------------------------------------
def test_less_strength_keeps_more_of_the_image(model):
    encoded = model.encode_images(pictures())
    errors = [relative_error(sample(model, ["a"], strength=s), encoded) for s in (0.1, 0.4, 0.7, 1.0)]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 2


def test_without_a_strength_it_is_0_8(model):
    assert torch.equal(sample(model), sample(model, strength=0.8))
    assert not torch.equal(sample(model), sample(model, strength=0.7))


def test_at_strength_one_next_to_nothing_of_the_image_is_left(model):
    def change(strength):  # when the image becomes its negative
        images = (pictures(), -pictures())
        return relative_error(*(sample(model, ["a"], strength=strength, init_images=each) for each in images))

    assert change(1.0) < change(0.3) / 3


def test_the_smallest_strength_in_the_message_is_one_that_works():
    for steps in range(1, 1001):
        with pytest.raises(InputError, match="leaves no step to run") as caught:
            SamplingSettings(steps=steps, strength=1e-9)
        least = float(str(caught.value).partition("at least ")[2].partition(",")[0])
        assert SamplingSettings(steps=steps, strength=least).network_calls >= 1
    assert SamplingSettings(steps=50, strength=0.58).skipped_steps == 22  # 50 * 0.58 is 28.999999999999996


@pytest.mark.parametrize("kind", ["ddim", "ddim, eta 0.7", "ddpm", "dpm++"])
def test_a_sampler_that_starts_late_makes_the_last_of_the_calls(kind):
    """If there is only one image, the noise in every call is known, and samplers must bring it back to that image. PLMS
    ends with a little noise left, as in diffusers; Karras' noise levels lie between the timesteps."""
    schedule, point = NoiseSchedule(), noise(1, 4, 3, 3)
    calls = []

    def denoise(latents, t):
        calls.append(t)
        alpha_bar = schedule.alpha_bar[t]
        return (latents - math.sqrt(alpha_bar) * point) / math.sqrt(1 - alpha_bar)

    sampler = kind.partition(",")[0]
    t, alpha_bar = starting_point(sampler, schedule, 20, 12)
    start = math.sqrt(alpha_bar) * point + math.sqrt(1 - alpha_bar) * noise(1, 4, 3, 3, seed=1)
    path = list(SAMPLERS[sampler](denoise, start, schedule, 20, lambda: noise(1, 4, 3, 3, seed=2), 12, **KINDS[kind]))
    assert len(path) == len(calls) == 8 and calls[0] == t
    assert relative_error(path[-1], point) < 0.05


# --- one generator per image -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_image_i_depends_on_its_seed_and_not_on_its_batch(kind, model):
    images = pictures(3)
    together = sample(model, ["a", "b", "c"], kind, init_images=images, seed=40)
    for i, prompt in enumerate("abc"):
        alone = sample(model, [prompt], kind, init_images=images[i : i + 1], seed=40 + i)
        assert relative_error(together[i : i + 1], alone) <= 1e-4
        assert torch.equal(sample(model, [prompt], kind, init_images=images[i : i + 1], seed=40 + i), alone)


def test_the_vaes_sample_takes_the_first_draw_and_the_initial_noise_the_second(model):
    generator = torch.Generator().manual_seed(9)
    start = model.encode_images(pictures(), generator)
    initial = torch.randn(1, 4, 8, 8, generator=generator)
    seen = []

    def unet(latents, timesteps, context):
        seen.append((latents, int(timesteps)))
        return torch.zeros_like(latents)

    ordinary, model.unet.forward = model.unet.forward, unet
    try:
        sample(model, ["a"], seed=9, strength=0.5, guidance=1)
    finally:
        model.unet.forward = ordinary
    latents, t = seen[0]
    assert t == 401 and len(seen) == 5
    expected = model.schedule.add_noise(start, initial, torch.tensor([401]))
    torch.testing.assert_close(latents, expected)


def test_given_latents_are_the_initial_noise(model):
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, 8, 8, generator=generator)  # the VAE's
    initial = torch.randn(1, 4, 8, 8, generator=generator)
    assert torch.equal(sample(model, ["a"], seed=3, latents=initial), sample(model, ["a"], seed=3))


def test_one_image_serves_all_prompts_and_gives_the_size(model):
    wide = pictures(1, 40, 72)
    both = sample(model, init_images=wide, output="tensor")
    assert both.shape == (2, 3, 40, 72)
    assert torch.equal(both, sample(model, init_images=wide.expand(2, -1, -1, -1), output="tensor"))
    grey = wide[:, :1]
    assert torch.equal(sample(model, init_images=grey), sample(model, init_images=grey.expand(-1, 3, -1, -1)))


def test_half_precision_starts_from_nearly_the_same_latents(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    ours, exact = (sample(m, ["a"], strength=0.2, steps=10) for m in (half, model))
    assert 0 < relative_error(ours, exact) < 0.1


@pytest.mark.parametrize(
    "options, says",
    [
        ({"strength": 0}, ["--strength must be a number above 0 and at most 1, got 0"]),
        ({"strength": -0.1}, ["--strength must be a number above 0 and at most 1, got -0.1"]),
        ({"strength": 1.01}, ["--strength must be a number above 0 and at most 1, got 1.01"]),
        ({"strength": math.nan}, ["--strength must be a number above 0", "nan"]),
        ({"strength": 0.01}, ["--strength 0.01 of 10 steps leaves no step to run; give at least 0.1"]),
        ({"strength": 0.5, "init_images": None}, ["strength 0.5 is for initial images"]),
        ({"init_images": pictures(3)}, ["3 initial images for 2 prompts; give one, or one for each"]),
        ({"height": 32}, ["init_images are 64 x 64 px", "32 and 64"]),
        ({"init_images": torch.zeros(1, 3, 60, 64)}, ["multiples of 8, got (60, 64)"]),
        ({"init_images": "a.png"}, ["init_images must be a float tensor (B, 3, H, W) in [-1, 1], got a str"]),
        ({"init_images": torch.zeros(1, 4, 64, 64)}, ["init_images must be", "got shape (1, 4, 64, 64)"]),
        ({"init_images": torch.full((1, 3, 64, 64), math.nan)}, ["init_images must be", "nan"]),
    ],
)
def test_invalid_initial_images_and_strengths_are_refused(options, says, model):
    with pytest.raises(InputError) as caught:
        sample(model, **options)
    assert_says(caught, *says)


def test_a_vae_that_overflows_on_the_initial_image_is_blamed_by_name():
    model = peers.random_model(ModelConfig.tiny(), seed=4).half()
    model.vae.encoder.conv_out.weight.data[:] = 6e4
    with pytest.raises(InputError, match=r"the VAE gave non-finite latents for the initial image in torch\.float16"):
        sample(model)


# --- reading ---------------------------------------------------------------------------------------------------------
def gradient(depth, height=50, width=70):
    """A grey ramp over the whole depth with a bright disc, (height, width)."""
    y, x = np.mgrid[:height, :width]
    values = x / (width - 1) * 0.8 + 0.2 * ((y - 20) ** 2 + (x - 40) ** 2 < 100)
    return (values * (2**depth - 1)).astype(np.uint8 if depth == 8 else np.uint16)


@pytest.mark.parametrize("kind", ["grey", "16-bit", "RGB", "RGBA", "JPEG", "DICOM"])
def test_an_initial_image_is_read_exactly_as_training_reads_it(kind, tmp_path):
    path = tmp_path / {"JPEG": "a.jpg", "DICOM": "a.dcm"}.get(kind, "a.png")
    if kind == "DICOM":
        path.write_bytes(dicom(gradient(12), 12))
    elif kind == "16-bit":
        Image.fromarray(gradient(16)).save(path)
    elif kind == "JPEG":
        Image.fromarray(gradient(8, 900, 700)).save(path)  # large enough to be decoded at a smaller scale
    else:
        Image.fromarray(gradient(8)).convert({"grey": "L"}.get(kind, kind)).save(path)
    pixels, _, key = reading.read(Record("a", "a", path=path), reading.Transform(64))
    image = read_init_image(path, 0.5)
    assert bytes.fromhex(image.sha256) == key
    assert torch.equal(image.tensor(64, 64)[0], reading.to_tensor(pixels))
    assert pixels.std() > 30


@pytest.mark.parametrize("height, width, rows, columns", [(32, 64, (20, 60), (0, 80)), (64, 32, (0, 80), (20, 60))])
def test_for_another_shape_the_largest_centred_part_is_taken(height, width, rows, columns, tmp_path):
    whole = gradient(8, 80, 80)
    Image.fromarray(whole).save(tmp_path / "a.png")
    ours = read_init_image(tmp_path / "a.png", None).tensor(height, width)
    part = whole[slice(*rows), slice(*columns)].copy()
    expected = np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.LANCZOS))
    assert ours.shape == (1, 3, height, width)
    inner = ((ours[0, 0].numpy() + 1) * 127.5 - expected)[4:-4, 4:-4]  # the filter reaches across the edges of the part
    assert np.abs(inner).max() <= 1.01


@pytest.mark.parametrize("content, says", [(b"", "empty"), (b"not an image", "unknown image format")])
def test_a_file_that_is_no_image_is_refused(content, says, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_init_image(path, None)
    assert_says(caught, path, says)


def test_a_folder_a_missing_file_and_a_strength_alone_are_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        read_init_image(tmp_path, None)
    assert_says(caught, tmp_path, "is a folder; give one image")
    with pytest.raises(FileNotFoundError) as caught:
        read_init_image(tmp_path / "x.png", None)
    assert_says(caught, "x.png: no such file")
    with pytest.raises(InputError) as caught:
        read_init_image(None, 0.4)
    assert_says(caught, "--strength 0.4 is for --init-image FILE")
    assert read_init_image(None, None) is None
