"""Several processes that write one store: who is who, and waiting for one another."""

import functools
import hashlib
import itertools
import json
import os
import platform
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed.distributed_c10d import Store

from latentvae.base.errors import StoreError

POLL_SECONDS = 0.05
_runs = itertools.count()


class Processes:
    """The processes of one run, as `torchrun` and `accelerate launch` number them in the environment.

    They talk through the key-value store that both launchers set up, and never through collectives.
    """

    def __init__(self) -> None:
        self.rank, self.world = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if not 0 <= self.rank < self.world:
            raise StoreError(f"RANK={self.rank} and WORLD_SIZE={self.world} came: a rank is below the size.")
        self._run = next(_runs)
        self._keys: Store | None = _meet(self.rank, self.world) if self.world > 1 else None
        if self._keys is not None:
            self._set(f"who/{self.rank}", {"host": platform.node(), "pid": os.getpid()})

    @property
    def is_main(self) -> bool:
        """Whether this is the one that locks, and writes the manifest."""
        return self.rank == 0

    def share(self, name: str, value: Any) -> list[Any]:
        """Wait until every process has come to `name`; what each brought, as JSON values, by rank.

        Raises:
            StoreError: what `fail` was called with in another process, or one is gone.
        """
        if self._keys is None:
            return [value]
        self._set(f"{name}/{self.rank}", value)
        wanted = list(range(self.world))
        while missing := [rank for rank in wanted if not self._has(f"{name}/{rank}")]:
            if self._has("error"):
                raise StoreError(self._get("error"))
            self._check_alive(missing)
            time.sleep(POLL_SECONDS)
        return [self._get(f"{name}/{rank}") for rank in wanted]

    def share_same(self, name: str, value: str) -> None:
        """Wait for every process, and make sure that all came with the same.

        Raises:
            StoreError: they did not.
        """
        digest = hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()
        if len(set(self.share(name, digest))) > 1:
            raise StoreError(
                f"the {self.world} processes see different {name}. Give all the same command, the same files "
                "and the same model, and do not change the folder meanwhile."
            )

    def leave(self) -> None:
        """Be the last to go where this process holds what the others talk through."""
        if self._keys is None:
            return
        self.share("finished", None)
        self._set(f"left/{self.rank}", None)
        if self.is_main:
            self.share("left", None)

    def fail(self, error: BaseException) -> None:
        """Have the others stop too."""
        if self._keys is not None:
            with suppress(RuntimeError):  # they are gone already
                self._set("error", f"process {self.rank} stopped: {error or type(error).__name__}")

    def _set(self, name: str, value: Any) -> None:
        assert self._keys is not None
        self._keys.set(f"latentvae/{self._run}/{name}", json.dumps(value))

    def _get(self, name: str) -> Any:
        assert self._keys is not None
        return json.loads(self._keys.get(f"latentvae/{self._run}/{name}"))

    def _has(self, name: str) -> bool:
        assert self._keys is not None
        try:
            return self._keys.check([f"latentvae/{self._run}/{name}"])
        except RuntimeError as error:  # torch's DistNetworkError
            raise StoreError(f"process 0 is gone ({error}); run the same command again.") from error

    def _check_alive(self, ranks: list[int]) -> None:
        """Those on this machine; on others the launcher has to notice."""
        for rank in ranks:
            who = self._get(f"who/{rank}") if self._has(f"who/{rank}") else None
            if who and who["host"] == platform.node() and not psutil.pid_exists(who["pid"]):
                raise StoreError(
                    f"process {rank} ended before it was done. What is finished stays: run the same command "
                    "again."
                )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise StoreError(f"{name}={text!r} is in the environment; wanted a number, or unset it.")
    return int(text)


@functools.cache
def _meet(rank: int, world: int) -> Store:
    """The launcher's key-value store; one for the life of this process, for its port can be had once."""
    from torch.distributed.rendezvous import rendezvous

    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise StoreError(
            f"WORLD_SIZE={world} came without MASTER_ADDR and MASTER_PORT: start the processes with torchrun "
            "or accelerate launch, or unset WORLD_SIZE."
        )
    try:
        keys, _, _ = next(iter(rendezvous("env://", rank, world, timeout=timedelta(minutes=10))))
    except (RuntimeError, ValueError) as error:
        raise StoreError(f"process {rank} of {world} did not meet the others: {error}.") from error
    return keys
