"""Batches of crops for one process: its share of every step, made by worker processes and waited for."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from latentvae.base.errors import LatentVAEError
from latentvae.training.config import Config
from latentvae.training.data.crops import CropSequence, Item
from latentvae.training.data.teacher_cache import TeacherCrop

# that ask a run to save and end; the last is Slurm's (sbatch --signal=USR1@120), and Windows has none
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]

LOOK_UP = 1.0  # seconds of waiting for a batch between two looks at what else has happened


@dataclass
class CropBatch:
    """Crops of consecutive positions, and the files that had to be passed over on the way."""

    pixel_values: torch.Tensor  # (B, C, H, W) uint8, a quarter of floats; of scans float32 in [-1, 1]
    positions: torch.Tensor  # (B,) int64: global sample index, counted from the run's start
    skipped: list[str]  # "name: reason"
    teacher: TeacherCrop | None = None  # (B, 2c, h, w) and (B, C, H, W), where a teacher's are kept

    def pin_memory(self) -> "CropBatch":
        """In memory that a GPU reads while it computes; DataLoader calls it."""
        pinned = None if self.teacher is None else TeacherCrop(*(each.pin_memory() for each in self.teacher))
        return CropBatch(self.pixel_values.pin_memory(), self.positions, self.skipped, pinned)

    def share_memory(self) -> None:
        """Move to where other processes read it; raises RuntimeError where there is no room."""
        for tensor in (self.pixel_values, self.positions, *(self.teacher or ())):
            tensor.share_memory_()


class PositionSampler(Sampler[list[int]]):
    """Batches of positions for one process: its share of every optimizer step's global batch, in order.

    Step s, forward pass a, process r and place j stand for position ((s * A + a) * R + r) * B + j, so N
    processes with batches of B / N see what one process with batches of B sees.
    """

    def __init__(self, batch_size: int, passes: range, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.passes, self.rank, self.world = batch_size, passes, rank, world

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for forward_pass in self.passes:
            start = (forward_pass * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


class BatchLoader(DataLoader):
    """A DataLoader whose workers' errors arrive as they were, not as a stack trace in a message.

    Attributes:
        while_waiting: called every second for which a batch of the workers is waited for; may raise.
    """

    while_waiting: Callable[[], None] = staticmethod(lambda: None)

    def __iter__(self) -> Iterator[CropBatch]:  # type: ignore[override]
        incoming = super().__iter__()
        while True:
            try:
                batch = next(incoming)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" in str(error):  # DataLoader's `timeout`; the next `next` waits on
                    self.while_waiting()
                    continue
                if "DataLoader worker" not in str(error):
                    raise
                raise LatentVAEError(
                    f"a process that decodes images died ({error}), most often because memory ran out. Lower "
                    "data.workers, leave out data.in_memory, or give the job more memory; then add --resume "
                    "latest."
                ) from error
            if isinstance(batch, LatentVAEError):
                # A new one: raising `batch` itself ties a cycle with this frame, which only gc undoes.
                raise type(batch)(*batch.args) from batch
            yield batch


def training_batches(
    config: Config, sequence: CropSequence, first_step: int, rank: int, world: int
) -> BatchLoader:
    """Batches from an optimizer step to the end of the run, `accumulation` of them per step."""
    # forward passes, not steps: a resumed run goes on with the pass after the checkpoint's last
    passes = range(first_step * config.train.accumulation, config.train.max_steps * config.train.accumulation)
    return BatchLoader(
        sequence,
        batch_sampler=PositionSampler(config.train.batch_size, passes, rank, world),
        collate_fn=collate,
        num_workers=config.data.workers,
        worker_init_fn=_leave_signals_to_the_main_process,
        timeout=LOOK_UP if config.data.workers else 0,
        generator=torch.Generator(),  # it draws a seed for its workers: not from the run's generator
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Go on when the whole process group is asked to stop: the main process saves first, and then ends us."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # after multiprocessing's own, hence run before it
def _end_workers() -> None:
    """Kill the workers that are left at exit: multiprocessing would ask with SIGTERM, and wait for ever."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls a killed worker an error
    for child in children:
        child.kill()


def collate(items: list[Item] | LatentVAEError) -> CropBatch | LatentVAEError:
    """Items as one batch; in a worker in shared memory, or the error to raise where that is full."""
    if isinstance(items, LatentVAEError):
        return items
    crops, positions, skipped, *given = zip(*items, strict=True)
    teacher = TeacherCrop(*map(torch.stack, zip(*given[0], strict=True))) if given else None
    names = [*chain.from_iterable(skipped)]
    batch = CropBatch(torch.stack(crops), torch.tensor(positions), names, teacher)
    worker = get_worker_info()
    if worker is not None:
        try:
            # here, and not by the queue, whose thread would print an error: the batch would never come
            batch.share_memory()
        except RuntimeError as error:
            megabytes = batch.pixel_values.nbytes / 1e6
            return LatentVAEError(
                f"a batch of {megabytes:.1f} MB found no room in shared memory, /dev/shm ({error}). Give the "
                f"container more (docker run --shm-size=8g), or lower data.workers={worker.num_workers}: "
                "each has two batches there, and data.workers=0 needs none."
            )
    return batch
