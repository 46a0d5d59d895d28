"""The layout of HAM10000."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from dlspark._require import known
from dlspark.data import trimmed, try_cast
from dlspark.errors import DataError
from dlspark.images.csv_table import read_csv
from dlspark.images.files import images
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)


def ham10000(source: str, spark: SparkSession) -> DataFrame:
    """HAM10000 as downloaded: ``HAM10000_metadata.csv`` or ``.tab``, and the images, in folders at any depth.

    The label is ``dx``, the group ``lesion_id``. The columns ``lesion_id``, ``dx_type``, ``age`` (years, NaN if unknown),
    ``sex`` and ``localization`` are kept. An image that the table names and that does not exist is rejected.

    Raises:
        DataError: the table is missing.
    """
    from pyspark.sql import functions as F

    store = Store(source)
    files = sorted(images(store.uri))
    tables = [path for path, name, _ in files if "ham10000_metadata" in PurePosixPath(name).name.lower()]
    if not tables:
        raise DataError(f"Expected a file HAM10000_metadata.csv in {store.uri!r}; got none.")
    uri, *others = tables
    if others:
        logger.warning("%s is read; %s is not.", uri, ", ".join(others))
    pictures: dict[str, str] = {}
    aside = []
    for path, name, passed_over in files:
        if passed_over is None and pictures.setdefault(PurePosixPath(name).stem, path) != path:
            passed_over = "a second image of one name"
        if passed_over and path != uri:
            aside.append((path, name, passed_over))
    paths = spark.createDataFrame(list(pictures.items()), "name string, path string")
    missing = F.concat(F.lit(f"{store.uri}/"), trimmed("image_id"), F.lit(".jpg"))
    table = read_csv(uri, spark)
    wanted = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
    for column in wanted:
        known(f"a column of {uri!r}", column, table.columns)
    rows = (
        table.select(*wanted)
        .withColumn("listed", F.lit(True))
        .join(paths, trimmed("image_id") == paths["name"], "full")
        .select(
            F.coalesce("path", missing).alias("path"),
            F.coalesce("image_id", "name").alias("id"),
            F.col("dx").alias("label"),
            F.col("lesion_id").alias("group"),
            "lesion_id",
            "dx_type",
            try_cast("age", "double").alias("age"),
            "sex",
            "localization",
            F.when(F.col("listed").isNull(), "not in the table").alias("passed_over"),
        )
    )
    left = spark.createDataFrame(aside, "path string, id string, passed_over string")
    return rows.unionByName(left, allowMissingColumns=True)
