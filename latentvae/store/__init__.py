"""Latents on disk: shards of moments that people train from.

Names are imported with their first use, for a data loader's worker needs no model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.store.buckets import BucketBatchSampler as BucketBatchSampler
    from latentvae.store.dataset import LatentDataset as LatentDataset
    from latentvae.store.encoding import EncodeReport as EncodeReport
    from latentvae.store.encoding import encode_folder as encode_folder
    from latentvae.store.manifest import Manifest as Manifest
    from latentvae.store.manifest import read_manifest as read_manifest
    from latentvae.store.shard import Entry as Entry
    from latentvae.store.verification import verify as verify
    from latentvae.store.webdataset import export_webdataset as export_webdataset
    from latentvae.store.working import Workload as Workload

_HOME = {
    "BucketBatchSampler": "buckets",
    "EncodeReport": "encoding",
    "Entry": "shard",
    "LatentDataset": "dataset",
    "Manifest": "manifest",
    "Workload": "working",
    "encode_folder": "encoding",
    "export_webdataset": "webdataset",
    "read_manifest": "manifest",
    "verify": "verification",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentvae.store' has no attribute {name!r}")
    return getattr(import_module(f"latentvae.store.{_HOME[name]}"), name)
