"""Exact tiling on and off: the untiled result to float rounding, in memory set by the tile and a scratch."""

import logging
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from tqdm import tqdm

from latentvae.base.errors import ImageError, LatentVAEError, ModelError
from latentvae.runtime.memory import peak_of
from latentvae.runtime.offloading import weights_of
from latentvae.runtime.patches import (
    check_autoencoder,
    is_patched,
    keep_settings,
    name_patches,
    on_restore,
    patch,
    patches_of,
    underlying,
)
from latentvae.runtime.plain import change
from latentvae.runtime.tiling import layers, maps, planning, stages, structure

logger = logging.getLogger(__name__)

MIN_TILE = 16  # pixels; a read reaches 2 px beyond a tile on each side


def enable_exact_tiling(
    vae: AutoencoderKL,
    tile_size: int = planning.DEFAULT_TILE,
    scratch: str | Path | torch.device | None = None,
    progress: bool = False,
    memory: float = planning.DEFAULT_MEMORY,
) -> AutoencoderKL:
    """Have a VAE encode and decode large images tile by tile, with the numbers it gives without tiles.

    Works on `vae.encode`, `vae.decode` and all that call them, for images with a side above `tile_size`.
    Smaller ones go the ordinary way, and so does anything that needs gradients. Where something is attached
    to a module (hooks, a forward, an adapter) that would see tiles, or nothing, it is computed whole, as far
    as `memory` allows, and above refused by name. diffusers' own tiling, with its seams, is switched off as
    long as this is on. `latentvae.restore` undoes it.

    Args:
        tile_size: largest side of a tile in pixels, from 16. Memory beside the maps grows with its square.
        scratch: where maps lie between stages. None: the memory of the input's device; "cpu": main memory;
            otherwise a scratch folder for memory-mapped files, which vanish with the process however it ends.
        progress: show a progress bar, in TFLOP, for every image.
        memory: bytes that maps and a tile may take; above, maps are computed again rather than stored,
            as far as that helps. 0 stores as little as can be, `math.inf` computes nothing twice.

    Returns:
        The same object.

    Raises:
        ModelError: not an AutoencoderKL, or one with blocks that cannot be tiled, which are named.
        LatentVAEError: a tile that is too small, or a scratch folder that cannot be used.
    """
    check_autoencoder(vae)
    structure.check_structure(vae)
    width = max(vae.config["block_out_channels"][:2])
    settings = planning.Settings(_checked(tile_size), _scratch_place(scratch), progress, memory, width)
    for name, forward in (("encoder", _encoder_forward), ("decoder", _decoder_forward)):
        model = getattr(vae, name, None)
        if model is None:  # deleted by who only wants the other
            continue
        patch(model, forward, "tiling")
        keep_settings(model, settings)
    # named as what diffusers calls where its own tiling is on: so that does not cut what we get whole
    for method in (_tiled_encode, tiled_decode):
        setattr(vae, method.__name__, types.MethodType(method, vae))
    on_restore(vae, _restore_methods, "tiling")
    name_patches(vae)
    return vae


def _checked(tile_size: int) -> int:
    if not isinstance(tile_size, int) or tile_size < MIN_TILE:
        raise LatentVAEError(
            f"tile_size={tile_size!r} came; wanted a whole number of pixels from {MIN_TILE}: around "
            f"a smaller tile the halo is larger than the tile. {planning.DEFAULT_TILE} is the default."
        )
    return tile_size


def _scratch_place(store: str | Path | torch.device | None) -> Path | torch.device | None:
    if store is None or isinstance(store, torch.device):
        return store
    if store == "cpu":
        return torch.device("cpu")
    maps.check_scratch_folder(Path(store))
    return Path(store)


def _restore_methods(vae: torch.nn.Module) -> None:
    for method in (_tiled_encode, tiled_decode):
        vae.__dict__.pop(method.__name__, None)


def _tiled_encode(self: Any, x: torch.Tensor) -> torch.Tensor:
    """What stands in for diffusers' own tiling: the encoder gets the whole image, and tiles it exactly."""
    moments = self.encoder(x)
    return moments if self.quant_conv is None else self.quant_conv(moments)


def tiled_decode(self: Any, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
    """What stands in for diffusers' own tiling: the decoder gets all latents, and tiles them exactly."""
    images = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
    return DecoderOutput(sample=images) if return_dict else (images,)


def _encoder_forward(self: Any, sample: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        from latentvae.runtime.tiling import uncompiled  # imports torch's compiler, which takes seconds

        return uncompiled.run(encode_in_tiles, self, sample)
    return encode_in_tiles(self, sample)


def _decoder_forward(
    self: Any, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    if latent_embeds is not None:
        raise LatentVAEError("latent_embeds came; an AutoencoderKL's decoder takes none, and tiles none.")
    if torch.compiler.is_compiling():
        from latentvae.runtime.tiling import uncompiled  # imports torch's compiler, which takes seconds

        return uncompiled.run(decode_in_tiles, self, sample)
    return decode_in_tiles(self, sample)


def encode_in_tiles(self: Any, sample: torch.Tensor) -> torch.Tensor:
    """What an encoder computes of images, by tiles where they are large."""
    halvings = sum(getattr(block, "downsamplers", None) is not None for block in self.down_blocks)
    size = [side >> halvings for side in sample.shape[2:]]  # each halving drops an odd line, as stock's
    # an image smaller than one latent is stock's to refuse
    if _goes_ordinary_way(self, sample, sample.shape[2:], "images") or min(size) == 0:
        return underlying(self, "tiling")(sample)
    return _tiled(self, sample, (self.conv_out.out_channels, *size))


def decode_in_tiles(self: Any, sample: torch.Tensor) -> torch.Tensor:
    """What a decoder computes of latents, by tiles where its images are large."""
    doublings = sum(getattr(block, "upsamplers", None) is not None for block in self.up_blocks)
    size = [side << doublings for side in sample.shape[2:]]
    if _goes_ordinary_way(self, sample, size, "latents"):
        return underlying(self, "tiling")(sample)
    return _tiled(self, sample, (self.conv_out.out_channels, *size))


def _goes_ordinary_way(model: torch.nn.Module, sample: torch.Tensor, size: Sequence[int], what: str) -> bool:
    """Whether to compute it whole.

    Args:
        size: of the image, (height, width).

    Raises:
        ModelError: something that is attached would see tiles, and the whole is not allowed so much memory.
        ImageError: there are values that are not finite.
    """
    settings = planning.settings_of(model)
    small = max(size) <= settings.tile_size
    if torch.is_grad_enabled() and any(t.requires_grad for t in (sample, *model.parameters())):
        if not small:
            logger.warning("not tiled, because gradients are wanted: use torch.no_grad() where they are not.")
        return True
    # at any size, or small and large images would fail differently
    if not torch.isfinite(sample).all():
        raise ImageError(
            f"{what} came with NaN or infinite values; wanted finite ones. Look at what made them."
        )
    return small or _must_stay_whole(model, len(sample) * math.prod(size), sample.dtype, settings)


def _must_stay_whole(model: Any, pixels: int, dtype: torch.dtype, settings: planning.Settings) -> bool:
    name = "decoder" if hasattr(model, "up_blocks") else "encoder"
    changed = change(model)
    found = f"{name}, which {changed}" if changed else next(structure.problems(name, model), None)
    if found is None:
        return False
    needed = peak_of(settings.width, pixels, dtype.itemsize)
    if needed > settings.memory:
        raise ModelError(
            f"exact tiling would pass over {found}; and whole, this takes about {needed / 1e9:.2f} GB, above "
            f"the memory={settings.memory:.3g} that was given. {structure.REMEDY}"
        )
    ours = patches_of(model)
    if ours is not None and ours.name not in ours.said:
        ours.said.add(ours.name)
        logger.warning("not tiled, but computed whole, because of %s.", found)
    return True


@torch.no_grad()
def _tiled(model: Any, batch: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Encode or decode a batch, one sample after the other: the statistics are each sample's own."""
    settings = planning.settings_of(model)
    decodes, kind = hasattr(model, "up_blocks"), batch.device.type
    run_stages = stages.decoder_stages if decodes else stages.encoder_stages
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else batch.dtype
    scratch = maps.Scratch(settings.scratch or batch.device, dtype, _layout(model, batch))
    steps = planning.plan_walk(model, batch.shape[1:], dtype.itemsize, settings, batch.device)
    scratch.check_room(steps.store_bytes)
    result = torch.empty(len(batch), *shape, dtype=dtype, device=batch.device)
    tflop = sum(stage.flops for stage in steps.stages) * len(batch) / 1e12
    bar_of = _progress_bar("decode" if decodes else "encode", tflop, settings.progress)
    by_kernels = is_patched(model.conv_norm_out, "optimize")
    # blocks, resnets and norms are not called: their hooks would not bring what offloading keeps away
    with bar_of as bar, weights_of(structure.uncalled(model)):
        for sample, target in zip(batch.split(1), result.split(1), strict=True):
            run = stages.TiledRun(steps, scratch, batch.device, bar, by_kernels)
            source = planning.input_map(sample.shape[1:], sample.contiguous(memory_format=scratch.layout))
            run_stages(run, model, source, layers.Stored("result", shape, target))
    return result


def _progress_bar(verb: str, tflop: float, shown: bool) -> "tqdm[Any]":
    form = "{l_bar}{bar}| {n:.1f}/{total:.1f} TFLOP [{elapsed}<{remaining}]"
    # a little more than there is: the tiles' shares, added up in floats, may come out above the whole
    return tqdm(total=tflop * (1 + 1e-9), desc=verb, bar_format=form, disable=not shown)


def _layout(model: Any, batch: torch.Tensor) -> torch.memory_format:
    """Channels last where that is no slower: on a CPU, in half types, or where the weights are so."""
    weight = model.conv_in.weight
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    if batch.device.type == "cpu" or (batch.device.type == "cuda" and batch.dtype.itemsize == 2) or last:
        return torch.channels_last
    return torch.contiguous_format
