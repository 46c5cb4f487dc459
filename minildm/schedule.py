"""The noise schedule: how much noise each of the 1000 timesteps holds, and what the U-Net is asked to predict.

DDPM (Ho et al. 2020, arXiv:2006.11239), with Stable Diffusion's "scaled linear" betas; v-prediction from Salimans and
Ho 2022, arXiv:2202.00512. DDIM's alpha_t *is* DDPM's bar alpha_t: here it is always ``alpha_bar``.
"""

import torch

from minildm.config import ScheduleConfig


class NoiseSchedule:
    """Tables over the timesteps, and the few formulas that need them. Holds no weights and no state.

    ``betas`` and ``alphas_cumprod`` are (n_timesteps,) float32 on the CPU; ``alpha_bar`` is the same table as Python
    floats in float64, for samplers, whose coefficients are scalars.
    """

    def __init__(self, prediction="epsilon", n_timesteps=1000, beta_start=0.00085, beta_end=0.012):
        ScheduleConfig(n_timesteps, beta_start, beta_end, prediction)  # checks the values
        self.prediction = prediction
        # "scaled_linear": the square roots are evenly spaced (CompVis latent-diffusion, make_beta_schedule "linear")
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, n_timesteps, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.betas, self.alphas_cumprod = betas.float(), alphas_cumprod.float()
        self.alpha_bar = alphas_cumprod.tolist()

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
        Raises: ValueError if a timestep lies outside the schedule.
        """
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return (signal * latents + sigma * noise).to(latents.dtype)

    def target(self, latents, noise, timesteps):
        """What the U-Net should say, (B, 4, h, w): the noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) z_0
        (Salimans and Ho 2022, section 4)."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return (signal * noise - sigma * latents).to(latents.dtype)

    def snr(self, timesteps):
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of each timestep, (B,) float32."""
        alpha_bar = self._gather(timesteps)
        return alpha_bar / (1 - alpha_bar)

    def min_snr_weight(self, timesteps, gamma=5.0):
        """Loss weight of each timestep, (B,) float32. Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556), section 3.4:
        min(SNR, gamma) on the error of z_0, which is min(SNR, gamma) / SNR on that of epsilon, / (SNR + 1) on v."""
        snr = self.snr(timesteps)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def posterior_variance(self, timesteps):
        """Variance of q(z_{t-1} | z_t, z_0), (B,) float32. DDPM, Eq. 7; 0 at t = 0."""
        timesteps = torch.as_tensor(timesteps)
        alpha_bar = self._gather(timesteps)
        alpha_bar_before = torch.where(timesteps > 0, self._gather((timesteps - 1).clamp(min=0)), 1.0)
        beta = self.betas[timesteps.cpu()].to(timesteps.device)
        return (1 - alpha_bar_before) / (1 - alpha_bar) * beta

    # --- sampling: scalars -------------------------------------------------------------------------------------------
    def clean_latents(self, prediction, noisy_latents, alpha_bar):
        """z_0 that the network's output implies at noise level ``alpha_bar`` (a float). DDPM, Eq. 15 / v: Eq. 4 solved
        with v's definition. All (B, 4, h, w)."""
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.prediction == "epsilon":
            return (noisy_latents - sigma * prediction) / signal
        return signal * noisy_latents - sigma * prediction

    def noise(self, prediction, noisy_latents, alpha_bar):
        """The noise that the network's output implies at noise level ``alpha_bar`` (a float), (B, 4, h, w)."""
        if self.prediction == "epsilon":
            return prediction
        return alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * noisy_latents

    # -----------------------------------------------------------------------------------------------------------------
    def _gather(self, timesteps):
        """alphas_cumprod at ``timesteps``, on their device. (Timesteps drawn on the CPU cost a GPU no waiting.)"""
        index = torch.as_tensor(timesteps).cpu()
        if index.numel() and not (index.min() >= 0 and index.max() < self.n_timesteps):
            raise ValueError(f"timesteps must lie in [0, {self.n_timesteps}), got {index.tolist()}")
        return self.alphas_cumprod[index].to(torch.as_tensor(timesteps).device)

    def _signal_and_sigma(self, timesteps, latents):
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), each (B, 1, 1, 1) float32, on the latents' device."""
        alpha_bar = self._gather(timesteps).to(latents.device).view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
