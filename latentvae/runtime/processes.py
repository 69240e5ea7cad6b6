"""Several processes that do one thing together, as torchrun and accelerate launch number them."""

import atexit
import gc
from datetime import timedelta
from importlib import import_module
from typing import Any, Self

from torch import distributed

from latentvae.base.errors import LatentVAEError
from latentvae.base.threads import environment_number

WAIT = timedelta(hours=24)  # for the slowest; a process that has died is noticed at once


def before_group() -> None:
    """To be called before processes meet in a group, which then ends with their work, not some time later.

    A process that ends while gloo's threads still run may be aborted by C++ ("terminate called without an
    active exception"), whatever its exit code was to be. Functions of `torch.distributed.nn`, which diffusers
    imports, keep the group as a default if there is one by then: hence the import here.
    """
    if distributed.is_available():  # builds for small devices go without
        import_module("torch.distributed.nn")
        atexit.register(leave_group)


def leave_group() -> None:
    """Part from the other processes, if this one met them through gloo, and let its threads end."""
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
    gc.collect()  # the group ends with the last object that knows it, as wrapped models do


class Processes:
    """The processes of one run: each brings what it has to `share`, and waits there for the others.

    with Processes() as processes:  # an error of one ends all of them
        parts = processes.share(part)
    """

    def __init__(self) -> None:
        self.rank, self.world = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
        if not 0 <= self.rank < self.world:
            raise LatentVAEError(
                f"RANK={self.rank} and WORLD_SIZE={self.world} came: a rank is below the size."
            )
        self._told = False  # whether all know already that one has failed
        self._met_here = self.world > 1 and not distributed.is_initialized()
        if self._met_here:
            before_group()
            try:
                distributed.init_process_group("gloo", timeout=WAIT)
            except (RuntimeError, ValueError) as error:
                raise LatentVAEError(
                    f"process {self.rank} of {self.world} did not meet the others ({error}): start the "
                    "processes with torchrun or accelerate launch, or unset WORLD_SIZE."
                ) from error

    @property
    def is_main(self) -> bool:
        """Whether this is the one that has the report."""
        return self.rank == 0

    def share(self, value: Any) -> list[Any]:
        """What every process brings, by rank, once all have come.

        Raises:
            LatentVAEError: another process failed, or is gone.
        """
        if self.world == 1:
            return [value]
        brought = self._gather((None, value))
        if errors := [error for error, _ in brought if error]:
            self._told = True
            raise LatentVAEError(errors[0])
        return [each for _, each in brought]

    def share_same(self, what: str, value: Any) -> None:
        """Wait for every process, and make sure that all came with the same.

        Raises:
            LatentVAEError: they did not.
        """
        if any(each != value for each in self.share(value)):
            raise LatentVAEError(
                f"the {self.world} processes see different {what}. Give all the same command, the same files "
                "and the same model, and do not change the folder meanwhile."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Part from the others; they stop too, when they come to share something, if this one failed."""
        try:
            if error is not None and self.world > 1 and not self._told:  # Ctrl-C too: others would wait
                self._gather((f"process {self.rank} stopped: {error or type(error).__name__}", None))
        except LatentVAEError:
            pass  # they are gone already; what is raised here says why
        finally:
            if self._met_here:
                leave_group()

    def _gather(self, value: Any) -> list[Any]:
        brought: list[Any] = [None] * self.world
        try:
            distributed.all_gather_object(brought, value)
        except RuntimeError as error:  # gloo's, of a connection that was closed
            raise LatentVAEError(f"another process is gone ({error}); run the same command again.") from error
        return brought
