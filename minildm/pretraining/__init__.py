"""A latent diffusion model from nothing, stage by stage: ``python -m minildm pretrain``."""
