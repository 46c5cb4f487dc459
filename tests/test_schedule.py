"""The noise schedule against its closed forms, the papers' definitions, and diffusers."""

import numpy as np
import peers
import pytest
import torch
from peers import noise, relative_error

from minildm.schedule import NoiseSchedule

EVERY = torch.arange(1000)
PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v"])


def test_square_roots_of_betas_are_evenly_spaced():
    betas = (np.sqrt(0.00085) + np.arange(1000) / 999 * (np.sqrt(0.012) - np.sqrt(0.00085))) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    schedule = NoiseSchedule()
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float32
    torch.testing.assert_close(schedule.betas, torch.tensor(betas).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(alphas_cumprod).float(), rtol=1e-6, atol=0)
    np.testing.assert_allclose(schedule.alpha_bar, alphas_cumprod, rtol=1e-12)


def test_tables_match_diffusers():
    theirs, ours = peers.diffusers_scheduler("ddpm"), NoiseSchedule()
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5, atol=0)  # a float32 product


def test_a_shorter_schedule_with_other_betas_has_the_same_form():
    schedule = NoiseSchedule(n_timesteps=10, beta_start=0.01, beta_end=0.04)
    assert schedule.n_timesteps == len(schedule.betas) == 10
    torch.testing.assert_close(schedule.betas[[0, 9]], torch.tensor([0.01, 0.04]))
    torch.testing.assert_close(schedule.betas.sqrt().diff(), torch.full((9,), 0.1 / 9))


def test_add_noise_matches_diffusers():
    latents, eps = noise(1000, 4, 2, 3), noise(1000, 4, 2, 3, seed=1)
    theirs = peers.diffusers_scheduler("ddpm").add_noise(latents, eps, EVERY)
    assert relative_error(NoiseSchedule().add_noise(latents, eps, EVERY), theirs) <= 1e-5


def test_add_noise_keeps_unit_variance():
    """Signal and noise amplitudes lie on the unit circle at every timestep."""
    one, zero = torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1)
    schedule = NoiseSchedule()
    signal, sigma = schedule.add_noise(one, zero, EVERY), schedule.add_noise(zero, one, EVERY)
    torch.testing.assert_close(signal**2 + sigma**2, one, rtol=1e-6, atol=0)
    assert (sigma.flatten().diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_add_noise_keeps_the_dtype_and_its_arguments(dtype):
    latents, eps = noise(3, 4, 2, 2).to(dtype), noise(3, 4, 2, 2, seed=1).to(dtype)
    before = latents.clone(), eps.clone()
    timesteps = torch.tensor([0, 500, 999])
    noisy = NoiseSchedule().add_noise(latents, eps, timesteps)
    exact = NoiseSchedule().add_noise(latents.double(), eps.double(), timesteps)
    assert noisy.dtype == dtype
    assert relative_error(noisy, exact) <= 4 * max(torch.finfo(dtype).eps, 1e-8)
    assert torch.equal(latents, before[0]) and torch.equal(eps, before[1])


def test_the_epsilon_target_is_the_noise():
    latents, eps = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    assert torch.equal(NoiseSchedule("epsilon").target(latents, eps, torch.tensor([0, 500, 999])), eps)


def test_the_v_target_matches_diffusers():
    latents, eps = noise(1000, 4, 2, 3), noise(1000, 4, 2, 3, seed=1)
    theirs = peers.diffusers_scheduler("ddpm", "v").get_velocity(latents, eps, EVERY)
    assert relative_error(NoiseSchedule("v").target(latents, eps, EVERY), theirs) <= 1e-5


@PREDICTIONS
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_a_perfect_prediction_gives_back_latents_and_noise(prediction, t):
    schedule = NoiseSchedule(prediction)
    latents, eps = noise(2, 4, 3, 3).double(), noise(2, 4, 3, 3, seed=1).double()
    timesteps = torch.tensor([t, t])
    noisy, target = schedule.add_noise(latents, eps, timesteps), schedule.target(latents, eps, timesteps)
    alpha_bar = float(schedule.alphas_cumprod[t])  # the float32 table that add_noise reads
    assert relative_error(schedule.clean_latents(target, noisy, alpha_bar), latents) <= 1e-5
    assert relative_error(schedule.noise(target, noisy, alpha_bar), eps) <= 1e-5


def test_snr_matches_diffusers_and_its_definition():
    from diffusers.training_utils import compute_snr

    schedule = NoiseSchedule()
    torch.testing.assert_close(
        schedule.snr(EVERY), compute_snr(peers.diffusers_scheduler("ddpm"), EVERY), rtol=1e-3, atol=0
    )  # theirs squares a float32 quotient of square roots
    alpha_bar = torch.tensor(schedule.alpha_bar)
    torch.testing.assert_close(schedule.snr(EVERY), (alpha_bar / (1 - alpha_bar)).float(), rtol=1e-4, atol=0)


@PREDICTIONS
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_the_error_of_the_clean_latents(prediction, gamma):
    """Hang et al. 2023, section 3.4: whatever the network predicts, an error of z_0 has the weight min(SNR, gamma)."""
    schedule = NoiseSchedule(prediction)
    timesteps = torch.arange(0, 1000, 37)
    weights = schedule.min_snr_weight(timesteps, gamma)
    for t, weight in zip(timesteps.tolist(), weights.tolist()):
        alpha_bar = schedule.alpha_bar[t]
        noisy, prediction_1 = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        error_of_clean = schedule.clean_latents(prediction_1, noisy, alpha_bar).item() ** 2  # of a unit error
        assert weight == pytest.approx(min(alpha_bar / (1 - alpha_bar), gamma) * error_of_clean, rel=1e-4)


@PREDICTIONS
def test_min_snr_weights_match_diffusers_training_scripts(prediction):
    """The formula of diffusers' examples/text_to_image/train_text_to_image.py."""
    from diffusers.training_utils import compute_snr

    snr = compute_snr(peers.diffusers_scheduler("ddpm"), EVERY)
    weights = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(NoiseSchedule(prediction).min_snr_weight(EVERY), weights, rtol=1e-3, atol=0)


def test_min_snr_gamma_defaults_to_five():
    schedule = NoiseSchedule()
    assert torch.equal(schedule.min_snr_weight(EVERY), schedule.min_snr_weight(EVERY, gamma=5.0))
    assert not torch.equal(schedule.min_snr_weight(EVERY), schedule.min_snr_weight(EVERY, gamma=4.0))


def test_posterior_variance_matches_ddpm_eq_7():
    schedule = NoiseSchedule()
    alpha_bar = np.array(schedule.alpha_bar)
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    expected = (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)
    ours = schedule.posterior_variance(EVERY)
    np.testing.assert_allclose(ours[1:].double(), expected[1:], rtol=1e-3)  # float32 1 - alpha_bar near t = 0
    assert ours[0] == 0
    theirs = peers.diffusers_scheduler("ddpm")
    assert torch.stack([theirs._get_variance(t) for t in range(1, 1000)]).numpy() == pytest.approx(
        ours[1:].numpy(), rel=1e-3
    )


FUNCTIONS = {
    "add_noise": lambda schedule, t: schedule.add_noise(torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1), t),
    "v target": lambda schedule, t: schedule.target(torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1), t),
    "snr": lambda schedule, t: schedule.snr(t),
    "min_snr_weight": lambda schedule, t: schedule.min_snr_weight(t),
    "posterior_variance": lambda schedule, t: schedule.posterior_variance(t),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("timesteps", [(0, 1000), (-1, 5), (10**12, 0)])
def test_a_timestep_outside_the_schedule_is_refused(name, timesteps):
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 1000\), got"):
        FUNCTIONS[name](NoiseSchedule("v"), torch.tensor(timesteps))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'epsilon' or 'v', got 'sample'"):
        NoiseSchedule("sample")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_schedule_does_not_make_the_cpu_wait_for_a_gpu():
    schedule = NoiseSchedule("v")
    latents, eps = noise(3, 4, 2, 2).cuda(), noise(3, 4, 2, 2, seed=1).cuda()
    on_cpu = torch.tensor([0, 500, 999])
    on_gpu = on_cpu.cuda()
    schedule.snr(on_gpu)  # the first use copies the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [schedule.add_noise(latents, eps, timesteps) for timesteps in (on_cpu, on_gpu)]
        targets = [schedule.target(latents, eps, timesteps) for timesteps in (on_cpu, on_gpu)]
        weights = schedule.min_snr_weight(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*results) and torch.equal(*targets)
    assert relative_error(weights.cpu(), schedule.min_snr_weight(on_cpu)) <= 1e-6
