"""Files that outlive a process: stores, checkpoints, leases, host copies, kept steps."""

from __future__ import annotations

from dlspark.storage.address import OBJECT_STORES, spelled
from dlspark.storage.checkpoints import FOLDER, Checkpoints, Position, differing
from dlspark.storage.checksum import checksum
from dlspark.storage.host_cache import BOUND, CacheError, HostCache
from dlspark.storage.lease import lease, refuse_if_running
from dlspark.storage.steps import Document, Folder, KeptSteps, Result, Step
from dlspark.storage.store import Store, StoreError

__all__ = [
    "BOUND",
    "FOLDER",
    "OBJECT_STORES",
    "CacheError",
    "Checkpoints",
    "Document",
    "Folder",
    "HostCache",
    "KeptSteps",
    "Position",
    "Result",
    "Step",
    "Store",
    "StoreError",
    "checksum",
    "differing",
    "lease",
    "refuse_if_running",
    "spelled",
]
