"""The training engine: config, data, step, loop, checkpoint."""
