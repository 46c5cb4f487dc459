"""The samplers against diffusers' schedulers, and on data whose optimal denoiser has a closed form."""

import math

import peers
import pytest
import torch
from peers import noise, relative_error

from minildm.config import UNetConfig
from minildm.samplers import SAMPLERS, guide
from minildm.schedule import NoiseSchedule

TRAJECTORY = 1e-4
PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v"])


def cheap_denoiser(latents, t):
    """Not linear in the latents, not an even function of them, and different at every timestep."""
    t = float(t) / 1000
    return torch.tanh(latents * (0.5 + t)) + 0.3 * torch.cos(3 * latents + 5 * t)


def run_ours(sampler, denoise, latents, schedule, steps, seed=11, **options):
    """Returns: (the latents after every network call, the timesteps of the calls)."""
    generator, timesteps = torch.Generator().manual_seed(seed), []

    def recording(x, t):
        timesteps.append(t)
        return denoise(x, t)

    path = SAMPLERS[sampler](
        recording, latents, schedule, steps, lambda: torch.randn(latents.shape, generator=generator), **options
    )
    return list(path), timesteps


def run_diffusers(sampler, denoise, latents, prediction, steps, seed=11, eta=0.0, karras=False):
    # All 1000 timesteps leave no room for the published file's offset of 1.
    scheduler = peers.diffusers_scheduler(sampler, prediction, karras, **({"steps_offset": 0} if steps == 1000 else {}))
    scheduler.set_timesteps(steps)
    generator, path = torch.Generator().manual_seed(seed), []
    extra = {"ddim": {"eta": eta, "generator": generator}, "ddpm": {"generator": generator}}.get(sampler, {})
    for t in scheduler.timesteps:
        latents = scheduler.step(denoise(latents, t), t, latents, **extra).prev_sample
        path.append(latents)
    return path, scheduler.timesteps.tolist()


def assert_same_trajectory(ours, theirs):
    (our_path, our_timesteps), (their_path, their_timesteps) = ours, theirs
    assert our_timesteps == their_timesteps
    assert len(our_path) == len(their_path)
    for our, their in zip(our_path, their_path):
        assert relative_error(our, their) <= TRAJECTORY


CASES = {
    "ddim": {},
    "ddim, eta 0.7": {"eta": 0.7},
    "ddim, eta 1": {"eta": 1.0},
    "ddpm": {},
    "plms": {},
    "dpm++": {},
    "dpm++, karras": {"karras": True},
}
KINDS = pytest.mark.parametrize("kind", CASES)


@PREDICTIONS
@pytest.mark.parametrize(
    "kind, steps",
    [
        (kind, steps)
        for kind in CASES
        for steps in (1, 2, 3, 4, 5, 20, 37, 50, 300, 600, 999)
        if not ("karras" in kind and steps == 1)  # 0 / 0 in diffusers
    ],
)
def test_trajectories_match_diffusers(kind, steps, prediction):
    latents, sampler = noise(2, 4, 3, 5), kind.partition(",")[0]
    assert_same_trajectory(
        run_ours(sampler, cheap_denoiser, latents, NoiseSchedule(prediction), steps, **CASES[kind]),
        run_diffusers(sampler, cheap_denoiser, latents, prediction, steps, **CASES[kind]),
    )


@PREDICTIONS
@pytest.mark.parametrize("kind", ["ddim", "ddim, eta 0.7", "ddpm", "plms"])
def test_a_thousand_steps_match_diffusers(kind, prediction):
    latents, sampler = noise(2, 4, 3, 5), kind.partition(",")[0]
    assert_same_trajectory(
        run_ours(sampler, cheap_denoiser, latents, NoiseSchedule(prediction), 1000, **CASES[kind]),
        run_diffusers(sampler, cheap_denoiser, latents, prediction, 1000, **CASES[kind]),
    )


@KINDS
@pytest.mark.parametrize("steps", [1, 500, 501, 999, 1000])
def test_every_number_of_steps_gives_finite_latents(kind, steps):
    path, timesteps = run_ours(
        kind.partition(",")[0], cheap_denoiser, noise(1, 4, 2, 2), NoiseSchedule(), steps, **CASES[kind]
    )
    assert len(path) == len(timesteps) == steps + (kind == "plms" and steps > 1)
    assert all(latents.isfinite().all() for latents in path)
    assert all(0 <= t < 1000 for t in timesteps)


@PREDICTIONS
@KINDS
def test_guided_trajectories_of_a_unet_match_diffusers(kind, prediction):
    unet = peers.random_network(UNetConfig.tiny(), seed=1)
    peer = peers.diffusers_unet(unet)
    uncond, cond = noise(2, 77, 32, seed=2), noise(2, 77, 32, seed=3)

    def their_denoiser(latents, t):  # as in diffusers' StableDiffusionPipeline
        predicted = peer(torch.cat([latents] * 2), t, torch.cat([uncond, cond])).sample
        predicted_uncond, predicted_text = predicted.chunk(2)
        return predicted_uncond + 7.5 * (predicted_text - predicted_uncond)

    latents, sampler = noise(2, 4, 8, 6), kind.partition(",")[0]
    with torch.no_grad():
        denoise = guide(unet, torch.cat([uncond, cond]), 7.5)
        assert_same_trajectory(
            run_ours(sampler, denoise, latents, NoiseSchedule(prediction), 12, **CASES[kind]),
            run_diffusers(sampler, their_denoiser, latents, prediction, 12, **CASES[kind]),
        )


# --- golden: what SD v1.5's scheduler file means ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "sampler, steps, timesteps",
    [
        ("ddim", 50, list(range(981, 0, -20))),
        ("ddim", 4, [751, 501, 251, 1]),
        ("ddim", 1, [1]),
        ("ddpm", 50, list(range(981, 0, -20))),
        ("ddpm", 1000, list(range(999, -1, -1))),
        ("plms", 4, [751, 501, 501, 251, 1]),
        ("plms", 1, [1]),
        (
            "dpm++",
            20,
            [999, 949, 899, 849, 799, 749, 699, 649, 599, 549, 500, 450, 400, 350, 300, 250, 200, 150, 100, 50],
        ),
        ("dpm++", 1, [999]),
    ],
)
def test_timesteps_are_the_published_ones(sampler, steps, timesteps):
    assert run_ours(sampler, cheap_denoiser, noise(1, 4, 1, 1), NoiseSchedule(), steps)[1] == timesteps


# --- guidance --------------------------------------------------------------------------------------------------------
class CountingUNet:
    """Records the batch sizes of its calls; its output is the context's mean."""

    def __init__(self):
        self.batches = []

    def __call__(self, latents, t, context):
        assert len(latents) == len(context)
        self.batches.append(len(latents))
        return torch.zeros_like(latents) + context.mean(dim=(1, 2))[:, None, None, None]


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_up_to_one_runs_no_unconditional_half(guidance):
    unet, context = CountingUNet(), noise(3, 77, 8)
    prediction = guide(unet, context, guidance)(torch.zeros(3, 4, 2, 2), 10)
    assert unet.batches == [3]
    torch.testing.assert_close(prediction[:, 0, 0, 0], context.mean(dim=(1, 2)))


@pytest.mark.parametrize("guidance", [1.001, 7.5, 20.0])
def test_guidance_extrapolates_from_the_negative_half_to_the_prompts(guidance):
    unet, uncond, cond = CountingUNet(), noise(3, 77, 8), noise(3, 77, 8, seed=1)
    prediction = guide(unet, torch.cat([uncond, cond]), guidance)(torch.zeros(3, 4, 2, 2), 10)
    assert unet.batches == [6]
    u, c = uncond.mean(dim=(1, 2)), cond.mean(dim=(1, 2))
    torch.testing.assert_close(prediction[:, 0, 0, 0], u + guidance * (c - u))


def test_the_network_gets_its_own_precision_and_the_prediction_is_float32():
    seen = []

    def unet(latents, t, context):
        seen.append(latents.dtype)
        return latents

    for guidance, rows in ((1.0, 1), (5.0, 2)):
        prediction = guide(unet, noise(rows, 77, 8).bfloat16(), guidance)(noise(1, 4, 2, 2), 3)
        assert prediction.dtype == torch.float32
    assert seen == [torch.bfloat16] * 2


# --- properties ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, steps, calls",
    [
        ("ddim", 20, 0),
        ("ddim, eta 0.7", 20, 20),
        ("ddim, eta 0.7", 1000, 999),
        ("ddpm", 20, 20),
        ("ddpm", 1000, 999),
        ("plms", 20, 0),
        ("dpm++", 20, 0),
    ],
)
def test_noise_is_sampled_once_per_stochastic_step_while_t_is_positive(kind, steps, calls):
    made = []

    def sample_noise():
        made.append(1)
        return torch.zeros(1, 4, 1, 1)

    list(
        SAMPLERS[kind.partition(",")[0]](
            cheap_denoiser, noise(1, 4, 1, 1), NoiseSchedule(), steps, sample_noise, **CASES[kind]
        )
    )
    assert len(made) == calls


@KINDS
def test_a_sampler_does_not_change_its_initial_latents(kind):
    latents = noise(1, 4, 2, 2)
    before = latents.clone()
    path, _ = run_ours(kind.partition(",")[0], cheap_denoiser, latents, NoiseSchedule(), 5, **CASES[kind])
    assert torch.equal(latents, before)
    assert len({path_latents.data_ptr() for path_latents in path}) == len(path)  # earlier ones are not overwritten


@pytest.mark.parametrize("kind", ["ddim", "ddim, eta 0.7", "ddpm", "dpm++"])
def test_equivalent_epsilon_and_v_networks_give_the_same_samples(kind):
    """Not PLMS, which combines epsilon or v as they are, like diffusers. Not Karras' spacing, whose noise levels lie
    between those of the timesteps, where epsilon and v do not convert exactly."""
    schedule = NoiseSchedule("v")

    def as_v(latents, t):  # v = (epsilon - sqrt(1 - alpha_bar) z_t) / sqrt(alpha_bar)
        alpha_bar = schedule.alpha_bar[t]
        return (cheap_denoiser(latents, t) - math.sqrt(1 - alpha_bar) * latents) / math.sqrt(alpha_bar)

    latents, sampler = noise(1, 4, 4, 4).double(), kind.partition(",")[0]
    epsilon, _ = run_ours(sampler, cheap_denoiser, latents, NoiseSchedule("epsilon"), 20, **CASES[kind])
    v, _ = run_ours(sampler, as_v, latents, schedule, 20, **CASES[kind])
    assert relative_error(v[-1], epsilon[-1]) <= 1e-9


def test_ddim_with_eta_one_is_ddpm_until_the_last_step():
    """Song et al. 2021, section 4.1. They end differently: at alphas_cumprod[0] and at 1."""
    latents = noise(1, 4, 4, 4).double()
    ddim, _ = run_ours("ddim", cheap_denoiser, latents, NoiseSchedule(), 50, eta=1.0)
    ddpm, _ = run_ours("ddpm", cheap_denoiser, latents, NoiseSchedule(), 50)
    for ours, theirs in zip(ddim[:-1], ddpm[:-1]):
        assert relative_error(ours, theirs) <= 1e-9


# Data N(0, c): z_t has variance alpha_bar c + 1 - alpha_bar, and the best prediction of the noise is linear in z_t.
def variance_at(alpha_bar, c):
    return alpha_bar * c + 1 - alpha_bar


def gaussian_denoiser(schedule, c):
    def denoise(latents, t):
        alpha_bar = schedule.alpha_bar[t]
        epsilon = math.sqrt(1 - alpha_bar) / variance_at(alpha_bar, c) * latents
        if schedule.prediction == "epsilon":
            return epsilon
        return (epsilon - math.sqrt(1 - alpha_bar) * latents) / math.sqrt(alpha_bar)

    return denoise


def ode_error(sampler, steps, c, prediction="epsilon", **options):
    """Relative error of a deterministic sampler against the exact probability-flow ODE, along which z_t divided by its
    standard deviation is constant (Song et al. 2021, arXiv:2011.13456, Eq. 13). DPM-Solver++'s jump from its last
    timestep to z_0 predicts the mean instead of following the ODE, so it is left out."""
    schedule = NoiseSchedule(prediction)
    path, timesteps = run_ours(
        sampler, gaussian_denoiser(schedule, c), torch.ones(1, 1, 1, 1, dtype=torch.float64), schedule, steps, **options
    )
    got, end = (path[-2], timesteps[-1]) if sampler == "dpm++" else (path[-1], 0)
    exact = math.sqrt(variance_at(schedule.alpha_bar[end], c) / variance_at(schedule.alpha_bar[timesteps[0]], c))
    return abs(got.item() / exact - 1)


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(
    "sampler, steps, prediction, tolerance",
    [
        ("ddim", 1000, "epsilon", 4e-3),
        ("ddim", 1000, "v", 4e-3),
        ("plms", 50, "epsilon", 4e-3),
        ("dpm++", 50, "epsilon", 4e-3),
        ("dpm++", 50, "v", 4e-3),
    ],
)
def test_deterministic_samplers_solve_the_ode(sampler, steps, prediction, tolerance, c):
    assert ode_error(sampler, steps, c, prediction) <= tolerance


@pytest.mark.parametrize("c", [0.25, 4.0])
def test_ddim_is_of_first_order_and_dpm_solver_of_second_order(c):
    assert 1.7 < ode_error("ddim", 50, c) / ode_error("ddim", 100, c) < 2.3
    # Karras' spacing ends at the same noise level for any number of steps. Order 2: 4^2 = 16, less rounded timesteps.
    assert 11 < ode_error("dpm++", 20, c, karras=True) / ode_error("dpm++", 80, c, karras=True) < 17


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_twenty_steps_of_dpm_solver_beat_twenty_of_ddim(c):
    assert ode_error("dpm++", 20, c) < ode_error("ddim", 20, c) / 10


def test_the_last_step_of_dpm_solver_is_the_predicted_z_0():
    schedule, seen = NoiseSchedule(), []

    def denoise(latents, t):
        seen.append((latents, t, cheap_denoiser(latents, t)))
        return seen[-1][-1]

    path, _ = run_ours("dpm++", denoise, noise(1, 4, 2, 2), schedule, 10)
    latents, t, prediction = seen[-1]
    torch.testing.assert_close(path[-1], schedule.clean_latents(prediction, latents, schedule.alpha_bar[t]))


@PREDICTIONS
@pytest.mark.parametrize("c", [0.25, 4.0])
@pytest.mark.parametrize("sampler, options", [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5})])
def test_stochastic_samplers_reproduce_the_variance_of_the_data(sampler, options, c, prediction):
    schedule = NoiseSchedule(prediction)
    latents = noise(1, 4, 128, 128)  # 65,536 independent numbers: their variance has an error of 0.6 %
    path, _ = run_ours(sampler, gaussian_denoiser(schedule, c), latents, schedule, 500, **options)
    assert path[-1].var().item() == pytest.approx(c, rel=0.03)
    assert abs(path[-1].mean().item()) < 4 * math.sqrt(c / latents.numel())
