"""A custom metric that several workers can merge: its variables are sums over rows, and it declares that.

python custom_metric.py [BACKEND [WORKERS]]
"""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
from keras import ops

from dlspark import Trainer


@keras.saving.register_keras_serializable(package="examples")
class MeanRecall(keras.metrics.Metric):
    """Recall averaged over classes: rare classes count as much as common ones."""

    merge = "sum"  # the workers' counts are added; without this line, several workers are an error

    def __init__(self, num_classes: int, name: str = "mean_recall", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.num_classes = num_classes
        self.rows = self.add_weight(shape=(num_classes,), initializer="zeros", name="rows")
        self.hits = self.add_weight(shape=(num_classes,), initializer="zeros", name="hits")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth = ops.one_hot(ops.reshape(ops.cast(y_true, "int32"), (-1,)), self.num_classes)
        guess = ops.one_hot(ops.argmax(y_pred, axis=-1), self.num_classes)
        self.rows.assign_add(ops.sum(truth, axis=0))
        self.hits.assign_add(ops.sum(truth * guess, axis=0))

    def result(self) -> Any:
        return ops.mean(self.hits / ops.maximum(self.rows, 1.0))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_classes": self.num_classes}


def main(backend: str = "local", workers: str = "1") -> None:
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).normal(size=(900, 4)).astype(np.float32)
    y = (x[:, 0] > 1.0).astype(np.int32)  # one row in six is of class 1
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy", metrics=["accuracy", MeanRecall(2)])
    result = Trainer(backend, num_workers=int(workers)).fit(model, (x, y), epochs=5, batch_size=32, seed=7)
    print(", ".join(f"{name} {values[-1]:.3f}" for name, values in result.history.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
