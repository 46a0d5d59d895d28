"""Rows: split, stored as shards and fed to workers."""

from __future__ import annotations

from dlspark.data.columns import empty, quoted
from dlspark.data.feed import Feed
from dlspark.data.shard_writer import SHARD_BYTES, ShardWriter, write_rows
from dlspark.data.sharding import fewest_rows, num_steps, step_range
from dlspark.data.shards import ShardedRows
from dlspark.data.split import PARTS, Split, assign, undersampled
from dlspark.data.split_report import leak_warning, split_report
from dlspark.data.structure import Structure, columns_of, place, with_tuples

__all__ = [
    "PARTS",
    "SHARD_BYTES",
    "Feed",
    "ShardWriter",
    "ShardedRows",
    "Split",
    "Structure",
    "assign",
    "columns_of",
    "empty",
    "fewest_rows",
    "leak_warning",
    "num_steps",
    "place",
    "quoted",
    "split_report",
    "step_range",
    "undersampled",
    "with_tuples",
    "write_rows",
]
