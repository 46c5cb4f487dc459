"""minildm: latent diffusion fine-tuning for medical images, from scratch."""

__version__ = "0.2.0"
__all__ = ["LatentDiffusion", "load"]


def __getattr__(name):
    """Import a public name when it is first used: torch takes two seconds to import, and not every command needs it."""
    if name == "LatentDiffusion":
        from minildm.latent_diffusion import LatentDiffusion

        return LatentDiffusion
    if name == "load":
        from minildm.loading import load

        return load
    raise AttributeError(f"module 'minildm' has no attribute {name!r}")
