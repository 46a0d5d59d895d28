"""Augmentation as Keras layers: part of the model, active in training only, the same on every engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlspark.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import keras

#: The effect of each name. A number is given after a colon: ``"rotation:0.1"``.
AUGMENTATIONS = {
    "flip": "left-right and top-bottom, each on its own with probability 1/2",
    "horizontal_flip": "left-right with probability 1/2",
    "vertical_flip": "top-bottom with probability 1/2",
    "rotation": "by an angle drawn uniformly from -F·2π … F·2π; rotation:F sets F, 0.99 by default",
}

# Keras' "horizontal_and_vertical" draws one number for both axes, so it gives two of the four pictures
# (RandomFlip._flip_inputs, keras 3.15.1). Two layers give all four.
_FLIPS = {"flip": ("horizontal", "vertical"), "horizontal_flip": ("horizontal",), "vertical_flip": ("vertical",)}


def augmentation_layers(augment: Sequence[str | keras.layers.Layer]) -> list[keras.layers.Layer]:
    """Keras layers that change (batch, height, width, 3) images in [0, 255] at random.

    They are for `build_classifier`, which calls them such that they act with ``training=True`` only. Layers made from names
    compute in float32 under every dtype policy, because bfloat16 cannot hold the coordinates of a 300-pixel image; a Keras
    layer is used as given. Each name draws a seed from Python's ``random`` (``keras.utils.set_random_seed`` fixes it), and
    the seed is part of the layer's configuration: a saved copy draws the same numbers as the original.

    Rotation fills by reflection: the middle is kept, no pixel value is new, and the corners look like the image's own border
    (skin, or the black around a cell). Constant black corners would exist in training only, which shifts batch statistics
    and teaches the network to look at them.

    Args:
        augment: names of `AUGMENTATIONS`, or Keras layers, in the order in which they act.

    Raises:
        ConfigError: an unknown name, a bad factor, or an item that is neither a name nor a layer.
    """
    check_augment(augment)
    import keras

    layers: list[keras.layers.Layer] = []
    for item in augment:
        if not isinstance(item, str):
            layers.append(item)
            continue
        name, factor = _parse(item)
        if name == "rotation":
            layers.append(
                keras.layers.RandomRotation(
                    factor,
                    fill_mode="reflect",
                    interpolation="bilinear",
                    seed=draw_seed(),
                    dtype="float32",
                    name=f"augment_{len(layers)}_rotation",
                )
            )
            continue
        for mode in _FLIPS[name]:
            layer = f"augment_{len(layers)}_{mode}_flip"
            layers.append(keras.layers.RandomFlip(mode, seed=draw_seed(), dtype="float32", name=layer))
    return layers


def check_augment(augment: object) -> None:
    """Reject items that `augmentation_layers` cannot use. Names are checked without loading Keras.

    Raises:
        ConfigError: the first of them.
    """
    if isinstance(augment, str) or not isinstance(augment, Sequence):
        raise ConfigError(
            f"Expected augment to be a sequence of names or Keras layers; got {augment!r}. "
            "Write for instance ('flip', 'rotation')."
        )
    for item in augment:
        if isinstance(item, str):
            _parse(item)
            continue
        import keras

        if not isinstance(item, keras.layers.Layer):
            raise ConfigError(
                f"Expected names or Keras layers in augment; got {item!r} of type {type(item).__name__}. "
                f"Known names: {', '.join(AUGMENTATIONS)}."
            )


def _parse(item: str) -> tuple[str, float]:
    name, colon, text = item.partition(":")
    if name not in AUGMENTATIONS:
        raise ConfigError(f"Unknown augmentation {item!r}. {did_you_mean(name, AUGMENTATIONS)}")
    if not colon:
        return name, 0.99  # nearly the full circle both ways: the range of the published skin-lesion study
    if name != "rotation":
        raise ConfigError(f"Expected {name!r} without a number; got {item!r}.")
    try:
        factor = float(text)
    except ValueError:
        factor = float("nan")
    if not 0.0 < factor <= 1.0:
        raise ConfigError(
            f"Expected a fraction of the full circle above 0 and at most 1 after 'rotation:'; got {item!r}. "
            "Write for instance 'rotation:0.1' for up to 36 degrees either way."
        )
    return name, factor


def draw_seed() -> int:
    """A seed for a random layer, drawn from Python's ``random``."""
    # As keras.random.SeedGenerator does for seed=None, but here the saved model holds the number.
    return random.randint(1, 10**9)
