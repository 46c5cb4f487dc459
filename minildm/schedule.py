"""The noise schedule: how much noise each of the 1000 timesteps holds, and what the U-Net predicts.

DDPM (Ho et al. 2020, arXiv:2006.11239) with Stable Diffusion's "scaled linear" betas; v-prediction from Salimans and
Ho 2022, arXiv:2202.00512. ``alpha_bar`` is DDPM's bar alpha_t, which the DDIM paper writes alpha_t.
"""

import torch

from minildm.config import ScheduleConfig


class NoiseSchedule:
    """Tables over the timesteps and the formulas that use them. No weights.

    ``betas`` and ``alphas_cumprod`` are (n_timesteps,) float32 on the CPU; ``alpha_bar`` holds the values of
    ``alphas_cumprod`` as Python floats (float64), for the samplers' scalar coefficients.

    Methods that take ``timesteps`` raise ValueError if one lies outside the schedule, but check only timesteps on the
    CPU. To see the values of those on a GPU, the CPU would have to wait for it.
    """

    def __init__(
        self,
        prediction="epsilon",
        n_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        zero_terminal_snr=False,
        timestep_spacing="leading",
    ):
        ScheduleConfig(  # checks the values
            n_timesteps, beta_start, beta_end, prediction, beta_schedule, zero_terminal_snr, timestep_spacing
        )
        self.prediction, self.timestep_spacing = prediction, timestep_spacing
        # "scaled_linear": the square roots are evenly spaced (CompVis latent-diffusion, make_beta_schedule "linear")
        power = 0.5 if beta_schedule == "scaled_linear" else 1
        betas = torch.linspace(beta_start**power, beta_end**power, n_timesteps, dtype=torch.float64) ** (1 / power)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if zero_terminal_snr:
            alphas_cumprod = _rescale_to_zero_snr(alphas_cumprod)
            betas = 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
        self.betas, self.alphas_cumprod = betas.float(), alphas_cumprod.float()
        self.alpha_bar = alphas_cumprod.tolist()
        self._tables = {torch.device("cpu"): (self.betas, self.alphas_cumprod)}  # `_at` adds copies on other devices

    @property
    def n_timesteps(self):
        return len(self.alpha_bar)

    # --- training ----------------------------------------------------------------------------------------------------
    def add_noise(self, latents, noise, timesteps):
        """Sample z_t from q(z_t | z_0). DDPM, Eq. 4.

        Args:
            latents: clean scaled latents z_0, (B, 4, h, w).
            noise: standard normal noise, same shape and dtype.
            timesteps: (B,) int64 in [0, n_timesteps).
        Returns: z_t, (B, 4, h, w), dtype of ``latents``.
        Raises: ValueError if a timestep lies outside the schedule (checked for timesteps on the CPU only).
        """
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return (signal * latents + sigma * noise).to(latents.dtype)

    def target(self, latents, noise, timesteps):
        """The U-Net's training target, (B, 4, h, w): the noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) z_0
        (Salimans and Ho 2022, section 4)."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return (signal * noise - sigma * latents).to(latents.dtype)

    def snr(self, timesteps):
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of each timestep, (B,) float32."""
        _, alpha_bar = self._at(timesteps)
        return alpha_bar / (1 - alpha_bar)

    def min_snr_weight(self, timesteps, gamma=5.0):
        """Loss weight of each timestep, (B,) float32. Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556), section 3.4:
        the weight min(SNR, gamma) for the error of z_0 is min(SNR, gamma) / SNR for epsilon and / (SNR + 1) for v."""
        snr = self.snr(timesteps)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def posterior_variance(self, timesteps):
        """Variance of q(z_{t-1} | z_t, z_0), (B,) float32. DDPM, Eq. 7; 0 at t = 0."""
        timesteps = torch.as_tensor(timesteps)
        beta, alpha_bar = self._at(timesteps)
        alpha_bar_prev = torch.where(timesteps > 0, self._at((timesteps - 1).clamp(min=0))[1], 1.0)
        return (1 - alpha_bar_prev) / (1 - alpha_bar) * beta

    # --- sampling: one noise level for the whole batch, a float -------------------------------------------------------
    def clean_latents(self, prediction, noisy_latents, alpha_bar):
        """The z_0 that ``prediction`` implies at noise level ``alpha_bar``, (B, 4, h, w). DDPM, Eq. 15; for v: its
        definition and Eq. 4, solved for z_0."""
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.prediction == "epsilon":
            return (noisy_latents - sigma * prediction) / signal
        return signal * noisy_latents - sigma * prediction

    def noise(self, prediction, noisy_latents, alpha_bar):
        """The noise that ``prediction`` implies at noise level ``alpha_bar``, (B, 4, h, w)."""
        if self.prediction == "epsilon":
            return prediction
        return alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * noisy_latents

    # -----------------------------------------------------------------------------------------------------------------
    def _at(self, timesteps):
        """(betas, alphas_cumprod) at ``timesteps``, each (B,), on their device."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device not in self._tables:
            self._tables[timesteps.device] = (self.betas.to(timesteps.device), self.alphas_cumprod.to(timesteps.device))
        if timesteps.device.type == "cpu" and not ((timesteps >= 0) & (timesteps < self.n_timesteps)).all():
            raise ValueError(f"timesteps must lie in [0, {self.n_timesteps}), got {timesteps.tolist()}")
        betas, alphas_cumprod = self._tables[timesteps.device]
        return betas[timesteps], alphas_cumprod[timesteps]

    def _signal_and_sigma(self, timesteps, latents):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, 1, 1) float32, on the latents' device."""
        _, alpha_bar = self._at(timesteps)
        # Copying to a GPU need not wait for the GPU's work in progress; copying from it must.
        alpha_bar = alpha_bar.to(latents.device, non_blocking=latents.device.type == "cuda").view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _rescale_to_zero_snr(alphas_cumprod):
    """Shift and stretch sqrt(alpha_bar) so that the last is 0 and the first stays. Lin et al. 2023, arXiv:2305.08891,
    Algorithm 1."""
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)) ** 2
