"""KL-regularised image VAEs for latent diffusion, as stock diffusers models."""

__version__ = "0.1.0"
