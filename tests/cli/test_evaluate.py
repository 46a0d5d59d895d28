"""``dlspark evaluate`` on a dataset with groups and further columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn import metrics

from dlspark.cli.main import main
from dlspark.data import Split, try_cast
from dlspark.images.layouts import csv_layout
from dlspark.images.prepare import prepare_images

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def dataset(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 noise images, 40 of them in test, two per patient; class mel is a little brighter."""
    folder = tmp_path_factory.mktemp("source")
    draw = np.random.default_rng(0)
    lines = ["image_id,label,part,age,sex,patient"]
    for i in range(60):
        mel = i // 2 % 3 == 0
        pixels = np.clip(draw.normal(140 if mel else 110, 40, (12, 12, 3)) + draw.normal(0, 20), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        age, sex = "" if i == 5 else i * 1.5, ("female", "male", "")[i % 3]
        lines.append(f"{i},{'mel' if mel else '<nv>'},{'train' if i >= 40 else 'test'},{age},{sex},p{i // 2}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")

    def layout(source: str, session: Any) -> Any:
        table = csv_layout(extension=".png", group_column="patient")(source, session)
        return table.withColumn("age", try_cast("age", "double"))

    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare_images(folder, out, layout=layout, image_size=(8, 8), split=Split(column="part", group="group"))
    return str(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that predicts mel for bright images."""
    import keras

    pooled = [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), keras.layers.GlobalAveragePooling2D()]
    found = keras.Sequential([*pooled, keras.layers.Dense(2, "softmax", name="out")])
    found.get_layer("out").set_weights([np.array([[0, 6.0]] * 3), np.array([0, -8.8])])
    found.compile("sgd", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    path = tmp_path_factory.mktemp("model") / "model.keras"
    found.save(path)
    return str(path)


def test_scores_page_and_predictions(
    dataset: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    out = tmp_path / "page"
    given = ["--by", "sex,age:20", "--first", "mel", "--bootstrap", "200", "--out", str(out)]
    assert main(["evaluate", model, dataset, *given, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)

    table = pq.read_table(out / "predictions.parquet").to_pydict()
    assert sorted(table) == ["id", "label", "predicted", "probability_<nv>", "probability_mel"]
    assert sorted(table["id"], key=int) == [str(i) for i in range(40)]
    truth = np.array(table["label"]) == "mel"
    area = metrics.roc_auc_score(truth, table["probability_mel"])
    assert document["classes"] == ["mel", "<nv>"]
    assert document["by_class"][0]["auroc"]["value"] == pytest.approx(area)
    assert 0.5 < area < 1
    recall = metrics.recall_score(truth, np.array(table["predicted"]) == "mel")
    assert document["recall"]["mel"] == document["by_class"][0]["recall"]["value"] == pytest.approx(recall)
    assert document["metrics"]["accuracy"] == pytest.approx(document["scores"]["accuracy"]["value"])
    assert document["metrics"]["loss"] == pytest.approx(document["scores"]["log_loss"]["value"], rel=1e-4)
    assert (document["group"], document["groups"]) == ("group", 20)
    assert {sex: part["rows"] for sex, part in document["by"]["sex"].items()} == {"female": 14, "male": 13, "(unknown)": 13}
    assert list(document["by"]["age"]) == ["0 to below 20", "20 to below 40", "40 to below 60", "(unknown)"]

    assert {path.name for path in out.iterdir()} == {
        "evaluation.html", "predictions.parquet", "confusion.png", "recall.png", "by-sex.png", "by-age.png",
        "roc.png", "precision-recall.png",
    }  # fmt: skip
    page = (out / "evaluation.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 6
    assert "95 %, by 200 resamples of 20 groups (group)" in page
    assert "&lt;nv&gt;" in page
    assert "<nv>" not in page
    with Image.open(out / "confusion.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert not [str(each.message) for each in recwarn if "sklearn" in each.filename or "dlspark" in each.filename]

    assert main(["evaluate", model, dataset, *given[:6]]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^intervals +95 %, by 200 resamples of 20 groups \(group\)$", told, re.MULTILINE)
    assert re.search(r"^score +value +95 % low +95 % high$", told, re.MULTILINE)
    assert re.search(r"^sex +rows +accuracy .* recall mel$", told, re.MULTILINE)


def test_rows_may_be_drawn_alone_or_not_at_all(dataset: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def accuracy(*given: str) -> tuple[float, float | None, str | None]:
        assert main(["evaluate", model, dataset, "--bootstrap", "100", *given, "--format", "json"]) == 0
        document = json.loads(capsys.readouterr().out)
        found = document["scores"]["accuracy"]
        return found["value"], found["low"], document["group"]

    by_group, by_row, by_sex = accuracy(), accuracy("--group", "none"), accuracy("--group", "sex")
    assert [by_group[2], by_row[2], by_sex[2]] == ["group", None, "sex"]
    assert by_group[0] == by_row[0] == by_sex[0]
    assert by_group[1] != by_row[1]
    assert accuracy("--bootstrap", "0")[1] is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--by", "sxe"], "Expected a column of the dataset after --by; got 'sxe'. Did you mean 'sex'"),
        (["--by", "age:old"], "expected columns as sex,age:20, got 'age:old'"),
        (["--by", "age:0"], "Expected bands of a width above 0"),
        (["--by", "sex:20"], "Expected numbers to put into bands"),
        (["--first", "mell"], "Expected classes after --first; got 'mell'. Did you mean 'mel'"),
        (["--group", "patients"], "Expected a column of the dataset after --group; got 'patients'. Did you mean 'patient'"),
        (["--by", "age:20,age:10"], "after --by; got 'age' twice"),
        (["--by", "age"], "in 'age'; got 40. Put numbers into bands"),
        (["--seed", "-1"], "Expected seed as a whole number of at least 0"),
        (["--bootstrap", "-1"], "Expected bootstrap as a whole number of at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_the_model_is_looked_for(
    dataset: str, given: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "page"
    assert main(["evaluate", "absent.keras", dataset, *given, "--out", str(out)]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()
