"""Images changed through their latents: between two, around one, into a hole."""
