"""What a CPU computes faster or more exactly than torch does: wide convolutions, norms of large maps."""
