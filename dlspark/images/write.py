"""Write shards on executors: read and decode images, write them, and report the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.data import ShardWriter
from dlspark.errors import ConfigError, DataError
from dlspark.images.decode import decode_measured
from dlspark.images.read import read_files
from dlspark.storage import Store

SOURCE_SIZE = ("source_height", "source_width")
"""Columns with the original size of an image, upright, in pixels."""

_KINDS = {
    "string": "text",
    "date": "text",
    "timestamp": "text",
    "boolean": "bool",
    "tinyint": "int8",
    "smallint": "int16",
    "int": "int32",
    "bigint": "int64",
    "float": "float32",
    "double": "float64",
}


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """The settings of every task.

    Attributes:
        uri: the store to write to.
        run: distinguishes the files of this run from those of others.
        image_size: (height, width) in pixels.
        resize: one of `decode.RESIZES`.
        classes: names of the classes, sorted.
        columns: name and kind (see `column_kind`) of the columns besides image and label, including ``id``.
        max_listed: the most rejected images listed per shard; all are counted.
        bits: see `decode.decode_measured`.
    """

    uri: str
    run: str
    image_size: tuple[int, int]
    resize: str
    classes: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    max_listed: int
    bits: int = 16


def column_kind(name: str, spark_type: str) -> str:
    """The stored type of a column of a Spark type: ``"text"`` or the name of a NumPy dtype.

    Raises:
        ConfigError: the type is not text, a number, a boolean or a time.
    """
    if spark_type not in _KINDS:
        raise ConfigError(
            f"Expected text, numbers or booleans beside the images; got column {name!r} of type {spark_type}. Remove it "
            "from the layout, or cast it to string or double."
        )
    return _KINDS[spark_type]


def write_shards(task: ShardTask, rows: Iterable[tuple[int, tuple[Any, ...]]]) -> Iterator[dict[str, Any]]:
    """Write a file for each shard, with rows in the order of their ids, and yield a report.

    Args:
        task: the settings of all shards.
        rows: (shard number, (part, path, label, *columns)), in any order.

    Yields:
        A dict per shard: ``part``, ``shard``, ``file`` (a `ShardInfo` as a dict; None if all images were rejected),
        ``by_class`` (rows by class name), ``rejected_rows``, ``rejected`` (pairs of path and reason), ``deep_rows`` (images
        of 16 bits), ``largest`` (the largest of their values) and ``error`` (None or the error; it is returned because Spark
        would retry a task that raises).
    """
    shards: dict[int, list[tuple[Any, ...]]] = {}
    for number, values in rows:
        shards.setdefault(number, []).append(values)
    id_at = 3 + [name for name, _ in task.columns].index("id")
    for number in sorted(shards):
        by_id = sorted(shards[number], key=lambda values: str(values[id_at]).encode())
        summary: dict[str, Any] = {"part": by_id[0][0], "shard": number, "file": None, "by_class": {}}
        summary |= {"rejected_rows": 0, "rejected": [], "deep_rows": 0, "largest": 0, "error": None}
        try:
            _fill(task, summary, by_id)
        except DataError as error:
            summary["error"] = str(error)
        yield summary


def dark_warning(summaries: Iterable[dict[str, Any]], bits: int) -> str:
    """A warning if no image uses the upper ones of ``bits``, from what `write_shards` yields; else an empty text."""
    deep = [summary for summary in summaries if summary["deep_rows"]]
    largest = max((summary["largest"] for summary in deep), default=0xFFFF)
    used = max(8, largest.bit_length())
    if used >= bits:
        return ""
    rows = sum(summary["deep_rows"] for summary in deep)
    return (
        f"{rows:,} images have values of 16 bits, and the largest is {largest:,}: they come out dark. If their "
        f"range is {used} bits, prepare them with bits={used} (--bits {used})."
    )


def write_counted(task: ShardTask, done: Any, rows: Iterable[tuple[int, tuple[Any, ...]]]) -> Iterator[dict[str, Any]]:
    """`write_shards`, which also adds the images of each shard to the accumulator ``done``."""
    for summary in write_shards(task, rows):
        done.add(sum(summary["by_class"].values()) + summary["rejected_rows"])
        yield summary


def _fill(task: ShardTask, summary: dict[str, Any], rows: Sequence[tuple[Any, ...]]) -> None:
    pixels = np.empty((len(rows), *task.image_size, 3), np.uint8)
    kept: list[tuple[Any, ...]] = []
    sizes: list[tuple[int, int]] = []
    for row, (data, reason) in zip(rows, read_files([row[1] for row in rows]), strict=True):
        try:
            if data is None:
                raise DataError(reason)
            found = decode_measured(data, task.image_size, resize=task.resize, bits=task.bits)
        except DataError as error:
            summary["rejected_rows"] += 1
            if len(summary["rejected"]) < task.max_listed:
                summary["rejected"].append((str(row[1]), str(error)))
        else:
            pixels[len(kept)] = found.pixels
            kept.append(row)
            sizes.append(found.size)
            if found.largest is not None:
                summary["deep_rows"] += 1
                summary["largest"] = max(summary["largest"], found.largest)
    if not kept:
        return
    index = {name: label for label, name in enumerate(task.classes)}
    columns: dict[str, Any] = {
        "image": pixels[: len(kept)],
        "label": np.array([index[row[2]] for row in kept], np.int32),
        **{name: np.array([size[i] for size in sizes], np.int32) for i, name in enumerate(SOURCE_SIZE)},
    }
    for position, (name, kind) in enumerate(task.columns, start=3):
        columns[name] = _column(name, kind, [row[position] for row in kept])
    # The name includes the attempt: a second attempt of a task must not overwrite the file that the first reported.
    name = f"{summary['part']}-{summary['shard']:05d}-{task.run}-{_attempt()}.arrow"
    with Store(task.uri).open_writer(name) as path, ShardWriter(path, name) as writer:
        writer.write(columns)
    summary["file"] = asdict(writer.close())
    summary["by_class"] = dict(Counter(row[2] for row in kept))


def _column(name: str, kind: str, values: Sequence[Any]) -> NDArray[Any] | list[str]:
    if kind == "text":
        return ["" if value is None else str(value) for value in values]
    if kind.startswith("float"):
        return np.array([np.nan if value is None else value for value in values], kind)
    if None in values:
        raise DataError(f"Expected a value in every row of column {name!r}; got nulls. Fill them or cast to double.")
    return np.array(values, kind)


def _attempt() -> int:
    from pyspark import TaskContext

    context = TaskContext.get()
    return context.taskAttemptId() if context is not None else 0
