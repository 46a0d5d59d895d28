"""Augmentation as Keras layers: part of the model, active in training only, the same on every engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlspark.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import keras

#: What each name does. A name with a number takes it after a colon: ``"rotation:0.1"``.
AUGMENTATIONS = {
    "flip": "left-right and top-bottom, each on its own with probability 1/2",
    "horizontal_flip": "left-right with probability 1/2",
    "vertical_flip": "top-bottom with probability 1/2",
    "rotation": "by an angle drawn uniformly from -F·2π … F·2π; F is 0.99 unless given as rotation:F",
}

# Keras' "horizontal_and_vertical" draws one number for both axes, so it only ever turns by 180°
# (RandomFlip._flip_inputs, keras 3.15.1). Two layers give all four pictures.
_FLIPS = {"flip": ("horizontal", "vertical"), "horizontal_flip": ("horizontal",), "vertical_flip": ("vertical",)}


def augmentation_layers(augment: Sequence[str | keras.layers.Layer]) -> list[keras.layers.Layer]:
    """Keras layers that change (batch, height, width, 3) images in [0, 255] at random.

    They are for `build_classifier`, which puts them into the model such that they act with ``training=True`` only.
    Those made from names compute in float32 whatever the dtype policy, because bfloat16 cannot hold the coordinates of
    a 300-pixel image; a Keras layer is taken as it is. Each name gets a seed here and now, from Python's ``random``
    (``keras.utils.set_random_seed`` fixes it), and the seed is part of the layer's configuration: a saved copy draws
    what the original draws.

    A rotated image is filled by reflection: nothing is lost of the middle, no value appears which the image did not
    have, and the corners look like the image's own border (skin, or the black around a cell). Constant black corners
    would exist in training only, which shifts batch statistics and teaches the network to look at them.

    Args:
        augment: names of `AUGMENTATIONS`, or Keras layers, in the order in which they act.

    Raises:
        ConfigError: an unknown name, a bad factor, or something that is neither a name nor a layer.
    """
    import keras

    if isinstance(augment, str) or not isinstance(augment, Sequence):
        raise ConfigError(
            f"augment must be a sequence of names or Keras layers; got {augment!r}. Write for instance ('flip', 'rotation')."
        )
    layers: list[keras.layers.Layer] = []
    for item in augment:
        if isinstance(item, keras.layers.Layer):
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


def check_augment(augment: Sequence[str]) -> None:
    """Refuse words that `augmentation_layers` would refuse, without loading Keras.

    Raises:
        ConfigError: the first of them.
    """
    for item in augment:
        _parse(item)


def _parse(item: object) -> tuple[str, float]:
    if not isinstance(item, str):
        raise ConfigError(
            f"augment holds names and Keras layers; got {item!r} of type {type(item).__name__}. "
            f"Known names: {', '.join(AUGMENTATIONS)}."
        )
    name, colon, text = item.partition(":")
    if name not in AUGMENTATIONS:
        raise ConfigError(f"Unknown augmentation {item!r}. {did_you_mean(name, AUGMENTATIONS)}")
    if not colon:
        return name, 0.99  # nearly the full circle both ways: the published skin-lesion study's range
    if name != "rotation":
        raise ConfigError(f"{name!r} takes no number; got {item!r}. Write {name!r}.")
    try:
        factor = float(text)
    except ValueError:
        factor = float("nan")
    if not 0.0 < factor <= 1.0:
        raise ConfigError(
            f"The number after 'rotation:' must be above 0 and at most 1, a fraction of the full circle; got {item!r}. "
            "Write for instance 'rotation:0.1' for up to 36 degrees either way."
        )
    return name, factor


def draw_seed() -> int:
    """A seed for a random layer, drawn from Python's ``random``."""
    # What keras.random.SeedGenerator does for seed=None, except that the number is then written into the saved model.
    return random.randint(1, 10**9)
