"""Stages and SQL functions on a stream of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark.ml import ImageFeaturizer, KerasTransformer, register_udf

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300)]


def test_a_folder_that_fills(spark: Any, classifier: Any, pictures: list[bytes], tmp_path: Path) -> None:
    import keras

    folder = tmp_path / "in"
    folder.mkdir()
    schema = spark.read.format("binaryFile").load(str(folder)).schema
    stream = spark.readStream.format("binaryFile").schema(schema).option("maxFilesPerTrigger", 4).load(str(folder))
    stage = ImageFeaturizer(inputCol="content", outputCol="out", errorCol="why", model=classifier)
    register_udf(spark, "streamed", classifier)
    names = stream.selectExpr("content", "element_at(split(path, '/'), -1) AS name")
    adding = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    behind = KerasTransformer(inputCol="out", outputCol="total", model=adding)
    found = behind.transform(stage.transform(names)).selectExpr(
        "name", "out", "why", "total", "total_error", "streamed(content) AS p"
    )
    for first in (0, 6):  # the second query reads only the new files
        for number in range(first, first + 6):
            (folder / f"{number:02}.png").write_bytes(pictures[number] if number != 3 else b"no image")
        query = (
            found.writeStream.format("parquet")
            .option("checkpointLocation", str(tmp_path / "checkpoint"))
            .trigger(availableNow=True)
            .start(str(tmp_path / "out"))
        )
        try:
            assert query.awaitTermination(200)
        finally:
            query.stop()
        rows = spark.read.parquet(str(tmp_path / "out")).orderBy("name").collect()
        assert [row.name for row in rows] == [f"{number:02}.png" for number in range(first + 6)]
    assert "not a JPEG" in rows[3].why
    assert [rows[3].out, rows[3].p, rows[3].total, rows[3].total_error] == [None, None, None, "the value is null"]
    good = [row for row in rows if row.why is None]
    assert len(good) == 11
    np.testing.assert_allclose([row.out.toArray() for row in good], [row.p for row in good], atol=1e-6)
    np.testing.assert_allclose([row.total.toArray() for row in good], np.ones((11, 1)), atol=1e-6)
