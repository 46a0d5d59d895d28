"""cache_features(): the outputs of a frozen backbone, computed once, so that its head trains without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dlspark._require import whole_number
from dlspark.data import PARTS, ShardedRows
from dlspark.driver import runs
from dlspark.errors import ConfigError, DataError
from dlspark.images import ImageDataset
from dlspark.ml.network import Network, output_of, predicting
from dlspark.ml.tables import dataset_images, featurized
from dlspark.spark import get_session, local_cores, told_plainly, write_dataframe
from dlspark.storage import Document, Folder, KeptSteps, Step, Store, checksum, lease
from dlspark.worker import seed_variables

if TYPE_CHECKING:
    import keras
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class KeptFeatures:
    """The result of `cache_features`: a head, and rows for it in the order of the dataset.

    Attributes:
        head: the model's own layers after the cut, not copies, compiled as the model, with its optimizer.
        train: ``x`` float32 of shape (rows, views · width), view by view; ``y`` int32 of shape (rows,). In each step of the
            training ``head`` draws one view of a row.
        validation: the same with one view, without augmentation; None if the dataset has no such part.
        test: as validation.
    """

    head: keras.Model
    train: ShardedRows
    validation: ShardedRows | None
    test: ShardedRows | None


def cache_features(
    model: Any,
    data: ImageDataset,
    store: str | os.PathLike[str],
    *,
    views: int = 1,
    layer: str = "pooling",
    seed: int = 0,
    spark: SparkSession | None = None,
) -> KeptFeatures:
    """Compute the outputs of a model's frozen part for a dataset once, and keep them.

    ``Trainer(…).fit(kept.head, kept.train, validation_data=kept.validation)`` then trains the head alone. Its layers
    and optimizer are the model's own, so ``model`` is then the trained model: predict with it and save it.

    A second call with the same frozen weights, rows, views and seed, and the same versions of dlspark and Keras, reuses the
    kept features and computes nothing. Features of other settings are kept, too.

    Args:
        model: compiled, and frozen up to ``layer``, as by ``build_classifier(…, fine_tune="head")``.
        data: a prepared dataset of the model's image size.
        store: folder or URI for the features, which executors and workers must reach. One process at a time may use it.
        views: number of augmented views of each training image: 2 or more, or 1 for a model without augmentation.
        layer: the last layer of the frozen part. Its output must be a vector; it is stored as float32.
        seed: of the augmentation, and of the views that the head draws.
        spark: the session whose executors compute; by default `get_session` on all cores.

    Raises:
        ConfigError: a model that cannot be cut at ``layer`` or is not frozen up to it; views that do not fit its
            augmentation; another image size; a store in use.
        DataError: the dataset has no part "train".
    """
    views, seed = whole_number("views", views), whole_number("seed", seed, least=0)
    if not isinstance(data, ImageDataset):
        raise ConfigError(f"Expected a prepared dataset, an ImageDataset; got a {type(data).__name__}.")
    if data.train is None:
        raise DataError(f"Expected rows to train on; the dataset at {data.uri!r} has none in its part 'train'.")
    frozen, top = _cut(model, layer)
    _check_frozen(frozen, layer)
    augments = any(_is_random(part) for part in _layers(frozen))
    if augments != (views > 1):
        raise ConfigError(
            f"Expected views of 2 or more, as the model augments; got {views}. One view would show the head the same "
            "draw of each image in all epochs. To use unchanged images, build the model without augmentation."
            if augments
            else f"Expected views=1, as nothing in the model up to {layer!r} is random; got {views}. All views of an "
            "image would be equal. Build the model with augmentation, or leave views out."
        )
    if tuple(frozen.input_shape[1:]) != (*data.image_size, 3):
        raise ConfigError(
            f"Expected a dataset of the model's images, {frozen.input_shape[1:]}; those at {data.uri!r} have "
            f"{(*data.image_size, 3)}. Prepare the data with the model's size, or build the model for the data's."
        )
    parts = [part for part in PARTS if getattr(data, part) is not None]
    place = Store(store)
    with lease(place):
        steps = [_step(frozen, data, part, views if augments and part == "train" else None, seed, spark) for part in parts]
        results = KeptSteps(place).run(steps)
    found = {
        part: replace(ShardedRows.from_json(result.document["rows"]), uri=result.store.child(_ROWS).uri)
        for part, result in zip(parts, results, strict=True)
    }
    return KeptFeatures(_head(model, top, seed), found["train"], found.get("validation"), found.get("test"))


_ROWS = "rows"


def _cut(model: Any, layer: str) -> tuple[keras.Model, keras.Model]:
    """The model up to ``layer`` and the rest of it, made of its own layers."""
    import keras

    whole = predicting(model)
    if not model.compiled:
        raise ConfigError("Expected a compiled model, as its head trains with the same settings. Call model.compile first.")
    cut = output_of(model, layer)
    try:
        if isinstance(model, keras.Sequential):
            # Adding a layer calls all layers again, so the first output of a layer is not connected to the last output.
            behind = [each.name for each in model.layers].index(layer) + 1
            first, given = whole.inputs[0], keras.Input(cut.shape[1:], dtype=cut.dtype)
            frozen = keras.Sequential(
                [keras.Input(first.shape[1:], dtype=first.dtype), *model.layers[:behind]], name="frozen"
            )
            top = keras.Sequential([given, *model.layers[behind:]], name="top")
        else:
            frozen, top = keras.Model(whole.inputs[0], cut, name="frozen"), keras.Model(cut, whole.outputs[0], name="top")
    except (AttributeError, ValueError) as error:  # of Keras: it is the last layer, or a path bypasses it
        raise ConfigError(f"The model cannot be cut at layer {layer!r}: {error}") from error
    if len(cut.shape) != 2 or cut.shape[1] is None:
        raise ConfigError(
            f"Expected a layer whose output is a vector; {layer!r} gives {cut.shape[1:]}. Cut after the pooling."
        )
    if not top.trainable_variables:
        raise ConfigError(f"Expected a head to train; after {layer!r} the model has no trainable weights.")
    return frozen, top


def _layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a model and of its nested models."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
        else:
            yield layer


def _check_frozen(frozen: keras.Model, layer: str) -> None:
    """Reject layers that a training step would change."""
    import keras

    changing = [
        part.name
        for part in _layers(frozen)
        # A batch normalisation without scale and offset has no trainable weights, but updates its statistics.
        if part.trainable_variables or (isinstance(part, keras.layers.BatchNormalization) and part.trainable)
    ]
    if changing:
        raise ConfigError(
            f"Expected a model that is frozen up to {layer!r}; training would change {len(changing)} layers, the first is "
            f"{changing[0]!r}. Build the model with fine_tune='head', or set their trainable to False and compile it again; "
            "or train it without kept features."
        )


def _is_random(layer: keras.layers.Layer) -> bool:
    """Whether a layer is random in training. `build_classifier` sets the dropout rates of a frozen backbone to 0."""
    return getattr(layer, "rate", None) != 0 and bool(seed_variables(layer))


def _step(
    frozen: keras.Model, data: ImageDataset, part: str, views: int | None, seed: int, spark: SparkSession | None
) -> Step:
    """The step for the features of one part: ``views`` draws of each image, or one without augmentation when None."""
    import keras

    def keep(folder: Folder) -> Document:
        # Draws depend on the batch, and a batch ends with its partition.
        images = dataset_images(spark or get_session(local_cores()), data, (part,), by_shard=views is not None)
        table = featurized(images, Network.of(frozen if views is None else _drawing(frozen, views, seed)))
        with told_plainly():
            rows = write_dataframe(folder.store, _ROWS, table, num_classes=data.num_classes, classes=data.classes)
        return {"rows": rows.to_json()}

    settings = {
        # Without the seeds of augmentation, which are drawn when a model is built and have no effect here.
        "network": runs.identity_of_model(frozen, seeds=False),
        "weights": checksum(frozen.get_weights()),
        "rows": runs.identity_of_data(getattr(data, part)),
        "drawn": None if views is None else [views, seed],
    }
    return Step("features", part, settings, keep, packages=("keras", keras.backend.backend()))


def _drawing(frozen: keras.Model, views: int, seed: int) -> keras.Model:
    import keras

    from dlspark.ml.views import DrawnViews

    images = keras.Input(frozen.input_shape[1:], name="images")
    return keras.Model(images, DrawnViews(frozen, views, seed, name="views")(images))


def _head(model: keras.Model, top: keras.Model, seed: int) -> keras.Model:
    import keras

    from dlspark.ml.views import OneView

    views = keras.Input((None,), name="views")
    head = keras.Model(views, top(OneView(top.input_shape[1], seed, name="view")(views)), name=f"{model.name}_head")
    settings = keras.saving.deserialize_keras_object(model.get_compile_config())
    head.compile(**{**settings, "optimizer": model.optimizer})
    return head
