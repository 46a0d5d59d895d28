"""The networks of a study: train them phase by phase through Trainer, keep their features and predictions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError, DataError
from dlspark.images import ImageDataset
from dlspark.job import RESULT_FILE, FitResult
from dlspark.ml.network import output_of
from dlspark.ml.tables import dataset_images, dataset_rows, featurized, read_table, write_table
from dlspark.model_files import MODEL, load_model
from dlspark.models import ClassifierOptions, build_from_options
from dlspark.storage import FOLDER as CHECKPOINTS
from dlspark.storage import Document, Folder, Store
from dlspark.study.settings import NetworkSettings, PhaseSettings, StudySettings, at_place
from dlspark.trainer import Trainer
from dlspark.worker import dtype_policy, load_trained, weights_of

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

RUNS = "runs"
_FROZEN = {"fine_tune": "head", "learning_rate": 1e-4, "depth_decay": 1.0}
_UNTRAINED = PhaseSettings(epochs=1, schedule="constant", classifier=_FROZEN)


def trainer_of(network: NetworkSettings, store: Store | None = None) -> Trainer:
    """The trainer of a network. Construct it early to check the network's settings."""
    return Trainer(
        network.backend,
        num_workers=network.workers,
        options=network.options,
        max_restarts=network.max_restarts,
        store=None if store is None else store.uri,
    )


def check_networks(settings: StudySettings, dataset: ImageDataset) -> None:
    """Build every network of a study once, so that an error in one is found before another has trained for hours.

    Raises:
        ConfigError: settings that `build_classifier` rejects, an unknown layer of ``features``, or too many components.
    """
    models = {}
    for name, network in settings.networks.items():
        for phase in network.phases or [_UNTRAINED]:
            with at_place(f"networks.{name}"), dtype_policy(network.dtype):
                built = network if network.phases else as_it_comes(network)
                models[name] = _build(dataset, built, phase, settings.seed, 1)
    for name, made in settings.features.items():
        with at_place(f"features.{name}"):
            outputs = [output_of(models[network], made.layer) for network in made.networks]
            numbers = sum(math.prod(output.shape[1:]) for output in outputs)
            if made.pca is not None and made.pca > numbers:
                raise ConfigError(f"pca: expected at most {numbers} components, the number of features; got {made.pca}.")


def train_phase(
    folder: Folder, dataset: ImageDataset, network: NetworkSettings, phase: PhaseSettings, seed: int
) -> Document:
    """Train one phase and keep ``model.keras``; an interrupted run is resumed.

    Training starts with the weights of the previous phase, if the last result in ``folder`` is one.
    """
    if dataset.train is None:
        raise DataError(f"Expected training rows; got none in the part 'train' of {dataset.uri!r}.")
    steps = phase.epochs * math.ceil(dataset.train.rows / network.batch_size)
    with dtype_policy(network.dtype):
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
        else:  # the process was killed after the training and before the end of the step
            result = FitResult.from_json(finished.read_bytes(RESULT_FILE).decode())
            model.set_weights(weights_of(load_trained(finished)))
        _save(model, folder.store)
    for name in place.list():
        place.child(name).delete(CHECKPOINTS, missing_ok=True)  # not needed beside the model, and three times as large
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
    """A network without augmentation and dropout. They have no effect, but would draw seeds before the weights."""
    return replace(network, classifier={**network.classifier, "augment": [], "dropout": 0.0})


def keep_untrained(folder: Folder, dataset: ImageDataset, network: NetworkSettings, seed: int) -> Document:
    """Keep the ``model.keras`` of a network that is not trained."""
    with dtype_policy(network.dtype):
        _save(_build(dataset, as_it_comes(network), _UNTRAINED, seed, 1), folder.store)
    return {"history": {}, "epoch_seconds": []}


def keep_features(folder: Folder, dataset: ImageDataset, spark: SparkSession, *, layer: str, trained: bool) -> Document:
    """Keep the outputs of a layer of the network in the last result of ``folder``: columns id and features.

    For a trained network also its predictions, in the column probabilities, which saves a second pass over the images.
    """
    from pyspark.sql import functions as F

    model = load_model(folder.results[-1].store.child(MODEL).uri, compiled=False)
    images = dataset_images(spark, dataset, ("train", "test"))
    if trained:
        found = featurized(images, _with_predictions(model, layer))
        width = -dataset.num_classes  # counted from the end
        features = F.slice("features", 1, F.size("features") + width).alias("features")
        found = found.select("id", features, F.slice("features", width, -width).alias("probabilities"))
    else:
        found = featurized(images, model, layer).select("id", "features")
    table = write_table(folder.store, found)
    return {"table": table, "layer": layer, "rows": sum(table["rows"])}


def keep_predictions(folder: Folder, dataset: ImageDataset, spark: SparkSession) -> Document:
    """Keep the predictions of a trained network for the test rows: columns id and probabilities.

    The last result in ``folder`` is either the network or features that were kept with predictions.
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
        raise DataError(f"Expected images in the part 'test' of {dataset.uri!r}; got none.")
    return {"table": table, "rows": sum(table["rows"])}


def _with_predictions(model: Any, layer: str) -> Any:
    """A model whose output is the flattened output of a layer, followed by the output of ``model``."""
    import keras

    # Explicit names, because the model may use Keras' default names, and an explicit dtype, because its policy may be mixed.
    flat = keras.layers.Flatten(dtype="float32", name="dlspark_features")(output_of(model, layer))
    both = keras.layers.Concatenate(dtype="float32", name="dlspark_features_and_predictions")([flat, *model.outputs])
    return keras.Model(model.inputs, both)


def _build(dataset: ImageDataset, made: NetworkSettings, trained: PhaseSettings, seed: int, steps: int) -> Any:
    import keras

    keras.utils.set_random_seed(seed)
    rate: Any = trained.classifier["learning_rate"]
    if trained.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, decay_steps=steps)
    options = ClassifierOptions.from_plain({**made.classifier, **trained.classifier, "learning_rate": rate})
    return build_from_options(options, dataset.num_classes, image_size=dataset.image_size)


def _save(model: Any, store: Store) -> None:
    with store.open_writer(MODEL) as path:
        model.save(path)


def _finished(place: Store) -> Store | None:
    """The finished run in a step's folder. The step's key ensures that it is a run with the same settings."""
    for name in reversed(place.list()):
        run = place.child(name)
        if run.exists(RESULT_FILE):
            return run
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
