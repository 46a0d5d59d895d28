"""The functions that Spark runs on rows: they read, predict, and report what they could not read. Also in SQL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyspark.sql.functions import pandas_udf
from pyspark.sql.types import BinaryType, StringType, StructType

from dlspark._require import choice, whole_number
from dlspark.errors import ConfigError, DataError
from dlspark.images import BITS, RESIZES
from dlspark.mends import zip_directories
from dlspark.ml.network import Network, Predict, takes_images
from dlspark.ml.rows import ArrayReader, ImageReader, ImageStruct, Read, Reader
from dlspark.spark import ARROW_ROWS, is_local, own_gpus, task_resources

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import DataType

logger = logging.getLogger(__name__)

BATCH_BYTES = 4 << 20
"""Default maximum bytes of decoded pixels or numbers in a batch of the network: 27 images of 224 x 224 pixels."""

_MOST_ROWS = 1024  # the activations of a network may be much larger than its rows
_ARROW_ROWS_KEY = "spark.sql.execution.arrow.maxRecordsPerBatch"
_Outcome = tuple[list[NDArray[np.float32] | None], list[str | None]]


def register_udf(
    spark: SparkSession,
    name: str,
    model: Any,
    *,
    layer: str | None = None,
    image_size: tuple[int, int] | None = None,
    resize: str = "fit",
    bits: int = 16,
    batch_bytes: int = BATCH_BYTES,
) -> None:
    """Make ``SELECT name(column) FROM …`` predict: array<float> from images or arrays of numbers.

    A null or a value that cannot be read gives null; `ImageFeaturizer` and `KerasTransformer` also give the reason.

    Args:
        spark: the session that gets the function.
        name: of the SQL function. It replaces a function of that name.
        model: a Keras model, a `FitResult`, or the path or URI of a ``.keras`` file. A model of RGB images predicts from
            the bytes of image files, from their paths or URIs, and from Spark's image structs; any other from arrays.
        layer: name of the layer whose flattened output is used; None is the model's output.
        image_size: (height, width) in pixels, for a model with a variable size.
        resize: how images are scaled: one of `dlspark.images.decode.RESIZES`.
        bits: how many bits the values of 16-bit images use, as for `prepare_images`.
        batch_bytes: maximum bytes of decoded pixels or numbers in a batch of the network.

    Raises:
        ConfigError: a model, layer or size that cannot work; a session without a SparkContext (Spark Connect).
    """
    network = Network.of(model)
    network = network if layer is None else network.cut(layer)
    reader = reader_of(network, image_size, resize, bits)
    if takes_images(network.input_shape):
        warn_of_large_batches(spark)
    spark.udf.register(name, pandas_udf(_values(_function(spark, network, reader, batch_bytes)), "array<float>"))


def outcome_udf(spark: SparkSession, network: Network, reader: Reader, batch_bytes: int) -> Any:
    """The function for stages: a struct of ``values`` (array<float>) and ``error`` (string), one of which is null.

    It is deterministic, and declared nondeterministic: Spark would copy a deterministic one into each filter on its results
    and evaluate it again.
    """
    function = _both(_function(spark, network, reader, batch_bytes))
    return pandas_udf(function, "values array<float>, error string").asNondeterministic()


def reader_of(network: Network, image_size: Sequence[int] | None, resize: str, bits: int) -> Reader:
    """The reader of rows for a network.

    Raises:
        ConfigError: ``image_size`` is missing for a variable size, or differs from a fixed one; unknown words or bits.
    """
    choice("resize", resize, RESIZES)
    choice("bits", bits, BITS)
    shape = network.input_shape
    if not takes_images(shape):
        if image_size is not None:
            raise ConfigError(
                f"Expected a network of RGB images, as image_size is given; this one takes rows of shape {shape}."
            )
        return array_reader(network)
    height, width = shape[:2] if image_size is None else image_size
    fits = all(own in (None, given) for own, given in zip(shape[:2], (height, width), strict=True))
    if height is None or width is None or not fits:
        raise ConfigError(
            f"Expected an image size that the network takes, (height, width) = {shape[:2]}; got {image_size!r}. "
            + ("Give one." if None in shape else "Leave it out.")
        )
    return ImageReader((height, width), resize, bits)


def array_reader(network: Network) -> Reader:
    """The reader of rows of numbers for a network.

    Raises:
        ConfigError: the shape of a row is variable.
    """
    shape = tuple(size for size in network.input_shape if size is not None)
    if len(shape) < len(network.input_shape):
        raise ConfigError(f"Expected a network with rows of a fixed shape; this one takes {network.input_shape}.")
    return ArrayReader(shape)


def check_images(spark: SparkSession, name: str, kind: DataType) -> None:
    """Reject a column without images; warn if Spark's batches of images are too large.

    Raises:
        ConfigError: ``kind``, the type of the column ``name``, is neither bytes, nor paths, nor Spark's image struct.
    """
    is_struct = isinstance(kind, StructType) and set(ImageStruct._fields) <= set(kind.names)
    if not is_struct and not isinstance(kind, (BinaryType, StringType)):
        raise ConfigError(
            f"Expected image bytes (binary), paths (string) or Spark's image structs in column {name!r}; it is of type "
            f"{kind.simpleString()}."
        )
    if not isinstance(kind, StringType):
        warn_of_large_batches(spark)


def warn_of_large_batches(spark: SparkSession) -> None:
    """Warn if a batch of images from Spark may not fit in memory: Spark limits rows, not bytes."""
    rows = int(spark.conf.get(_ARROW_ROWS_KEY, "10000") or 0)
    if not 0 < rows <= ARROW_ROWS:
        logger.warning(
            "Spark gives a task %s rows at a time: with images of 200 kB that is %s, in the JVM and again in Python. "
            "Set %s to %d or fewer (it can be set at any time), or give paths of images instead of their bytes.",
            f"{rows:,}" if rows > 0 else "all its",
            f"{rows * 200_000 / 1e9:.1f} GB" if rows > 0 else "all of them",
            _ARROW_ROWS_KEY,
            ARROW_ROWS,
        )


def _function(
    spark: SparkSession, network: Network, reader: Reader, batch_bytes: int
) -> Callable[[Iterator[Any]], Iterator[_Outcome]]:
    batch_rows = _rows_at_once(reader, whole_number("batch_bytes", batch_bytes))
    is_local(spark)  # rejects Spark Connect
    task_resources(spark)  # rejects resources that tasks would wait for, or could not share
    shipped = network.shipped(spark.sparkContext)

    def outcomes(batches: Iterator[Any]) -> Iterator[_Outcome]:
        from pyspark import TaskContext

        zip_directories.read_when_changed()
        with own_gpus():
            yield from _outcomes(batches, shipped.value, reader, batch_rows, TaskContext.get().cpus())

    return outcomes


def _rows_at_once(reader: Reader, batch_bytes: int) -> int:
    return min(_MOST_ROWS, max(1, batch_bytes // reader.row_bytes))


def _values(function: Callable[[Iterator[Any]], Iterator[_Outcome]]) -> Any:
    def values(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        for found, _ in function(batches):
            yield pd.Series(found, dtype=object)

    return values


def _both(function: Callable[[Iterator[Any]], Iterator[_Outcome]]) -> Any:
    def outcomes(batches: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        for found, reasons in function(batches):
            yield pd.DataFrame({"values": pd.Series(found, dtype=object), "error": pd.Series(reasons, dtype=object)})

    return outcomes


def _outcomes(batches: Iterator[Any], predict: Predict, reader: Reader, batch_rows: int, threads: int) -> Iterator[_Outcome]:
    """Predict a batch while the next one is read. Two batches are in memory, whatever the number of rows.

    Batches are independent of Spark's, and full except for the last: Spark only needs the same number of rows, in order.
    """
    with (
        ThreadPoolExecutor(1, thread_name_prefix="dlspark-read") as ahead,
        ThreadPoolExecutor(threads, thread_name_prefix="dlspark-decode") as pool,
    ):
        waiting: Future[Read] | None = None
        rows = (value for batch in batches for value in _rows(batch))
        while values := list(islice(rows, batch_rows)):
            reading = ahead.submit(reader.read, values, pool)
            if waiting is not None:
                yield _predicted(predict, *waiting.result())
            waiting = reading
        if waiting is not None:
            yield _predicted(predict, *waiting.result())


def _predicted(predict: Predict, inputs: NDArray[Any], reasons: list[str | None]) -> _Outcome:
    predictions = iter(predict(inputs)) if len(inputs) else iter(())
    return [next(predictions) if reason is None else None for reason in reasons], reasons


def _rows(batch: Any) -> Iterator[Any]:
    if not isinstance(batch, pd.DataFrame):
        yield from batch
        return
    missing = set(ImageStruct._fields) - set(batch.columns)
    if missing:
        raise DataError(
            f"Expected image bytes, a path or Spark's image struct; got a struct of {', '.join(batch.columns)}. "
            "Give one of its fields."
        )
    yield from (ImageStruct(*row) for row in zip(*(batch[name] for name in ImageStruct._fields), strict=True))
