"""minildm: latent diffusion fine-tuning for medical images, from scratch."""

__version__ = "0.1.0"
