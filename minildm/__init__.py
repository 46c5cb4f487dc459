"""minildm: latent diffusion fine-tuning for medical images, from scratch."""

__version__ = "0.1.0"
__all__ = ["LatentDiffusion", "load"]


def __getattr__(name):
    """The public names, imported when first asked for: torch takes two seconds, and not every command needs it."""
    if name in __all__:
        from minildm import latent_diffusion
        return getattr(latent_diffusion, name)
    raise AttributeError(f"module 'minildm' has no attribute {name!r}")
