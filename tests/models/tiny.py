"""A backbone from outside, small enough to train in a moment."""

from __future__ import annotations

from typing import Any

from dlspark.models import Backbone


def tiny(*, input_shape: tuple[int, int, int], **_: object) -> Any:
    import keras

    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 3, strides=4, name="stem_conv")(inputs)
    return keras.Model(inputs, keras.layers.Conv2D(5, 1, name="block1_conv")(x))


TINY = Backbone("tiny", tiny, "scale", 8, r"stem|block\d+")
