"""One step's mathematics: what is random, and what a sample's loss is."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from made_runs import samples, small_model
from made_runs import training_config as settings

from minildm.adapters import add_adapter
from minildm.data.cache import context_cache
from minildm.data.loader import TrainingPairs
from minildm.training.loop import learning_rate
from minildm.training.loss import (
    Captions,
    PlainLoss,
    caption_texts,
    denoising_losses,
    sample_randomness,
    validation_loss,
)
from minildm.training.machine import checkpoint_blocks, forecast

SHAPE = (4, 8, 8)


@pytest.fixture
def model():
    return small_model()


def batch_of(data, indices, contexts=None):
    pairs = TrainingPairs(data.records, data.prompts, latents=data.latents, contexts=contexts)
    return torch.utils.data.default_collate([pairs[i] for i in indices])


def test_the_randomness_of_a_sample_depends_on_the_seed_and_its_id_alone():
    together = sample_randomness(7, "sample", range(10, 16), SHAPE, 1000)
    apart = [sample_randomness(7, "sample", [number], SHAPE, 1000) for number in range(10, 16)]
    for i, one in enumerate(apart):
        assert all(torch.equal(a[i], b[0]) for a, b in zip(together, one))
    for other in (
        sample_randomness(8, "sample", [10], SHAPE, 1000),
        sample_randomness(7, "validation", [10], SHAPE, 1000),
    ):
        assert not torch.equal(other.noise[0], together.noise[0])
    assert not torch.equal(together.noise, together.latent_noise)


def test_randomness_has_the_right_distributions():
    many = sample_randomness(0, "sample", range(2000), (4, 2, 2), 1000)
    assert many.timesteps.min() >= 0
    assert many.timesteps.max() < 1000
    assert many.timesteps.float().mean().item() == pytest.approx(499.5, abs=25)
    assert many.noise.std().item() == pytest.approx(1, abs=0.02)
    assert many.caption.mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("v2", [False, True])
def test_the_loss_is_the_mean_squared_error_of_what_the_network_should_say(v2):
    model, data = small_model(v2), samples(3)
    randomness = sample_randomness(0, "sample", range(3), SHAPE, 1000)
    losses = denoising_losses(
        model, batch_of(data, [0, 1, 2]), randomness, Captions(model, data.prompts), settings(caption_dropout=0)
    )
    mean, logvar = (torch.stack(part) for part in zip(*(data.latents.moments(i) for i in range(3))))
    latents = 0.18215 * (mean + logvar.exp().sqrt() * randomness.latent_noise)
    alpha_bar = model.schedule.alphas_cumprod[randomness.timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * randomness.noise
    target = alpha_bar.sqrt() * randomness.noise - (1 - alpha_bar).sqrt() * latents if v2 else randomness.noise
    prediction = model.unet(noisy, randomness.timesteps, model.encode_prompt(list(data.prompts)))
    torch.testing.assert_close(losses, F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3)))


def test_captions_are_dropped_and_cut_with_and_without_a_cache(model, tmp_path):
    data = samples(4)
    prompts = ("a chest, age 40, normal", "a chest", "a chest, age 50, effusion", "a chest, age 40, effusion")
    data = dataclasses.replace(data, prompts=prompts)
    dropout_and_cut = PlainLoss(caption_dropout=0.2, caption_cut=0.5)  # of u: [0, 0.2) empty, [0.2, 0.6) cut
    u = torch.tensor([0.25, 0.55, 0.19, 0.59])
    expected = model.encode_prompt(["a chest", "a chest", "", "a chest, age 40"])
    contexts = context_cache(caption_texts(prompts, cut=True), model.tokenize, model.text_encoder, tmp_path)
    running, cached = Captions(model, prompts, cut=True), Captions(model, prompts, contexts, cut=True)
    for captions, batch, tolerance in (
        (running, batch_of(data, range(4)), 1e-5),
        (cached, batch_of(data, range(4), contexts), 2e-3),  # the cache is float16
    ):
        found = captions(batch, captions.rows(batch["index"], u, dropout_and_cut))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        whole = captions(batch_of(data, range(4), captions.contexts), captions.rows(batch["index"], u, PlainLoss()))
        torch.testing.assert_close(whole, model.encode_prompt(list(prompts)), rtol=0, atol=tolerance)


def test_as_many_captions_are_dropped_and_cut_as_asked_for(model):
    captions = Captions(model, ["a, b, c, d"], cut=True)
    assert caption_texts(["a, b, c, d"], cut=True) == ["a, b, c, d", "a", "a, b", "a, b, c", ""]
    u = sample_randomness(0, "sample", range(6000), (1, 1, 1), 1000).caption
    rows = captions.rows(torch.zeros(6000, dtype=torch.int64), u, PlainLoss(caption_dropout=0.1, caption_cut=0.3))
    shares = torch.bincount(rows + 1, minlength=6) / 6000  # empty, whole, and the three shorter ones
    torch.testing.assert_close(shares[:5], torch.tensor([0.1, 0.63, 0.09, 0.09, 0.09]), rtol=0, atol=0.02)


def test_the_randomness_of_captions_is_uniform():
    randomness = sample_randomness(0, "sample", range(3000), (1, 1, 1), 1000)
    assert (randomness.caption < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_min_snr_weighs_and_noise_offset_shifts_whole_channels(model):
    captions = Captions(model, samples(3).prompts)
    randomness, batch = sample_randomness(0, "sample", range(3), SHAPE, 1000), batch_of(samples(3), [0, 1, 2])
    plain = denoising_losses(model, batch, randomness, captions, settings(caption_dropout=0))
    weighted = denoising_losses(model, batch, randomness, captions, settings(caption_dropout=0, min_snr_gamma=5.0))
    torch.testing.assert_close(weighted, plain * model.schedule.min_snr_weight(randomness.timesteps, 5.0))
    shifted = randomness._replace(noise=randomness.noise + 0.1 * randomness.offset)
    torch.testing.assert_close(
        denoising_losses(model, batch, randomness, captions, settings(caption_dropout=0, noise_offset=0.1)),
        denoising_losses(model, batch, shifted, captions, settings(caption_dropout=0)),
    )
    assert randomness.offset.shape == (3, 4, 1, 1)


@pytest.mark.parametrize("targets", [("unet",), ("unet", "text_encoder")])
def test_gradients_are_those_of_the_whole_batch_however_it_is_cut(targets):
    gradients = []
    for size in (4, 3, 1):
        model, data = small_model(), samples(4)
        add_adapter(model, "lora", rank=2, targets=targets)
        captions = Captions(model, data.prompts)
        for first in range(0, 4, size):
            ids = range(first, min(first + size, 4))
            randomness = sample_randomness(0, "sample", ids, SHAPE, 1000)
            (denoising_losses(model, batch_of(data, ids), randomness, captions, settings()).sum() / 4).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for again in (False, True):
        model, data = small_model(), samples(2)
        add_adapter(model, "lora", rank=2)
        if again:
            checkpoint_blocks(model.unet, model.text_encoder)
        denoising_losses(
            model,
            batch_of(data, [0, 1]),
            sample_randomness(0, "sample", range(2), SHAPE, 1000),
            Captions(model, data.prompts),
            settings(),
        ).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_validation_is_fixed_and_independent_of_the_batch(model):
    data = samples(3)
    pairs, captions = TrainingPairs(data.records, data.prompts, latents=data.latents), Captions(model, data.prompts)
    first, again, other = (
        validation_loss(model, pairs, captions, settings(batch_size=size, noise_offset=offset))
        for size, offset in ((4, 0), (4, 0), (3, 0.5))
    )
    assert first == again
    assert other == pytest.approx(first, rel=1e-5)


def test_the_learning_rate_warms_up_and_follows_its_curve():
    config = settings(lr=1.0, warmup=4, lr_schedule="cosine")
    rates = [learning_rate(step, 104, config) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1
    assert rates[54] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert all(learning_rate(step, 10, settings(lr=0.1)) == 0.1 for step in range(10))


def test_the_forecast_weighs_what_autograd_keeps():
    """Against the sum of all tensors that really are kept, each storage once."""
    model, data = small_model(), samples(1)
    add_adapter(model, "lora", rank=2)
    randomness, captions = sample_randomness(0, "sample", [0], SHAPE, 1000), Captions(model, data.prompts)

    def loss():
        return denoising_losses(model, batch_of(data, [0]), randomness, captions, settings())

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        whole = loss()
    truth = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    del whole
    weights = sum(4 * p.numel() for p in model.parameters())
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    fixed = weights + 3 * trained
    needed = {micro: (forecast(model, loss, settings(micro_batch=micro))[0] - fixed) / 1.15 for micro in (1, 4)}
    assert needed[1] == pytest.approx(truth, rel=0.15)
    assert needed[4] == pytest.approx(4 * needed[1], rel=1e-3)
    lean = (forecast(model, loss, settings(micro_batch=1, checkpointing=True))[0] - fixed) / 1.15
    assert lean < 0.6 * needed[1]
