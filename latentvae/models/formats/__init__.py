"""The files that hold a VAE: diffusers' and LDM's names, bare, prefixed or inside a whole checkpoint."""
