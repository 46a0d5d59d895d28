"""Write a Spark DataFrame as shards: executors write the rows, the driver receives counts and file names."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dlspark._require import known, require
from dlspark.data import SHARD_BYTES, ShardedRows, ShardWriter, Structure, check_distinct, columns_of, quoted, with_tuples
from dlspark.errors import ConfigError, DataError
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql.types import DataType

Columns = dict[str, NDArray[Any]]
"""Arrays with the same number of rows, by column."""

Read = Callable[[pa.RecordBatch], Iterator[Columns]]

_SUMMARY = "partition int, file string, rows long, size_bytes long, columns string, error string"


def write_dataframe(
    store: Store,
    name: str,
    df: DataFrame,
    *,
    features: Structure = "features",
    label: Structure | None = "label",
    sample_weight: Structure | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] = (),
) -> ShardedRows:
    """Write the rows of a DataFrame as shards into the folder ``name`` of ``store``.

    Each partition with rows becomes a file, in the order of the partitions; rows keep Spark's order. The order is as
    deterministic as that of the DataFrame: fixed after `orderBy` or for files read directly, not after a `repartition`
    without a sort. The plan runs once.

    Args:
        store: the store. All executors must reach it.
        name: the folder in it; its old content is removed.
        df: columns of booleans or numbers, arrays of them (of any depth, with one shape in all rows), or Spark ML vectors,
            also those of ``pyspark.mllib``, which become float32.
        features: the columns of the model's input: a name, or a tuple or dict of names for several inputs. To join columns
            into one input, use Spark's VectorAssembler.
        label: the columns of the target; None if there is none.
        sample_weight: the columns of the weights; None for equal weights.
        num_classes: copied to the result.
        classes: copied to the result.

    Raises:
        ConfigError: a column is missing, occurs twice or has another type, or this process does not see the files of the
            executors.
        DataError: there are no rows, a value is null, a label or weight is NaN, or shapes differ between rows; the message
            names the column. The folder is removed.
    """
    require("pandas", install="pandas<3", purpose="Reading a Spark DataFrame")
    structures = tuple(with_tuples(structure) for structure in (features, label, sample_weight))
    complete = frozenset(column for structure in structures[1:] for column in columns_of(structure))
    names = tuple(dict.fromkeys(column for structure in structures for column in columns_of(structure)))
    check_distinct(df, "the DataFrame", names)
    # By number: mapInArrow reads a name with a dot as a field of a struct.
    selected = df.select(*[_plain(df, column).alias(f"c{number}") for number, column in enumerate(names)])
    written = write_columns(store, name, selected, partial(_arrays, names=names, complete=complete))
    return replace(
        written,
        x=structures[0],
        y=structures[1],
        sample_weight=structures[2],
        num_classes=num_classes,
        classes=tuple(classes),
    )


def write_columns(store: Store, name: str, df: DataFrame, read: Read) -> ShardedRows:
    """Convert the rows of a DataFrame by ``read`` and write them as `write_dataframe` does; the result has no columns.

    Args:
        store: the store. All executors must reach it.
        name: the folder in it; its old content is removed.
        df: the rows.
        read: runs on executors; yields arrays by column for each Arrow batch, in one or several parts.

    Raises:
        ConfigError, DataError: see `write_dataframe`. A DataError from ``read`` is raised here too.
    """
    folder = store.child(name)
    folder.delete_all()
    try:
        task = partial(_write_partition, read=read, uri=folder.uri, run=uuid.uuid4().hex[:8])
        summaries = sorted(df.mapInArrow(task, _SUMMARY).collect(), key=lambda row: row.partition)
        _check(folder, summaries)
    except BaseException:
        folder.delete_all()
        raise
    files = tuple(row.file for row in summaries)
    for left in set(folder.list()) - set(files):  # of failed or duplicate attempts
        folder.delete(left, missing_ok=True)
    return ShardedRows(
        uri=folder.uri,
        files=files,
        rows_per_file=tuple(row.rows for row in summaries),
        x=(),
        y=None,
    )


def _plain(df: DataFrame, name: str) -> Any:
    """The column in a type that Arrow supports: a Spark ML vector becomes an array of float32."""
    from pyspark.ml.functions import vector_to_array
    from pyspark.ml.linalg import VectorUDT
    from pyspark.mllib.linalg import VectorUDT as OldVectorUDT
    from pyspark.sql import functions as F
    from pyspark.sql.types import ArrayType, BooleanType, NumericType

    known("a column of the DataFrame", name, df.columns)
    column = F.col(quoted(name))
    kind: DataType = df.schema[name].dataType
    if isinstance(kind, (VectorUDT, OldVectorUDT)):
        return vector_to_array(column, "float32")
    element = kind
    while isinstance(element, ArrayType):
        element = element.elementType
    if not isinstance(element, (BooleanType, NumericType)) or element.typeName() == "decimal":
        raise ConfigError(
            f"Expected numbers, arrays of numbers or vectors in column {name!r}; got the type {kind.simpleString()}. "
            "Index texts with Spark's StringIndexer, cast decimals to double, prepare images with prepare_images."
        )
    return column


def _write_partition(batches: Iterable[pa.RecordBatch], *, read: Read, uri: str, run: str) -> Iterator[pa.RecordBatch]:
    """On an executor: write one file and yield one row that describes it, or the error in its rows."""
    from pyspark import TaskContext

    context = TaskContext.get()
    number = context.partitionId()
    # Each attempt of a task writes its own file; only the file of the successful attempt is used.
    name = f"part-{number:05d}-{run}-{context.taskAttemptId()}.arrow"
    try:
        found = _write_batches(Store(uri), name, (part for batch in batches if batch.num_rows for part in read(batch)))
    except DataError as error:  # returned, because Spark would retry a task that raises
        found = {"error": str(error)}
    if found is not None:
        yield pa.RecordBatch.from_pylist([{"partition": number, **found}], schema=_summary_schema())


def _write_batches(store: Store, name: str, parts: Iterator[Columns]) -> dict[str, Any] | None:
    first = next(parts, None)
    if first is None:
        return None
    shapes: dict[str, Any] = {}
    with store.open_writer(name) as path, ShardWriter(path, name) as writer:
        pending: list[Columns] = []
        pending_bytes = 0
        for arrays in chain([first], parts):
            for key, array in arrays.items():
                if shapes.setdefault(key, [str(array.dtype), *array.shape[1:]]) != [str(array.dtype), *array.shape[1:]]:
                    raise _unequal(key, shapes[key][1:], array.shape[1:])
            pending.append(arrays)
            pending_bytes += sum(array.nbytes for array in arrays.values())
            if pending_bytes >= SHARD_BYTES:  # a few large record batches are faster to read than many small ones
                _flush(writer, pending)
                pending_bytes = 0
        _flush(writer, pending)
    info = writer.close()
    return {"file": name, "rows": info.rows, "size_bytes": info.size_bytes, "columns": json.dumps(shapes)}


def _arrays(batch: pa.RecordBatch, *, names: tuple[str, ...], complete: frozenset[str]) -> Iterator[Columns]:
    arrays = {name: _array(name, column) for name, column in zip(names, batch.columns, strict=True)}
    for name in complete:
        if arrays[name].dtype.kind == "f" and np.isnan(arrays[name]).any():  # one would make the loss NaN
            raise DataError(f"Expected a value in every row of column {name!r}; got NaN. Drop or fill such rows.")
    yield arrays


def _flush(writer: ShardWriter, pending: list[Columns]) -> None:
    if pending:
        writer.write({key: np.concatenate([arrays[key] for arrays in pending]) for key in pending[0]})
        pending.clear()


def _array(name: str, column: pa.Array) -> NDArray[Any]:
    """An array of shape (rows, ...) from a column of numbers, or of nested lists with one shape."""
    shape = [len(column)]
    while True:
        if column.null_count:
            raise DataError(f"Expected a value in every row of column {name!r}; got nulls. Drop or fill them.")
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            break
        lengths = np.unique(np.diff(column.offsets.to_numpy()))
        if len(lengths) != 1 or lengths[0] == 0:
            raise _unequal(name, [int(lengths[0])], [int(lengths[-1])])
        shape.append(int(lengths[0]))
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def _unequal(name: str, one: Sequence[int], other: Sequence[int]) -> DataError:
    return DataError(
        f"Expected arrays of one shape in all rows of column {name!r}, with at least one element; got {tuple(one)} and "
        f"{tuple(other)}."
    )


def _check(folder: Store, summaries: Sequence[Any]) -> None:
    for row in summaries:
        if row.error is not None:
            raise DataError(row.error)
    if not summaries:
        raise DataError("Expected a DataFrame with at least one row; got an empty one.")
    expected = json.loads(summaries[0].columns)
    folder.require(row.file for row in summaries)
    for row in summaries:
        for key, found in json.loads(row.columns).items():
            if found != expected[key]:
                raise _unequal(key, expected[key][1:], found[1:])


def _summary_schema() -> pa.Schema:
    kinds: Mapping[str, pa.DataType] = {"int": pa.int32(), "long": pa.int64(), "string": pa.string()}
    return pa.schema([(key, kinds[kind]) for key, kind in (part.split() for part in _SUMMARY.split(", "))])
