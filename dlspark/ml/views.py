"""Keras layers of kept features: one draws views of images, one takes a view for training. Importing this imports keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dlspark.worker import seed_variables


@keras.saving.register_keras_serializable(package="dlspark")
class DrawnViews(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
    """What a network gives for images in training, drawn several times.

    The network is called with ``training=True`` even at prediction, so its random layers draw. What they draw depends on
    the seed, the view, the layer and the pixels of the batch, and on nothing that was drawn before: the same rows give the
    same views in whatever process, and in whatever order.

    Args:
        network: from images to a vector.
        views: how many.
        seed: of the draws, 0 or more.
        **kwargs: those of any layer.
    """

    def __init__(self, network: keras.Model, views: int, seed: int, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})  # bfloat16 would round the pixels
        self.network = network
        self.views = views
        self.seed = seed

    def call(self, images: Any) -> Any:
        """From (rows, height, width, 3) of whole numbers to (rows, views · width of a vector), float32, view by view."""
        ops = keras.ops
        content = ops.sum(ops.cast(images, "int32"))
        states = seed_variables(self.network)
        found = []
        for view in range(self.views):
            for number, state in enumerate(states):
                own = int(np.random.SeedSequence([self.seed, view, number]).generate_state(1)[0]) >> 1  # fits an int32
                state.assign(ops.stack([ops.cast(own, state.dtype), ops.cast(content, state.dtype)]))
            found.append(ops.cast(self.network(images, training=True), "float32"))
        return ops.concatenate(found, axis=1)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """(rows, views · width)."""
        return input_shape[0], self.views * self.network.output_shape[1]

    def get_config(self) -> dict[str, Any]:
        """The arguments, as plain data."""
        network = keras.saving.serialize_keras_object(self.network)
        return {**super().get_config(), "network": network, "views": self.views, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DrawnViews:
        """The layer that `get_config` described."""
        return cls(keras.saving.deserialize_keras_object(config.pop("network")), **config)


@keras.saving.register_keras_serializable(package="dlspark")
class OneView(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
    """In training one of a row's views, each row's drawn anew at every step; else the first one.

    Args:
        width: of a view.
        seed: of the draws.
        **kwargs: those of any layer.
    """

    def __init__(self, width: int, seed: int, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.width = width
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, views: Any, training: bool = False) -> Any:
        """From (rows, any number of views · width), view by view, to (rows, width)."""
        if not training:
            return views[:, : self.width]
        rows, values = keras.ops.shape(views)
        count = values // self.width
        drawn = keras.random.randint((rows,), 0, count, seed=self.seed_generator)
        return keras.ops.take(keras.ops.reshape(views, (-1, self.width)), keras.ops.arange(rows) * count + drawn, axis=0)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """(rows, width)."""
        return input_shape[0], self.width

    def get_config(self) -> dict[str, Any]:
        """The arguments, as plain data."""
        return {**super().get_config(), "width": self.width, "seed": self.seed}
