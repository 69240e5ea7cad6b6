"""What a CPU computes faster or more exactly than torch does: convolutions, norms of large maps."""
