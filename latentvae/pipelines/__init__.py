"""Putting a VAE into a diffusers pipeline, and whether that can work."""

from latentvae.pipelines.agreement import Agreement, agree
from latentvae.pipelines.checks import LatentSpaceError
from latentvae.pipelines.structure import SwapError
from latentvae.pipelines.swapping import swap

__all__ = ["Agreement", "LatentSpaceError", "SwapError", "agree", "swap"]
