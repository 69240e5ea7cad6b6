"""Exact tiling as torch.compile calls it: as it is, for a graph of it would be made anew for every size."""

from collections.abc import Callable
from typing import Any

import torch

_REASON = "exact tiling is not compiled: latentvae.restore(vae, 'tiling') where fullgraph is wanted"


@torch.compiler.disable(reason=_REASON)
def run(tiled: Callable[..., torch.Tensor], *values: Any) -> torch.Tensor:
    """Call a function in eager mode, within whatever is compiled."""
    return tiled(*values)
