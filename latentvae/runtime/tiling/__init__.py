"""Exact tiled encode and decode: the numbers of the whole image, in memory set by the tile."""
