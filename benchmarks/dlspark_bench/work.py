"""The model and images of a scenario, equal for all subjects and machines."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark import ConfigError, ImageDataset, build_classifier
from dlspark_bench.scenario import Scenario

CLASSES = 10


def images(scenario: Scenario, rows: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return uint8 (rows, size, size, 3) and int32 (rows,): the scenario's dataset, or noise with a tint per class.

    Raises:
        ConfigError: the dataset has too few images, or images of another size.
    """
    if scenario.data is not None:
        return _prepared(scenario, rows)
    draw = np.random.default_rng(scenario.seed)
    labels = draw.integers(0, CLASSES, rows, np.int32)
    pixels = draw.integers(0, 128, (rows, scenario.image_size, scenario.image_size, 3), np.uint8)
    tints = np.random.default_rng(1).integers(0, 128, (CLASSES, 1, 1, 3), np.uint8)
    return pixels + tints[labels], labels


def _prepared(scenario: Scenario, rows: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    dataset = ImageDataset.open(str(scenario.data))
    train = dataset.train
    size = (scenario.image_size, scenario.image_size)
    if train is None or train.rows < rows or dataset.image_size != size:
        raise ConfigError(
            f"Expected at least {rows:,} training images of {size} in {scenario.data!r}; got "
            f"{train.rows if train else 0:,} of {dataset.image_size}. Change rows_per_core or image_size."
        )
    x = np.empty((rows, *size, 3), np.uint8)
    y = np.empty(rows, np.int32)
    filled = 0
    for images_, labels in train.batches(256, seed=scenario.seed):
        some = min(len(labels), rows - filled)
        x[filled : filled + some], y[filled : filled + some] = images_[:some], labels[:some]
        filled += some
        if filled == rows:
            break
    return x, y


def classes(scenario: Scenario) -> int:
    """Return the number of classes."""
    return CLASSES if scenario.data is None else ImageDataset.open(scenario.data).num_classes


def model(scenario: Scenario) -> Any:
    """Return the compiled Keras model, initialised from the scenario's seed."""
    import keras

    keras.config.set_dtype_policy(scenario.dtype)
    keras.utils.set_random_seed(scenario.seed)
    size = (scenario.image_size, scenario.image_size)
    if scenario.model == "small_cnn":
        built = _small_cnn(size, classes(scenario))
        optimizer: Any = keras.optimizers.Adam(1e-3)
    else:
        built = build_classifier(
            scenario.model, classes(scenario), image_size=size, weights=None, fine_tune=scenario.fine_tune
        )
        optimizer = built.optimizer
    built.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=scenario.jit_compile)
    return built


def gradient_bytes(built: Any) -> int:
    """Return the bytes of one step's gradients: every trainable parameter in float32."""
    return 4 * sum(prod(variable.shape) for variable in built.trainable_variables)


def flops_per_image(built: Any) -> int:
    """Return the floating-point operations of one training step, per image.

    A multiply-add counts as two. The forward pass counts convolutions and dense layers, which are all but a few percent. In
    the backward pass, the gradient of a layer's input costs as much as its forward pass, if a layer below is trained; so
    does the gradient of its kernel, if it is trained (Griewank and Walther, Evaluating Derivatives, 2008, chapter 3).
    """
    total, trained_below = 0, False
    for layer in _leaves(built):
        forward = _forward(layer)
        trained = bool(layer.trainable_weights)
        total += forward * (1 + trained + trained_below)
        trained_below = trained_below or trained
    return total


def _forward(layer: Any) -> int:
    import keras

    kernel = getattr(layer, "kernel", None)
    if kernel is None or isinstance(layer, keras.layers.SeparableConv2D):
        parts = [getattr(layer, name, None) for name in ("depthwise_kernel", "pointwise_kernel")]
        return sum(2 * prod(part.shape) * _places(layer) for part in parts if part is not None)
    return 2 * prod(kernel.shape) * _places(layer)


def _places(layer: Any) -> int:
    """Return how often a kernel is applied per image: the number of output pixels, or 1 for a dense layer."""
    return prod(layer.output.shape[1:-1])


def _leaves(built: Any) -> list[Any]:
    return [leaf for layer in built.layers for leaf in (_leaves(layer) if hasattr(layer, "layers") else [layer])]


def _small_cnn(size: tuple[int, int], outputs: int) -> Any:
    import keras

    return keras.Sequential(
        [
            keras.layers.Input((*size, 3), dtype="uint8"),
            keras.layers.Rescaling(1 / 127.5, offset=-1),
            keras.layers.Conv2D(32, 3, activation="relu", padding="same"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu", padding="same"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(128, 3, activation="relu", padding="same"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(outputs, activation="softmax", dtype="float32"),
        ]
    )
