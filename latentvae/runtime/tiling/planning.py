"""What exact tiling takes before anything runs: tiles, stages, scratch, peak, and the cost of attention."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import ModelError
from latentvae.runtime.memory import ordinary_peak
from latentvae.runtime.patches import check_autoencoder, is_patched, patches_of
from latentvae.runtime.tiling.layers import Stored
from latentvae.runtime.tiling.maps import gives_back
from latentvae.runtime.tiling.stages import Stage, Walk, choose, decoder_stages, encoder_stages
from latentvae.runtime.tiling.structure import check_structure

DEFAULT_TILE = 512  # pixels of a side
DEFAULT_MEMORY = 3e9  # bytes


@dataclass(frozen=True)
class Settings:
    """What `enable_exact_tiling` was asked for; `scratch` None is the memory of the input's device.

    `width` is of the wider of the first two levels, by which a computation without tiles is measured.
    """

    tile_size: int = DEFAULT_TILE
    scratch: Path | torch.device | None = None
    progress: bool = False
    memory: float = DEFAULT_MEMORY
    width: int = 0


def settings_of(model: torch.nn.Module) -> Settings:
    """What `enable_exact_tiling` was asked for, or its defaults if it is off."""
    ours = patches_of(model)
    return ours.settings if ours is not None and is_patched(model, "tiling") else Settings()


@dataclass(frozen=True)
class Course:
    """What encoding or decoding one image takes.

    Attributes:
        verb: encode or decode.
        stages: in their order; none where the image is no larger than a tile, and goes the ordinary way.
        store_bytes: the most that the scratch holds at any time.
        peak_bytes: the most that scratch, tile and result take together, above the weights and the input.
        tile_bytes: the most that tile and result take together: what a scratch folder leaves to memory.
    """

    verb: str
    stages: tuple[Stage, ...]
    store_bytes: int
    peak_bytes: int
    tile_bytes: int

    @property
    def tiles(self) -> int:
        """Of all stages together."""
        return sum(stage.tiles for stage in self.stages)

    @property
    def tflop(self) -> float:
        """What is computed in all, counting what is computed again."""
        return sum(stage.flops for stage in self.stages) / 1e12

    @property
    def attention_tflop(self) -> float:
        """Of these, those of attention: they grow with the square of the area."""
        return sum(stage.flops for stage in self.stages if ".attentions." in stage.name) / 1e12

    def __str__(self) -> str:
        if not self.stages:  # smaller than a tile
            return f"{self.verb}: not tiled, peak about {self.peak_bytes / 1e9:.2f} GB above the weights"
        lines = [
            f"{self.verb}: {len(self.stages)} stages, {self.tiles} tiles, {self.tflop:.2f} TFLOP (attention "
            f"{self.attention_tflop:.2f}), scratch {self.store_bytes / 1e9:.2f} GB, peak "
            f"{self.peak_bytes / 1e9:.2f} GB above the weights",
            f"  {'stage':48} tiles  side  TFLOP  maps GB  tile GB",
        ]
        for stage in self.stages:
            lines.append(
                f"  {stage.name:48} {stage.tiles:5} {stage.side:5} {stage.flops / 1e12:6.2f} "
                f"{stage.store_bytes / 1e9:9.2f} {stage.tile_bytes / 1e9:8.2f}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class TilingPlan:
    """What `plan` returns, for one image; of a batch, the results add up. Print it."""

    height: int
    width: int
    encode: Course
    decode: Course

    def __str__(self) -> str:
        return f"{self.height} x {self.width} px\n{self.encode}\n{self.decode}"


def plan(
    vae: AutoencoderKL,
    height: int,
    width: int,
    *,
    tile_size: int | None = None,
    scratch: Path | torch.device | None = None,
    memory: float | None = None,
) -> TilingPlan:
    """Say what exact tiling of an image takes, without running it, in the VAE's dtype.

    Args:
        height, width: of the image in pixels. The latents to decode are those of the image padded to a
            multiple of the compression ratio.
        tile_size, scratch, memory: as in `enable_exact_tiling`. Default: what that was called with, or its
            defaults. The folder need not exist.

    Raises:
        ModelError: not an AutoencoderKL, one with blocks that cannot be tiled, or without one of its halves.
    """
    check_autoencoder(vae)
    for name in ("encoder", "decoder"):
        if getattr(vae, name, None) is None:
            raise ModelError(f"this VAE has no {name}; a plan says what encoding and decoding take.")
    check_structure(vae)
    asked = settings_of(vae.encoder)
    settings = Settings(
        asked.tile_size if tile_size is None else tile_size,
        asked.scratch if scratch is None else scratch,
        memory=asked.memory if memory is None else memory,
    )
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    images, latents = _shapes(vae, height, width)
    encoding = _course(vae, "encode", images, max(height, width), settings)
    decoding = _course(vae, "decode", latents, factor * max(latents[1:]), settings)
    return TilingPlan(height, width, encoding, decoding)


def whole_tflop(vae: AutoencoderKL, height: int, width: int) -> dict[str, float]:
    """What `encode` and `decode` compute of an image of so many pixels without tiles."""
    images, latents = _shapes(vae, height, width)
    one_tile = Settings(tile_size=4 * max(height, width), memory=math.inf)
    halves: dict[str, tuple[Any, tuple[int, int, int]]] = {
        "encode": (vae.encoder, images),
        "decode": (vae.decoder, latents),
    }
    walks = {verb: plan_walk(half, shape, 1, one_tile, vae.device) for verb, (half, shape) in halves.items()}
    return {verb: sum(stage.flops for stage in walk.stages) / 1e12 for verb, walk in walks.items()}


def _shapes(vae: AutoencoderKL, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """What the encoder gets of an image, and the decoder: latents of the padded image."""
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    latents = (vae.decoder.conv_in.in_channels, -(-height // factor), -(-width // factor))
    return (vae.encoder.conv_in.in_channels, height, width), latents  # the encoder pads nothing


def _course(
    vae: AutoencoderKL, verb: str, shape: tuple[int, int, int], side: int, settings: Settings
) -> Course:
    if side <= settings.tile_size:
        peak = ordinary_peak(vae, side, side)
        return Course(verb, (), 0, peak, peak)
    model = vae.encoder if verb == "encode" else vae.decoder
    walk = plan_walk(model, shape, vae.dtype.itemsize, settings, vae.device)
    return Course(verb, tuple(walk.stages), walk.store_bytes, walk.peak_bytes, walk.tile_bytes)


def plan_walk(model: Any, shape: Any, itemsize: int, settings: Settings, device: torch.device) -> Walk:
    """The stages of one sample (C, H, W) on a device, with what to keep chosen by the settings' memory."""
    # elsewhere maps lie in another order, and do not come row by row
    by_rows = device.type == "cpu" and gives_back(settings.scratch or device)
    decodes = hasattr(model, "up_blocks")
    # of the first level, where maps are largest: it sets how much a tile may take
    width = model.conv_norm_out.num_channels if decodes else model.conv_in.out_channels

    # the same stages that will compute, run without tensors
    def walk(kept: frozenset[str]) -> Walk:
        steps = Walk(itemsize, settings.tile_size, width, kept, by_rows)
        (decoder_stages if decodes else encoder_stages)(steps, model, input_map(shape))
        return steps

    return choose(walk, settings.memory)


def input_map(shape: Any, tensor: torch.Tensor | None = None) -> Stored:
    """The map that the first stage reads, which belongs to the caller."""
    device = None if tensor is None else tensor.device
    return Stored("input", tuple(shape), tensor, device)
