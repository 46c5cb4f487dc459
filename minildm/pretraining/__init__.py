"""A latent diffusion model trained from scratch, stage by stage: ``python -m minildm pretrain``."""
