from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlspark.data.shard_writer import ShardInfo, ShardWriter, write_rows
from dlspark.data.shards import RowReader, ShardedRows
from dlspark.errors import DataError
from dlspark.storage.store import Store

DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint32", "float16", "float32", "float64"]


def write(path: Path, *batches: dict[str, Any]) -> ShardInfo:
    with ShardWriter(path) as writer:
        for batch in batches:
            writer.write(batch)
    return writer.close()


def rows_of(path: Path, *infos: ShardInfo, x: Any = "x", y: Any = None, **more: Any) -> ShardedRows:
    files, counts = tuple(info.file for info in infos), tuple(info.rows for info in infos)
    return ShardedRows(uri=str(path), files=files, rows_per_file=counts, x=x, y=y, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1)])
def test_arrays_come_back_as_they_went(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 2, (7, *shape)).astype(dtype)
    info = write(tmp_path / "a.arrow", {"x": x[:4]}, {"x": x[4:]})
    with rows_of(tmp_path, info).open() as reader:
        assert reader.rows == 7
        assert reader.columns == {"x": (np.dtype(dtype), shape)}
        found = reader.take(np.arange(7))["x"]
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, x)
    assert found.flags.writeable


def test_texts_come_back(tmp_path: Path) -> None:
    ids = ["a", "", "größer", "d"]
    info = write(tmp_path / "a.arrow", {"id": ids[:3]}, {"id": np.array(ids[3:])})
    with rows_of(tmp_path, info, x="id").open() as reader:
        assert reader.take(np.array([3, 2, 2, 0]), ["id"])["id"].tolist() == ["d", "größer", "größer", "a"]


def test_other_byte_orders_and_strides_are_taken(tmp_path: Path) -> None:
    x = np.arange(24, dtype=">f4").reshape(4, 6)[:, ::2]
    info = write(tmp_path / "a.arrow", {"x": x})
    with rows_of(tmp_path, info).open() as reader:
        np.testing.assert_array_equal(reader.take(np.arange(4))["x"], x)


def test_the_writer_describes_its_file(tmp_path: Path) -> None:
    info = write(tmp_path / "a.arrow", {"x": np.zeros((5, 2))}, {"x": np.zeros((0, 2))})
    content = (tmp_path / "a.arrow").read_bytes()
    assert info == ShardInfo("a.arrow", 5, len(content), zlib.crc32(content))


def test_a_failed_block_leaves_no_file(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), ShardWriter(tmp_path / "a.arrow") as writer:
        writer.write({"x": np.zeros(3)})
        raise ZeroDivisionError
    with pytest.raises(DataError, match="at least one write"), ShardWriter(tmp_path / "b.arrow"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"x": np.zeros(3), "y": np.zeros(4)},
        {"x": np.zeros(3, complex)},
        {"x": np.zeros((3, 0))},
        {"x": np.array(0.0)},
        {"x": ["a", None]},
        {"x": np.array([{}, 1], object)},
    ],
)
def test_what_is_no_column_is_refused(tmp_path: Path, columns: dict[str, Any]) -> None:
    with pytest.raises(DataError), ShardWriter(tmp_path / "a.arrow") as writer:
        writer.write(columns)


def test_the_first_write_fixes_the_columns(tmp_path: Path) -> None:
    for other in ({"x": np.zeros((1, 3))}, {"x": np.zeros((1, 2), np.float32)}, {"z": np.zeros((1, 2))}):
        with ShardWriter(tmp_path / "a.arrow") as writer:
            writer.write({"x": np.zeros((1, 2))})
            with pytest.raises(DataError, match="first write"):
                writer.write(other)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_take_equals_numpy(tmp_path: Path, data: st.DataObject) -> None:
    """Any rows in any order, however they are divided into files and record batches."""
    rows = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))
    indices = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=50)), np.int64)
    indices = np.tile(indices, data.draw(st.sampled_from([1, 10])))  # many rows of small columns are grouped by chunk
    width = data.draw(st.sampled_from([1, 2000]))  # small and large rows take different code paths
    x = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    ids = np.array([f"row {i}" for i in range(rows)], object)
    infos = []
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, rows], strict=True)):
        middle = (start + stop) // 2
        parts = [{"x": x[a:b], "y": x[a:b, 0], "id": ids[a:b]} for a, b in ((start, middle), (middle, stop))]
        infos.append(write(tmp_path / f"{number}.arrow", *parts))
    with rows_of(tmp_path, *infos).open() as reader:
        assert reader.rows == rows
        found = reader.take(indices)
    np.testing.assert_array_equal(found["x"], x[indices])
    np.testing.assert_array_equal(found["y"], x[indices, 0])
    assert found["id"].tolist() == ids[indices].tolist()


@pytest.mark.parametrize("indices", [[-1], [5], [0.0], [[0]]])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, indices: list[Any]) -> None:
    info = write(tmp_path / "a.arrow", {"x": np.zeros(5)})
    with rows_of(tmp_path, info).open() as reader, pytest.raises(DataError, match="row indices"):
        reader.take(np.array(indices))


def test_a_batch_has_the_nesting_of_the_model(tmp_path: Path) -> None:
    columns = {name: np.arange(4.0) + 10 * i for i, name in enumerate(["a", "b", "c", "y", "w"])}
    info = write(tmp_path / "a.arrow", columns)
    x = {"first": "a", "both": ("b", "c")}
    with rows_of(tmp_path, info, x=x, y="y", sample_weight="w").open() as reader:
        inputs, target, weight = reader.batch(np.array([2, 0]))
    assert list(inputs) == ["first", "both"]
    assert inputs["first"].tolist() == [2, 0]
    assert [leaf.tolist() for leaf in inputs["both"]] == [[12, 10], [22, 20]]
    assert target.tolist() == [32, 30]
    assert weight.tolist() == [42, 40]
    with rows_of(tmp_path, info, x="a", y="y").open() as reader:
        assert len(reader.batch(np.array([1]))) == 2
    with rows_of(tmp_path, info, x="a").open() as reader:
        assert len(reader.batch(np.array([1]))) == 1
    with pytest.raises(DataError, match="'nope'"):
        rows_of(tmp_path, info, x="nope").open()


def test_a_file_that_is_not_right_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.arrow", {"x": np.zeros((4, 2))})
    bad = write(tmp_path / "bad.arrow", {"x": np.zeros((4, 2))})
    both = rows_of(tmp_path, good, bad)
    content = (tmp_path / "bad.arrow").read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"<html></html>", content[:-20] + bytes(20)):
        (tmp_path / "bad.arrow").write_bytes(damaged)
        with pytest.raises(DataError, match=r"bad\.arrow"):
            both.open()
    (tmp_path / "bad.arrow").unlink()
    with pytest.raises(DataError, match=r"bad\.arrow.*missing"):
        both.open()
    write(tmp_path / "bad.arrow", {"x": np.zeros((4, 3))})
    with pytest.raises(DataError, match=r"bad\.arrow"):
        both.open()
    write(tmp_path / "bad.arrow", {"x": np.zeros((5, 2))})
    with pytest.raises(DataError, match=r"4 rows in 'bad\.arrow'"):
        both.open()


def test_rows_are_plain_data(tmp_path: Path) -> None:
    info = write(tmp_path / "a.arrow", {"x": np.zeros(4)})
    rows = rows_of(tmp_path, info, x={"a": ("x", "x")}, y="x", num_classes=2, classes=("no", "yes"))
    assert rows.rows == 4
    assert pickle.loads(pickle.dumps(rows)) == rows
    assert ShardedRows.from_json(rows.to_json()) == rows


def test_closing_twice_is_fine_and_arrays_outlive_it(tmp_path: Path) -> None:
    info = write(tmp_path / "a.arrow", {"x": np.arange(4)})
    reader = rows_of(tmp_path, info).open()
    taken = reader.take(np.array([1, 2]))["x"]
    reader.close()
    reader.close()
    shutil.rmtree(tmp_path)
    assert taken.tolist() == [1, 2]


class TestWriteRows:
    def test_it_cuts_by_bytes_and_keeps_the_order(self, tmp_path: Path) -> None:
        x, y = np.arange(100.0).reshape(50, 2), np.arange(50, dtype=np.int32)
        rows = write_rows(Store(tmp_path), "data", x, y, num_classes=50, shard_bytes=200)
        assert rows.rows_per_file == (10,) * 5
        assert (rows.x, rows.y, rows.sample_weight, rows.num_classes) == ("x", "y", None, 50)
        with rows.open() as reader:
            found = reader.batch(np.arange(50))
        np.testing.assert_array_equal(found[0], x)
        np.testing.assert_array_equal(found[1], y)

    def test_a_large_row_still_gets_a_file(self, tmp_path: Path) -> None:
        assert write_rows(Store(tmp_path), "data", np.zeros((3, 100)), shard_bytes=8).rows_per_file == (1, 1, 1)

    def test_structures_keep_their_nesting(self, tmp_path: Path) -> None:
        x = {"image": np.zeros((4, 2)), "more": [np.arange(4), (np.ones(4),)]}
        rows = write_rows(Store(tmp_path), "data", x, np.zeros(4), np.ones(4))
        with rows.open() as reader:
            found, _, weight = reader.batch(np.array([3, 1]))
        assert found["more"][0].tolist() == [3, 1]
        assert found["more"][1][0].tolist() == [1, 1]
        assert found["image"].shape == (2, 2)
        assert weight.tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("x", "y"),
        [
            (np.zeros((0, 2)), None),
            (np.zeros(3), np.zeros(4)),
            (None, np.zeros(3)),
            ({}, np.zeros(3)),
            ("path", None),
            (np.array(["a"]), None),
            ({"a": np.zeros(3), "b": None}, None),
            ([1.0, 2.0], None),
        ],
    )
    def test_what_is_no_data_is_refused(self, tmp_path: Path, x: Any, y: Any) -> None:
        with pytest.raises(DataError):
            write_rows(Store(tmp_path), "data", x, y)


def test_the_remote_copy_is_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = write_rows(Store(f"memory://bucket/{tmp_path.name}"), "data", np.arange(6))
    with rows.open() as reader:
        assert reader.batch(np.array([5]))[0].tolist() == [5]
    assert list(tmp_path.rglob("*rows-00000.arrow"))


def test_reading_is_fast(tmp_path: Path) -> None:
    """The goal is 20,000 images/s on a dedicated core; any core must reach a tenth of it."""
    images = np.random.default_rng(0).integers(0, 255, (256, 224, 224, 3), np.uint8)
    rows = write_rows(Store(tmp_path), "data", images, np.arange(256))
    order = np.random.default_rng(1).permutation(256)
    with RowReader(rows) as reader:
        reader.batch(order)
        start = time.process_time()
        for step in range(0, 256, 32):
            reader.batch(order[step : step + 32])
        assert 256 / (time.process_time() - start) > 2_000


def test_reading_needs_no_pandas(tmp_path: Path) -> None:
    """The core does not require pandas, but pyarrow's own conversion of dtypes does."""
    rows = write_rows(Store(tmp_path), "r", np.arange(6, dtype=np.uint8).reshape(3, 2), np.arange(3))
    code = (
        "import sys\n"
        "class NoPandas:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pandas': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoPandas())\n"
        "from dlspark import ShardedRows\n"
        "print([x.tolist() for x, _ in ShardedRows.from_json(sys.argv[1]).batches(3)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, rows.to_json()], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "[[[0, 1], [2, 3], [4, 5]]]\n", done.stderr
