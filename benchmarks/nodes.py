"""Four nodes of a Ray cluster, killed and replaced while they encode: the store is that of one process.

    python benchmarks/nodes.py PHOTOS --images 96 --kills 20

The nodes are Ray's own, on this machine, of one core each; the oldest is killed as each `--every` further
shards are there, and another joins. Half-way the command itself is killed, and started again as it was.
Nothing is timed; what is printed are the hashes of both stores.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from latentvae.images.reading import find_images
from latentvae.store.verification import verify

NODES = 4
PATIENCE = 600.0  # seconds without another shard
MEMORY = {"object_store_memory": 80_000_000, "include_dashboard": False}


def command(photos: list[Path], store: Path, *options: str) -> list[str]:
    """The verb, as people type it."""
    call = [sys.executable, "-m", "latentvae", "encode", *map(str, photos), str(store), "-m", "f8c4-small"]
    return [*call, "--shard-size", "2", "--precision", "fp32", *options]


def finished(store: Path) -> int:
    """Shards of a run that are on disk."""
    return len([*store.glob(".run/*/latents-*.safetensors"), *store.glob("latents-*.safetensors")])


def digest(store: Path) -> str:
    """Of the names and the bytes of all that lies in it."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.relative_to(store)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"{found.hexdigest()} of {len(files)} files"


class Shaken:
    """A run of the command on a cluster whose nodes come and go."""

    def __init__(self, call: list[str], cluster: Any, store: Path) -> None:
        self.call, self.cluster, self.store = call, cluster, store
        self.nodes = [cluster.add_node(num_cpus=1, **MEMORY) for _ in range(NODES)]
        self.driver = subprocess.Popen(call)

    def wait_for(self, shards: int) -> None:
        """Until so many shards are there."""
        there, since = -1, time.monotonic()
        while (now := finished(self.store)) < shards:
            there, since = (now, time.monotonic()) if now != there else (there, since)
            if self.driver.poll() is not None or time.monotonic() - since > PATIENCE:
                raise SystemExit(f"after {now} shards nothing more came")
            time.sleep(0.05)

    def replace_node(self) -> None:
        """Kill the oldest, as it works, and have another join."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, **MEMORY))
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def kill_driver(self) -> None:
        """Kill the command, and give it again."""
        self.driver.send_signal(signal.SIGKILL)
        self.driver.wait()
        self.driver = subprocess.Popen(self.call)


def shake(run: Shaken, kills: int, every: int) -> None:
    """Replace nodes, and half-way the command, until it ends."""
    for number in range(1, kills + 1):
        run.wait_for(every * number)
        run.replace_node()
        print(
            f"node {number} of {kills} killed after {finished(run.store)} shards, another joined", flush=True
        )
        if number == kills // 2:
            run.kill_driver()
            print("the command killed, and given again", flush=True)
    if run.driver.wait():
        raise SystemExit("the command failed")


def main() -> None:
    """Print the hashes of both stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="a folder of images")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=int, default=2, help="shards from kill to kill")
    arguments = parser.parse_args()
    photos = find_images(arguments.photos)[: arguments.images]
    if len(photos) < 2 * arguments.every * arguments.kills + 2:
        parser.error(f"{len(photos)} images are too few for {arguments.kills} kills")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's are of lower priority otherwise
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as scratch:
        alone, shaken = Path(scratch, "alone"), Path(scratch, "shaken")
        subprocess.run(command(photos, alone), check=True)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **MEMORY})
        try:
            engine = ("--engine", "ray", "--ray-address", cluster.address, "--threads", "1")
            run = Shaken(command(photos, shaken, *engine), cluster, shaken)
            shake(run, arguments.kills, arguments.every)
        finally:
            cluster.shutdown()
        found = [digest(alone), digest(shaken)]
        print(f"one process: {found[0]}\nfour nodes:  {found[1]}\n{verify(shaken) or 'verified'}")
    if found[0] != found[1]:
        raise SystemExit("the stores differ")


if __name__ == "__main__":
    main()
