"""Readers: from the values of rows to the inputs of a network, or to the reason why there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dlspark._require import known
from dlspark.errors import DataError
from dlspark.images import READ_AT_ONCE, decode, read_files, scale

NULL = "the value is null"


def check_column(param: str, name: str, columns: Sequence[str]) -> None:
    """Reject the value of a param that names no column.

    Raises:
        ConfigError: it is not among ``columns``.
    """
    known(f"{param} to be a column", name, columns)


class ImageStruct(NamedTuple):
    """A value of Spark's image data source, without its origin."""

    height: int | None
    width: int | None
    nChannels: int | None
    data: bytes | None


Read = tuple[NDArray[Any], list[str | None]]
"""The inputs of the rows that can be predicted; and for each row the reason why it cannot be, or None."""


class Reader(Protocol):
    """Reads the values of some rows. It holds all of them at once, so callers limit their number."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the input of one row."""
        ...

    def read(self, values: Sequence[Any], pool: ThreadPoolExecutor) -> Read:
        """The inputs of ``values``, read in this thread and in ``pool``."""
        ...


@dataclass(frozen=True)
class ImageReader:
    """Images: the bytes of files, paths and URIs of files, or `ImageStruct`; uint8 of shape (height, width, 3), RGB.

    Attributes:
        image_size: (height, width) in pixels.
        resize: one of `dlspark.images.decode.RESIZES`.
        bits: one of `dlspark.images.decode.BITS`.
    """

    image_size: tuple[int, int]
    resize: str
    bits: int = 16

    @property
    def row_bytes(self) -> int:
        """Bytes of the pixels of one image."""
        return math.prod(self.image_size) * 3

    def read(self, values: Sequence[Any], pool: ThreadPoolExecutor) -> Read:
        """Files are read in this thread, remote ones several at once; images are decoded in the threads of ``pool``."""
        files = read_files([value for value in values if isinstance(value, str)])
        found: list[NDArray[np.uint8] | str] = []
        for start in range(0, len(values), READ_AT_ONCE):  # a file may be much larger than its scaled pixels
            some = values[start : start + READ_AT_ONCE]
            contents = [next(files) if isinstance(value, str) else (value, NULL) for value in some]
            found += pool.map(self._pixels, contents)
        return _sorted_out(found, (*self.image_size, 3), np.uint8)

    def _pixels(self, content: tuple[Any, str]) -> NDArray[np.uint8] | str:
        value, reason = content
        try:
            if isinstance(value, ImageStruct):
                return scale(_rgb(value), self.image_size, resize=self.resize)
            if value is None:
                return reason
            return decode(bytes(value), self.image_size, resize=self.resize, bits=self.bits)
        except DataError as error:
            return str(error)


@dataclass(frozen=True)
class ArrayReader:
    """Arrays of numbers, nested or not, to float32 arrays of ``shape``, row-major."""

    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of the numbers of one row."""
        return math.prod(self.shape) * 4

    def read(self, values: Sequence[Any], pool: ThreadPoolExecutor) -> Read:
        """All in this thread."""
        return _sorted_out([self._array(value) for value in values], self.shape, np.float32)

    def _array(self, value: Any) -> NDArray[np.float32] | str:
        if value is None:
            return NULL
        array = _dense(value)
        if array.size != math.prod(self.shape):
            return f"expected {math.prod(self.shape)} numbers, of shape {self.shape}; got {array.size}"
        return array.reshape(self.shape)


def _sorted_out(found: Sequence[NDArray[Any] | str], shape: tuple[int, ...], dtype: Any) -> Read:
    inputs = [item for item in found if not isinstance(item, str)]
    reasons = [item if isinstance(item, str) else None for item in found]
    return (np.stack(inputs) if inputs else np.empty((0, *shape), dtype)), reasons


def _rgb(image: ImageStruct) -> NDArray[np.uint8]:
    """The pixels of a Spark image (grey, BGR or BGRA) as grey, RGB or RGBA."""
    if image.data is None:
        raise DataError(NULL)
    height, width, channels = (int(number or 0) for number in image[:3])
    if height < 1 or width < 1:
        raise DataError("Spark could not decode the image")
    if channels not in (1, 3, 4) or len(image.data) != height * width * channels:
        raise DataError(f"expected a {height} x {width} image of {channels} channels; got {len(image.data)} bytes")
    pixels = np.frombuffer(image.data, np.uint8).reshape(height, width, channels)
    return pixels if channels == 1 else np.ascontiguousarray(pixels[..., [2, 1, 0, 3][:channels]])


def _dense(value: Any) -> NDArray[np.float32]:
    """Numbers of nested lists, which Arrow gives as arrays of arrays. SQL's decimals, such as 1.5, are objects too."""
    array = np.asarray(value)
    if array.dtype == object and any(isinstance(part, list | np.ndarray) for part in array):
        return np.concatenate([_dense(part).ravel() for part in array])
    return array.astype(np.float32, copy=False)
