"""PySpark writes tables and lines of text, but no file as it is, to the file systems that a cluster reaches.

Reading one is public (the data source ``binaryFile``). For writing, the choice is between a table that holds the bytes, so
that what lies there is no ``.keras`` file, and Hadoop's FileSystem through the gateway, which PySpark's own ML writers use.
Needed until PySpark has a call for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_CHUNK_BYTES = 4 << 20  # the gateway sends text: four thirds of that are in memory, on both sides


def write_file(spark: SparkSession, path: str, data: bytes) -> None:
    """Write ``data`` as the file ``path``, a path as Spark takes it, which must not exist.

    Raises:
        Py4JJavaError: what Hadoop raises: the file exists, cannot be written, or no connector knows the scheme.
    """
    context = spark.sparkContext
    where = context._jvm.org.apache.hadoop.fs.Path(path)
    stream = where.getFileSystem(context._jsc.hadoopConfiguration()).create(where, False)
    try:
        for start in range(0, len(data), _CHUNK_BYTES):
            stream.write(bytearray(data[start : start + _CHUNK_BYTES]))
    finally:
        stream.close()


def read_file(spark: SparkSession, path: str) -> bytes:
    """The content of the file ``path``, a path as Spark takes it."""
    return bytes(spark.read.format("binaryFile").load(path).select("content").first()[0])
