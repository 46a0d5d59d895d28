"""Write arrays as shards: Arrow IPC files with checksums. `shards` describes the format."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dlspark.data.arrow import in_words, to_arrow
from dlspark.data.shards import ShardedRows
from dlspark.data.structure import Structure, columns_of, place
from dlspark.errors import DataError
from dlspark.storage import Store

SHARD_BYTES = 64 * 2**20
"""The size of a shard: large enough for sequential reads, small enough to distribute evenly."""


@dataclass(frozen=True)
class ShardInfo:
    """A written shard: file name, number of rows, size and the CRC-32 of its bytes (RFC 1952)."""

    file: str
    rows: int
    size_bytes: int
    crc32: int


class ShardWriter:
    """Writes one shard, a record batch per call. A context manager; after an exception in the block there is no file.

    Args:
        path: the file to create. To publish it in a store, use the path from `Store.open_writer`.
        name: the value of `ShardInfo.file`; the name of the path when None.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path = Path(path)
        self._name = name or self._path.name
        self._file = _CheckedFile(self._path)
        self._writer: pa.RecordBatchFileWriter | None = None
        self._schema: pa.Schema | None = None
        self._rows = 0
        self._info: ShardInfo | None = None

    def write(self, columns: Mapping[str, NDArray[Any] | Sequence[str]]) -> None:
        """Append rows.

        Args:
            columns: by name, arrays of shape (rows, ...) of a boolean, integer or floating dtype, or text of shape
                (rows,). The first call fixes names, order, dtypes and shapes.

        Raises:
            DataError: no columns, unequal numbers of rows, an unsupported dtype, or other columns than in the first call.
        """
        converted = [to_arrow(name, values) for name, values in columns.items()]
        schema, arrays = pa.schema([field for field, _ in converted]), [array for _, array in converted]
        if len({len(array) for array in arrays}) != 1:
            counts = {name: len(array) for name, array in zip(columns, arrays, strict=True)}
            raise DataError(f"Expected at least one column, all with the same number of rows; got {counts}.")
        if self._writer is None:
            self._schema = schema
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), schema)
        elif not schema.equals(self._schema, check_metadata=True):
            raise DataError(f"Expected the columns of the first write, {in_words(self._schema)}; got {in_words(schema)}.")
        if len(arrays[0]):
            self._writer.write_batch(pa.record_batch(arrays, schema=schema))
            self._rows += len(arrays[0])

    def close(self) -> ShardInfo:
        """Finish the file and describe it; a second call returns the same. `Store.open_writer` syncs it to disk.

        Raises:
            DataError: there was no `write`, so the columns are unknown; the file is removed.
        """
        if self._info is None:
            if self._writer is None:
                self._abandon()
                raise DataError(f"Expected at least one write() to the shard {self._name!r} before close(); got none.")
            self._writer.close()
            size = self._file.finish()
            self._info = ShardInfo(self._name, self._rows, size, self._file.crc32)
        return self._info

    def _abandon(self) -> None:
        self._file.finish()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._info is None:
            self._abandon()


class _CheckedFile:
    """Computes the CRC-32 of a file while writing it. CRC-32 detects damage at a sixth of the cost of SHA-256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.crc32 = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Does nothing: Arrow calls it when it drops its wrapper, and `finish` closes the file."""

    def finish(self) -> int:
        size = 0
        if not self._file.closed:
            self._file.flush()
            size = self._file.tell()
            self._file.close()
        self.closed = True
        return size


def write_rows(
    store: Store,
    name: str,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    float_dtype: str | None = None,
) -> ShardedRows:
    """Write arrays as shards into the folder ``name`` of ``store``, in their order.

    Args:
        store: the store.
        name: the folder in it; files of the same name are replaced.
        x: an array of shape (rows, ...), or a tuple, list or dict of such arrays at any depth.
        y: the target, as ``x``; None if there is none.
        sample_weight: an array of shape (rows,), or a structure like that of ``y``; None for equal weights.
        num_classes: copied to the result.
        classes: copied to the result.
        shard_bytes: the approximate size of a file; a file has at least one row.
        float_dtype: cast arrays of other floating dtypes to it, one shard at a time; None keeps their dtypes.

    Raises:
        DataError: no rows, unequal numbers of rows, or a value that is not an array of numbers.
    """
    arrays: dict[str, NDArray[Any]] = {}
    x_columns = _flatten("x", x, arrays)
    y_columns = None if y is None else _flatten("y", y, arrays)
    weight_columns = None if sample_weight is None else _flatten("sample_weight", sample_weight, arrays)
    if not columns_of(x_columns):
        raise DataError(f"Expected an array of rows as x, or a structure of such arrays; got {type(x).__name__}.")
    counts = {key: len(array) for key, array in arrays.items()}
    rows = min(counts.values())
    if rows == 0 or rows != max(counts.values()):
        raise DataError(f"Expected at least one row, and the same number in every array; got {counts}.")
    row_bytes = sum(array.nbytes for array in arrays.values()) / rows
    step = max(1, int(shard_bytes // max(row_bytes, 1)))
    folder = store.child(name)
    written = []
    for number, start in enumerate(range(0, rows, step)):
        file = f"rows-{number:05d}.arrow"
        with folder.open_writer(file) as path, ShardWriter(path, file) as writer:
            writer.write({key: _cast(array[start : start + step], float_dtype) for key, array in arrays.items()})
        written.append(writer.close())
    return ShardedRows(
        uri=folder.uri,
        files=tuple(info.file for info in written),
        rows_per_file=tuple(info.rows for info in written),
        x=x_columns,
        y=y_columns,
        sample_weight=weight_columns,
        num_classes=num_classes,
        classes=tuple(classes),
        crc32=tuple(info.crc32 for info in written),
    )


def _cast(array: NDArray[Any], float_dtype: str | None) -> NDArray[Any]:
    return array.astype(float_dtype, copy=False) if float_dtype and array.dtype.kind == "f" else array


def _flatten(name: str, value: Any, into: dict[str, NDArray[Any]]) -> Structure:
    """Put the arrays of a structure into ``into`` under names made from their places; returns the structure of names."""
    if isinstance(value, Mapping):
        return {str(key): _flatten(place(name, key), part, into) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_flatten(place(name, number), part, into) for number, part in enumerate(value))
    array = np.asarray(value) if hasattr(value, "__array__") else np.empty(0, object)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise DataError(
            f"Expected an array of numbers with rows along its first axis as {name}; got {type(value).__name__} "
            f"({array.dtype}, shape {array.shape}). Give np.asarray(...) of numbers."
        )
    into[name] = array
    return name
