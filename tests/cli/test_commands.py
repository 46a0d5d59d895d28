"""From image files to an evaluated model, with a user's commands."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dlspark.cli.main import main
from dlspark.data.shard_writer import write_rows
from dlspark.errors import ConfigError, DataError
from dlspark.storage.store import Store


def photos(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, colour in {"blue": (40, 60, 200), "red": (200, 50, 40)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(draw.normal(colour, 30, (36, 40, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    return folder


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prepare_train_evaluate(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")

    def run(*arguments: str) -> Any:
        assert main([*arguments, "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    prepared = run("prepare", "photos", "data", "--layout", "folders", "--image-size", "32", "--test", "0.34")
    assert prepared["classes"] == ["blue", "red"]
    assert prepared["parts"]["test"]["by_class"] == {"blue": 2, "red": 2}

    model = ("--backbone", "mobilenetv2", "--weights", "none", "--fine-tune", "head")
    trained = run("train", "data", "--out", "run", *model, "--batch-size", "4", "--verbose", "0")
    assert trained["backend"] == "local"
    assert trained["data"]["validation"] == "test"
    assert len(trained["epoch_seconds"]) == 1
    history = json.loads(Path("run/history.json").read_text())
    assert history["command"].startswith("dlspark train data --out run --backbone mobilenetv2")
    assert history["history"] == trained["history"]
    assert sorted(path.name for path in Path("run").iterdir()) == ["history.json", "model.keras"]

    found = run("evaluate", "run/model.keras", "data")
    assert found["rows"] == 4
    assert found["metrics"]["loss"] == pytest.approx(history["history"]["val_loss"][0], rel=1e-4)
    assert found["metrics"]["accuracy"] == pytest.approx(history["history"]["val_accuracy"][0])
    assert [sum(row) for row in found["confusion"]] == [2, 2]

    assert main(["train", "data", "--out", "run", *model]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["evaluate", "run", "data", "--part", "validation"]) == 2
    assert "with --part: test, train" in capsys.readouterr().err
    for name, why in {"model.h5": "can run any code", "absent.keras": "no such file", "photos": "is neither"}.items():
        assert main(["evaluate", name, "data"]) == 2
        assert why in capsys.readouterr().err


def test_an_evaluation_equals_that_of_keras(tmp_path: Path) -> None:
    import keras
    from sklearn.metrics import log_loss

    from dlspark.evaluation.evaluation import evaluate_predictions
    from dlspark.evaluation.predictions import predict_rows

    keras.utils.set_random_seed(0)
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(53, 4)).astype("float32"), draw.integers(0, 3, 53).astype("int32")
    y[y == 2] = 1  # a class without rows
    layers = [keras.Input((4,)), keras.layers.Dense(3, "softmax", kernel_regularizer="l2")]
    model = keras.Sequential(layers)
    top = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy", top])
    rows = write_rows(Store(tmp_path), "test", x, y)
    with pytest.raises(DataError, match="Expected outputs of shape"):
        predict_rows(keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)]), _with_classes(rows), batch_size=8)

    seen: list[int] = []
    found = predict_rows(model, _with_classes(rows), batch_size=8, on_batch=lambda done, total: seen.append(done))

    expected = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    assert found.metrics == pytest.approx(expected, rel=1e-5)
    probabilities = model.predict(x, verbose=0)
    predicted = probabilities.argmax(-1)
    expected_log_loss = log_loss(y, probabilities, labels=range(3))
    judged = evaluate_predictions(found.labels, found.probabilities, found.classes)
    assert judged.by_class[0].recall.value == pytest.approx(np.mean(predicted[y == 0] == 0))
    assert judged.by_class[2].recall.value is None
    assert judged.confusion[1][0] == np.sum((y == 1) & (predicted == 0))
    assert judged.scores["accuracy"].value == pytest.approx(expected["accuracy"])
    assert judged.scores["log_loss"].value == pytest.approx(expected_log_loss, rel=1e-5)
    assert seen[-1] == judged.rows == 53

    logits = keras.Sequential([*layers[:1], keras.layers.Dense(3)])
    logits.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logits.layers[0].set_weights(model.layers[0].get_weights())
    again = predict_rows(logits, _with_classes(rows))
    np.testing.assert_allclose(again.probabilities, found.probabilities, atol=1e-6)


def test_code_in_a_model_is_not_run(tmp_path: Path) -> None:
    import keras

    from dlspark.model_files.model import load_model

    layers = [keras.Input((1,)), keras.layers.Lambda(lambda value: value)]
    keras.Sequential(layers).save(tmp_path / "lambda.keras")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(tmp_path / "lambda.keras")
    (tmp_path / "text.keras").write_text("no archive")
    with pytest.raises(ConfigError, match="damaged"):
        load_model(tmp_path / "text.keras")
    with zipfile.ZipFile(tmp_path / "empty.keras", "w"):
        pass
    with pytest.raises(ConfigError, match="damaged"):
        load_model(tmp_path / "empty.keras")


def _with_classes(rows: Any) -> Any:
    import dataclasses

    return dataclasses.replace(rows, num_classes=3, classes=("a", "b", "c"))
