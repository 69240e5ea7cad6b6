"""Exact tiling as torch.compile calls it: as it is, for a graph of it would be made anew for every size."""

import torch

from latentvae.runtime.tiling import switch

_REASON = "exact tiling is not compiled: latentvae.restore(vae, 'tiling') where fullgraph is wanted"

encode_in_tiles = torch.compiler.disable(switch.encode_in_tiles, reason=_REASON)
decode_in_tiles = torch.compiler.disable(switch.decode_in_tiles, reason=_REASON)
