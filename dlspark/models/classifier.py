"""Classifiers from the backbones of keras.applications: what is loaded, what trains, and how fast at which depth."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from inspect import signature
from numbers import Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError, did_you_mean
from dlspark.model_files import load_weights
from dlspark.models.augment import augmentation_layers, draw_seed
from dlspark.models.backbones import BACKBONES, Backbone, blocks, construct, imagenet_file, preprocess

if TYPE_CHECKING:
    import keras

_WEIGHT_SUFFIXES = (".h5", ".keras")


def build_classifier(
    backbone: str,
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

    The order of the weights does not depend on `fine_tune`: training in two phases is ``second.set_weights(
    first.get_weights())`` with one classifier for each phase.

    Args:
        backbone: a name of `BACKBONES`.
        num_classes: 2 or more.
        image_size: (height, width) in pixels.
        weights: "imagenet"; a file with the weights of the backbone without its top (``.h5``, ``.weights.h5`` or
            ``.keras``, of which only weights are read); None for random ones.
        fine_tune: "all"; "head": the backbone is frozen; "top:N": of the backbone's layers that carry weights
            (convolutions and batch normalisations, each counted) the N nearest the output train. What is frozen runs as
            it does at prediction, in training too: batch normalisation uses its stored statistics and leaves them as
            they are, and drop-connect (EfficientNetV2) is off.
        batch_norm: of the layers that train: "train", or "frozen": the backbone's batch normalisations are left as they
            come, statistics, scale and offset, and run as they do at prediction. For small batches, and for files whose
            statistics do not suit training.
        dense: widths of relu layers between pooling and output, in order.
        dropout: fraction dropped before the output layer, in [0, 1).
        augment: names or layers, see `dlspark.models.augment.augmentation_layers`.
        learning_rate: of the head, and of everything while `depth_decay` is 1.
        depth_decay: in (0, 1]. The backbone's last block learns at depth_decay times the rate, the block below it at
            depth_decay² times, and so on down to the stem: layer-wise decay as in BEiT (arXiv:2106.08254), by residual
            block. ResNet50 has 17 blocks, Xception and MobileNet 14, MobileNetV2 19, EfficientNetV2B0 23.

    Raises:
        ConfigError: a setting that cannot work, or weights that cannot be found or do not fit.
    """
    spec, size = check_backbone(backbone, image_size)
    top = _check_fine_tune(fine_tune)
    if batch_norm not in ("train", "frozen"):
        raise ConfigError(f"batch_norm must be 'train' or 'frozen'; got {batch_norm!r}.")
    num_classes = _whole("num_classes", num_classes, least=2)
    if isinstance(dense, str) or not isinstance(dense, Sequence):
        raise ConfigError(f"dense must be a sequence of widths; got {dense!r}. Write for instance (512, 128).")
    widths = [_whole("each width in dense", width, least=1) for width in dense]
    dropout = _number("dropout", dropout, "at least 0 and below 1", lambda value: 0.0 <= value < 1.0, 0.2)
    depth_decay = _number("depth_decay", depth_decay, "above 0 and at most 1", lambda value: 0.0 < value <= 1.0, 0.9)
    if depth_decay != 1.0 and top == 0:
        raise ConfigError(
            f"depth_decay={depth_decay} expects a backbone that trains; got fine_tune='head', which freezes it. "
            "Leave depth_decay at 1.0, or choose fine_tune='all' or 'top:N'."
        )
    file = _check_weights(weights)

    import keras

    if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        learning_rate = _number("learning_rate", learning_rate, "a schedule or above 0", lambda value: value > 0.0, 1e-4)
    if keras.config.image_data_format() != "channels_last":
        raise ConfigError(
            "dlspark's images are (height, width, channels); got Keras' image_data_format 'channels_first'. "
            "Call keras.config.set_image_data_format('channels_last') first."
        )
    augmentation = augmentation_layers(augment)
    if weights == "imagenet":
        file = imagenet_file(spec, size)
    network = construct(spec, size)
    network.name = backbone
    if file is not None:
        hint = f"Give a file saved from keras.applications' {backbone} with include_top=False."
        load_weights(network, file, hint=hint)
    multipliers = _multipliers(network, spec, depth_decay) if depth_decay != 1.0 else {}
    _freeze(network, top)
    if batch_norm == "frozen":
        for layer in network.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False

    # float32 from the pixels to the backbone: under mixed precision a mean of 103.939 would be rounded to 104.
    inputs = keras.Input((*size, 3), dtype="float32", name="images")
    x = inputs
    for layer in augmentation:
        # Keras' random layers have training=True as their default, so without this a plain ``model(x)`` would augment;
        # fit still switches them on, for the value given to the model's call overrides this one (keras 3.15.1).
        x = layer(x, training=False) if "training" in signature(layer.call).parameters else layer(x)
    x = network(preprocess(x, spec))
    x = keras.layers.GlobalAveragePooling2D(name="pooling")(x)
    for number, width in enumerate(widths, start=1):
        x = keras.layers.Dense(width, activation="relu", name=f"dense_{number}")(x)
    if dropout:
        x = keras.layers.Dropout(dropout, seed=draw_seed(), name="dropout")(x)
    outputs = keras.layers.Dense(num_classes, activation="softmax", dtype="float32", name="probabilities")(x)
    model = keras.Model(inputs, outputs, name=f"{backbone}_classifier")
    model.compile(
        optimizer=_optimizer(learning_rate, multipliers), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def check_backbone(backbone: object, image_size: object) -> tuple[Backbone, tuple[int, int]]:
    """The backbone of that name, and (height, width).

    Raises:
        ConfigError: there is no such backbone, or it cannot take images of that size.
    """
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise ConfigError(f"Unknown backbone {backbone!r}. {did_you_mean(str(backbone), BACKBONES)}")
    spec = BACKBONES[backbone]
    if isinstance(image_size, str) or not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise ConfigError(f"image_size must be (height, width); got {image_size!r}. Write for instance (224, 224).")
    height, width = (
        _whole("image_size", side, least=spec.min_size, of=f" of pixels that {backbone} can take") for side in image_size
    )
    return spec, (height, width)


def _check_fine_tune(fine_tune: object) -> int | None:
    """How many layers of the backbone train: None is all of them."""
    if fine_tune == "all":
        return None
    if fine_tune == "head":
        return 0
    match = re.fullmatch(r"top:([1-9]\d*)", fine_tune) if isinstance(fine_tune, str) else None
    if match is None:
        raise ConfigError(
            f"fine_tune must be 'all', 'head' or 'top:N' with N ≥ 1; got {fine_tune!r}. "
            "Write for instance 'top:30' to train the backbone's last 30 layers that carry weights."
        )
    return int(match[1])


def _check_weights(weights: object) -> Path | None:
    if weights is None or weights == "imagenet":
        return None
    if not isinstance(weights, (str, os.PathLike)):
        raise ConfigError(f"weights must be 'imagenet', a file or None; got {weights!r}.")
    file = Path(weights).expanduser()
    if not file.is_file():
        raise ConfigError(f"weights must be 'imagenet', a file or None; got {str(file)!r}, and there is no such file.")
    if file.suffix not in _WEIGHT_SUFFIXES:
        raise ConfigError(
            f"A weights file ends in {' or '.join(_WEIGHT_SUFFIXES)}; got {file.name!r}. Use Keras' save_weights."
        )
    return file


def _whole(what: str, value: Any, *, least: int, of: str = "") -> int:
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ConfigError(f"{what} must be a whole number{of}; got {value!r}. Give {least} or more.")
    return number


def _number(what: str, value: Any, expected: str, accept: Callable[[float], bool], example: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not accept(float(value)):
        raise ConfigError(f"{what} must be {expected}; got {value!r}. Give for instance {example}.")
    return float(value)


def _freeze(network: keras.Model, top: int | None) -> None:
    """Leave the last ``top`` layers that carry weights trainable; all with None, none with 0."""
    import keras

    if top is None:
        return
    weighted = [layer for layer in network.layers if layer.weights]
    if top > len(weighted):
        raise ConfigError(
            f"fine_tune='top:N' expects N of at most {len(weighted)}, the layers of {network.name} that carry weights; "
            f"got 'top:{top}'. Write 'top:{len(weighted)}' or 'all'."
        )
    network.trainable = top > 0
    for layer in network.layers[: network.layers.index(weighted[-top]) if top else None]:
        layer.trainable = False  # which also makes a batch normalisation ignore training=True
        if isinstance(layer, keras.layers.Dropout):
            # Calling the frozen part with training=False is not enough: the outer call's True overrides it (3.15.1).
            layer.rate = 0.0


def _multipliers(network: keras.Model, spec: Backbone, decay: float) -> dict[str, float]:
    """The factor on the learning rate of each variable of the backbone, by `Variable.path`."""
    found = blocks(network, spec.block)
    return {
        variable.path: decay ** (len(found) - position)
        for position, block in enumerate(found)
        for layer in block
        for variable in layer.trainable_variables
    }


def _optimizer(learning_rate: Any, multipliers: dict[str, float]) -> keras.optimizers.Optimizer:
    if multipliers:
        from dlspark.models.optimizers import DepthDecayAdam

        return DepthDecayAdam(learning_rate, multipliers=multipliers)
    import keras

    return keras.optimizers.Adam(learning_rate)
