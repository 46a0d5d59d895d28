"""Networks of a study: a phase starts with the weights of the previous one; a finished training is not repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark.data.split import Split
from dlspark.images.dataset import ImageDataset
from dlspark.images.prepare import prepare_images
from dlspark.ml.tables import dataset_images, dataset_rows, read_local
from dlspark.spark.slots import available_slots
from dlspark.storage.steps import Folder, Result
from dlspark.storage.store import Store
from dlspark.study.networks import keep_features, keep_predictions, train_phase
from dlspark.study.settings import NetworkSettings, PhaseSettings
from dlspark.testing.cells import cell_files

pytestmark = [pytest.mark.spark, pytest.mark.slow]

FINE_TUNE = {"fine_tune": "head", "learning_rate": 0.01, "depth_decay": 1.0}
HEAD = PhaseSettings(epochs=1, schedule="cosine", classifier=FINE_TUNE)
NETWORK = NetworkSettings(
    classifier={
        "backbone": "mobilenet",
        "weights": "none",
        "batch_norm": "frozen",
        "dense": [4],
        "dropout": 0.0,
        "augment": [],
    },
    dtype="mixed_bfloat16",
    batch_size=8,
    class_weight="balanced",
    backend="local",
    workers=1,
    options={},
    max_restarts=0,
    phases=[HEAD],
)


@pytest.fixture(scope="module")
def dataset(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = tmp_path_factory.mktemp("cells")
    for name, content in cell_files(ill=2, healthy=2, cells=4):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    split = Split(test=0.25, validation=0.25)
    return prepare_images(folder, folder / "data", layout="cnmc", image_size=(32, 32), split=split, spark=spark)


def test_phases_hand_over_and_a_finished_training_is_not_repeated(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    from dlspark.model_files.model import load_model
    from dlspark.trainer import Trainer

    first, second = Store(tmp_path / "1"), Store(tmp_path / "2")
    document = train_phase(Folder(first, []), dataset, NETWORK, HEAD, seed=1)
    assert set(document["history"]) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert keras.config.dtype_policy().name == "float32"
    head = load_model(first.child("model.keras").uri)
    needs = [Result(first, document, 0.0, {})]
    train_phase(
        Folder(second, needs), dataset, NETWORK, replace(HEAD, classifier={**FINE_TUNE, "fine_tune": "top:1"}), seed=1
    )
    top = load_model(second.child("model.keras").uri)
    assert list(tmp_path.glob("1/runs/*/events.jsonl"))
    assert not list(tmp_path.glob("**/checkpoints")), "a finished step keeps the model only"
    frozen = [layer.name for layer in top.get_layer("mobilenet").layers if layer.weights and not layer.trainable]
    assert len(frozen) > 50
    for name in frozen:
        before, after = (model.get_layer("mobilenet").get_layer(name).get_weights() for model in (head, top))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    first.delete("model.keras")  # as if the study was killed between the training and the end of the step
    monkeypatch.setattr(Trainer, "fit", None)
    again = train_phase(Folder(first, []), dataset, NETWORK, HEAD, seed=1)
    assert again == document
    loaded = load_model(first.child("model.keras").uri)
    assert all(np.array_equal(a, b) for a, b in zip(head.get_weights(), loaded.get_weights(), strict=True))


def test_rows_and_images_of_a_dataset(dataset: ImageDataset, spark: Any) -> None:
    rows = {row.id: row for row in dataset_rows(spark, dataset).collect()}
    assert len(rows) == 16
    assert {row.part for row in rows.values()} == {"train", "validation", "test"}
    assert all((row.label == dataset.classes.index("hem")) == row.subject.startswith("H") for row in rows.values())
    assert dataset.test is not None
    with dataset.test.open() as reader:
        found = reader.take(np.arange(reader.rows), ["id", "image"])
    images = {row.id: row.image for row in dataset_images(spark, dataset, ("test",)).collect()}
    assert set(images) == set(found["id"])
    for name, pixels in zip(found["id"], found["image"], strict=True):
        image = images[name]
        assert (image.height, image.width, image.nChannels, image.mode) == (32, 32, 3, 16)
        assert np.array_equal(np.frombuffer(image.data, np.uint8).reshape(32, 32, 3)[..., ::-1], pixels)

    shards = 5 * available_slots(spark)  # more shards than tasks
    repeated = {name: getattr(dataset.test, name) * shards for name in ("files", "rows_per_file", "crc32")}
    many = replace(dataset, test=replace(dataset.test, **repeated))
    assert dataset_images(spark, many, ("test",)).rdd.getNumPartitions() == 4 * available_slots(spark)
    assert dataset_images(spark, many, ("test",), by_shard=True).rdd.getNumPartitions() == shards


def test_features_and_predictions_come_of_one_pass(dataset: ImageDataset, spark: Any, tmp_path: Path) -> None:
    """Kept features and predictions equal those of the network, whether predictions are kept with features or not."""
    import keras

    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((32, 32, 3)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Flatten(),
        keras.layers.Dense(4, name="dense_1"),
        keras.layers.Dense(2, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    with Store(tmp_path / "network").open_writer("model.keras") as path:
        model.save(path)
    prepared, network = (Result(Store(tmp_path / name), {}, 0.0, {}) for name in ("data", "network"))
    featurized = Result(
        Store(tmp_path / "features"),
        keep_features(
            Folder(Store(tmp_path / "features"), [prepared, network]), dataset, spark, layer="dense_1", trained=True
        ),
        0.0,
        {},
    )
    features = read_local(featurized.store, featurized.document["table"]).sort_by("id")
    assert features.column_names == ["id", "features", "probabilities"]
    assert dataset.train is not None
    assert dataset.test is not None
    assert features.num_rows == featurized.document["rows"] == dataset.train.rows + dataset.test.rows

    with dataset.test.open() as reader:
        found = reader.take(np.arange(reader.rows), ["id", "image"])
    order = np.argsort(found["id"])
    images = found["image"][order].astype(np.float32)
    dense = keras.Model(model.inputs, model.get_layer("dense_1").output)
    kept = {row["id"]: row for row in features.to_pylist()}
    ids = [str(name) for name in found["id"][order]]
    np.testing.assert_allclose(
        [kept[name]["features"] for name in ids], dense.predict(images, verbose=0), rtol=1e-3, atol=1e-5
    )
    expected = model.predict(images, verbose=0)
    assert np.ptp(expected[:, 0]) > 0.01

    for number, source in enumerate((featurized, network)):
        store = Store(tmp_path / f"predictions-{number}")
        document = keep_predictions(Folder(store, [prepared, source]), dataset, spark)
        table = read_local(store, document["table"]).sort_by("id")
        assert table["id"].to_pylist() == ids, "all test rows and no others"
        np.testing.assert_allclose(table["probabilities"].to_pylist(), expected, atol=1e-5)
