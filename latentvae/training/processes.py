"""What several processes have to agree on: the checkpoint that they continue from, and their weights."""

import platform
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

from latentvae.base.errors import ConfigError, LatentVAEError
from latentvae.base.files import file_sha256, make_folder
from latentvae.training import checkpoint
from latentvae.training.checkpoint import TrainingState
from latentvae.training.checks import find_start
from latentvae.training.config import Config

logger = get_logger(__name__)


def agree_on_start(config: Config, resume: str | None, accelerator: Accelerator) -> Path | None:
    """The checkpoint that every process continues from, as the first one finds it; None for a new run.

    Only the first process writes, so the others need not see its output folder until they are to read a
    checkpoint in it.

    Raises:
        ConfigError: the same in all processes: what `find_start` raises in the first, or a checkpoint that
            others do not have.
    """
    if accelerator.num_processes == 1:
        return find_start(config, resume)
    found: list[Path | str | None] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = find_start(config, resume)
        except ConfigError as error:
            found[1] = str(error)
    start, problem = broadcast_object_list(found)
    if problem is not None:
        raise ConfigError(problem)
    apart = _without_folder(Path(config.output), accelerator)
    if apart:
        logger.info(
            "processes %s do not see %s of process 0, as their machines share no folder: process 0 writes "
            "for all; to resume, they will need its checkpoints at the same path",
            *(apart, config.output),
        )
    if start is not None:
        _check_same_checkpoint(start, accelerator)
    return start


def _without_folder(folder: Path, accelerator: Accelerator) -> list[int]:
    """The processes that do not see a file which the first one writes into the output folder."""
    token = folder / broadcast_object_list([f".seen-{uuid.uuid4().hex}"])[0]
    if accelerator.is_main_process:
        make_folder(folder, ConfigError)
        token.touch()
    accelerator.wait_for_everyone()
    seen = gather_object([token.is_file()])
    if accelerator.is_main_process:  # all have looked: `gather_object` waited for them
        token.unlink()
    return [rank for rank, each in enumerate(seen) if not each]


def _check_same_checkpoint(start: Path, accelerator: Accelerator) -> None:
    """Refuse a resume where a process has not the checkpoint that the first one has verified."""
    try:
        own = file_sha256(start / checkpoint.MANIFEST)
    except OSError:
        own = ""
    digests = gather_object([own])
    apart = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if apart:
        raise ConfigError(
            f"processes {apart} do not have {start}, from which process 0 would continue. Put the output on "
            "a folder that all machines share, or copy that checkpoint to the same path on each of them."
        )


def check_agreement(state: TrainingState, accelerator: Accelerator) -> None:
    """Find processes whose weights have drifted from the first one's.

    Equal hardware computes equal updates from equal gradients, so there it is a fault, and the run ends.
    Different hardware rounds differently: all take over the first one's state, which is said and counted.

    Raises:
        LatentVAEError: names the processes that differ from the first though their hardware does not.
    """
    if accelerator.num_processes == 1:
        return
    sums = accelerator.gather(checksum(state.networks).reshape(1).to(accelerator.device)).tolist()
    apart = [rank for rank, each in enumerate(sums) if each != sums[0]]
    if not apart:
        return
    kinds = gather_object([hardware(accelerator.device)])
    if len(set(kinds)) == 1:
        raise LatentVAEError(
            f"processes {apart} hold other weights than process 0 at step {state.step}; nothing was saved. "
            "Check that all machines run the same versions and GPUs, and continue with --resume latest."
        )
    realign(state, accelerator)
    state.realigned += 1
    logger.warning(
        "processes %s had drifted from process 0 at step %d, as their hardware differs (%s): all go on with "
        "its weights (the %d. time)",
        *(apart, state.step, "; ".join(dict.fromkeys(kinds)), state.realigned),
    )


def hardware(device: torch.device) -> str:
    """What the last bits of a process's sums depend on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def realign(state: TrainingState, accelerator: Accelerator) -> None:
    """Give every process the first one's weights, averages and what its optimizers have accumulated."""
    networks, optimizers = [*state.networks, state.ema.model], state.optimizers
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    for optimizer in optimizers:
        tensors += [tensor for slot in optimizer.state.values() for tensor in slot.values()]
    if state.adversary is not None:
        tensors.append(state.adversary.averages)
    for tensor in tensors:
        # collectives take what lies in one piece, on the process's device
        sent = tensor.detach().to(accelerator.device, memory_format=torch.contiguous_format).contiguous()
        tensor.detach().copy_(broadcast(sent))


def checksum(networks: Iterable[nn.Module]) -> torch.Tensor:
    """A scalar int64 that changes with any bit of any parameter."""
    total = torch.zeros((), dtype=torch.int64)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    for number, parameter in enumerate(parameters, 1):
        # sums of integers do not depend on their order, as sums of floats would
        bits = (
            parameter.detach()
            .contiguous()
            .view(torch.int32 if parameter.element_size() == 4 else torch.int64)
        )
        total = total.to(bits.device) + number * bits.sum(dtype=torch.int64)
    return total
