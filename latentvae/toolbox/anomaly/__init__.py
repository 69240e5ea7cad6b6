"""Which images are odd, compared with normal ones."""
