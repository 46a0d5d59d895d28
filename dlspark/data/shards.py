"""Shards: rows in Arrow IPC files, mapped into memory and gathered by index.

A file is a sequence of record batches. A column holds in each row an array of one fixed shape (Arrow's canonical
``fixed_shape_tensor``), a number, or text; there are no nulls. All processes of a host that map a file share its pages in
the page cache, so resident memory does not grow with the dataset.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dlspark.data.arrow import dtype_and_shape, in_words, view
from dlspark.data.sharding import epoch_order, num_steps, step_range
from dlspark.data.structure import Structure, columns_of, restore, with_tuples
from dlspark.errors import DataError, DlsparkError
from dlspark.storage import BOUND, HostCache, Store, StoreError

_LARGE_ROW_BYTES = 4096
_ROWS_WORTH_GROUPING = 32  # per chunk: a group costs about as much as 40 single rows
# Bytes gathered before mapped pages are released. One fault maps up to 16 pages around a row, so mapped memory grows
# several times as fast as the bytes read: with 64 MiB it reached 830 MB, with 4 MiB it stays at 200 MB.
_RESIDENT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ShardedRows:
    """The files that hold the rows of a fit, and the columns that the model reads. Plain, picklable data.

    Rows are numbered from 0 through all files in order.

    Attributes:
        uri: the folder of the store.
        files: names of the Arrow files in it.
        rows_per_file: the number of rows in each file.
        x: the columns of the model's input.
        y: the columns of its target; None if there is none.
        sample_weight: the columns with the weights of the rows, usually one; None for equal weights.
        num_classes: the number of classes; None if the target is not a class.
        classes: names of the classes, in the order of the labels; empty if they have none.
        crc32: the CRC-32 of each file, to verify copies of remote files; empty if unknown.
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
        """The number of rows in all files."""
        return sum(self.rows_per_file)

    def to_json(self) -> str:
        """All attributes as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ShardedRows:
        """The rows that `to_json` wrote."""
        return cls(**{key: with_tuples(item) for key, item in json.loads(text).items()})

    def open(self) -> RowReader:
        """Map the files; see `RowReader`."""
        return RowReader(self)

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0) -> Iterator[tuple[Any, ...]]:
        """The batches of one pass, as for a single worker of `Trainer.fit`.

        Args:
            batch_size: the most rows of a batch.
            seed: determines the order, as in `Trainer.fit`; None keeps the order of the rows.
            epoch: the epoch, which also determines the order.

        Yields:
            ``(x, y)`` or ``(x, y, sample_weight)``; each leaf is an array of shape (rows, …).
        """
        order = None if seed is None else epoch_order(self.rows, seed, epoch)
        with self.open() as reader:
            for step in range(num_steps(self.rows, batch_size)):
                start, stop = step_range(self.rows, batch_size, step)
                yield reader.batch(np.arange(start, stop) if order is None else order[start:stop])


class RowReader:
    """Reads rows of shards by index. It maps the files; remote files are copied to this host first.

    A context manager. Returned arrays stay valid after `close`. Threads may share a reader.

    Raises:
        DataError: a file is missing or damaged, or has another number of rows or other columns than expected; or a column
            of the structure does not exist. The message names it.
    """

    def __init__(self, source: ShardedRows) -> None:
        if len(source.files) != len(source.rows_per_file):
            counts = len(source.rows_per_file)
            raise DataError(f"Expected one row count per file; got {len(source.files)} files and {counts} counts.")
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
                    f"Expected the columns of {source.files[0]!r} in all files of {source.uri!r}, {in_words(schema)}; got "
                    f"{in_words(found)} in {name!r}. Prepare the dataset again."
                )
            for batch in batches:
                starts.append(starts[-1] + batch.num_rows)
                for field, column in zip(found, batch.columns, strict=True):
                    self._chunks.setdefault(field.name, []).append(view(field, column))
            count = sum(batch.num_rows for batch in batches)
            if count != rows:
                raise DataError(
                    f"Expected {rows} rows in {name!r} of {source.uri!r}; got {count}. Prepare the dataset again."
                )
        if not store.is_local:
            _check_room(source.uri, sum(chunk.nbytes for column in self._chunks.values() for chunk in column))
        self._starts = np.asarray(starts, np.int64)
        self.rows = starts[-1]
        self.columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {f.name: dtype_and_shape(f) for f in schema or ()}
        for name in (*columns_of(source.x), *columns_of(source.y), *columns_of(source.sample_weight)):
            self._known(name)

    def take(self, indices: NDArray[Any], columns: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Gather rows into new arrays.

        Args:
            indices: integers of shape (n,), from 0 to rows - 1, in any order; repeats are allowed.
            columns: names of the columns; None for all.

        Returns:
            By name, arrays of shape (n, *column shape), whose row i is row ``indices[i]``. Text is returned as str objects.

        Raises:
            DataError: an index is out of range, or a column is unknown.
        """
        indices = np.asarray(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise DataError(f"Expected row indices as integers of shape (n,); got {indices.dtype} of shape {indices.shape}.")
        indices = indices.astype(np.int64, copy=False)
        if indices.size and (indices.min() < 0 or indices.max() >= self.rows):
            raise DataError(f"Expected row indices from 0 to {self.rows - 1}; got {indices.min()} to {indices.max()}.")
        names = tuple(self.columns) if columns is None else tuple(columns)
        for name in names:
            self._known(name)
        chunk_of = np.searchsorted(self._starts, indices, side="right") - 1
        row_of = indices - self._starts[chunk_of]
        gathered = {name: self._gather(name, chunk_of, row_of) for name in names}
        self._release_pages(sum(array.nbytes for array in gathered.values()))
        return gathered

    def batch(self, indices: NDArray[Any]) -> tuple[Any, ...]:
        """The rows as Keras expects them: (x, y), or (x, y, sample_weight) with weights, or (x,) without a target."""
        source = self._source
        names = dict.fromkeys((*columns_of(source.x), *columns_of(source.y), *columns_of(source.sample_weight)))
        arrays = self.take(indices, tuple(names))
        structures = (source.x, source.y, source.sample_weight)
        used = 3 if source.sample_weight is not None else 2 if source.y is not None else 1
        return tuple(restore(structure, arrays) for structure in structures[:used])

    def close(self) -> None:
        """Release the files; a second call does nothing."""
        self._chunks = {}
        self._maps = []
        self.columns = {}
        self._starts = np.zeros(1, np.int64)
        self.rows = 0

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _release_pages(self, read_bytes: int) -> None:
        """Release mapped pages, which count as memory of this process; they stay in the kernel's page cache."""
        self._read_bytes += read_bytes
        if self._read_bytes >= _RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._read_bytes = 0
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def _known(self, name: str) -> None:
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise DataError(f"Expected a column of {self._source.uri!r}, one of {known}; got {name!r}.")

    def _gather(self, name: str, chunk_of: NDArray[Any], row_of: NDArray[Any]) -> NDArray[Any]:
        chunks = self._chunks[name]
        dtype, shape = self.columns[name]
        out = np.empty((len(row_of), *shape), dtype)
        large = out.itemsize * int(np.prod(shape)) >= _LARGE_ROW_BYTES
        if dtype.kind != "O" and (large or len(row_of) < _ROWS_WORTH_GROUPING * len(chunks)):
            # Row by row: a shuffled batch has about one row in each chunk, so grouping rows by chunk costs more.
            for position, (chunk, row) in enumerate(zip(chunk_of.tolist(), row_of.tolist(), strict=True)):
                out[position] = chunks[chunk][row]
            return out
        for chunk, positions in _groups(chunk_of):
            values, rows = chunks[chunk], row_of[positions]
            texts = dtype.kind == "O"
            out[positions] = values.take(pa.array(rows)).to_numpy(zero_copy_only=False) if texts else values[rows]
        return out


def _map_file(store: Store, name: str, crc32: int | None) -> tuple[list[pa.RecordBatch], pa.Schema, mmap.mmap]:
    try:
        with store.local_file(name, crc32=crc32).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))) as reader:
            return [reader.get_batch(number) for number in range(reader.num_record_batches)], reader.schema, mapped
    except StoreError as error:
        if store.is_local or isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"The shard {name!r} of {store.uri!r} is missing: {error} Prepare the dataset again.") from error
        raise  # the network, or a right: the dataset may be intact
    except DlsparkError:  # of the cache, or of its limits
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"The shard {name!r} of {store.uri!r} is damaged: {error}. Prepare the dataset again.") from error


def _check_room(uri: str, size: int) -> None:
    """Reject copies that do not fit into the cache together: they would evict each other, and every process would copy."""
    allowed = HostCache.of_user().max_bytes
    if size > allowed:
        raise DataError(
            f"Expected the copies of {uri!r} to fit into the {allowed:,} bytes of each host's cache; got {size:,} bytes. "
            f"Set {BOUND} to more, or XDG_CACHE_HOME to a folder on a larger disk."
        )


def _groups(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Each distinct value and its positions."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order])) + 1
    for positions in np.split(order, ends) if len(values) else ():
        yield int(values[positions[0]]), positions
