"""Columns of shards in Arrow: fixed-shape tensors, numbers and text, without nulls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dlspark.errors import DataError

_BOOLEAN = {b"dlspark.dtype": b"bool"}  # Arrow packs booleans into bits, which cannot be mapped: they are stored as uint8


def to_arrow(name: str, values: NDArray[Any] | Sequence[str]) -> tuple[pa.Field, pa.Array]:
    """The field and the Arrow array of a column.

    Raises:
        DataError: the column holds neither numbers nor text, or has nulls.
    """
    if not isinstance(values, np.ndarray) or values.dtype.kind in "OUT":
        try:
            texts = pa.array(values.tolist() if isinstance(values, np.ndarray) else list(values), pa.string())
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"Expected numbers or text in column {name!r}; got other values ({error}).") from error
        if texts.null_count:
            raise DataError(f"Expected text in every row of column {name!r}; got {texts.null_count} nulls. Fill them.")
        return pa.field(name, pa.string(), nullable=False), texts
    shape = values.shape[1:]
    metadata = _BOOLEAN if values.dtype == bool else None
    if values.dtype.kind not in "biuf" or values.ndim == 0 or 0 in shape or values.dtype.itemsize > 8:
        raise DataError(
            f"Expected numbers of shape (rows, ...) with at least one per row in column {name!r}; got {values.dtype} of "
            f"shape {values.shape}."
        )
    values = np.ascontiguousarray(values, np.uint8 if values.dtype == bool else values.dtype.newbyteorder("="))
    flat = pa.array(values.reshape(-1))
    if not shape:
        return pa.field(name, flat.type, nullable=False, metadata=metadata), flat
    kind = pa.fixed_shape_tensor(flat.type, shape)
    tensors = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape))))
    return pa.field(name, kind, nullable=False, metadata=metadata), tensors


def view(field: pa.Field, column: pa.Array) -> Any:
    """A column as a NumPy array over its mapped bytes; text stays in Arrow."""
    if pa.types.is_string(field.type):
        return column
    tensor = isinstance(field.type, pa.FixedShapeTensorType)
    array = column.to_numpy_ndarray() if tensor else column.to_numpy(zero_copy_only=True)
    return array.view(bool) if field.metadata == _BOOLEAN else array


def dtype_and_shape(field: pa.Field) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and the shape of a row of a column; object for text."""
    if pa.types.is_string(field.type):
        return np.dtype(object), ()
    tensor = isinstance(field.type, pa.FixedShapeTensorType)
    kind, shape = (field.type.value_type, tuple(field.type.shape)) if tensor else (field.type, ())
    if field.metadata == _BOOLEAN:
        return np.dtype(bool), shape
    # Not to_pandas_dtype: pyarrow 21 needs pandas for it, which dlspark's core does not require.
    return pa.nulls(0, kind).to_numpy(zero_copy_only=False).dtype, shape


def in_words(schema: pa.Schema | None) -> str:
    """The columns with their dtypes and shapes, for a message."""
    return ", ".join(
        f"{field.name} {dtype}{list(shape)}" for field in schema or () for dtype, shape in [dtype_and_shape(field)]
    )
