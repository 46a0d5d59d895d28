"""Unevenly divided rows: each is trained once, as one process would train it, or the fit is refused early."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dlspark import ConfigError, FitResult, Trainer, load_backend
from dlspark.data.shard_writer import ShardWriter
from dlspark.data.shards import ShardedRows
from dlspark.spark.rows import write_dataframe
from dlspark.storage.store import Store
from dlspark.testing import toys

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(180)]

EPOCHS = 2
TOLERANCE = 1e-5
REFUSAL_SECONDS = 20.0  # a launch that hangs takes minutes; a refusal on a busy machine takes seconds


def frame(spark: Any, x: NDArray[Any], y: NDArray[Any], counts: Sequence[int]) -> Any:
    """A DataFrame whose partitions have ``counts`` rows."""
    ends = np.cumsum(counts)
    rows = [(list(map(float, point)), int(label)) for point, label in zip(x, y, strict=True)]
    parts = [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]
    assert len(rows) == ends[-1]
    in_parts = spark.sparkContext.parallelize(parts, len(parts)).flatMap(lambda part: part)
    assert in_parts.glom().map(len).collect() == list(counts)
    return spark.createDataFrame(in_parts, "features array<float>, label int")


def shards(store: Store, parts: Iterable[tuple[NDArray[Any], NDArray[Any]]], num_classes: int) -> ShardedRows:
    """Shards as of a prepared dataset, with one file for each of ``parts``."""
    written = []
    for number, (x, y) in enumerate(parts):
        name = f"part-{number}.arrow"
        with store.open_writer(name) as path, ShardWriter(path, name) as writer:
            writer.write({"x": x, "y": y})
        written.append(writer.close())
    return ShardedRows(
        uri=store.uri,
        files=tuple(info.file for info in written),
        rows_per_file=tuple(info.rows for info in written),
        x="x",
        y="y",
        num_classes=num_classes,
    )


def fit(backend: str, model: Any, data: Any, **settings: Any) -> FitResult:
    workers = 1 if backend == "local" else 2
    defaults = {"epochs": EPOCHS, "batch_size": 64, "verbose": 0}
    return Trainer(backend, num_workers=workers).fit(model, data, **{**defaults, **settings})


def assert_finite(result: FitResult) -> None:
    for name, values in result.history.items():
        assert len(values) == EPOCHS
        assert np.isfinite(values).all(), name
    assert all(np.isfinite(weight).all() for weight in result.weights)


def assert_equal(result: FitResult, reference: FitResult) -> None:
    for ours, theirs in zip(result.weights, reference.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    for name, values in reference.history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def synchronous(backend: str) -> bool:
    return load_backend(backend).capabilities.synchronous_gradients


@pytest.mark.usually("mirrored")
def test_f8_f9_uneven_and_empty_partitions_of_a_frame(spark: Any, engine: str) -> None:
    """Partitions of 1,001, 0 and 999 rows; for validation as many rows as workers, which is the minimum."""
    x, ids = toys.numbered(2000)
    data = frame(spark, x, ids, [1001, 0, 999])
    few = frame(spark, x[:2], ids[:2], [0, 2])
    result = fit(engine, toys.counting_classifier(2000), data, validation_data=few)
    assert result.history["seen_once"] == [2000] * EPOCHS
    assert result.history["val_seen_once"] == [2] * EPOCHS
    assert sum(worker.rows for worker in result.workers) == 2000 * EPOCHS
    assert_finite(result)
    if synchronous(engine):
        assert_equal(result, fit("local", toys.counting_classifier(2000), (x, ids), validation_data=(x[:2], ids[:2])))


@pytest.mark.usually("processes")
@pytest.mark.parametrize("engine", ["processes", "mirrored", "horovod", "elephas"], indirect=True)
def test_f8_shards_of_ten_to_one(engine: str, tmp_path: Path) -> None:
    x, ids = toys.numbered(1100)
    data = shards(Store(tmp_path), [(x[:1000], ids[:1000]), (x[1000:], ids[1000:])], 1100)
    model = toys.counting_classifier(1100)
    result = fit(engine, model, data)
    assert result.history["seen_once"] == [1100] * EPOCHS
    assert_finite(result)
    if synchronous(engine):
        assert_equal(result, fit("local", toys.counting_classifier(1100), (x, ids)))


@pytest.mark.usually("processes")
@pytest.mark.parametrize("engine", ["processes", "mirrored", "horovod", "elephas"], indirect=True)
def test_f10_a_class_that_one_shard_lacks(engine: str, tmp_path: Path) -> None:
    """Class 2 is only in the second shard: counting labels by shard would give another model, or a failure."""
    x, y = toys.separable(300)
    by_class = [np.flatnonzero(y < 2), np.flatnonzero(y == 2)]
    data = shards(Store(tmp_path), [(x[rows], y[rows]) for rows in by_class], 3)
    order = np.concatenate(by_class)
    result = fit(engine, toys.dense_classifier(), data)
    assert_finite(result)
    assert sum(worker.rows for worker in result.workers) == 300 * EPOCHS
    reference = fit("local", toys.dense_classifier(), (x[order], y[order]))
    if synchronous(engine):
        assert_equal(result, reference)
    else:
        assert result.history["loss"][-1] < result.history["loss"][0]
        assert result.history["accuracy"][-1] == pytest.approx(reference.history["accuracy"][-1], abs=0.1)


@pytest.fixture
def arrow_is_loaded(spark: Any, tmp_path: Path) -> None:
    """Load Arrow and pandas in Spark's workers: on a busy machine that takes seconds, which the refusal must not count."""
    write_dataframe(Store(tmp_path), "data", frame(spark, *toys.separable(2), [1, 1]))


class TestFewerRowsThanWorkers:
    """Refused with both numbers before any engine starts, because an average over no rows is undefined."""

    @pytest.fixture(autouse=True)
    def no_launch(self, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load_backend(engine), "fit", lambda self, job: pytest.fail("the job was launched"))

    @pytest.mark.parametrize(("rows", "batch_size", "told"), [(1, 32, "1 rows in 1 steps"), (3, 2, "3 rows in 2 steps")])
    def test_f9_in_arrays(self, spark: Any, engine: str, rows: int, batch_size: int, told: str) -> None:
        x, y = toys.separable(rows)
        for refused in ({"data": (x, y)}, {"data": toys.separable(60), "validation_data": (x, y)}):
            started = time.monotonic()
            with pytest.raises(ConfigError, match=rf"at least 2 rows in a step.*data has {told}"):
                fit(engine, toys.dense_classifier(), batch_size=batch_size if refused["data"][0] is x else 32, **refused)
            assert time.monotonic() - started <= REFUSAL_SECONDS
            if batch_size == 2:
                break  # the training data would be refused first

    def test_f9_in_a_frame(self, arrow_is_loaded: None, spark: Any, engine: str) -> None:
        """A frame's rows are counted when it is written, after the cluster check and before the launch."""
        data = frame(spark, *toys.separable(1), [0, 1])
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"at least 2 rows in a step.*data has 1 rows in 1 steps"):
            fit(engine, toys.dense_classifier(), data)
        assert time.monotonic() - started <= REFUSAL_SECONDS
