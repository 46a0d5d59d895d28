"""PySpark writes tables and lines of text, but not a plain file, to the file systems of a cluster.

Reading one is public (the data source ``binaryFile``). Writing needs either a table with the bytes, which is not a
``.keras`` file, or Hadoop's FileSystem through the gateway, which PySpark's own ML writers use. Needed until PySpark has a
public call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_CHUNK_BYTES = 4 << 20  # the gateway encodes bytes as text: both sides hold four thirds of a chunk


def write_file(spark: SparkSession, path: str, data: bytes) -> None:
    """Write ``data`` as the file ``path``, in Spark's notation. It must not exist.

    Raises:
        Py4JJavaError: the file exists, cannot be written, or its scheme has no connector.
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
    """The content of the file ``path``, in Spark's notation."""
    return bytes(spark.read.format("binaryFile").load(path).select("content").first()[0])
