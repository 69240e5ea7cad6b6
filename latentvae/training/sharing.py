"""The module as Accelerate runs it: its blocks compiled if asked, its gradients shared between processes."""

import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL
from torch import nn

from latentvae.errors import ConfigError
from latentvae.model import spatial_compression_ratio
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import Config
from latentvae.training.module import TrainableVAE


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return bool(PartialState().is_main_process)


def wrap(config: Config, module: TrainableVAE, accelerator: Accelerator) -> nn.Module:
    """The module as processes share it, its blocks compiled if asked."""
    if config.train.compile:
        compile_blocks(module.vae, accelerator.device)
    return accelerator.prepare_model(module)


def compile_blocks(vae: AutoencoderKL, device: torch.device) -> None:
    """Compile the blocks in place; the layers at both ends stay, as the adaptive weight looks at the last.

    Raises:
        ConfigError: this machine cannot compile.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"train.compile=true, but this machine cannot compile ({reason}). Install a C++ compiler (and, "
            "for a GPU, triton), or set train.compile=false."
        ) from error
    encoder, decoder = vae.encoder, vae.decoder
    for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
        block.compile()


def settle(config: Config, state: TrainingState, model: nn.Module, accelerator: Accelerator) -> None:
    """Two backward passes without an update, so that a resumed run adds gradients up in the old order.

    DistributedDataParallel sorts parameters into buckets anew after its first backward pass. With three or
    more processes the buckets decide the order of sums, and so the last bits.
    """
    side, shape = config.data.crop, state.vae.config
    small = side // spatial_compression_ratio(state.vae)
    images = torch.zeros(
        1, shape["in_channels"], side, side, device=accelerator.device, dtype=config.train.dtype
    )
    noise = images.new_zeros(1, shape["latent_channels"], small, small)
    adversary = state.adversary
    for _ in range(2):
        outputs = model(images, noise)
        maps = [each for each in (outputs.reconstructions, outputs.moments) if each.requires_grad]
        accelerator.backward(torch.stack([each.sum() for each in maps]).sum())
        if adversary is not None and adversary.ramp(state.step - 1) > 0:  # it has had its first pass
            accelerator.backward(adversary.model(images).sum())
    for optimizer in (state.optimizer, *([adversary.optimizer] if adversary else [])):
        optimizer.zero_grad(set_to_none=True)
