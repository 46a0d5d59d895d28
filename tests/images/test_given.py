from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dlspark.data.split import Split
from dlspark.errors import ConfigError, DataError
from dlspark.images.prepare import prepare_images
from tests.images.given import Given
from tests.images.given_pixels import PIXELS
from tests.images.given_places import PLACES
from tests.images.given_tables import TABLES

pytestmark = pytest.mark.spark


@pytest.mark.parametrize("given", [*PIXELS, *PLACES, *TABLES], ids=lambda given: given.name)
def test_every_row_is_there_or_named(given: Given, spark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collection = tmp_path / "collection"
    collection.mkdir()
    given.make(collection)
    settings: dict[str, Any] = {"image_size": (8, 12), "split": Split(), "max_rejected_fraction": 1.0, **given.settings}
    out = tmp_path / "out"
    if given.error:
        with pytest.raises((DataError, ConfigError), match=given.error):
            prepare_images(given.source(collection), out, layout=given.layout, **settings)
        assert not (out / "manifest.json").exists()
        return
    dataset = prepare_images(given.source(collection), out, layout=given.layout, **settings)
    rows = {name: sum(part["by_class"][name] for part in dataset.summary()["parts"].values()) for name in dataset.classes}
    assert rows == given.rows
    listed = pq.read_table(out / "rejected.parquet").to_pylist() if (out / "rejected.parquet").exists() else []
    assert len(listed) == len(given.rejected)
    for name, reason in given.rejected.items():
        (found,) = [each["reason"] for each in listed if each["path"].endswith(name)]
        assert re.search(reason, found)
    assert dataset.summary()["passed_over"] == given.passed_over
    if given.parts:
        assert {name: part["rows"] for name, part in dataset.summary()["parts"].items() if part["rows"]} == given.parts
    if given.warning:
        assert re.search(given.warning, caplog.text)
