"""Training images: sources by number, and the crops drawn from them."""
