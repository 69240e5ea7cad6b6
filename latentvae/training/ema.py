"""The moving average of a model's weights."""

import copy

import torch
from diffusers import AutoencoderKL


class EMA:
    """Exponential moving average of a model's weights in float32, with the decay warmed up.

    Args:
        model: averaged; the average is `ema.model`, a copy in eval mode without gradients.
        decay: the final decay. At step n it is at most (1 + n) / (10 + n), so that short runs do not report
            their first weights.
    """

    def __init__(self, model: AutoencoderKL, decay: float) -> None:
        self.decay = decay
        self.model: AutoencoderKL = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: AutoencoderKL, step: int) -> None:
        """Move the average towards `model`, once per optimizer step; `step` counts from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            # lerp_ keeps weights that do not change exactly; mul_ and add_ round them
            average.lerp_(parameter.detach(), weight)
