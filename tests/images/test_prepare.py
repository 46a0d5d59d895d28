from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dlspark.data.split import Split
from dlspark.errors import ConfigError, DataError
from dlspark.images import files, layouts, prepare, read
from dlspark.images.cnmc import cnmc
from dlspark.images.dataset import ImageDataset
from dlspark.images.layouts import KnownLayout, csv_layout
from dlspark.images.prepare import prepare_images

pytestmark = pytest.mark.spark

CNMC = Path(__file__).parents[3] / "shared/data/cnmc_file_names.csv"
COLORS = {"mel": (200, 20, 20), "nv": (20, 200, 20), "bkl": (20, 20, 200)}
COUNTS = {"mel": 20, "nv": 40, "bkl": 10}
SIZE = (12, 16)


def picture(path: Path, color: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32), color).save(path, quality=95)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images in class folders, some nested, two broken, beside files that are not images."""
    source = tmp_path_factory.mktemp("collection")
    for name, count in COUNTS.items():
        for i in range(count):
            picture(source / name / ("deep" if i % 2 else "") / f"{i:02d}.jpg", COLORS[name])
    broken = source / "nv" / "deep" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    (source / "nv" / "06.jpg").write_bytes(b"<html>gone</html>")
    (source / "nv" / "notes.txt").write_text("not an image")
    (source / "nv" / ".hidden.jpg").write_bytes(b"")
    (source / ".cache").mkdir()
    return source


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 40 images, three per patient, with a column for the part."""
    source = tmp_path_factory.mktemp("table")
    with (source / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "label", "patient", "part", "age.years", "note"])
        for i in range(40):
            name = list(COLORS)[i % 2]
            picture(source / "images" / f"img{i:02d}.png", COLORS[name])
            writer.writerow(
                [f"img{i:02d}", name, f"p{i // 3}", "test" if i >= 33 else "train", i, "a, b\nc" if i == 7 else ""]
            )
    return source


@pytest.fixture(scope="module")
def prepared(spark: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    out = tmp_path_factory.mktemp("prepared") / "data"
    split = Split(test=0.2, validation=0.1, seed=3)
    return prepare_images(folder, out, layout="folders", image_size=SIZE, split=split, max_rejected_fraction=0.05)


def again(dataset: ImageDataset, folder: Path, **more: Any) -> ImageDataset:
    split = Split(test=0.2, validation=0.1, seed=3)
    settings: dict[str, Any] = {"layout": "folders", "image_size": SIZE, "split": split, "max_rejected_fraction": 0.05}
    return prepare_images(folder, dataset.uri, **{**settings, **more})


def everything(rows: Any) -> dict[str, np.ndarray[Any, Any]]:
    with rows.open() as reader:
        return reader.take(np.arange(reader.rows))


def test_every_image_is_in_one_part_with_its_label(prepared: ImageDataset) -> None:
    assert prepared.classes == ("bkl", "mel", "nv")
    assert prepared.num_classes == 3
    assert prepared.image_size == SIZE
    seen = []
    for part in (prepared.train, prepared.validation, prepared.test):
        assert part is not None
        assert (part.num_classes, part.classes) == (3, prepared.classes)
        rows = everything(part)
        assert rows["image"].shape == (part.rows, 12, 16, 3)
        assert rows["label"].dtype == np.int32
        assert rows["id"].tolist() == sorted(rows["id"])
        for image, label, name in zip(rows["image"], rows["label"], rows["id"], strict=True):
            assert name.startswith(prepared.classes[label] + "/")
            assert np.abs(image.astype(int) - COLORS[prepared.classes[label]]).max() < 20
        seen += rows["id"].tolist()
    assert len(seen) == len(set(seen)) == 68


def test_classes_keep_their_ratio(prepared: ImageDataset) -> None:
    parts = prepared.summary()["parts"]
    assert parts["test"]["by_class"] == {"bkl": 2, "mel": 4, "nv": 8 - missing(prepared, "test")}
    assert parts["validation"]["by_class"] == {"bkl": 1, "mel": 2, "nv": 4 - missing(prepared, "validation")}
    assert {part: parts[part]["rows"] for part in parts} == {
        part: sum(parts[part]["by_class"].values()) for part in ("train", "validation", "test")
    }


def missing(dataset: ImageDataset, part: str) -> int:
    """The number of broken images that were assigned to a part: the split precedes decoding."""
    whole = {"train": 28, "validation": 4, "test": 8}
    return int(whole[part] - dataset.summary()["parts"][part]["by_class"]["nv"])


def test_rejected_images_are_listed(prepared: ImageDataset) -> None:
    assert prepared.summary()["rejected"] == 2
    assert sum(missing(prepared, part) for part in ("train", "validation", "test")) == 2
    listed = pq.read_table(Path(prepared.uri, "rejected.parquet")).to_pylist()
    reasons = {Path(row["path"]).name: row["reason"] for row in listed}
    assert "truncated" in reasons["05.jpg"].lower()
    assert "<html>" in reasons["06.jpg"]


def test_the_manifest_describes_the_folder(prepared: ImageDataset) -> None:
    import zlib

    manifest = json.loads(Path(prepared.uri, "manifest.json").read_text())
    files = [file for part in manifest["parts"].values() for file in part["files"]]
    for file in files:
        content = Path(prepared.uri, file["file"]).read_bytes()
        assert (len(content), zlib.crc32(content)) == (file["size_bytes"], file["crc32"])
    expected = {"manifest.json", "rejected.parquet", *(file["file"] for file in files)}
    assert {path.name for path in Path(prepared.uri).iterdir()} == expected
    assert manifest["settings"]["split"]["seed"] == 3
    assert manifest["versions"]["pyspark"]


def test_a_dataset_is_plain_data_and_opens_again(prepared: ImageDataset) -> None:
    assert pickle.loads(pickle.dumps(prepared)) == prepared
    assert ImageDataset.open(prepared.uri) == prepared
    assert len(pickle.dumps(prepared.train)) < 2000
    with pytest.raises(DataError, match="no manifest"):
        ImageDataset.open(Path(prepared.uri).parent)


def test_the_same_settings_return_what_is_there(
    prepared: ImageDataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "get_session", lambda *_: pytest.fail("Spark was asked for"))
    assert again(prepared, folder) == prepared
    with pytest.raises(DataError, match=r"strict.*got 2.*(?i:truncated)"):
        again(prepared, folder, strict=True)
    with pytest.raises(ConfigError, match=r"image_size: \[12, 16\] there, \[12, 12\] requested"):
        again(prepared, folder, image_size=(12, 12))
    with pytest.raises(ConfigError, match="resize: 'fit' there, 'crop' requested"):
        again(prepared, folder, resize="crop")
    with pytest.raises(ConfigError, match="split: "):
        again(prepared, folder, split=Split(seed=4))
    assert ImageDataset.open(prepared.uri) == prepared


def test_the_same_rows_come_out_of_another_cluster_and_an_unfinished_folder(
    spark: Any, prepared: ImageDataset, folder: Path, tmp_path: Path
) -> None:
    """Files of a killed run are removed; another partitioning of the table gives the same dataset."""
    from dlspark.images.layouts import folders

    def scattered(source: str, session: Any) -> Any:
        return folders(source, session).repartition(5, "path")

    out = tmp_path / "data"
    shutil.copytree(prepared.uri, out)
    (out / "manifest.json").rename(out / "unfinished.json")
    split = Split(test=0.2, validation=0.1, seed=3)
    other = prepare_images(folder, out, layout=scattered, image_size=SIZE, split=split, max_rejected_fraction=0.05)
    for part in ("train", "validation", "test"):
        one, two = everything(getattr(prepared, part)), everything(getattr(other, part))
        for column in one:
            np.testing.assert_array_equal(one[column], two[column])
    assert len(list(out.iterdir())) == len(list(Path(prepared.uri).iterdir()))


def test_strict_and_too_many_rejected_leave_nothing(spark: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"strict\); got 2.*0[56]\.jpg: .*; .*0[56]\.jpg: ") as caught:
        prepare_images(folder, tmp_path / "out", layout="folders", image_size=SIZE, strict=True)
    assert "truncated" in str(caught.value).lower()
    with pytest.raises(DataError, match=r"max_rejected_fraction=0\.01\); got 2"):
        prepare_images(folder, tmp_path / "out", layout="folders", image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_broken_images_in_ten_thousand(spark: Any, tmp_path: Path) -> None:
    """F12: the other images are prepared and both broken ones are named; ``strict`` fails and names them."""
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(whole, quality=95)
    for i in range(10_000):
        path = tmp_path / "photos" / f"class-{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i not in {1234, 8765}:
            os.link(whole, path)
    truncated, corrupt = tmp_path / "photos/class-0/01234.jpg", tmp_path / "photos/class-1/08765.jpg"
    truncated.write_bytes(whole.read_bytes()[:-300])
    corrupt.write_bytes(whole.read_bytes()[:2] + bytes(500))
    settings: dict[str, Any] = {"layout": "folders", "image_size": (8, 8), "split": Split(test=0.2), "spark": spark}
    data = prepare_images(tmp_path / "photos", tmp_path / "out", **settings)
    assert data.train is not None
    assert data.test is not None
    assert data.train.rows + data.test.rows == 9_998
    listed = {row["path"]: row["reason"] for row in pq.read_table(Path(data.uri, "rejected.parquet")).to_pylist()}
    assert set(listed) == {str(truncated), str(corrupt)}
    assert "truncated" in listed[str(truncated)]
    with pytest.raises(DataError, match=r"(?s)(01234\.jpg.*08765|08765\.jpg.*01234)"):
        prepare_images(tmp_path / "photos", tmp_path / "strict", strict=True, **settings)
    assert not (tmp_path / "strict").exists()


def test_a_table_of_images(spark: Any, table: Path, tmp_path: Path) -> None:
    layout = csv_layout(folder="images", extension=".png")
    data = prepare_images(table, tmp_path / "out", layout=layout, image_size=(4, 4), split=Split(column="part"))
    assert data.train is not None
    assert data.test is not None
    assert data.validation is None
    assert (data.train.rows, data.test.rows) == (33, 7)
    rows = everything(data.train)
    assert list(rows) == ["image", "label", "source_height", "source_width", "id", "patient", "age.years", "note"]
    assert (set(rows["source_height"]), set(rows["source_width"])) == ({32}, {48})
    assert rows["id"].tolist() == [f"img{i:02d}" for i in range(33)]
    assert rows["note"][7] == "a, b\nc"
    assert rows["patient"][32] == "p10"
    assert rows["age.years"][32] == "32"


def test_groups_stay_whole(spark: Any, table: Path, tmp_path: Path) -> None:
    layout = csv_layout(folder="images", extension=".png", group_column="patient")
    split = Split(test=0.3, group="patient")
    data = prepare_images(table, tmp_path / "out", layout=layout, image_size=(4, 4), split=split)
    assert data.train is not None
    assert data.test is not None
    train, test = everything(data.train), everything(data.test)
    assert train["group"].tolist() == train["patient"].tolist()
    assert not set(train["group"]) & set(test["group"])
    assert data.train.rows + data.test.rows == 40


def layout_of(rows: list[tuple[Any, ...]], schema: str = "path string, id string, label string") -> Any:
    def layout(source: str, session: Any) -> Any:
        return session.createDataFrame(rows, schema)

    return layout


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got none with the layout"),
        ([("a.jpg", "1", "x"), ("b.jpg", "2", None)], "label for every image; got none for 1 of 2.*'b.jpg'"),
        ([("a.jpg", "1", " ")], "label for every image"),
        ([("a.jpg", "", "x")], "id for every image"),
        ([("a.jpg", "1", "x"), ("b.jpg", "1", "x")], "got '1' 2 times, for 'a.jpg' and 'b.jpg'"),
        ([(__file__, "1", "x"), (__file__, "2", "x")], "part 'test'"),
        ([(f"/no/{i}.jpg", str(i), "x") for i in range(5)], "none at the first 5 paths.*/no/0.jpg: cannot be read: No such"),
    ],
)
def test_tables_that_cannot_be_are_refused(spark: Any, tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_images(tmp_path, tmp_path / "out", layout=layout_of(rows), image_size=(4, 4))
    assert not (tmp_path / "out").exists()


def test_further_columns(spark: Any, tmp_path: Path) -> None:
    paths = [str(picture(tmp_path / f"{i}.png", (i, i, i))) for i in range(4)]
    schema = "path string, id int, label boolean, n int, f float, ok boolean, day date"
    import datetime

    day = datetime.date(2026, 1, 2)
    rows = [(path, i, i % 2 == 0, i, None if i == 1 else i / 2, i > 1, day) for i, path in enumerate(paths)]
    split = Split(test=0.0)
    data = prepare_images(tmp_path, tmp_path / "a", layout=layout_of(rows, schema), image_size=(4, 4), split=split)
    assert data.test is None
    found = everything(data.train)
    assert data.classes == ("false", "true")
    assert found["label"].tolist() == [1, 0, 1, 0]
    assert found["n"].dtype == np.int32
    assert np.isnan(found["f"][1])
    assert found["ok"].tolist() == [False, False, True, True]
    assert found["day"][0] == "2026-01-02"
    for wrong, error in (("n int", DataError), ("n array<int>", ConfigError), ("image int", ConfigError)):
        layout = layout_of([(paths[0], "1", "a", None)], f"path string, id string, label string, {wrong}")
        with pytest.raises(error, match=r"nulls|type array|'image'"):
            prepare_images(tmp_path, tmp_path / "b", layout=layout, image_size=(4, 4), split=split)
    assert not (tmp_path / "b").exists()


def test_a_folder_in_use_is_not_touched(spark: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        prepare_images(folder, tmp_path, layout="folders", image_size=SIZE)
    with pytest.raises(ConfigError):
        prepare_images(folder, folder, layout="folders", image_size=SIZE)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_sources_that_are_not_there(spark: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-images" / "class").mkdir(parents=True)
    for source, layout, message in (
        ("nowhere", "folders", "nowhere.*does not exist"),
        ("empty", "folders", "folders named after the classes"),
        ("no-images", "folders", "got none with the layout 'folders'. It reads: Class folders"),
        ("empty", "csv", r"metadata\.csv.*does not exist"),
        ("empty", "ham10000", r"HAM10000_metadata\.csv"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_images(tmp_path / source, tmp_path / "out", layout=layout, image_size=SIZE)
    (tmp_path / "empty" / "metadata.csv").write_text("image,label\n1,a\n")
    with pytest.raises(ConfigError, match=r"'image_id'.*Did you mean 'image'"):
        prepare_images(tmp_path / "empty", tmp_path / "out", layout="csv", image_size=SIZE)
    (tmp_path / "empty" / "metadata.csv").write_text("image_id,label\n1,a\n2\n")
    with pytest.raises(DataError, match="2 cells in line 3"):
        prepare_images(tmp_path / "empty", tmp_path / "out", layout="csv", image_size=SIZE)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for wrong in (
        {"image_size": 224},
        {"image_size": (0, 4)},
        {"image_size": "44"},
        {"layout": "folder"},
        {"max_rejected_fraction": 2},
        {"resize": "crops"},
    ):
        settings: dict[str, Any] = {"layout": "folders", "image_size": (4, 4), **wrong}
        with pytest.raises(ConfigError, match=r"image_size|Did you mean '(folders|crop)'|max_rejected_fraction"):
            prepare_images(tmp_path, tmp_path / "out", **settings)


def test_remote_files_are_listed_and_read() -> None:
    """Read in this process, because each process has its own ``memory://``."""
    import fsspec

    bucket = f"memory://{uuid.uuid4().hex}/in"
    for name in ("nv/a.JPG", "nv/deep/b[1].png", "nv/.hidden.png", "nv/notes.txt"):
        with fsspec.open(f"{bucket}/{name}", "wb") as file:
            file.write(name.encode())
    listed = sorted(files.images(bucket))
    assert {name: reason for _, name, reason in listed if reason} == {
        "nv/.hidden.png": "hidden",
        "nv/notes.txt": "not an image (.txt)",
    }
    paths = [path for path, _, reason in listed if reason is None]
    assert paths == [f"{bucket}/nv/a.JPG", f"{bucket}/nv/deep/b[1].png"]
    found = list(read.read_files([paths[1], f"{bucket}/nv/gone.png", None, paths[0]]))
    assert [data for data, _ in found] == [b"nv/deep/b[1].png", None, None, b"nv/a.JPG"]
    assert "FileNotFoundError" in found[1][1]
    assert "no path" in found[2][1]


def test_ham10000_as_downloaded(spark: Any, tmp_path: Path) -> None:
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for i in range(12):
        picture(tmp_path / "in" / f"HAM10000_images_part_{i % 2 + 1}" / f"ISIC_{i}.jpg", COLORS["nv"])
        lines.append(f"HAM_{i // 2},ISIC_{i},{'nv' if i < 8 else 'mel'},histo,{'' if i == 3 else 45.0},male,scalp")
    (tmp_path / "in" / "HAM10000_metadata.csv").write_text("\n".join(lines) + "\n")
    split = Split(test=0.5, group="lesion_id")
    data = prepare_images(tmp_path / "in", tmp_path / "out", layout="ham10000", image_size=(4, 4), split=split)
    assert data.classes == ("mel", "nv")
    assert data.train is not None
    assert data.test is not None
    both = [everything(data.train), everything(data.test)]
    assert not set(both[0]["lesion_id"]) & set(both[1]["lesion_id"])
    ages = {name: age for rows in both for name, age in zip(rows["id"], rows["age"], strict=True)}
    assert np.isnan(ages["ISIC_3"])
    assert len(ages) == 12
    kept = {"id", "group", "lesion_id", "dx_type", "age", "sex", "localization"}
    assert set(both[0]) == {"image", "label", "source_height", "source_width", *kept}


def test_the_manifest_says_what_the_split_did(spark: Any, table: Path, tmp_path: Path, caplog: Any) -> None:
    layout = csv_layout(folder="images", extension=".png", group_column="patient")
    leaking = prepare_images(table, tmp_path / "rows", layout=layout, image_size=(4, 4), split=Split(test=10))
    drawn = leaking.summary()["split"]
    assert drawn["parts"]["test"]["rows"] == 10
    assert drawn["groups"]["of"] == 14
    assert drawn["groups"]["torn"] > 0
    assert "This split leaks" in caplog.text
    caplog.clear()
    split = Split(test=0.3, group="patient", undersample=True)
    whole = prepare_images(table, tmp_path / "groups", layout=layout, image_size=(4, 4), split=split)
    drawn = whole.summary()["split"]
    assert drawn["groups"]["torn"] == 0
    assert not caplog.text
    assert whole.train is not None
    assert len(set(drawn["parts"]["train"]["by_class"].values())) == 1
    assert whole.train.rows == drawn["parts"]["train"]["rows"]
    assert drawn["left_out"] == 40 - sum(part["rows"] for part in drawn["parts"].values())


def test_class_weights_make_classes_count_alike(prepared: ImageDataset) -> None:
    counts = prepared.summary()["parts"]["train"]["by_class"]
    weights = prepared.class_weight()
    shares = [weights[label] * counts[name] for label, name in enumerate(prepared.classes)]
    assert shares == pytest.approx([sum(counts.values()) / 3] * 3)


def test_an_image_whose_name_says_nothing_is_put_aside(spark: Any, tmp_path: Path) -> None:
    names = ["UID_1_1_1_all", "UID_1_2_1_all", "UID_H2_1_1_hem", "UID_H2_2_9_hem", "UID_3_1_1_hem", "1", "UID_4_1_1_ALL"]
    for name in names:
        picture(tmp_path / "in" / "fold_0" / f"{name}.bmp", COLORS["nv"])
    settings: dict[str, Any] = {"layout": "cnmc", "image_size": (4, 4), "split": Split(test=0.5)}
    with pytest.raises(DataError, match=r"at most 0 of 7 images.*got 3"):
        prepare_images(tmp_path / "in", tmp_path / "out", **settings)
    data = prepare_images(tmp_path / "in", tmp_path / "out", max_rejected_fraction=0.5, **settings)
    assert data.classes == ("all", "hem")
    reasons = {
        Path(row["path"]).stem: row["reason"] for row in pq.read_table(Path(data.uri, "rejected.parquet")).to_pylist()
    }
    assert set(reasons) == {"UID_3_1_1_hem", "1", "UID_4_1_1_ALL"}
    assert "contradicts" in reasons["UID_3_1_1_hem"]
    assert data.train is not None
    rows = everything(data.train)
    assert set(rows["group"]) <= {"1", "H2"}
    assert rows["cell"].dtype == np.int32


@pytest.mark.skipif(not CNMC.is_file(), reason=f"no C-NMC file names at {CNMC}")
def test_every_real_cnmc_name_is_understood(spark: Any, tmp_path: Path) -> None:
    with CNMC.open(newline="") as file:
        expected = {row["file"]: (row["label"], row["group"]) for row in csv.DictReader(file)}
    for name in expected:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = cnmc(str(tmp_path), spark).collect()
    assert {row["id"]: (row["label"], row["group"]) for row in found} == expected
    assert not any(row["problem"] for row in found)


def test_rows_that_do_not_know_something_are_put_aside_with_the_reason(spark: Any, tmp_path: Path) -> None:
    lines = ["image_id,label,sex,age", "a,nv,male,40", "b,nv,Unknown,40", "c,nv,,40", "d,nv,female,NaN"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    layout = KnownLayout(layout=csv_layout(), columns=("sex", "age"))
    found = {row["id"]: row["problem"] for row in layout(str(tmp_path), spark).collect()}
    assert found == {"a": None, "b": "its sex is not known", "c": "its sex is not known", "d": "its age is not known"}
    with pytest.raises(ConfigError, match="Did you mean 'sex'"):
        KnownLayout(layout="csv", columns=("sexx",))(str(tmp_path), spark)
    assert layouts.describe(layout) != layouts.describe(KnownLayout(layout=csv_layout(), columns=("sex",)))
