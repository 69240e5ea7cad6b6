"""Shards encoded by Ray, on any number of machines; the process that was started writes them.

Each shard is a task: its moments depend on its images, the model and the options alone, so that Ray may run
it anywhere and again. What a node that died was doing, and what it had done and not handed over, Ray does
again on another; nodes that join are given tasks, and tasks that wait tell an autoscaler to add some.
"""

import logging
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.base.optional import need
from latentvae.store import format as layout
from latentvae.store.encoding import Moments, Worker, Workload
from latentvae.store.format import Entry, Failure, Manifest, Row
from latentvae.store.journal import Journal
from latentvae.store.parts import WHOLE
from latentvae.store.planning import ShardWork, Source

logger = logging.getLogger(__name__)

RETRIES = 20  # of one shard whose node or process died
REACHED = 10.0  # seconds: a cluster that has not answered by then is none
CORES = 4  # of a task, where the nodes have as many
CANNOT_CONNECT = (
    "there is no Ray cluster at {address} ({reason}). Start one (`ray start --head`), name another with "
    "--ray-address, or leave that out: then Ray starts on this machine."
)
# Ray says alike that nobody answers and that no token came, which it never sends to an address by itself
WANTS_TOKEN = " If it is there and asks for a token, set RAY_AUTH_MODE=token (the token: ~/.ray/auth_token)."
Equip = Callable[[AutoencoderKL], tuple[AutoencoderKL, Workload]]


class Ray:
    """An engine for `Workload.engine`.

    Args:
        vae: the model, on the CPU, as it was loaded.
        equip: called with it in each process that encodes: makes it ready, and says how the process works. It
            is pickled: a function of a module, or a partial of one.
        address: of the cluster, such as "auto" or ray://host:10001; None: $RAY_ADDRESS, else the one that
            runs on this machine, else a new one here.
        cores: of a task; None: 4, or as many as the largest node has.
        gpus: of a task; less than 1 has several share one. None: 1 where the cluster has some, else 0.

    Raises:
        StoreError: Ray is not installed, or no cluster is there.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        equip: Equip,
        address: str | None = None,
        cores: int | None = None,
        gpus: float | None = None,
    ) -> None:
        self.ray = need("ray", StoreError, what="--engine ray")
        self.vae, self.equip = vae, equip
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        if not self.ray.is_initialized():
            try:
                _reach(address or os.environ.get("RAY_ADDRESS", ""))
                self.ray.init(address, log_to_driver=False, logging_level="warning")
            except (OSError, ValueError, RuntimeError) as error:
                hint = WANTS_TOKEN if "Failed to connect" in str(error) else ""
                raise StoreError(
                    CANNOT_CONNECT.format(address=address or "auto", reason=error) + hint
                ) from error
        have = self.ray.cluster_resources()
        self.gpus = gpus if gpus is not None else 1.0 if have.get("GPU") else 0.0
        largest = max(node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"])
        self.cores = cores or max(1, int(min(CORES, largest)))

    def __call__(
        self, settings: Manifest, sources: dict[str, Source], shards: list[ShardWork]
    ) -> Iterator[Moments]:
        """The shards' moments, as they come.

        Raises:
            StoreError: a shard could not be encoded; or what went wrong there.
        """
        put = self.ray.put
        # in a list, which is handed on as it is: each process fetches them once, and not each task
        tools = [put(self.vae), put(sources), put((settings, self.equip))]
        run = uuid.uuid4().hex
        task = self.ray.remote(
            num_cpus=self.cores,
            num_gpus=self.gpus,
            max_retries=RETRIES,
            max_calls=0,  # a process with a GPU would otherwise end after each task
            scheduling_strategy="SPREAD",
        )(_compute)
        if not self._room():
            logger.warning(
                "no node of the cluster has %d cores and %g GPUs now: waiting for one to join. Tasks ask for "
                "less with --threads and --ray-gpus.",
                *(self.cores, self.gpus),
            )
        waiting, running = list(reversed(shards)), dict[Any, ShardWork]()
        try:
            while waiting or running:
                # more than there is room for: so nothing stands still, and an autoscaler sees what is wanted
                while waiting and len(running) < 2 * self._room() + 2:
                    shard = waiting.pop()
                    running[task.options(name=f"encode {shard.name}").remote(run, tools, shard)] = shard
                (done,), _ = self.ray.wait(list(running), num_returns=1)
                yield self._unpack(done, running.pop(done))
        finally:
            for one in running:
                self.ray.cancel(one, force=True)

    def _room(self) -> int:
        """How many tasks the cluster runs at once now."""
        rooms = 0
        for have in (node["Resources"] for node in self.ray.nodes() if node["Alive"]):
            shares = [have.get("CPU", 0) // self.cores]
            if self.gpus:
                shares.append(have.get("GPU", 0) // self.gpus)
            rooms += int(min(shares))
        return rooms

    def _unpack(self, done: Any, shard: ShardWork) -> Moments:
        try:
            tensors, entries, failures = self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LatentVAEError):
                raise error.cause from error
            raise StoreError(
                f"{shard.name} failed on a node ({type(error.cause).__name__}: {error.cause}). Nodes need "
                "the same latentvae and the packages that it uses here. Finished shards are kept: run the "
                "same command again when that is mended."
            ) from error
        except self.ray.exceptions.RayError as error:
            raise StoreError(
                f"{shard.name} was not encoded: its process or node ended {RETRIES + 1} times ({error}). "
                "Finished shards are kept: see what Ray says of it (often memory: give tasks more "
                "cores, --threads), and run the same command again."
            ) from error
        return shard, [_row(tensors, entry) for entry in entries], failures


def _reach(address: str) -> None:
    """See that somebody listens there: Ray would go on trying for a quarter of an hour; raises OSError."""
    if (match := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)) is not None:
        socket.create_connection((match[1], int(match[2])), REACHED).close()


def own_share() -> tuple[int, bool]:
    """How many cores the task that asks has, and whether it has a GPU."""
    import ray

    return int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), bool(ray.get_gpu_ids())


def _row(tensors: dict[str, Any], entry: Entry) -> Row:
    flipped = tensors.get(layout.flipped_name(entry.tensor))
    return Row(entry, tensors[entry.tensor][entry.offset], None if flipped is None else flipped[entry.offset])


def _compute(
    run: str, tools: list[Any], shard: ShardWork
) -> tuple[dict[str, Any], list[Entry], list[Failure]]:
    """One task: a shard's moments, in few large tensors, because many small ones are slow to hand over."""
    _, rows, failures = _worker(run, tuple(tools)).compute(shard)
    return *layout.assemble(rows), failures


@lru_cache(maxsize=1)
def _worker(run: str, tools: tuple[Any, ...]) -> Worker:
    """What a process of Ray needs, kept from task to task."""
    import ray

    vae, sources, (settings, equip) = ray.get(list(tools))
    ready, work = equip(vae)
    # no folder: nothing is written here
    return Worker(ready, Journal(Path()), settings, sources, work, WHOLE)
