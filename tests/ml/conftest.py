"""Pictures and a tiny network for them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIZE = (8, 8)


def picture(number: int) -> bytes:
    """A PNG of 10 x 12 pixels, mostly red for even numbers and mostly blue for odd ones."""
    colour = (200, 60, 40) if number % 2 == 0 else (40, 60, 200)
    pixels = np.clip(np.random.default_rng(number).normal(colour, 30, (10, 12, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Sixty-four of these pictures."""
    return [picture(number) for number in range(64)]


@pytest.fixture(scope="session")
def classifier() -> Any:
    """A network for RGB images of 8 x 8 pixels, with four features in the layer "pooling" and two probabilities."""
    import keras

    keras.utils.set_random_seed(3)
    layers = [
        keras.Input((*SIZE, 3)),
        keras.layers.Rescaling(1 / 127.5, offset=-1.0),
        keras.layers.Conv2D(4, 3, activation="relu", name="maps"),
        keras.layers.GlobalAveragePooling2D(name="pooling"),
        keras.layers.Dense(2, activation="softmax", name="probabilities"),
    ]
    return keras.Sequential(layers, name="tiny")
