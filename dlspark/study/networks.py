"""The networks of a study: trained phase by phase through Trainer, used as featurizers, and as classifiers themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError, DataError
from dlspark.images import ImageDataset
from dlspark.job import RESULT_FILE, FitResult
from dlspark.ml.network import output_of
from dlspark.ml.tables import dataset_images, dataset_rows, featurized, read_table, write_table
from dlspark.model_files import MODEL, load_model
from dlspark.models import build_classifier
from dlspark.storage import FOLDER as CHECKPOINTS
from dlspark.storage import Document, Folder, Store
from dlspark.study.settings import NetworkSettings, PhaseSettings, StudySettings, told_at
from dlspark.trainer import Trainer
from dlspark.worker import load_trained

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

RUNS = "runs"
_UNTRAINED = PhaseSettings(epochs=1, fine_tune="head", learning_rate=1e-4, schedule="constant", depth_decay=1.0)


def trainer_of(network: NetworkSettings, store: Store | None = None) -> Trainer:
    """The trainer of a network; checks its settings, so making it early finds what is wrong with them."""
    return Trainer(
        network.backend,
        num_workers=network.workers,
        options=network.options,
        max_restarts=network.max_restarts,
        store=None if store is None else store.uri,
    )


def check_networks(settings: StudySettings, dataset: ImageDataset) -> None:
    """Build every network of a study once: what is wrong with one is told before another has trained for hours.

    Raises:
        ConfigError: what `build_classifier` refuses; a layer of ``features`` that is not there; too many components.
    """
    models = {}
    for name, network in settings.networks.items():
        for phase in network.phases or [_UNTRAINED]:
            with told_at(f"networks.{name}"), _policy(network.dtype):
                built = network if network.phases else as_it_comes(network)
                models[name] = _build(dataset, built, phase, settings.seed, 1)
    for name, made in settings.features.items():
        with told_at(f"features.{name}"):
            outputs = [output_of(models[network], made.layer) for network in made.networks]
            numbers = sum(math.prod(output.shape[1:]) for output in outputs)
            if made.pca is not None and made.pca > numbers:
                raise ConfigError(
                    f"pca: expected at most {numbers} components, as many as there are numbers; {made.pca} came."
                )


def train_phase(
    folder: Folder, dataset: ImageDataset, network: NetworkSettings, phase: PhaseSettings, seed: int
) -> Document:
    """Train one phase and leave ``model.keras``; goes on with a run that was cut.

    The weights are those of the phase before, which is the last of the steps that this one needs, if there is one.
    """
    if dataset.train is None:
        raise DataError(f"Expected rows to train on: the dataset at {dataset.uri!r} has none in its part 'train'.")
    steps = phase.epochs * math.ceil(dataset.train.rows / network.batch_size)
    with _policy(network.dtype):
        model = _build(dataset, network, phase, seed, steps)
        before = [result for result in folder.results if result.store.exists(MODEL)]
        if before:
            model.set_weights(load_model(before[-1].store.child(MODEL).uri, compiled=False).get_weights())
        place = folder.store.child(RUNS)
        finished = _finished(place)
        if finished is None:
            result = trainer_of(network, place).fit(
                model,
                dataset.train,
                validation_data=dataset.validation,
                epochs=phase.epochs,
                batch_size=network.batch_size,
                seed=seed,
                class_weight=dataset.class_weight() if network.class_weight == "balanced" else None,
            )
        else:  # killed between the end of the training and that of the step
            result = FitResult.from_json(finished.read_bytes(RESULT_FILE).decode())
            model.set_weights(load_trained(finished)[0])
        _save(model, folder.store)
    for name in place.list():
        place.child(name).delete(CHECKPOINTS, missing_ok=True)  # the model is there now; they are three times as large
    return {
        "rows": dataset.train.rows,
        "history": {name: [_finite(value) for value in values] for name, values in result.history.items()},
        "epoch_seconds": list(result.epoch_seconds),
        "time_to_first_step_seconds": result.time_to_first_step_seconds,
        "backend": result.backend,
        "workers": [f"{worker.host} ({worker.device})" for worker in result.workers],
        "versions": dict(result.versions),
    }


def as_it_comes(network: NetworkSettings) -> NetworkSettings:
    """A network without what acts in training only: augmentation would draw seeds before the weights are drawn."""
    return replace(network, augment=[], dropout=0.0)


def keep_untrained(folder: Folder, dataset: ImageDataset, network: NetworkSettings, seed: int) -> Document:
    """Leave the ``model.keras`` of a network that is used as it is."""
    with _policy(network.dtype):
        _save(_build(dataset, as_it_comes(network), _UNTRAINED, seed, 1), folder.store)
    return {"history": {}, "epoch_seconds": []}


def keep_features(folder: Folder, dataset: ImageDataset, spark: SparkSession, *, layer: str, trained: bool) -> Document:
    """Keep what a layer of the network that is the last of the steps needed gives: columns id and features.

    Of a trained one its predictions too, as they cost no second pass over the images: the column probabilities.
    """
    from pyspark.sql import functions as F

    model = load_model(folder.results[-1].store.child(MODEL).uri, compiled=False)
    images = dataset_images(spark, dataset, ("train", "test"))
    if trained:
        found = featurized(images, _with_predictions(model, layer))
        width = -dataset.num_classes  # from the end
        features = F.slice("features", 1, F.size("features") + width).alias("features")
        found = found.select("id", features, F.slice("features", width, -width).alias("probabilities"))
    else:
        found = featurized(images, model, layer).select("id", "features")
    table = write_table(folder.store, found)
    return {"table": table, "layer": layer, "rows": sum(table["rows"])}


def keep_predictions(folder: Folder, dataset: ImageDataset, spark: SparkSession) -> Document:
    """Keep what a trained network says of the test rows: columns id and probabilities.

    The last of the steps needed is either the network's, or one that kept its predictions with the features of all rows.
    """
    needed = folder.results[-1]
    if needed.store.exists(MODEL):
        found = featurized(dataset_images(spark, dataset, ("test",)), needed.store.child(MODEL).uri)
        predicted = found.select("id", found["features"].alias("probabilities"))
    else:
        test = dataset_rows(spark, dataset).filter("part = 'test'").select("id")
        predicted = read_table(spark, needed.store, needed.document["table"], ["id", "probabilities"]).join(test, "id")
    table = write_table(folder.store, predicted)
    if not sum(table["rows"]):
        raise DataError(f"Expected images in the part 'test' of {dataset.uri!r}: there are none.")
    return {"table": table, "rows": sum(table["rows"])}


def _with_predictions(model: Any, layer: str) -> Any:
    """A model that gives both, in one vector: what a layer gives, flattened, and then what the model itself gives."""
    import keras

    # Names and a dtype of their own: the model may have layers of Keras' names, and its policy may be a coarser one.
    flat = keras.layers.Flatten(dtype="float32", name="dlspark_features")(output_of(model, layer))
    both = keras.layers.Concatenate(dtype="float32", name="dlspark_features_and_predictions")([flat, *model.outputs])
    return keras.Model(model.inputs, both)


def _build(dataset: ImageDataset, made: NetworkSettings, trained: PhaseSettings, seed: int, steps: int) -> Any:
    import keras

    network, phase = vars(made), vars(trained)
    keras.utils.set_random_seed(seed)
    rate: Any = phase["learning_rate"]
    if phase["schedule"] == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, decay_steps=steps)
    return build_classifier(
        network["backbone"],
        dataset.num_classes,
        image_size=dataset.image_size,
        weights=None if network["weights"] == "none" else network["weights"],
        fine_tune=phase["fine_tune"],
        batch_norm=network["batch_norm"],
        dense=network["dense"],
        dropout=network["dropout"],
        augment=network["augment"],
        learning_rate=rate,
        depth_decay=phase["depth_decay"],
    )


def _save(model: Any, store: Store) -> None:
    with store.open_writer(MODEL) as path:
        model.save(path)


def _finished(place: Store) -> Store | None:
    """The run in a step's folder that has ended well: the step's key says that it can be no other."""
    for name in reversed(place.list()):
        run = place.child(name)
        if run.exists(RESULT_FILE):
            return run
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _policy(name: str) -> Iterator[None]:
    """Build and train under a dtype policy."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
