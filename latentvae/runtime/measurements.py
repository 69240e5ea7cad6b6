"""What was measured on this machine, kept in a file in the user's cache folder.

Of each machine, and of each version of what computes, it holds entries of their own: a home folder may be
shared. A file that cannot be read is as good as none, and one that cannot be written costs only time.
"""

import json
import logging
import os
import platform
import zlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from latentvae import __version__
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import cache_folder, whole_file

logger = logging.getLogger(__name__)

FILE = "speed.json"
VERSION = 2  # of the file's layout: another one is measured anew


def place() -> Path:
    """The file, which need not be there."""
    return cache_folder() / FILE


def machine() -> str:
    """What figures hold for: the processor, torch's threads on it, and the versions of what computes."""
    try:
        openvino = metadata.version("openvino")
    except metadata.PackageNotFoundError:
        openvino = "none"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    versions = f"torch {torch.__version__}, openvino {openvino}, latentvae {__version__}"
    return f"{processor()}; {threads}; {versions}"


@cache
def processor() -> str:
    """Name and instructions: a virtual machine may tell the same name for several processors."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    lines = (line.partition(":") for line in first.splitlines())
    told = {name.strip(): value.strip() for name, _, value in lines}
    kind = [told.get(name, "") for name in ("cpu family", "model", "stepping", "flags", "Features")]
    name = told.get("model name") or platform.machine()
    return f"{name} ({zlib.crc32(' '.join(kind).encode()):08x})"


def capabilities() -> dict[str, object]:
    """What torch knows of this CPU; older versions know only two things."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {name: getattr(torch.cpu, test, bool)() for name, test in known.items()}


def read(name: str) -> dict[str, Any] | None:
    """This machine's entry of that name, if there is one."""
    entry = _machines().get(machine(), {}).get(name)
    return entry if isinstance(entry, dict) else None


def write(name: str, entry: dict[str, Any]) -> None:
    """Keep an entry; the log says where that cannot be."""
    machines = _machines()
    machines.setdefault(machine(), {})[name] = entry
    try:
        path = place()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps({"version": VERSION, "machines": machines}, indent=1), "utf-8")
    except (OSError, LatentVAEError) as error:
        logger.warning("what was measured is not kept, and measured again by the next process: %s", error)


def _machines() -> dict[str, dict[str, Any]]:
    """Entries by machine; none where the file is missing, damaged, or of another version."""
    try:
        found = json.loads(place().read_text(encoding="utf-8"))
        if found["version"] == VERSION and all(isinstance(each, dict) for each in found["machines"].values()):
            return dict(found["machines"])
        reason = f"of version {found['version']}, or not as written"
    except (FileNotFoundError, LatentVAEError):  # no file, or no place for one
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning("%s cannot be used (%s): speeds are measured anew.", place(), reason)
    return {}
