"""Images and labels of a DataFrame as shards for training: each executor decodes and writes its own rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlspark.data import ShardedRows, name_warnings, quoted
from dlspark.errors import ConfigError, DataError
from dlspark.ml.rows import ImageReader, ImageStruct, check_column
from dlspark.spark import Columns, write_columns
from dlspark.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

_DECODED_BYTES = 16 << 20  # decoded at a time, whatever the size of Spark's batches


@dataclass(frozen=True)
class _Decode:
    reader: ImageReader
    skip: bool

    def __call__(self, batch: pa.RecordBatch) -> Iterator[Columns]:
        from pyspark import TaskContext

        rows = max(1, _DECODED_BYTES // self.reader.row_bytes)
        with ThreadPoolExecutor(TaskContext.get().cpus(), thread_name_prefix="dlspark-decode") as pool:
            for start in range(0, batch.num_rows, rows):
                images, labels = batch.slice(start, rows).columns
                pixels, reasons = self.reader.read([_value(image) for image in images.to_pylist()], pool)
                wrong = [reason for reason in reasons if reason is not None]
                if wrong and not self.skip:
                    raise DataError(
                        f"Expected an image in every row: {wrong[0]}. Set handleInvalid='skip' to leave such rows out; "
                        "ImageFeaturizer gives the reason for each of them."
                    )
                if len(pixels):
                    kept = np.array([reason is None for reason in reasons])
                    yield {"image": pixels, "label": labels.to_numpy(zero_copy_only=False)[kept].astype(np.int32)}


def _value(image: Any) -> Any:
    return ImageStruct(*(image[name] for name in ImageStruct._fields)) if isinstance(image, dict) else image


def write_images(
    store: Store, df: DataFrame, *, image: str, label: str, reader: ImageReader, skip: bool
) -> tuple[ShardedRows, tuple[str, ...]]:
    """Write the rows to the folder "images" of ``store``, as `dlspark.spark.rows.write_dataframe` does.

    Args:
        store: a place that all executors reach.
        df: the rows.
        image: a column that `dlspark.ml.udf.check_images` accepts.
        label: a column of class indices, 0, 1, …, as Spark's StringIndexer makes them.
        reader: decodes the images.
        skip: leave out rows whose image cannot be read, with a warning, instead of failing.

    Returns:
        The rows; and the names of the classes from the metadata of the label column, or else their numbers.

    Raises:
        ConfigError: the label column is missing, or it is not numeric.
        DataError: no rows; labels that are no class indices; an image that cannot be read.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.types import NumericType

    check_column("labelCol", label, df.columns)
    kind = df.schema[label]
    if not isinstance(kind.dataType, NumericType):
        raise ConfigError(
            f"Expected class indices in column {label!r}: it is of type {kind.dataType.simpleString()}. Index texts with "
            "Spark's StringIndexer."
        )
    column = F.col(quoted(label)).cast("double")
    odd = F.count_if(column.isNull() | F.isnan(column) | (column < 0) | (column != F.floor(column)))
    rows, wrong, highest = df.agg(F.count(F.lit(1)), odd, F.max(column)).first()
    if not rows:
        raise DataError("Expected rows to train on: the DataFrame has none.")
    if wrong:
        raise DataError(f"Expected class indices 0, 1, … in column {label!r}: {wrong} of {rows} rows have none.")
    # From the metadata, as in Spark's own classifiers: a part of the rows, such as a fold, may lack a class.
    named = tuple(kind.metadata.get("ml_attr", {}).get("vals", ()))
    classes = named or tuple(str(number) for number in range(int(highest) + 1))
    for warning in name_warnings("classes", named):
        logger.warning("%s", warning)
    if len(classes) < 2 or highest >= len(classes):
        raise DataError(
            f"Expected indices of two classes or more in column {label!r}: they run to {highest:g}, classes are {classes}."
        )
    selected = df.select(F.col(quoted(image)).alias("image"), column.alias("label"))
    written = write_columns(store, "images", selected, _Decode(reader, skip))
    if written.rows < rows:
        logger.warning("%d of %d rows are left out: their images cannot be read.", rows - written.rows, rows)
    return replace(written, x="image", y="label", num_classes=len(classes), classes=classes), classes
