"""Samplers: from noise to latents in a few dozen calls of the U-Net.

Each sampler is a generator that yields the latents after every network call; the last ones yielded are the result. It
needs a `NoiseSchedule` and

    denoise(latents, t) -> prediction    the U-Net, guided or not, at the integer timestep t
    latents (B, 4, h, w) float32         standard normal noise, unless calls are skipped
    sample_noise() -> (B, 4, h, w)       fresh standard normal noise, for stochastic steps
    skip                                 how many network calls to leave out, from the first on: image-to-image sampling
                                         starts in the middle, from an image with the noise of `starting_point`

Timesteps follow Stable Diffusion v1.5's scheduler file: "leading" with offset 1 for DDIM, DDPM and PLMS (981, 961, ...,
1 for 50 steps), "linspace" for DPM-Solver++. Symbols: alpha_bar = DDPM's bar alpha_t = DDIM's alpha_t; ``clean`` = the
predicted z_0; ``noise`` = epsilon.
"""

import math

import torch


def guide(unet, context, guidance):
    """A ``denoise`` function with classifier-free guidance: uncond + s (cond - uncond) (Ho and Salimans 2022,
    arXiv:2207.12598, Eq. 6, where s = 1 + w).

    Args:
        context: (2 B, 77, D), first the negative prompts, then the prompts; for guidance <= 1, which runs no
            unconditional half, the prompts alone, (B, 77, D).
    Returns: denoise(latents, t) -> prediction, (B, 4, h, w) float32.
    """

    def denoise(latents, t):
        timesteps = torch.full((1,), t, device=latents.device)  # as a number, each t would be compiled anew
        if guidance <= 1:
            return unet(latents.to(context.dtype), timesteps, context).float()
        both = torch.cat([latents, latents]).to(context.dtype)  # (2 B, 4, h, w)
        uncond, cond = unet(both, timesteps, context).float().chunk(2)
        return uncond + guidance * (cond - uncond)

    return denoise


def leading_timesteps(schedule, steps):
    """``steps`` timesteps, descending, and the distance between them: 981, 961, ..., 1 for 50 of 1000. All 1000 steps
    leave no room for the offset of 1: 999, ..., 0.

    The distance is rounded down, so a number of steps that does not divide 1000 may start late: 600 steps start at
    timestep 600, where half of the image should be done. Published samplers do the same; `LatentDiffusion.sample`
    warns of it.
    """
    stride = schedule.n_timesteps // steps
    offset = 0 if steps == schedule.n_timesteps else 1
    return [i * stride + offset for i in reversed(range(steps))], stride


def spaced_timesteps(schedule, steps):
    """The timesteps of ddim, ddpm and plms, descending, and the distance between them, as the schedule asks: "leading",
    or for 50 of 1000 "trailing": 999, 979, ..., 19, or "linspace": 999, 979, ..., 20, 0 (Lin et al. 2023,
    arXiv:2305.08891, section 3.3 and Table 2)."""
    n = schedule.n_timesteps
    if schedule.timestep_spacing == "trailing":
        return [round(n - i * (n / steps)) - 1 for i in range(steps)], n // steps
    if schedule.timestep_spacing == "linspace":
        return [round((n - 1) * i / max(steps - 1, 1)) for i in reversed(range(steps))], n // steps
    return leading_timesteps(schedule, steps)


def starting_point(sampler, schedule, steps, skip=0, karras=False):
    """(t, alpha_bar) of a sampler's first network call after ``skip`` skipped ones: its timestep and noise level."""
    if sampler == "dpm++":
        timesteps, ratios = _karras_steps(schedule, steps) if karras else _linspace_steps(schedule, steps)
        return timesteps[skip], _alpha_and_sigma(ratios[skip])[0] ** 2
    timesteps, _ = spaced_timesteps(schedule, steps)
    t = (_repeat_second(timesteps) if sampler == "plms" else timesteps)[skip]
    return t, schedule.alpha_bar[t]


def ddim(denoise, latents, schedule, steps, sample_noise, skip=0, eta=0.0):
    """DDIM (Song et al. 2021, arXiv:2010.02502). ``eta`` 0 is deterministic; 1 adds as much noise as DDPM."""
    timesteps, stride = spaced_timesteps(schedule, steps)
    for t in timesteps[skip:]:
        alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar[max(t - stride, 0)]
        prediction = denoise(latents, t)
        clean = schedule.clean_latents(prediction, latents, alpha_bar)  # Eq. 9
        noise = schedule.noise(prediction, latents, alpha_bar)
        sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))  # Eq. 16
        direction = math.sqrt(1 - alpha_bar_prev - sigma**2) * noise
        latents = math.sqrt(alpha_bar_prev) * clean + direction  # Eq. 12
        if eta > 0 and t > 0:
            latents = latents + sigma * sample_noise()
        yield latents


def ddpm(denoise, latents, schedule, steps, sample_noise, skip=0):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, Algorithm 2) on a subsequence of the timesteps (Nichol and
    Dhariwal 2021, arXiv:2102.09672, section 4), with the smaller of the paper's two variances and no clipping."""
    timesteps, _ = spaced_timesteps(schedule, steps)
    for t, t_prev in list(zip(timesteps, [*timesteps[1:], None]))[skip:]:
        alpha_bar = schedule.alpha_bar[t]
        alpha_bar_prev = 1.0 if t_prev is None else schedule.alpha_bar[t_prev]  # the last step ends at zero noise
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        clean = schedule.clean_latents(denoise(latents, t), latents, alpha_bar)  # Eq. 15
        latents = (
            math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * clean
            + math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * latents
        )  # mean of Eq. 7
        if t > 0:
            variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta  # Eq. 7
            latents = latents + math.sqrt(variance) * sample_noise()
        yield latents


def plms(denoise, latents, schedule, steps, sample_noise=None, skip=0):
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778), the sampler in SD v1.5's scheduler file: DDIM steps
    (the paper's transfer part) along a combination of the last four predictions (its gradient part, section 3.3).

    The warm-up is Stable Diffusion's: the first step is taken twice, the second time along the mean of the predictions
    at its two ends, which makes ``steps`` + 1 network calls. For v-prediction the combination is of v, as in diffusers.

    With skipped calls this follows diffusers to the letter. Its list of timesteps repeats the second one for the
    warm-up's sake; if the list starts later, the warm-up still takes two calls for one step, so from then on every
    timestep is one step lower than the noise left in the latents, and a little of it remains. DDIM has no such fault.
    """
    timesteps, stride = spaced_timesteps(schedule, steps)

    def ddim_step(t, latents, prediction):  # eta = 0
        alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar[max(t - stride, 0)]
        clean = schedule.clean_latents(prediction, latents, alpha_bar)
        noise = schedule.noise(prediction, latents, alpha_bar)
        return math.sqrt(alpha_bar_prev) * clean + math.sqrt(1 - alpha_bar_prev) * noise

    past, first = [], latents  # predictions, newest first; the latents that the first step starts from
    for call, t in enumerate(_repeat_second(timesteps)[skip:]):
        prediction = denoise(latents, t)
        if call == 1:  # the first step once more, along the mean
            latents = ddim_step(t + stride, first, (past[0] + prediction) / 2)
            yield latents
            continue
        past = [prediction, *past[:3]]
        if len(past) == 2:  # Adams-Bashforth of order 2, 3 and, as in the paper, 4
            prediction = (3 * past[0] - past[1]) / 2
        elif len(past) == 3:
            prediction = (23 * past[0] - 16 * past[1] + 5 * past[2]) / 12
        elif len(past) == 4:
            prediction = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
        latents = ddim_step(t, latents, prediction)
        yield latents


def _repeat_second(timesteps):
    """981, 961, 961, 941, ...: the timesteps of PLMS' network calls."""
    return [*timesteps[:2], *timesteps[1:]]


def dpm_solver_pp(denoise, latents, schedule, steps, sample_noise=None, skip=0, karras=False):
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, Algorithm 2): a second-order multistep solver in
    terms of z_0, for which 20 steps are enough. The first and the last step are of first order.

    ``ratios`` are sigma / alpha, the noise-to-signal ratios; alpha = 1 / sqrt(1 + ratio^2), lambda = -log ratio.
    ``karras`` spaces the steps by Karras et al. 2022, arXiv:2206.00364, Eq. 5 with rho = 7, not evenly in time.
    """
    timesteps, ratios = _karras_steps(schedule, steps) if karras else _linspace_steps(schedule, steps)
    clean_prev, step_prev = None, None
    for i, t in list(enumerate(timesteps))[skip:]:
        alpha, sigma = _alpha_and_sigma(ratios[i])
        alpha_next, sigma_next = _alpha_and_sigma(ratios[i + 1])
        clean = schedule.clean_latents(denoise(latents, t), latents, alpha**2)
        if i == len(timesteps) - 1:  # sigma = 0 and lambda is infinite: the prediction itself
            latents = alpha_next * clean
        else:
            step = math.log(ratios[i] / ratios[i + 1])  # h = lambda_next - lambda
            extrapolated = clean  # Algorithm 2's D, with r = step_prev / step
            if clean_prev is not None:
                extrapolated = clean + step / (2 * step_prev) * (clean - clean_prev)
            latents = sigma_next / sigma * latents - alpha_next * math.expm1(-step) * extrapolated
            clean_prev, step_prev = clean, step
        yield latents


def _alpha_and_sigma(ratio):
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha


def _linspace_steps(schedule, steps):
    """Timesteps, such as 999, 949, ..., 50 for 20 steps, and their ratios sigma / alpha, followed by 0. All 1000 steps
    are 999, ..., 0, because the spacing of fewer steps would repeat 500."""
    last = schedule.n_timesteps - 1
    timesteps = [round(last * i / steps) if steps <= last else i - 1 for i in range(steps, 0, -1)]
    if schedule.timestep_spacing == "trailing":
        timesteps, _ = spaced_timesteps(schedule, steps)
    return timesteps, [_ratio(schedule.alpha_bar[t]) for t in timesteps] + [0.0]


def _karras_steps(schedule, steps, rho=7.0):
    """Ratios sigma / alpha evenly spaced in ratio^(1 / rho), followed by 0, and the timesteps nearest in log ratio."""
    table = [_ratio(alpha_bar) for alpha_bar in schedule.alpha_bar]  # ascending
    ramp = [i / max(steps - 1, 1) for i in range(steps)]
    low, high = table[0] ** (1 / rho), table[-1] ** (1 / rho)
    ratios = [(high + x * (low - high)) ** rho for x in ramp]
    logs = torch.tensor(table, dtype=torch.float64).log()
    timesteps = []
    for ratio in ratios:
        above = int(torch.searchsorted(logs, math.log(ratio)).clamp(1, len(table) - 1))
        weight = (math.log(ratio) - logs[above - 1]) / (logs[above] - logs[above - 1])
        timesteps.append(round(float(above - 1 + weight.clamp(0, 1))))
    return timesteps, [*ratios, 0.0]


def _ratio(alpha_bar):
    alpha_bar = max(alpha_bar, 2**-24)  # at zero terminal SNR the last ratio would be infinite; diffusers' value
    return math.sqrt((1 - alpha_bar) / alpha_bar)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "plms": plms, "dpm++": dpm_solver_pp}
