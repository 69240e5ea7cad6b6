"""How large a batch fits, from the memory that two small ones take."""

import tempfile
from dataclasses import dataclass

import torch

from latentvae.base.errors import ConfigError
from latentvae.training.checks import check_values
from latentvae.training.config import Config
from latentvae.training.data.batches import CropBatch
from latentvae.training.machine import peak_memory, usable_memory
from latentvae.training.setup import Run, set_up
from latentvae.training.step import optimizer_step

# images: two points give a line; small first, so that they fit wherever anything does
PROBES = (2, 6, 18, 54, 162)
SHARE = 0.85  # of the memory: fragments, validation and other processes take the rest
# by how much a batch must raise the peak: the system counts a process's pages, of which a few come whatever
# is computed, and a line through those would promise thousands of images
SHOWS = 1.02


@dataclass(frozen=True)
class BatchFit:
    """The largest batch per process and pass that fits, and the figures behind it, in bytes."""

    batch_size: int
    bytes_per_image: int
    fixed_bytes: int
    memory_bytes: int

    def advice(self) -> str:
        """The figures in a sentence, with the setting."""
        fixed, each, memory = (
            size / 1e9 for size in (self.fixed_bytes, self.bytes_per_image, self.memory_bytes)
        )
        return (
            f"{fixed:.2f} GB, and {each:.3f} GB more for each image: into {SHARE:.0%} of the {memory:.1f} GB "
            f"that it may have go up to {self.batch_size} images per process and pass "
            f"(--set train.batch_size={self.batch_size})"
        )


def find_batch_size(config: Config) -> BatchFit:
    """Take real steps with small batches, and extrapolate: memory is linear in the batch.

    Args:
        config: of the run; its output is not touched, and the adversarial loss counts as started.

    Raises:
        LatentVAEError: whatever would stop the run itself.
    """
    if config.stages:
        raise ConfigError(
            "--find-batch-size measures one stage: give its settings by --set, and --set 'stages=[]'"
        )
    check_values(config)  # before the trial changes what is checked
    with tempfile.TemporaryDirectory() as folder:
        trial = config.model_copy(deep=True)
        trial.output = folder
        trial.train.tracker = "none"
        trial.train.accumulation = 1
        trial.data.in_memory = False  # images are made up, so none need be decoded
        trial.distil.cache = None  # nor is a teacher's: made-up images have none, and it is the larger case
        if trial.model.teacher is not None:  # without one the setting would be refused
            trial.distil.linear_start = False
        trial.adversarial.disc_start = 0  # the run's largest step, not its first
        run = set_up(trial, None)
        if run.accelerator.num_processes > 1:  # each would judge by its own memory, and wait for the others
            raise ConfigError("--find-batch-size measures one process: call it without a launcher")
        each, fixed = _measure(run)
    memory = usable_memory()
    return BatchFit(max(1, int((SHARE * memory - fixed) // each)), each, fixed, memory)


def _measure(run: Run) -> tuple[int, int]:
    """Bytes of an image and of all else, from the first two batches that take more than one image did.

    On a CPU small batches hide in what loading took, or in what the optimizer takes for a moment, so larger
    ones are tried: a line through a hidden one would be too flat. Where none shows, all that is in use counts
    for the images of the largest: rather too much than too little.
    """
    floor, smaller, before = _peak(run, 1), 0, 0
    for size in PROBES:
        peak = _peak(run, size)
        if before > floor * SHOWS and peak > before * SHOWS:
            each = (peak - before) // (size - smaller)
            return each, max(0, before - smaller * each)
        smaller, before = size, peak
    return max(1, before // smaller), 0


def _peak(run: Run, size: int) -> int:
    """Peak memory after two steps of a batch, so that the optimizer's states are there."""
    side, channels = run.config.data.crop, run.state.vae.config["in_channels"]
    for step in range(2):
        shape = (size, channels, side, side)  # (B, C, H, W); what they show costs nothing
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        optimizer_step(run, [CropBatch(images, torch.arange(size) + step * size, [])])
    return peak_memory()
