"""What latents look like, learned, so that new ones can be drawn."""
