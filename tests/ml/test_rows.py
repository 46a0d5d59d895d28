"""Reading the values of rows into inputs, and predicting in batches of one size, without Spark."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dlspark.errors import DataError
from dlspark.images.decode import decode
from dlspark.ml.rows import NULL, ArrayReader, ImageReader, ImageStruct
from dlspark.ml.udf import BATCH_BYTES, _outcomes, _rows, _rows_at_once


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("resize", ["fit", "crop"])
def test_bytes_paths_and_structs_of_one_image_are_one_input(
    channels: int, resize: str, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    pixels = np.random.default_rng(channels).integers(0, 256, (20, 30, channels), np.uint8)
    data = png(pixels[..., 0] if channels == 1 else pixels)
    file = tmp_path / "a b.png"
    file.write_bytes(data)
    as_opencv = np.ascontiguousarray(pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels)
    struct = ImageStruct(20, 30, channels, as_opencv.tobytes())
    values = [data, bytearray(data), str(file), f"file:{file}", f"file://{file}", file.as_uri(), struct]
    found, reasons = ImageReader((8, 6), resize).read(values, pool)
    assert reasons == [None] * 7
    assert found.shape == (7, 8, 6, 3)
    assert (found == decode(data, (8, 6), resize=resize)).all()


def test_a_damaged_image_has_a_reason(pool: ThreadPoolExecutor) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    found, reasons = ImageReader((8, 6), "fit").read([whole[: len(whole) // 2] + whole[-2:], whole], pool)
    assert len(found) == 1
    assert str(reasons[0]).startswith("damaged: ")
    assert reasons[1] is None


def test_sixteen_bit_images_are_scaled_by_the_bits_in_use(pool: ThreadPoolExecutor) -> None:
    data = png(np.full((8, 8), 4095, np.uint16))
    for bits, expected in ((16, 15), (12, 255)):
        found, _ = ImageReader((4, 4), "fit", bits).read([data], pool)
        assert (found == expected).all()


def test_what_is_no_image_has_a_reason(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    struct = ImageStruct(2, 2, 3, bytes(11))
    values = [
        None,
        b"",
        str(tmp_path / "gone.png"),
        ImageStruct(None, None, None, None),
        ImageStruct(-1, -1, -1, b""),
        struct,
        "htp://somewhere/1.jpg",
        "a\0b.png",
    ]
    found, reasons = ImageReader((4, 4), "fit").read([*values, png(np.zeros((2, 2, 3), np.uint8))], pool)
    assert found.shape == (1, 4, 4, 3)
    assert [reason is None for reason in reasons] == [False] * 8 + [True]
    told = (NULL, "empty", "No such file", NULL, "could not decode", "11 bytes", "Protocol not known", "null byte")
    for reason, part in zip(reasons, told, strict=False):
        assert part in str(reason)


def test_few_files_are_in_memory_at_once(tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded pixels bound a batch, but a file may be much larger than its pixels."""
    file = tmp_path / "one.png"
    file.write_bytes(png(np.zeros((2, 2, 3), np.uint8)))
    held = most = 0

    def read(paths: Any) -> Iterator[tuple[bytes, str]]:
        nonlocal held, most
        for path in paths:
            held += 1
            most = max(most, held)
            yield Path(path).read_bytes(), ""

    def decoded(*arguments: Any, **settings: Any) -> Any:
        nonlocal held
        held -= 1
        return decode(*arguments, **settings)

    monkeypatch.setattr("dlspark.ml.rows.read_files", read)
    monkeypatch.setattr("dlspark.ml.rows.decode", decoded)
    found, _ = ImageReader((2, 2), "fit").read([str(file)] * 100, pool)
    assert len(found) == 100
    assert most <= 32


def test_arrays_of_arrays(pool: ThreadPoolExecutor) -> None:
    nested = np.empty(2, object)
    nested[:] = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    values = [nested, [[1, 2], [3, 4]], np.arange(1.0, 5), None, [1, 2, 3], []]
    found, reasons = ArrayReader((2, 2)).read(values, pool)
    assert found.dtype == np.float32
    assert found.tolist() == [[[1, 2], [3, 4]]] * 3
    assert reasons[:4] == [None, None, None, NULL]
    assert "expected 4 numbers" in str(reasons[4])
    assert "got 0" in str(reasons[5])


def test_batches_of_the_network_are_not_those_of_spark() -> None:
    """All are full except the last; at most two are in memory; rows keep their order."""
    sizes: list[int] = []
    pulled = 0

    def batches() -> Iterator[pd.Series]:
        nonlocal pulled
        for start in range(0, 1000, 7):
            batch = pd.Series([[float(n)] if n % 10 else None for n in range(start, min(start + 7, 1000))], dtype=object)
            pulled += len(batch)
            yield batch

    def predict(inputs: Any) -> Any:
        sizes.append(len(inputs))
        return inputs * 2

    done = 0
    for values, reasons in _outcomes(batches(), predict, ArrayReader((1,)), 20, 1):
        for value, reason in zip(values, reasons, strict=True):
            assert (value is None and reason == NULL) if done % 10 == 0 else (value == [2 * done] and reason is None)
            done += 1
        assert pulled <= done + 20 + 7
    assert done == 1000
    assert set(sizes) == {18}


def test_batches_are_bounded_in_bytes() -> None:
    assert _rows_at_once(ImageReader((224, 224), "fit"), BATCH_BYTES) == 27
    assert _rows_at_once(ImageReader((224, 224), "fit"), 1) == 1
    assert _rows_at_once(ArrayReader((3,)), BATCH_BYTES) == 1024


def test_nothing_to_predict() -> None:
    def predict(inputs: Any) -> Any:
        raise AssertionError("there are no inputs")

    rows = iter([pd.Series([None, None], dtype=object), pd.Series([], dtype=object)])
    assert list(_outcomes(rows, predict, ArrayReader((1,)), 4, 1)) == [([None, None], [NULL, NULL])]


def test_another_struct_is_refused() -> None:
    with pytest.raises(DataError, match="got a struct of a, b"):
        list(_rows(pd.DataFrame({"a": [1], "b": [2]})))
