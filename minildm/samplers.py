"""Samplers: from noise to latents in a few dozen calls of the U-Net.

Each sampler is a generator over a schedule that yields the latents after every network call; the last ones yielded are
the picture's. It needs nothing but

    denoise(latents, t) -> prediction    the U-Net (guided or not) at the integer timestep t
    latents (B, 4, h, w) float32         standard normal noise
    draw_noise() -> (B, 4, h, w)         fresh standard normal noise, for the stochastic steps

Timesteps are those that Stable Diffusion v1.5's scheduler file implies: "leading" with offset 1 for DDIM, DDPM and PLMS
(981, 961, ..., 1 for 50 steps), "linspace" for DPM-Solver++. Symbols: alpha_bar = DDPM's bar alpha_t = DDIM's alpha_t;
``clean`` = predicted z_0; ``noise`` = epsilon.
"""

import math

import torch


def guide(unet, context, guidance):
    """A ``denoise`` function with classifier-free guidance: uncond + s (cond - uncond) (Ho and Salimans 2022,
    arXiv:2207.12598, Eq. 6, where s = 1 + w).

    Args:
        context: (2 B, 77, D), the negative prompts' rows before the prompts'; just (B, 77, D) if guidance <= 1, which
            runs no unconditional half.
    Returns: denoise(latents, t) -> prediction, (B, 4, h, w) float32.
    """

    def denoise(latents, t):
        timesteps = torch.full((1,), t, device=latents.device)  # a tensor: a compiler would make each number a program
        if guidance <= 1:
            return unet(latents.to(context.dtype), timesteps, context).float()
        both = torch.cat([latents, latents]).to(context.dtype)  # (2 B, 4, h, w)
        uncond, cond = unet(both, timesteps, context).float().chunk(2)
        return uncond + guidance * (cond - uncond)

    return denoise


def leading_timesteps(schedule, steps):
    """``steps`` timesteps, descending, and the distance between them: 981, 961, ..., 1 for 50 of 1000. With all 1000
    steps there is no room for the offset of 1, and they are 999, ..., 0.

    The distance is a whole number, so step counts that do not divide 1000 begin late: 600 steps at timestep 600, where
    a picture should be half there. That is what published samplers do; `LatentDiffusion.sample` warns of it.
    """
    stride = schedule.n_timesteps // steps
    offset = 0 if steps == schedule.n_timesteps else 1
    return [i * stride + offset for i in reversed(range(steps))], stride


def ddim(denoise, latents, schedule, steps, draw_noise, eta=0.0):
    """DDIM (Song et al. 2021, arXiv:2010.02502). ``eta`` 0: deterministic; 1: as much noise as DDPM."""
    timesteps, stride = leading_timesteps(schedule, steps)
    for t in timesteps:
        alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar[max(t - stride, 0)]
        prediction = denoise(latents, t)
        clean = schedule.clean_latents(prediction, latents, alpha_bar)  # Eq. 9
        noise = schedule.noise(prediction, latents, alpha_bar)
        sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))  # Eq. 16
        direction = math.sqrt(1 - alpha_bar_prev - sigma**2) * noise
        latents = math.sqrt(alpha_bar_prev) * clean + direction  # Eq. 12
        if eta > 0 and t > 0:
            latents = latents + sigma * draw_noise()
        yield latents


def ddpm(denoise, latents, schedule, steps, draw_noise):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, Algorithm 2) on a subsequence of the timesteps (Nichol and
    Dhariwal 2021, arXiv:2102.09672, section 4), with the smaller of the paper's two variances and no clipping."""
    timesteps, _ = leading_timesteps(schedule, steps)
    for t, t_prev in zip(timesteps, [*timesteps[1:], None]):
        alpha_bar = schedule.alpha_bar[t]
        alpha_bar_prev = 1.0 if t_prev is None else schedule.alpha_bar[t_prev]  # the last step goes to no noise at all
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        clean = schedule.clean_latents(denoise(latents, t), latents, alpha_bar)  # Eq. 15
        latents = (
            math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * clean
            + math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * latents
        )  # mean of Eq. 7
        if t > 0:
            variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta  # Eq. 7
            latents = latents + math.sqrt(variance) * draw_noise()
        yield latents


def plms(denoise, latents, schedule, steps, draw_noise=None):
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778), the scheduler that SD v1.5's own file names: DDIM
    steps (the paper's transfer part) along a combination of the last four predictions (its gradient part, section 3.3).

    The warm-up is Stable Diffusion's: the first step is taken twice, the second time along the mean of the predictions
    at both its ends (so ``steps`` + 1 network calls). Outputs are combined as the network gives them, also for v.
    """
    timesteps, stride = leading_timesteps(schedule, steps)

    def step_from(t, latents, prediction):  # DDIM's step, eta = 0
        alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar[max(t - stride, 0)]
        clean = schedule.clean_latents(prediction, latents, alpha_bar)
        noise = schedule.noise(prediction, latents, alpha_bar)
        return math.sqrt(alpha_bar_prev) * clean + math.sqrt(1 - alpha_bar_prev) * noise

    past = []  # predictions, newest first
    for t in timesteps:
        past = [denoise(latents, t), *past[:3]]
        if len(past) == 1 and steps > 1:
            guess = step_from(t, latents, past[0])
            yield guess
            prediction = (past[0] + denoise(guess, t - stride)) / 2
        elif len(past) == 1:
            prediction = past[0]
        elif len(past) == 2:  # Adams-Bashforth's coefficients of order 2, 3, and from then on the paper's, of order 4
            prediction = (3 * past[0] - past[1]) / 2
        elif len(past) == 3:
            prediction = (23 * past[0] - 16 * past[1] + 5 * past[2]) / 12
        else:
            prediction = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
        latents = step_from(t, latents, prediction)
        yield latents


def dpm_solver_pp(denoise, latents, schedule, steps, draw_noise=None, karras=False):
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, Algorithm 2): a second-order multistep solver for
    z_0, so that 20 steps do. The first and the last step are of first order.

    With noise-to-signal s = sigma / alpha, alpha = 1 / sqrt(1 + s^2) and lambda = -log s. ``karras`` spaces the steps
    as Karras et al. 2022, arXiv:2206.00364, Eq. 5 with rho = 7, instead of evenly in time.
    """
    timesteps, ratios = _karras_steps(schedule, steps) if karras else _linspace_steps(schedule, steps)
    clean_before, h_before = None, None
    for i, t in enumerate(timesteps):
        alpha, sigma = _alpha_and_sigma(ratios[i])
        alpha_next, sigma_next = _alpha_and_sigma(ratios[i + 1])
        clean = schedule.clean_latents(denoise(latents, t), latents, alpha**2)
        if i == len(timesteps) - 1:  # to sigma = 0, where lambda is infinite: the prediction itself
            latents = alpha_next * clean
        else:
            h = math.log(ratios[i] / ratios[i + 1])  # lambda_next - lambda
            if clean_before is None:
                towards = clean
            else:  # r = h_before / h; Algorithm 2's D
                towards = clean + h / (2 * h_before) * (clean - clean_before)
            latents = sigma_next / sigma * latents - alpha_next * math.expm1(-h) * towards
            clean_before, h_before = clean, h
        yield latents


def _alpha_and_sigma(ratio):
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha


def _linspace_steps(schedule, steps):
    """Timesteps 999, 949, ..., 50 (for 20) and their sigma / alpha, with a final 0. All 1000 steps are 999, ..., 0:
    spaced like the others, 500 would come twice."""
    last = schedule.n_timesteps - 1
    timesteps = [round(last * i / steps) if steps <= last else i - 1 for i in range(steps, 0, -1)]
    return timesteps, [_ratio(schedule.alpha_bar[t]) for t in timesteps] + [0.0]


def _karras_steps(schedule, steps, rho=7.0):
    """Noise levels evenly spaced in sigma^(1 / rho), a final 0, and the timesteps nearest to them in log sigma."""
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
    return math.sqrt((1 - alpha_bar) / alpha_bar)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "plms": plms, "dpm++": dpm_solver_pp}
