"""Augmentation: what each name does, when it acts, and what is refused."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dlspark.errors import ConfigError
from dlspark.models.augment import AUGMENTATIONS, augmentation_layers

keras = pytest.importorskip("keras")


def act(layers: list[Any], images: Any) -> Any:
    for layer in layers:
        images = layer(images, training=True)
    return np.asarray(images)


@pytest.fixture
def images() -> Any:
    return np.random.default_rng(0).integers(0, 256, (200, 6, 6, 3)).astype("uint8")


def test_importing_it_loads_no_keras() -> None:
    code = "import sys, dlspark.models.augment, dlspark.models; sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("flip", {"same", "left-right", "top-bottom", "both"}),
        ("horizontal_flip", {"same", "left-right"}),
        ("vertical_flip", {"same", "top-bottom"}),
    ],
)
def test_a_flip_gives_every_picture_it_names_equally_often(name: str, pictures: set[str], images: Any) -> None:
    flipped = act(augmentation_layers([name]), images)
    options = {
        "same": images,
        "left-right": images[:, :, ::-1],
        "top-bottom": images[:, ::-1],
        "both": images[:, ::-1, ::-1],
    }
    counts = {key: int(np.all(flipped == value, axis=(1, 2, 3)).sum()) for key, value in options.items()}
    assert sum(counts.values()) == len(images)
    assert {key for key, count in counts.items() if count} == pictures
    assert min(count for count in counts.values() if count) > 0.6 * len(images) / len(pictures)


def test_rotation_is_over_the_full_circle_and_stays_within_the_pixels(images: Any) -> None:
    (layer,) = augmentation_layers(["rotation"])
    angles = np.asarray(layer.get_random_transformation(np.zeros((4000, 6, 6, 3), "float32"))["angle"])
    assert tuple(layer.factor) == (-0.99, 0.99)
    assert layer.fill_mode == "reflect"
    assert angles.min() < -0.97 * 360
    assert angles.max() > 0.97 * 360
    assert np.histogram(angles, bins=4)[0].min() > 850  # uniform: 1,000 expected in each
    turned = act([layer], np.full((8, 6, 6, 3), 200, "uint8"))
    np.testing.assert_allclose(turned, 200.0, rtol=1e-6)  # no black corners
    assert not np.array_equal(act([layer], images), images)


def test_a_rotation_takes_a_factor() -> None:
    (layer,) = augmentation_layers(("rotation:0.1",))
    assert tuple(layer.factor) == (-0.1, 0.1)


def test_layers_are_taken_as_they_are_and_in_order() -> None:
    mine = keras.layers.RandomZoom(0.1)
    first, *flips, last = augmentation_layers([mine, "flip", "rotation"])
    assert first is mine
    assert [layer.mode for layer in flips] == ["horizontal", "vertical"]
    assert isinstance(last, keras.layers.RandomRotation)
    assert augmentation_layers(()) == []


def test_names_compute_in_float32_under_mixed_precision(images: Any) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layers = augmentation_layers(tuple(AUGMENTATIONS))
    finally:
        keras.config.set_dtype_policy(before)
    assert {layer.compute_dtype for layer in layers} == {"float32"}


def test_a_copy_draws_what_the_original_draws(images: Any) -> None:
    layers = augmentation_layers(["flip", "rotation"])
    copies = [type(layer).from_config(layer.get_config()) for layer in layers]
    np.testing.assert_array_equal(act(layers, images), act(copies, images))


def test_seeds_follow_pythons_random() -> None:
    def seeds() -> list[int]:
        random.seed(5)
        return [layer.seed for layer in augmentation_layers(["flip", "rotation"])]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("flip", "Expected augment to be a sequence of names"),
        (None, "sequence of names"),
        (("rotaton",), "Did you mean 'rotation'"),
        (("zoom",), "Known: flip, horizontal_flip, rotation, vertical_flip"),
        (("flip:0.5",), "without a number"),
        (("rotation:",), "above 0 and at most 1"),
        (("rotation:1.5",), "above 0 and at most 1"),
        (("rotation:nan",), "above 0 and at most 1"),
        (("rotation:-0.1",), "above 0 and at most 1"),
        ((3,), "of type int"),
    ],
)
def test_refusals(augment: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        augmentation_layers(augment)  # type: ignore[arg-type]
