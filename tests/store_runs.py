"""Encoding runs in processes of their own, forked from one that has imported everything."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

import latentvae
import latentvae.store.encoding

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["latentvae.store.encoding", "latentvae.models.presets"]
)  # installed, so found


def run(photos: Path, store: Path, environment: dict[str, str]) -> None:
    """Encode with the tests' tiny model; ends with 1 where that fails."""
    os.environ.update(environment)
    torch.manual_seed(0)
    vae = latentvae.build("tiny").eval()
    latentvae.store.encoding.encode_folder(vae, photos, store, shard_size=2, batch_size=2, flips=True)


def start(
    photos: Path, store: Path, target: Callable[..., None] = run, **environment: str
) -> ForkServerProcess:
    """Start one process."""
    process = context.Process(target=target, args=(photos, store, environment))
    process.start()
    return process


def start_two(photos: Path, store: Path, target: Callable[..., None] = run) -> list[ForkServerProcess]:
    """Start both parts of two, as torchrun numbers them."""
    return [start(photos, store, target, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]


def finish(*processes: ForkServerProcess) -> list[int | None]:
    """Wait for processes; their exit codes."""
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]
