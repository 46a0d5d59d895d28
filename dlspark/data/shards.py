"""Shards: rows in Arrow IPC files, mapped into memory and gathered by index.

A file is a sequence of record batches. A column holds, per row, an array of one fixed shape (Arrow's canonical
``fixed_shape_tensor``), a number, or a text; there are no nulls. All processes of a host that map a file share one copy
of it in the page cache, so resident memory does not grow with the dataset.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dlspark.data.sharding import epoch_order, num_steps, step_range
from dlspark.errors import DataError
from dlspark.storage import BOUND, HostCache, Store, StoreError

Structure: TypeAlias = "str | tuple[Structure, ...] | dict[str, Structure]"
"""How columns are nested into what a model takes: one name, or a tuple or dict of such structures."""

BOOLEAN = {b"dlspark.dtype": b"bool"}  # Arrow's booleans are bits, which cannot be mapped: they are stored as uint8
_LARGE_ROW_BYTES = 4096
_ROWS_WORTH_GROUPING = 32  # per chunk: a group costs about as much as 40 rows one by one
# Gathered before mapped pages are let go. One fault maps up to 16 pages around a row, so what a process has mapped grows
# several times as fast as what it read: with 64 MiB its memory reached 830 MB, with 4 MiB it stays at 200 MB.
_RESIDENT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ShardedRows:
    """The rows that a fit reads: which files hold them and which columns make the model's input. Plain, picklable data.

    Rows are numbered from 0 through all files in their order.

    Attributes:
        uri: the store's folder.
        files: names of the Arrow files in it.
        rows_per_file: rows in each of them.
        x: the columns of the model's input.
        y: the columns of its target; None when there is none.
        sample_weight: the columns that weigh the rows in the loss, usually one; None when all weigh the same.
        num_classes: how many classes the labels count up to; None when they are no classes.
        classes: their names, in the order of the labels; empty when they have none.
        crc32: of each file, which a copy of a remote one is checked against; empty when not known.
    """

    uri: str
    files: tuple[str, ...]
    rows_per_file: tuple[int, ...]
    x: Structure
    y: Structure | None = None
    sample_weight: Structure | None = None
    num_classes: int | None = None
    classes: tuple[str, ...] = ()
    crc32: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows in all files together."""
        return sum(self.rows_per_file)

    def to_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ShardedRows:
        """The rows that `to_json` wrote."""
        return cls(**{key: _tuples(item) for key, item in json.loads(text).items()})

    def open(self) -> RowReader:
        """Map the files; see `RowReader`."""
        return RowReader(self)

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0) -> Iterator[tuple[Any, ...]]:
        """The batches of one pass, as one worker of `Trainer.fit` gets them.

        Args:
            batch_size: the most rows of a batch.
            seed: of the order, as `Trainer.fit` takes it; None reads the rows in their own order.
            epoch: whose order it is.

        Yields:
            ``(x, y)`` or ``(x, y, sample_weight)``; each leaf an array of shape (rows, …).
        """
        order = None if seed is None else epoch_order(self.rows, seed, epoch)
        with self.open() as reader:
            for step in range(num_steps(self.rows, batch_size)):
                start, stop = step_range(self.rows, batch_size, step)
                yield reader.batch(np.arange(start, stop) if order is None else order[start:stop])


class RowReader:
    """Gives rows of some shards by their index. Maps the files; a remote one is copied to this host first.

    A context manager. Arrays that it gave stay valid after `close`. Threads may share one reader.

    Raises:
        DataError: a file is missing, damaged, of another number of rows, or has other columns than the first; or a
            column of the structure is in none. The message names it.
    """

    def __init__(self, source: ShardedRows) -> None:
        if len(source.files) != len(source.rows_per_file):
            counts = len(source.rows_per_file)
            raise DataError(f"Expected one row count per file: received {len(source.files)} files and {counts} counts.")
        self._source = source
        self._chunks: dict[str, list[Any]] = {}
        self._maps: list[mmap.mmap] = []
        self._read_bytes = 0
        starts = [0]
        schema: pa.Schema | None = None
        store = Store(source.uri)
        sums = source.crc32 or (None,) * len(source.files)
        for name, rows, crc32 in zip(source.files, source.rows_per_file, sums, strict=True):
            batches, found, mapped = _map_file(store, name, crc32)
            self._maps.append(mapped)
            schema = found if schema is None else schema
            if not found.equals(schema, check_metadata=True):
                raise DataError(
                    f"Expected the columns of {source.files[0]!r} in all files of {source.uri!r}, {in_words(schema)}: "
                    f"{name!r} has {in_words(found)}. Prepare the dataset again."
                )
            for batch in batches:
                starts.append(starts[-1] + batch.num_rows)
                for field, column in zip(found, batch.columns, strict=True):
                    self._chunks.setdefault(field.name, []).append(_view(field, column))
            count = sum(batch.num_rows for batch in batches)
            if count != rows:
                raise DataError(
                    f"Expected {rows} rows in {name!r} of {source.uri!r}: it has {count}. Prepare the dataset again."
                )
        if not store.is_local:
            _check_room(source.uri, sum(chunk.nbytes for column in self._chunks.values() for chunk in column))
        self._starts = np.asarray(starts, np.int64)
        self.rows = starts[-1]
        self.columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {f.name: _dtype_and_shape(f) for f in schema or ()}
        for name in (*columns_of(source.x), *columns_of(source.y), *columns_of(source.sample_weight)):
            self._known(name)

    def take(self, indices: NDArray[Any], columns: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Gather rows into new arrays.

        Args:
            indices: integers of shape (n,), from 0 to rows - 1, in any order, repeats allowed.
            columns: which columns; all of them when None.

        Returns:
            Name to array of shape (n, *column shape), its row i being row ``indices[i]``. Texts come as str objects.

        Raises:
            DataError: an index out of range, or an unknown column.
        """
        indices = np.asarray(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise DataError(
                f"Expected row indices as integers of shape (n,): received {indices.dtype} of shape {indices.shape}."
            )
        indices = indices.astype(np.int64, copy=False)
        if indices.size and (indices.min() < 0 or indices.max() >= self.rows):
            raise DataError(f"Expected row indices from 0 to {self.rows - 1}: received {indices.min()} to {indices.max()}.")
        names = tuple(self.columns) if columns is None else tuple(columns)
        for name in names:
            self._known(name)
        chunk_of = np.searchsorted(self._starts, indices, side="right") - 1
        row_of = indices - self._starts[chunk_of]
        gathered = {name: self._gather(name, chunk_of, row_of) for name in names}
        self._let_go(sum(array.nbytes for array in gathered.values()))
        return gathered

    def batch(self, indices: NDArray[Any]) -> tuple[Any, ...]:
        """The rows as Keras takes them: (x, y), (x, y, sample_weight) where there is one, (x,) without a target."""
        source = self._source
        names = dict.fromkeys((*columns_of(source.x), *columns_of(source.y), *columns_of(source.sample_weight)))
        arrays = self.take(indices, tuple(names))
        structures = (source.x, source.y, source.sample_weight)
        used = 3 if source.sample_weight is not None else 2 if source.y is not None else 1
        return tuple(restore(structure, arrays) for structure in structures[:used])

    def close(self) -> None:
        """Let go of the files; again is fine."""
        self._chunks = {}
        self._maps = []
        self.columns = {}
        self._starts = np.zeros(1, np.int64)
        self.rows = 0

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _let_go(self, read_bytes: int) -> None:
        """Keep the mapped pages that count as this process' memory few; they stay in the kernel's page cache."""
        self._read_bytes += read_bytes
        if self._read_bytes >= _RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._read_bytes = 0
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def _known(self, name: str) -> None:
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise DataError(f"Expected a column of {self._source.uri!r}, one of {known}: received {name!r}.")

    def _gather(self, name: str, chunk_of: NDArray[Any], row_of: NDArray[Any]) -> NDArray[Any]:
        chunks = self._chunks[name]
        dtype, shape = self.columns[name]
        out = np.empty((len(row_of), *shape), dtype)
        large = out.itemsize * int(np.prod(shape)) >= _LARGE_ROW_BYTES
        if dtype.kind != "O" and (large or len(row_of) < _ROWS_WORTH_GROUPING * len(chunks)):
            # Row by row: a shuffled batch meets almost every chunk once, and finding who shares one costs more.
            for position, (chunk, row) in enumerate(zip(chunk_of.tolist(), row_of.tolist(), strict=True)):
                out[position] = chunks[chunk][row]
            return out
        for chunk, positions in _groups(chunk_of):
            values, rows = chunks[chunk], row_of[positions]
            texts = dtype.kind == "O"
            out[positions] = values.take(pa.array(rows)).to_numpy(zero_copy_only=False) if texts else values[rows]
        return out


def columns_of(structure: Structure | None) -> tuple[str, ...]:
    """The names of the columns in a structure, in order; none for None."""
    if structure is None or isinstance(structure, str):
        return () if structure is None else (structure,)
    parts = structure.values() if isinstance(structure, dict) else structure
    return tuple(name for part in parts for name in columns_of(part))


def restore(structure: Structure | None, arrays: Mapping[str, Any]) -> Any:
    """The structure with each column's name replaced by its array."""
    if structure is None or isinstance(structure, str):
        return None if structure is None else arrays[structure]
    if isinstance(structure, dict):
        return {key: restore(part, arrays) for key, part in structure.items()}
    return tuple(restore(part, arrays) for part in structure)


def _map_file(store: Store, name: str, crc32: int | None) -> tuple[list[pa.RecordBatch], pa.Schema, mmap.mmap]:
    try:
        with store.local_file(name, crc32=crc32).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))) as reader:
            return [reader.get_batch(number) for number in range(reader.num_record_batches)], reader.schema, mapped
    except StoreError as error:
        raise DataError(f"The shard {name!r} of {store.uri!r} is missing: {error} Prepare the dataset again.") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"The shard {name!r} of {store.uri!r} is damaged: {error}. Prepare the dataset again.") from error


def _check_room(uri: str, size: int) -> None:
    """Refuse copies that would push each other out of the cache, and be made anew by every process."""
    allowed = HostCache.of_user().max_bytes
    if size > allowed:
        raise DataError(
            f"The copies of {uri!r} take {size:,} bytes on each host, and the cache may take {allowed:,}. "
            f"Set {BOUND} to more, or XDG_CACHE_HOME to a folder on a larger disk."
        )


def _view(field: pa.Field, column: pa.Array) -> Any:
    """The column as an array over the mapped bytes; texts stay in Arrow."""
    if pa.types.is_string(field.type):
        return column
    tensor = isinstance(field.type, pa.FixedShapeTensorType)
    array = column.to_numpy_ndarray() if tensor else column.to_numpy(zero_copy_only=True)
    return array.view(bool) if field.metadata == BOOLEAN else array


def _dtype_and_shape(field: pa.Field) -> tuple[np.dtype[Any], tuple[int, ...]]:
    if pa.types.is_string(field.type):
        return np.dtype(object), ()
    tensor = isinstance(field.type, pa.FixedShapeTensorType)
    kind, shape = (field.type.value_type, tuple(field.type.shape)) if tensor else (field.type, ())
    if field.metadata == BOOLEAN:
        return np.dtype(bool), shape
    # Not to_pandas_dtype, which needs pandas in pyarrow 21, as the core does not.
    return pa.nulls(0, kind).to_numpy(zero_copy_only=False).dtype, shape


def _groups(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Each distinct value with the positions that hold it."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order])) + 1
    for positions in np.split(order, ends) if len(values) else ():
        yield int(values[positions[0]]), positions


def in_words(schema: pa.Schema | None) -> str:
    """The columns with their dtypes and shapes, for a message."""
    return ", ".join(
        f"{field.name} {dtype}{list(shape)}" for field in schema or () for dtype, shape in [_dtype_and_shape(field)]
    )


def _tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
