"""Cached features of a frozen backbone: equal training without it, reproducible views, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark import ConfigError, DataError, ImageDataset, Split, Trainer, prepare_images
from dlspark.data.shards import ShardedRows
from dlspark.ml import cache_features
from dlspark.testing.cells import cell_files

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300)]

WIDTH = 6  # of a feature vector
FIT: dict[str, Any] = {"epochs": 3, "batch_size": 8, "seed": 3, "verbose": 0}


@pytest.fixture(scope="module")
def dataset(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Forty small images of cells, half of them for training."""
    folder = tmp_path_factory.mktemp("cells")
    for name, content in cell_files(ill=2, healthy=2, cells=10):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    split = Split(test=0.25, validation=0.25)
    return prepare_images(folder, folder / "data", layout="cnmc", image_size=(16, 16), split=split, spark=spark)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the folders whose features are computed."""
    from dlspark.ml import cached_features

    done: list[str] = []
    write: Callable[..., ShardedRows] = cached_features.write_dataframe

    def noting(store: Any, *given: Any, **options: Any) -> ShardedRows:
        done.append(store.uri)
        return write(store, *given, **options)

    monkeypatch.setattr(cached_features, "write_dataframe", noting)
    return done


def classifier(*, augment: bool = False, train: str = "head", seed: int = 5) -> Any:
    """A network like those of `build_classifier`: a nested backbone, frozen, with batch normalisation and dropout."""
    import keras

    keras.utils.set_random_seed(seed)
    inputs = keras.Input((16, 16, 3), name="images")
    layers = [
        keras.layers.Rescaling(1 / 127.5, offset=-1.0),
        keras.layers.Conv2D(WIDTH, 3, activation="relu"),
        keras.layers.BatchNormalization(scale=False, center=False, name="norm"),
        keras.layers.Dropout(0.5, name="drop_connect"),
    ]
    backbone = keras.Sequential([keras.Input((16, 16, 3)), *layers], name="backbone")
    backbone.trainable = train != "head"
    backbone.get_layer("norm").set_weights([np.linspace(-0.5, 0.5, WIDTH), np.linspace(0.01, 0.1, WIDTH)])
    backbone.get_layer("drop_connect").rate = 0.0  # as build_classifier does in a frozen backbone
    x = inputs
    if augment:
        x = keras.layers.RandomRotation(0.5, fill_mode="reflect", name="rotation")(x, training=False)
        x = keras.layers.RandomFlip("horizontal", name="flip")(x, training=False)
    x = keras.layers.GlobalAveragePooling2D(name="pooling")(backbone(x))
    x = keras.layers.Dense(8, activation="relu", name="dense")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax", name="probabilities")(x), name="tiny")
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def arrays(rows: ShardedRows) -> tuple[Any, Any]:
    """All rows, in their order."""
    with rows.open() as reader:
        return reader.batch(np.arange(reader.rows))


@pytest.fixture(scope="module")
def whole(dataset: ImageDataset) -> tuple[Any, Any]:
    """A whole model whose head was trained on images, and the result of that fit."""
    model = classifier()
    return model, Trainer("local").fit(model, dataset.train, validation_data=dataset.validation, **FIT)


def equal(found: Any, model: Any, whole: tuple[Any, Any]) -> None:
    """Compare histories and weights, with the contract's tolerance between one worker and several."""
    other, expected = whole
    assert set(found.history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    for name, values in expected.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=1e-5, err_msg=name)
    for mine, its in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5, err_msg=mine.path)


def test_without_augmentation_the_head_trains_as_if_whole(
    spark: Any, dataset: ImageDataset, tmp_path: Path, whole: tuple[Any, Any]
) -> None:
    model = classifier()
    kept = cache_features(model, dataset, tmp_path, spark=spark)
    before = [np.array(weight) for weight in model.weights]
    equal(Trainer("local").fit(kept.head, kept.train, validation_data=kept.validation, **FIT), model, whole)

    # The fit trains the head of the model itself and its optimizer, and nothing else.
    changed = [weight.path for weight, was in zip(model.weights, before, strict=True) if not np.array_equal(weight, was)]
    assert changed == [weight.path for weight in model.trainable_weights]
    assert int(model.optimizer.iterations) == int(whole[0].optimizer.iterations) > 0
    assert kept.test is not None
    assert dataset.test is not None
    (features, labels), (images, truth) = arrays(kept.test), arrays(dataset.test)
    assert np.array_equal(labels, truth)
    assert labels.dtype == truth.dtype
    assert features.shape == (len(truth), WIDTH)
    assert features.dtype == np.float32
    np.testing.assert_allclose(kept.head.predict(features, verbose=0), model.predict(images, verbose=0), atol=1e-6)

    # The same on two workers, from the cached features.
    model = classifier()
    kept = cache_features(model, dataset, tmp_path, spark=spark)
    trainer = Trainer("mirrored", num_workers=2)
    equal(trainer.fit(kept.head, kept.train, validation_data=kept.validation, **FIT), model, whole)


def test_a_sequential_model_from_a_file(spark: Any, dataset: ImageDataset, tmp_path: Path) -> None:
    import keras

    layers = [
        keras.Input((16, 16, 3)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(WIDTH, 3, trainable=False),
        keras.layers.GlobalAveragePooling2D(name="pooling"),
        keras.layers.Dense(2, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    kept = cache_features(model, dataset, tmp_path / "kept", spark=spark)
    Trainer("local").fit(kept.head, kept.train, **FIT)
    assert kept.test is not None
    assert dataset.test is not None
    (features, _), (images, _) = arrays(kept.test), arrays(dataset.test)
    np.testing.assert_allclose(kept.head.predict(features, verbose=0), model.predict(images, verbose=0), atol=1e-6)
    assert not np.array_equal(model.layers[-1].get_weights()[0], layers[-1].get_weights()[0]), "its own head was trained"


def test_views_differ_and_can_be_drawn_again(spark: Any, dataset: ImageDataset, tmp_path: Path, jobs: list[str]) -> None:
    import keras

    def views(folder: str, data: ImageDataset, **options: Any) -> Any:
        kept = cache_features(classifier(augment=True), data, tmp_path / folder, views=3, spark=spark, **options)
        train, labels = arrays(kept.train)
        assert train.shape == (len(labels), 3 * WIDTH)
        return train.reshape(-1, 3, WIDTH), kept.validation

    train_only = replace(dataset, validation=None, test=None)
    first, validation = views("one", replace(dataset, test=None))
    assert all(np.abs(first[:, i] - first[:, j]).max(axis=1).min() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))
    again, _ = views("other", train_only)
    assert np.array_equal(first, again)
    assert len(jobs) == 3
    other, same_validation = views("one", replace(dataset, test=None), seed=1)
    assert len(jobs) == 4  # only the training rows are computed again
    assert same_validation == validation
    assert np.abs(first - other).max(axis=(1, 2)).min() > 1e-4
    model = classifier(augment=True)
    before = model.get_layer("dense").get_weights()[0]
    kept = cache_features(model, train_only, tmp_path / "one", views=3, spark=spark)
    result = Trainer("local").fit(kept.head, kept.train, **FIT)
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert not np.array_equal(model.get_layer("dense").get_weights()[0], before)
    # Validation rows are not augmented.
    plain = classifier()
    up_to_pooling = keras.Model(plain.inputs[0], plain.get_layer("pooling").output)
    assert dataset.validation is not None
    np.testing.assert_allclose(
        arrays(validation)[0], up_to_pooling.predict(arrays(dataset.validation)[0], verbose=0), atol=1e-6
    )


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    import keras

    from dlspark.ml.views import DrawnViews

    network = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.RandomRotation(0.5), keras.layers.RandomFlip(), keras.layers.Flatten()]
    )
    layer = DrawnViews(network, views=2, seed=0)
    one, two = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3)).astype(np.float32)
    first = np.asarray(layer(one))
    other = np.asarray(layer(two))
    assert np.array_equal(layer(one), first)
    assert np.array_equal(DrawnViews(network, views=2, seed=0)(two), other)
    # An image is augmented differently in another batch.
    mixed = np.concatenate([one[:1], two[1:]])
    assert np.abs(np.asarray(layer(mixed))[0] - first[0]).max() > 1


def test_what_is_kept_is_not_computed_again(
    spark: Any, dataset: ImageDataset, tmp_path: Path, jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache_features(classifier(), dataset, tmp_path, spark=spark)
    assert len(jobs) == 3
    again = cache_features(classifier(), dataset, tmp_path, seed=9, spark=spark)  # the seed draws nothing here
    assert len(jobs) == 3
    assert (again.train, again.validation, again.test) == (first.train, first.validation, first.test)
    changed = classifier()
    changed.get_layer("dense").set_weights([weight + 1 for weight in changed.get_layer("dense").get_weights()])
    cache_features(changed, dataset, tmp_path, spark=spark)
    assert len(jobs) == 3  # the head does not matter
    frozen = changed.get_layer("backbone").get_layer("norm")
    frozen.set_weights([weight + 1 for weight in frozen.get_weights()])
    cache_features(changed, replace(dataset, test=None), tmp_path, spark=spark)
    assert len(jobs) == 5
    monkeypatch.setattr(
        "dlspark.storage.steps.installed_version", {"keras": "0.0", "tensorflow": "0", "dlspark": "0"}.__getitem__
    )
    cache_features(changed, replace(dataset, validation=None, test=None), tmp_path, spark=spark)
    assert len(jobs) == 6


def test_the_head_takes_every_view_in_training_and_the_first_one_else() -> None:
    import keras

    from dlspark.ml.views import OneView

    layer = OneView(2, seed=1)
    views = keras.ops.convert_to_tensor(np.arange(200 * 6, dtype=np.float32).reshape(200, 6))
    assert np.array_equal(layer(views, training=False), views[:, :2])
    drawn = np.asarray(layer(views, training=True))
    rows, view = np.divmod(drawn[:, 0], 6)
    assert np.array_equal(rows, np.arange(200))
    assert np.array_equal(drawn[:, 1], drawn[:, 0] + 1)
    counts = np.unique(view, return_counts=True)[1]
    assert len(counts) == 3
    assert counts.min() > 40
    assert not np.array_equal(drawn, layer(views, training=True))


def trainable_norm() -> Any:
    import keras

    model = classifier()
    model.get_layer("backbone").trainable = True
    for layer in model.get_layer("backbone").layers:
        layer.trainable = isinstance(layer, keras.layers.BatchNormalization)
    return model


def all_frozen() -> Any:
    model = classifier()
    model.trainable = False
    return model


def uncompiled() -> Any:
    import keras

    model = classifier()
    return keras.Model(model.inputs[0], model.outputs[0])


@pytest.mark.parametrize(
    ("build", "options", "told"),
    [
        (
            lambda: classifier(train="all"),
            {},
            r"frozen up to 'pooling'; training would change 2 layers, the first is 'conv2d",
        ),
        (trainable_norm, {}, r"would change 1 layers, the first is 'norm'. Build the model with fine_tune='head'"),
        (classifier, {"views": 2}, r"Expected views=1, as nothing in the model up to 'pooling' is random; got 2"),
        (lambda: classifier(augment=True), {}, r"views of 2 or more, as the model augments; got 1"),
        (classifier, {"views": 0}, r"Expected views as a whole number of at least 1"),
        (classifier, {"layer": "poling"}, r"The model has no layer 'poling'. .*'pooling'"),
        (classifier, {"layer": "backbone"}, r"a layer whose output is a vector; 'backbone' gives \(14, 14, 6\)"),
        (classifier, {"layer": "probabilities"}, r"The model cannot be cut at layer 'probabilities'"),
        (all_frozen, {}, r"after 'pooling' the model has no trainable weights"),
        (uncompiled, {}, r"Expected a compiled model"),
        (lambda: "model.keras", {}, r"Expected a Keras model"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    dataset: ImageDataset, tmp_path: Path, build: Callable[[], Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        cache_features(build(), dataset, tmp_path / "kept", **options)
    assert not (tmp_path / "kept").exists()


def test_data_that_does_not_fit_is_refused(dataset: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has none in its part 'train'"):
        cache_features(classifier(), replace(dataset, train=None), tmp_path)
    with pytest.raises(ConfigError, match=r"a dataset of the model's images, \(16, 16, 3\); .* have \(8, 16, 3\)"):
        cache_features(classifier(), replace(dataset, image_size=(8, 16)), tmp_path)
    with pytest.raises(ConfigError, match="a prepared dataset, an ImageDataset; got a ShardedRows"):
        cache_features(classifier(), dataset.train, tmp_path)  # type: ignore[arg-type]
