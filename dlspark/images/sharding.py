"""Which shard holds which image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dlspark.data import PARTS, SHARD_BYTES, quoted
from dlspark.mends import zip_directories

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SHARDS = 64  # at least, with enough rows: sufficient for a small cluster, and the same on any cluster
_FEWEST_ROWS = 32


def shards_of(sizes: dict[str, int], total: int, row_bytes: int) -> dict[str, int]:
    """The number of shards of each part. It depends only on the rows, so all clusters write the same shards."""
    most = max(1, SHARD_BYTES // row_bytes)
    rows = min(most, max(_FEWEST_ROWS, -(-total // _SHARDS)))
    return {part: -(-sizes[part] // rows) for part in PARTS if sizes.get(part)}


def numbered(parted: DataFrame, shards: dict[str, int], columns: Sequence[str]) -> Any:
    """An RDD of (shard number, (part, path, label, *columns)), in no order."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    whole = Window.partitionBy("part")
    position = F.row_number().over(whole.orderBy("id")) - 1
    number, first = F.lit(0), 0
    for part, count in shards.items():
        # Shard i of c starts at position floor(i n / c), so shards differ by at most one row.
        within = F.floor(((position + 1) * count - 1) / F.count(F.lit(1)).over(whole))
        number = F.when(F.col("part") == part, within + first).otherwise(number)
        first += count
    kept = [quoted(name) for name in columns]
    table = parted.withColumn("__shard", number.cast("int")).select("__shard", "part", "path", "label", *kept)
    # An RDD, because it assigns shards to tasks exactly: SQL would hash them onto tasks, and merge small ones.
    return table.rdd.mapPartitions(_keyed)


def _keyed(rows: Iterable[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    zip_directories.read_when_changed()  # before the tasks that write
    for row in rows:
        yield row[0], tuple(row[1:])
