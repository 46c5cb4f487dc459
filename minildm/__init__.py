"""minildm: latent diffusion fine-tuning for medical images, from scratch."""

from minildm.latent_diffusion import LatentDiffusion, load

__version__ = "0.1.0"
__all__ = ["LatentDiffusion", "load"]
