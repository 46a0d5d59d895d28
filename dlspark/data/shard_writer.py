"""Writing shards: arrays in, Arrow IPC files and their checksums out. What they look like is said in `shards`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dlspark.data.shards import BOOLEAN, ShardedRows, Structure, columns_of, in_words
from dlspark.errors import DataError
from dlspark.storage import Store

SHARD_BYTES = 64 * 2**20
"""How large a shard grows: large enough to read in one go, small enough that many of them share out evenly."""


@dataclass(frozen=True)
class ShardInfo:
    """What was written: the file's name, its rows, its length and the CRC-32 of its bytes (RFC 1952)."""

    file: str
    rows: int
    size_bytes: int
    crc32: int


class ShardWriter:
    """Writes one shard, a record batch per call; a context manager. A block left by an exception leaves no file.

    Args:
        path: the file to create. To publish it in a store, take the path from `Store.open_writer`.
        name: what `ShardInfo.file` says; the path's own name when None.
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
            columns: name to an array of shape (rows, ...) of a boolean, integer or floating dtype, or to texts of
                shape (rows,). The first call fixes names, order, dtypes and shapes.

        Raises:
            DataError: no columns, unequal numbers of rows, a dtype that Arrow has not, or not the first call's columns.
        """
        converted = [_to_arrow(name, values) for name, values in columns.items()]
        schema, arrays = pa.schema([field for field, _ in converted]), [array for _, array in converted]
        if len({len(array) for array in arrays}) != 1:
            counts = {name: len(array) for name, array in zip(columns, arrays, strict=True)}
            raise DataError(f"Expected at least one column, all with the same number of rows: received {counts}.")
        if self._writer is None:
            self._schema = schema
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), schema)
        elif not schema.equals(self._schema, check_metadata=True):
            raise DataError(
                f"Expected the columns of the first write, {in_words(self._schema)}: received {in_words(schema)}."
            )
        if len(arrays[0]):
            self._writer.write_batch(pa.record_batch(arrays, schema=schema))
            self._rows += len(arrays[0])

    def close(self) -> ShardInfo:
        """Finish the file and describe it; again gives the same. `Store.open_writer` has it on disk.

        Raises:
            DataError: nothing was ever written, so that its columns are unknown; the file is removed.
        """
        if self._info is None:
            if self._writer is None:
                self._abandon()
                raise DataError(f"Expected at least one write() before closing the shard {self._name!r}.")
            self._writer.close()
            size = self._file.finish()
            self._info = ShardInfo(self._name, self._rows, size, self._file.crc32)
        return self._info

    def _abandon(self) -> None:
        self._file.finish()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._info is None:
            self._abandon()


class _CheckedFile:
    """A file whose CRC-32 is known once it is written: it guards against damage, at a sixth of what SHA-256 costs."""

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
        """Arrow calls it when its own wrapper goes; `finish` is what closes the file."""

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
) -> ShardedRows:
    """Write arrays as shards into the folder ``name`` of ``store``, in their order.

    Args:
        store: where.
        name: the folder in it; files of the same name are replaced.
        x: an array of shape (rows, ...), or a tuple, list or dict of such arrays, nested at will.
        y: the same for the target; None when there is none.
        sample_weight: an array of shape (rows,), or a structure like y's; None when all rows weigh the same.
        num_classes: passed on to the result.
        classes: passed on to the result.
        shard_bytes: about how large a file becomes; a file has at least one row.

    Raises:
        DataError: no rows, unequal numbers of rows, or something that is not an array of numbers.
    """
    arrays: dict[str, NDArray[Any]] = {}
    x_columns = _flatten("x", x, arrays)
    y_columns = None if y is None else _flatten("y", y, arrays)
    weight_columns = None if sample_weight is None else _flatten("sample_weight", sample_weight, arrays)
    if not columns_of(x_columns):
        raise DataError(f"Expected an array of rows as x, or a structure of such arrays: received {type(x).__name__}.")
    counts = {key: len(array) for key, array in arrays.items()}
    rows = min(counts.values())
    if rows == 0 or rows != max(counts.values()):
        raise DataError(f"Expected at least one row, and the same number in every array: received {counts}.")
    row_bytes = sum(array.nbytes for array in arrays.values()) / rows
    step = max(1, int(shard_bytes // max(row_bytes, 1)))
    folder = store.child(name)
    written = []
    for number, start in enumerate(range(0, rows, step)):
        file = f"rows-{number:05d}.arrow"
        with folder.open_writer(file) as path, ShardWriter(path, file) as writer:
            writer.write({key: array[start : start + step] for key, array in arrays.items()})
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


def _flatten(name: str, value: Any, into: dict[str, NDArray[Any]]) -> Structure:
    """Put the arrays of a structure into ``into`` under names made from where they are; give the names' structure."""
    if isinstance(value, Mapping):
        return {str(key): _flatten(f"{name}/{key}", part, into) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_flatten(f"{name}/{number}", part, into) for number, part in enumerate(value))
    array = np.asarray(value) if hasattr(value, "__array__") else np.empty(0, object)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise DataError(
            f"Expected an array of numbers with rows along its first axis as {name}: received "
            f"{type(value).__name__} ({array.dtype}, shape {array.shape}). Give np.asarray(...) of numbers."
        )
    into[name] = array
    return name


def _to_arrow(name: str, values: NDArray[Any] | Sequence[str]) -> tuple[pa.Field, pa.Array]:
    if not isinstance(values, np.ndarray) or values.dtype.kind in "OUT":
        try:
            texts = pa.array(values.tolist() if isinstance(values, np.ndarray) else list(values), pa.string())
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"Expected an array of numbers, or texts, in column {name!r}: {error}.") from error
        if texts.null_count:
            raise DataError(f"Expected a text in every row of column {name!r}: {texts.null_count} of {len(texts)} are null.")
        return pa.field(name, pa.string(), nullable=False), texts
    shape = values.shape[1:]
    metadata = BOOLEAN if values.dtype == bool else None
    if values.dtype.kind not in "biuf" or values.ndim == 0 or 0 in shape or values.dtype.itemsize > 8:
        raise DataError(
            f"Expected numbers of shape (rows, ...) with at least one per row in column {name!r}: "
            f"received {values.dtype} of shape {values.shape}."
        )
    values = np.ascontiguousarray(values, np.uint8 if values.dtype == bool else values.dtype.newbyteorder("="))
    flat = pa.array(values.reshape(-1))
    if not shape:
        return pa.field(name, flat.type, nullable=False, metadata=metadata), flat
    kind = pa.fixed_shape_tensor(flat.type, shape)
    tensors = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape))))
    return pa.field(name, kind, nullable=False, metadata=metadata), tensors
