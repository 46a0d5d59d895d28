"""Tables of a study: DataFrames kept as Parquet files in a store, and the images of a dataset as rows.

Executors write and read the files through the store, so any store of the images works; Spark's own readers would need a
Hadoop connector. `write_table` returns the list of a table's files; other files beside them are of failed attempts.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlspark.data import PARTS, ShardedRows, empty, quoted
from dlspark.errors import DataError
from dlspark.images import ImageDataset
from dlspark.spark import available_slots, told_plainly
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_SUMMARY = "partition int, file string, rows long"
_IMAGE_BYTES = 8 * 2**20  # of pixels in one record batch
_BATCH_BYTES = 32 * 2**20  # of a table in one record batch; raw maps are 400 kB a row
_ROWS = 4096
_CV_8UC3 = 16  # OpenCV's number for three channels of bytes, as Spark's image source gives it
_IMAGE = "struct<origin: string, height: int, width: int, nChannels: int, mode: int, data: binary>"


def write_table(store: Store, df: DataFrame) -> dict[str, Any]:
    """Write a DataFrame of texts, numbers and arrays of them to ``store``, one file for each partition with rows.

    Returns:
        Plain data for `read_table`: ``files``, in the order of the partitions, ``rows`` in each, and the ``schema``.

    Raises:
        ConfigError: this process does not see the files of the executors.
    """
    task = partial(_write_partition, uri=store.uri, run=uuid.uuid4().hex[:8], names=tuple(df.columns))
    # By number: mapInArrow reads a name with a dot in it as a field of a struct (pyspark 3.5).
    numbered = df.toDF(*(f"c{number}" for number in range(len(df.columns))))
    with told_plainly():
        parts = sorted(numbered.mapInArrow(task, _SUMMARY).collect(), key=lambda part: part.partition)
    files = [part.file for part in parts]
    store.require(files)
    return {"files": files, "rows": [part.rows for part in parts], "schema": json.loads(df.schema.json())}


def read_table(
    spark: SparkSession, store: Store, table: Mapping[str, Any], columns: Sequence[str] | None = None
) -> DataFrame:
    """The DataFrame that `write_table` wrote, or some of its columns (names without dots), one partition for each slot."""
    from pyspark.sql.types import StructType

    whole = StructType.fromJson(table["schema"])
    schema = whole if columns is None else StructType([whole[name] for name in columns])
    task = partial(_read_files, uri=store.uri, files=tuple(table["files"]), columns=columns)
    return _numbers(spark, len(table["files"])).mapInArrow(task, schema)


def read_local(store: Store, table: Mapping[str, Any]) -> pa.Table:
    """All of a small table, in this process."""
    return pa.concat_tables([pq.read_table(store.local_file(file)) for file in table["files"]])


def dataset_rows(spark: SparkSession, dataset: ImageDataset) -> DataFrame:
    """A prepared dataset without its pixels: id, part, label and all further columns. A missing value is a null."""
    from pyspark.sql import functions as F

    shards = _shards(dataset, PARTS)
    columns = [name for name in dataset.manifest["columns"] if name not in ("image", "label", "id")]
    first = shards[0][1]
    with first.open() as reader:
        kinds = {name: _spark_type(reader.columns[name][0]) for name in columns}
    schema = ", ".join(["id string", "part string", "label int", *(f"{quoted(name)} {kinds[name]}" for name in columns)])
    task = partial(_read_columns, shards=shards, columns=tuple(columns))
    df = _numbers(spark, len(shards)).mapInArrow(task, schema)
    for name, kind in kinds.items():
        if kind == "string":  # shards have no nulls
            df = df.withColumn(name, F.when(~empty(name), F.col(quoted(name))))
    return df


def dataset_images(
    spark: SparkSession, dataset: ImageDataset, parts: Sequence[str] = PARTS, *, by_shard: bool = False
) -> DataFrame:
    """The images of a dataset: id, label, and image as from ``spark.read.format("image")``. The driver reads no images.

    Args:
        spark: the session.
        dataset: of the images.
        parts: names of its parts.
        by_shard: one partition for each shard, so equal on all clusters. Otherwise fewer partitions, which is faster.
    """
    shards = _shards(dataset, parts)
    # A task costs some 0.4 s in two Python workers; several tasks for each slot, as slots are not equally fast.
    table = _numbers(spark, len(shards), per_slot=len(shards) if by_shard else 4)
    return table.mapInArrow(partial(_read_images, shards=shards), f"id string, label int, image {_IMAGE}")


def _shards(dataset: ImageDataset, parts: Sequence[str]) -> list[tuple[str, ShardedRows]]:
    """The part and the rows of each file."""
    found = [(part, rows) for part in parts if (rows := getattr(dataset, part)) is not None]
    return [(part, _single(rows, number)) for part, rows in found for number in range(len(rows.files))]


def _numbers(spark: SparkSession, count: int, *, per_slot: int = 1) -> DataFrame:
    """0 … count - 1, in ``per_slot`` partitions for each slot; in ``count`` partitions while no executor is registered."""
    slots = available_slots(spark)
    return spark.range(0, count, 1, numPartitions=max(1, min(count, per_slot * slots) if slots else count))


def _single(rows: ShardedRows, number: int) -> ShardedRows:
    """The rows of one file."""
    one = slice(number, number + 1)
    return replace(rows, files=rows.files[one], rows_per_file=rows.rows_per_file[one], crc32=rows.crc32[one])


def _spark_type(dtype: np.dtype[Any]) -> str:
    names = {"bool": "boolean", "int8": "tinyint", "int16": "smallint", "int32": "int", "int64": "bigint"}
    names |= {"float32": "float", "float64": "double", "object": "string"}
    return names[dtype.name]


def _read_columns(
    batches: Iterable[pa.RecordBatch], *, shards: Sequence[tuple[str, ShardedRows]], columns: tuple[str, ...]
) -> Iterator[pa.RecordBatch]:
    for part, rows in _chosen(batches, shards):
        with rows.open() as reader:
            found = reader.take(np.arange(rows.rows), ["id", "label", *columns])
        arrays = [pa.array([str(name) for name in found["id"]]), pa.array([part] * rows.rows), pa.array(found["label"])]
        arrays += [pa.array(found[name]) for name in columns]
        yield pa.RecordBatch.from_arrays(arrays, ["id", "part", "label", *columns])


def _read_images(
    batches: Iterable[pa.RecordBatch], *, shards: Sequence[tuple[str, ShardedRows]]
) -> Iterator[pa.RecordBatch]:
    for _, rows in _chosen(batches, shards):
        with rows.open() as reader:
            _, (height, width, channels) = reader.columns["image"]
            step = max(1, _IMAGE_BYTES // (height * width * channels))
            for start in range(0, rows.rows, step):
                found = reader.take(np.arange(start, min(start + step, rows.rows)), ["id", "label", "image"])
                ids = [str(name) for name in found["id"]]
                count = len(ids)
                same = {"height": height, "width": width, "nChannels": channels, "mode": _CV_8UC3}
                fields = [pa.array(ids), *(pa.array([value] * count, pa.int32()) for value in same.values())]
                fields.append(pa.array([image[..., ::-1].tobytes() for image in found["image"]], pa.binary()))  # BGR
                struct = pa.StructArray.from_arrays(fields, ["origin", *same, "data"])
                columns = [pa.array(ids), pa.array(found["label"]), struct]
                yield pa.RecordBatch.from_arrays(columns, ["id", "label", "image"])


def _chosen(batches: Iterable[pa.RecordBatch], of: Sequence[Any]) -> Iterator[Any]:
    for batch in batches:
        for number in batch.column(0).to_pylist():
            yield of[number]


def _write_partition(
    batches: Iterable[pa.RecordBatch], *, uri: str, run: str, names: tuple[str, ...]
) -> Iterator[pa.RecordBatch]:
    from pyspark import TaskContext

    context = TaskContext.get()
    filled = (batch.rename_columns(list(names)) for batch in batches if batch.num_rows)
    first = next(filled, None)
    if first is None:
        return
    number, rows = context.partitionId(), first.num_rows
    name = f"part-{number:05d}-{run}-{context.taskAttemptId()}.parquet"
    with Store(uri).open_writer(name) as path, pq.ParquetWriter(path, first.schema) as writer:
        writer.write_batch(first)
        for batch in filled:
            writer.write_batch(batch)
            rows += batch.num_rows
    columns = [pa.array([number], pa.int32()), pa.array([name]), pa.array([rows])]
    yield pa.RecordBatch.from_arrays(columns, ["partition", "file", "rows"])


def _read_files(
    batches: Iterable[pa.RecordBatch], *, uri: str, files: tuple[str, ...], columns: Sequence[str] | None
) -> Iterator[pa.RecordBatch]:
    store = Store(uri)
    for name in _chosen(batches, files):
        try:
            with pq.ParquetFile(store.local_file(name)) as file:
                about = file.metadata
                total = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
                rows = max(1, min(_ROWS, _BATCH_BYTES * about.num_rows // max(1, total)))
                for batch in file.iter_batches(rows, columns=columns):
                    yield batch if columns is None else batch.select(columns)  # they come in the file's order
        except pa.ArrowException as error:
            raise DataError(f"The table {name!r} of {uri!r} is damaged: {error}. Delete its folder.") from error


def featurized(images: DataFrame, model: Any, layer: str | None = None) -> DataFrame:
    """The rows of `dataset_images` with the output of a network (features, array<float>) in place of the image.

    Args:
        images: of a prepared dataset, so an image that cannot be decoded fails the job.
        model: as for `ImageFeaturizer`.
        layer: name of the layer whose output is used; None is the model's output.
    """
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions as F

    from dlspark.ml.featurizer import ImageFeaturizer

    stage = ImageFeaturizer(inputCol="image", outputCol="features", errorCol="error", model=model, layer=layer)
    checked = F.when(F.col("error").isNull(), vector_to_array("features", "float32")).otherwise(
        F.raise_error(F.concat(F.lit("dlspark.errors.DataError: "), F.col("id"), F.lit(": "), F.col("error")))
    )
    return stage.transform(images).select("id", "label", checked.alias("features"))
