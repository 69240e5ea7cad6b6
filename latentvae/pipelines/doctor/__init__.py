"""Whether a VAE survives half precision, and a rescaled copy that does."""
