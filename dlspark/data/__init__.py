"""Rows: split, stored as shards and fed to workers."""

from __future__ import annotations

from dlspark.data.columns import (
    BLANKS,
    check_distinct,
    empty,
    has_column,
    is_missing,
    may_be_missing,
    name_warnings,
    quoted,
    trimmed,
    try_cast,
)
from dlspark.data.feed import Feed
from dlspark.data.shard_writer import SHARD_BYTES, ShardWriter, write_rows
from dlspark.data.sharding import fewest_rows, num_steps, step_range
from dlspark.data.shards import ShardedRows
from dlspark.data.split import PARTS, Split, assign, undersampled
from dlspark.data.split_report import leak_warning, split_report
from dlspark.data.structure import Structure, columns_of, place, with_tuples

__all__ = [
    "BLANKS",
    "PARTS",
    "SHARD_BYTES",
    "Feed",
    "ShardWriter",
    "ShardedRows",
    "Split",
    "Structure",
    "assign",
    "check_distinct",
    "columns_of",
    "empty",
    "fewest_rows",
    "has_column",
    "is_missing",
    "leak_warning",
    "may_be_missing",
    "name_warnings",
    "num_steps",
    "place",
    "quoted",
    "split_report",
    "step_range",
    "trimmed",
    "try_cast",
    "undersampled",
    "with_tuples",
    "write_rows",
]
