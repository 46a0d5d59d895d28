from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dlspark.cli.main import main
from dlspark.data import Split, try_cast
from dlspark.errors import ConfigError
from dlspark.images.dataset import ImageDataset
from dlspark.images.explore import explore
from dlspark.images.layouts import csv_layout
from dlspark.images.prepare import prepare_images

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def dataset(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """40 images of two sizes. Image 39 (test) is a copy of image 0 (train); images 1 and 2 (both train) are equal."""
    folder = tmp_path_factory.mktemp("source")
    draw = np.random.default_rng(0)
    lines = ["image_id,label,part,age,place,patient"]
    for i in range(40):
        size = (24, 32, 3) if i % 4 else (32, 24, 3)
        pixels = draw.integers(0, 256, size, np.uint8)
        if i in (39, 2):
            pixels = np.asarray(Image.open(folder / f"{0 if i == 39 else 1}.png"))
        Image.fromarray(pixels).save(folder / f"{i}.png")
        age = "" if i == 5 else i * 2.0
        lines.append(f"{i},{'mel' if i % 4 == 0 else 'nv'},{'test' if i >= 30 else 'train'},{age},<arm> & {i % 3},p{i // 2}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")

    def layout(source: str, session: Any) -> Any:
        table = csv_layout(extension=".png", group_column="patient")(source, session)
        return table.withColumn("age", try_cast("age", "double"))

    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare_images(folder, out, layout=layout, image_size=(16, 16), split=Split(column="part"))


def test_it_counts_by_part_value_and_range(dataset: ImageDataset) -> None:
    found = {each.column: each for each in explore(dataset).counts}
    assert set(found) == {"part", "age", "place"}  # the group and its source column are ids
    assert found["part"].values == ("train", "test")
    assert found["part"].counts.tolist() == [[8, 22], [2, 8]]
    assert sorted(found["place"].values) == ["<arm> & 0", "<arm> & 1", "<arm> & 2"]
    assert all(each.counts.sum() == 40 for each in found.values())
    assert found["age"].values[-1] == "(unknown)"
    assert found["age"].counts[-1].sum() == 1
    assert found["age"].values[0] == "0 to below 7.8"
    assert found["age"].values[-2] == "70.2 to 78"
    (_, patients) = explore(dataset, columns=["patient"]).counts
    assert len(patients.values) == 20


def test_it_knows_the_sizes_before_scaling(dataset: ImageDataset) -> None:
    assert dict(explore(dataset).sizes) == {(24, 32): 29, (32, 24): 11}


def test_equal_images_in_two_parts_come_first(dataset: ImageDataset) -> None:
    found = explore(dataset)
    assert [sorted(row[2] for row in rows) for rows in found.duplicates] == [["0", "39"], ["1", "2"]]
    assert found.leaking == 1
    assert any("1 set of equal images is in more than one part" in warning for warning in found.warnings())


def test_unknown_columns_are_refused(dataset: ImageDataset) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'place'"):
        explore(dataset, columns=["plase"])


def test_the_command_leaves_a_page_that_needs_nothing_else(
    dataset: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pages"
    assert main(["explore", dataset.uri, "--columns", "place,age", "--out", str(out), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["duplicates"]["sets_on_several_parts"] == 1
    assert document["counts"]["part"]["test"] == {"mel": 2, "nv": 8}
    assert {path.name for path in out.iterdir()} == {
        "explore.html", "samples.png", "by-part.png", "by-place.png", "by-age.png",
    }  # fmt: skip
    page = (out / "explore.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 4
    assert "&lt;arm&gt; &amp; 0" in page
    assert "<arm>" not in page
    assert "This split leaks" not in page
    with Image.open(out / "samples.png") as sheet:
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 50

    assert main(["explore", dataset.uri]) == 0
    assert "24 x 32 (29), 32 x 24 (11)" in capsys.readouterr().out
