"""NumPy arrays with two named inputs and a weight per row. Training updates the caller's own model."""

from __future__ import annotations

import keras
import numpy as np

from dlspark import Trainer


def flowers(rows: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return (x, y, sample_weight); x is a dict with one array per input of the model."""
    draw = np.random.default_rng(seed)
    size = draw.normal(size=(rows, 2)).astype(np.float32)
    colour = draw.normal(size=(rows, 3)).astype(np.float32)
    score = size[:, 0] + colour[:, 0]
    weight = np.where(np.abs(score) < 0.1, 0.5, 1.0).astype(np.float32)  # labels near the boundary are uncertain
    return {"size": size, "colour": colour}, (score > 0).astype(np.int32), weight


def classifier() -> keras.Model:
    keras.utils.set_random_seed(1)
    size, colour = keras.Input((2,), name="size"), keras.Input((3,), name="colour")
    x = keras.layers.Concatenate()([size, colour])
    x = keras.layers.Dense(16, activation="relu")(x)
    model = keras.Model({"size": size, "colour": colour}, keras.layers.Dense(2, activation="softmax")(x))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main() -> None:
    model = classifier()
    result = Trainer("local").fit(
        model, flowers(800, seed=0), validation_data=flowers(200, seed=1), epochs=5, batch_size=32, seed=7
    )
    x, y, _ = flowers(200, seed=2)
    right = model.predict(x, verbose=0).argmax(axis=1) == y
    print(f"validation accuracy {result.history['val_accuracy'][-1]:.3f}, on new rows {right.mean():.3f}")


if __name__ == "__main__":
    main()
