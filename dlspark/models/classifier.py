"""Classifiers: the network around a backbone, what of it trains, and the learning rate of each variable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark._require import whole_number
from dlspark.errors import ConfigError
from dlspark.mends.keras_batch_norm import batch_normalisations
from dlspark.models.augment import augmentation_layers, draw_seed
from dlspark.models.backbones import Backbone, cached_imagenet_file, check_backbone
from dlspark.models.options import ClassifierOptions

if TYPE_CHECKING:
    import keras


def build_classifier(
    backbone: str | Backbone,
    num_classes: int,
    *,
    image_size: tuple[int, int],
    weights: str | os.PathLike[str] | None = "imagenet",
    fine_tune: str = "all",
    batch_norm: str = "train",
    dense: Sequence[int] = (),
    dropout: float = 0.0,
    augment: Sequence[str | keras.layers.Layer] = (),
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-4,
    depth_decay: float = 1.0,
) -> keras.Model:
    """A compiled image classifier: augmentation, preprocessing, backbone, average pooling, dense layers, softmax.

    The model takes (batch, height, width, 3) RGB images in [0, 255], uint8 or float, and gives (batch, num_classes)
    probabilities, float32 under every dtype policy. It is made of stock Keras layers: its ``.keras`` file loads in a
    process without dlspark (with `depth_decay` the optimizer needs ``import dlspark.models.optimizers``; a file loaded with
    ``compile=False`` needs nothing). The backbone is the layer ``model.get_layer(backbone)``. Labels are class indices;
    the loss is sparse categorical cross-entropy, the metric accuracy, the optimizer Adam.

    The order of the weights does not depend on `fine_tune`: to train in two phases, build one classifier for each and call
    ``second.set_weights(first.get_weights())`` between them.

    Args:
        backbone: a name of `BACKBONES`, or a `Backbone` of your own.
        num_classes: 2 or more.
        image_size: (height, width) in pixels.
        weights: "imagenet"; a file with the weights of the backbone without its top (``.h5``, ``.weights.h5`` or
            ``.keras``, of which only weights are read); None for random ones.
        fine_tune: "all"; "head": the backbone is frozen; "top:N": of the backbone's layers that carry weights
            (convolutions and batch normalisations, each counted) the N nearest the output train. Frozen layers run as at
            prediction, in training too: batch normalisation uses its stored statistics and does not update them, and
            drop-connect (EfficientNetV2) is off.
        batch_norm: of the backbone's batch normalisations. "train": each worker normalises with its own rows. "frozen": they
            keep their statistics, scale and offset, and run as at prediction; for small batches, and for weights whose
            statistics do not suit training. "synchronized": those that train have ``synchronized=True``, so several
            workers normalise with the rows of the whole step and train as one process does. That needs Keras on
            TensorFlow, also to load the model later, and a backend with synchronous gradients.
        dense: widths of relu layers between pooling and output, in order.
        dropout: fraction dropped before the output layer, in [0, 1).
        augment: names or layers, see `dlspark.models.augment.augmentation_layers`.
        learning_rate: of the head, and of all layers while `depth_decay` is 1.
        depth_decay: in (0, 1]. The backbone's last block learns at depth_decay times the rate, the block below it at
            depth_decay² times, and so on down to the stem: layer-wise decay as in BEiT (arXiv:2106.08254), by residual
            block. ResNet50 has 17 blocks, Xception and MobileNet 14, MobileNetV2 19, EfficientNetV2B0 23.

    Raises:
        ConfigError: a setting that cannot work, or weights that cannot be found or do not fit.
    """
    options = ClassifierOptions(
        backbone=backbone,
        weights=weights,
        fine_tune=fine_tune,
        batch_norm=batch_norm,
        dense=dense,
        dropout=dropout,
        augment=augment,
        learning_rate=learning_rate,
        depth_decay=depth_decay,
    )
    return build_from_options(options, num_classes, image_size=image_size)


def build_from_options(options: ClassifierOptions, num_classes: int, *, image_size: tuple[int, int]) -> keras.Model:
    """`build_classifier` with its options in one object."""
    backbone, size = check_backbone(options.backbone, image_size)
    num_classes = whole_number("num_classes", num_classes, least=2)

    import keras

    if keras.config.image_data_format() != "channels_last":
        raise ConfigError(
            "Expected Keras' image_data_format 'channels_last', as images are (height, width, channels); got "
            "'channels_first'. Call keras.config.set_image_data_format('channels_last') first."
        )
    if options.batch_norm == "synchronized" and keras.backend.backend() != "tensorflow":
        raise ConfigError(
            f"Expected Keras on TensorFlow for batch_norm='synchronized'; got {keras.backend.backend()!r}, for which Keras "
            "has no synchronized batch normalisation. Set KERAS_BACKEND=tensorflow, or use batch_norm='train'."
        )
    augmentation = augmentation_layers(options.augment)
    file = cached_imagenet_file(backbone, size) if options.weights == "imagenet" else options.weights
    network = backbone.construct(size)
    network.name = backbone.name
    if file is not None:
        from dlspark.model_files import load_weights  # here, so that the commands start fast

        hint = f"Give a file saved from a {backbone.name} with include_top=False."
        load_weights(network, Path(file), hint=hint)
    multipliers = _multipliers(network, backbone, options.depth_decay) if options.depth_decay != 1.0 else {}
    _freeze(network, options.fine_tune)
    for layer in batch_normalisations(network):
        if options.batch_norm == "frozen":
            layer.trainable = False
        elif options.batch_norm == "synchronized" and layer.trainable:
            layer.synchronized = True

    # float32 from the pixels to the backbone: under mixed precision a mean of 103.939 would be rounded to 104.
    inputs = keras.Input((*size, 3), dtype="float32", name="images")
    x = inputs
    for layer in augmentation:
        # The default of Keras' random layers is training=True, so without this a plain ``model(x)`` would augment. fit still
        # turns them on, because the argument of the model's call overrides this one (keras 3.15.1).
        x = layer(x, training=False) if "training" in signature(layer.call).parameters else layer(x)
    x = network(backbone.preprocess(x))
    x = keras.layers.GlobalAveragePooling2D(name="pooling")(x)
    for number, width in enumerate(options.dense, start=1):
        x = keras.layers.Dense(width, activation="relu", name=f"dense_{number}")(x)
    if options.dropout:
        x = keras.layers.Dropout(options.dropout, seed=draw_seed(), name="dropout")(x)
    outputs = keras.layers.Dense(num_classes, activation="softmax", dtype="float32", name="probabilities")(x)
    model = keras.Model(inputs, outputs, name=f"{backbone.name}_classifier")
    optimizer = _optimizer(options.learning_rate, multipliers)
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _freeze(network: keras.Model, fine_tune: str) -> None:
    """Leave trainable all of the network, nothing, or its last N layers that carry weights."""
    import keras

    if fine_tune == "all":
        return
    weighted = [layer for layer in network.layers if layer.weights]
    top = 0 if fine_tune == "head" else int(fine_tune.removeprefix("top:"))
    if top > len(weighted):
        raise ConfigError(
            f"Expected N of at most {len(weighted)} in fine_tune='top:N', as many layers of {network.name} carry weights; "
            f"got {fine_tune!r}. Write 'top:{len(weighted)}' or 'all'."
        )
    network.trainable = top > 0
    for layer in network.layers[: network.layers.index(weighted[-top]) if top else None]:
        layer.trainable = False  # a batch normalisation then ignores training=True, too
        if isinstance(layer, keras.layers.Dropout):
            # Calling the frozen part with training=False is not enough: the outer call's True overrides it (3.15.1).
            layer.rate = 0.0


def _multipliers(network: keras.Model, backbone: Backbone, decay: float) -> dict[str, float]:
    """The factor on the learning rate of each variable of the backbone, by `Variable.path`."""
    blocks = backbone.blocks(network)
    return {
        variable.path: decay ** (len(blocks) - position)
        for position, block in enumerate(blocks)
        for layer in block
        for variable in layer.trainable_variables
    }


def _optimizer(learning_rate: Any, multipliers: dict[str, float]) -> keras.optimizers.Optimizer:
    if multipliers:
        from dlspark.models.optimizers import DepthDecayAdam

        return DepthDecayAdam(learning_rate, multipliers=multipliers)
    import keras

    return keras.optimizers.Adam(learning_rate)
