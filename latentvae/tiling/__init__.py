"""Exact tiled encode and decode: the numbers of the whole image, in memory set by the tile and a store."""

from latentvae.tiling.planning import DEFAULT_TILE, Plan, plan
from latentvae.tiling.switch import enable_exact_tiling

__all__ = ["DEFAULT_TILE", "Plan", "enable_exact_tiling", "plan"]
