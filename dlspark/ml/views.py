"""Keras layers for kept features: one draws views of images, one selects a view. Importing this module imports keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dlspark.worker import seed_variables


@keras.saving.register_keras_serializable(package="dlspark")
class DrawnViews(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
    """The outputs of a network for several random draws of each image.

    The network is called with ``training=True``, also at prediction, so that its random layers act. Their draws depend on
    the seed, the view, the layer and the pixels of the batch, and not on earlier draws: the same rows give the same views
    in any process and any order.

    Args:
        network: from images to a vector.
        views: number of draws.
        seed: of the draws, 0 or more.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, network: keras.Model, views: int, seed: int, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})  # bfloat16 would round the pixels
        self.network = network
        self.views = views
        self.seed = seed

    def call(self, images: Any) -> Any:
        """From integers of shape (rows, height, width, 3) to float32 of shape (rows, views · width), view by view."""
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
        """The layer with these arguments."""
        return cls(keras.saving.deserialize_keras_object(config.pop("network")), **config)


@keras.saving.register_keras_serializable(package="dlspark")
class OneView(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
    """Selects one view of each row: in training a random one at each step, otherwise the first.

    Args:
        width: of a view.
        seed: of the draws.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, width: int, seed: int, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.width = width
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, views: Any, training: bool = False) -> Any:
        """From (rows, views · width), view by view and with any number of views, to (rows, width)."""
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
