"""What each rank of test_gradient_sync.py runs: models, and a training loop with an exchange between processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from dlspark.data.feed import Feed
from dlspark.data.shard_writer import write_rows
from dlspark.data.shards import ShardedRows
from dlspark.storage.store import Store
from dlspark.testing import toys
from dlspark.worker.gradient_sync import attached
from dlspark.worker.loop import build_before_tracing
from dlspark.worker.session import WorkerSession
from tests.given_models import Given, given

BATCH = 17


class ListSession(WorkerSession):
    """Sums the tensors of all ranks in rank order, so that every rank gets the same bits."""

    def __init__(self, rank: int, world_size: int, box: Any, barrier: Any) -> None:
        super().__init__(rank, world_size)
        self._box = box
        self._barrier = barrier

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        import tensorflow as tf

        totals = tf.nest.flatten(tf.numpy_function(self._exchange, list(tensors), [t.dtype for t in tensors]))
        return [tf.ensure_shape(total, tensor.shape) for total, tensor in zip(totals, tensors, strict=True)]

    def _exchange(self, *mine: Any) -> list[Any]:
        self._box[self.rank] = mine
        self._barrier.wait(60)
        totals = [np.sum(parts, axis=0) for parts in zip(*self._box[: self.world_size], strict=True)]
        self._barrier.wait(60)
        return totals


@dataclass(frozen=True)
class Trained:
    """The result of one rank."""

    weights: list[Any]
    history: dict[str, list[float]]
    replaced: set[str]  # methods of model and optimizer that are still replaced


def train(
    case: str, rank: int, world_size: int, box: Any, barrier: Any, rows: ShardedRows, validation: ShardedRows, options: Any
) -> Trained:
    """Train ``case`` as ``rank``."""
    os.environ["DLSPARK_RANK"] = str(rank)
    each = given(case) if case in GIVEN else Given(CASES[case]())
    model = each.model
    if each.data is not None:
        folder = tempfile.mkdtemp()
        rows, validation = (write_rows(Store(folder), name, *each.data) for name in ("train", "val"))
    part = {"batch_size": BATCH, "rank": rank, "world_size": world_size}
    with Feed(rows, seed=1, **part) as feed, Feed(validation, **part) as val_feed:
        last = {"train": feed.part_rows(feed.steps - 1), "test": val_feed.part_rows(val_feed.steps - 1)}
        build_before_tracing(model, feed)
        epoch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda number, logs: setattr(feed, "epoch", number))
        with attached(model, ListSession(rank, world_size, box, barrier), last.__getitem__) as passes:
            history = model.fit(
                feed.dataset(),
                validation_data=val_feed.dataset(),
                epochs=options.get("epochs", 2),
                callbacks=[passes, epoch, *callbacks_of(case, rank), *each.callbacks],
                shuffle=False,
                class_weight=options.get("class_weight"),
                verbose=0,
            ).history
    ours = {"train_step", "test_step", "get_metrics_result", "evaluate", "apply", "_get_metrics_result_or_logs"}
    replaced = ours & (set(vars(model)) | set(vars(model.optimizer)))
    x, y, *_ = toys.separable(32) if each.data is None else each.data
    model.fit(x, y, verbose=0, epochs=0)  # the model can still be trained alone
    return Trained(model.get_weights(), history, replaced)


def callbacks_of(case: str, rank: int) -> list[Any]:
    if case == "callbacks decide alike":
        return [
            keras.callbacks.EarlyStopping("val_loss", min_delta=1.0, patience=1),
            keras.callbacks.ReduceLROnPlateau("val_loss", min_delta=1.0, patience=0, factor=0.1),
        ]
    if case == "weights that differ" and rank == 1:
        return [keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None), Strays()]
    if case == "a validation that ends" and rank == 1:
        return [EndsValidation()]
    return []


class EndsValidation(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends each validation after one batch, on this rank only."""

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_evaluating = True


class Strays(keras.callbacks.Callback):  # type: ignore[misc]
    """Changes the weights of this rank only."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.layers[-1].bias.assign([9.0, 9.0, 9.0])


def embedding_classifier() -> Any:
    """A classifier whose embedding has a sparse gradient."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8,))
    whole = keras.ops.clip(keras.ops.cast(inputs * 3 + 10, "int32"), 0, 19)
    x = keras.layers.Flatten()(keras.layers.Embedding(20, 4)(whole))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class OwnStep(keras.Model):  # type: ignore[misc]
    """A custom train_step with its own optimizer and a log that is not a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3, activation="softmax")
        self.other_optimizer = keras.optimizers.SGD(0.05)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def train_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x, training=True)))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.other_optimizer.apply(gradients, self.trainable_variables)
        return {"own_loss": loss}


def own_step_model() -> Any:
    keras.utils.set_random_seed(1)
    model = OwnStep()
    model(np.zeros((1, 8), np.float32))  # creates the variables
    model.other_optimizer.build(model.trainable_variables)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def batch_norm_model() -> Any:
    keras.utils.set_random_seed(1)
    frozen = keras.layers.Dense(8, name="frozen")
    frozen.trainable = False
    layers = [keras.layers.Input((8,)), frozen, keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    model = keras.Sequential([*layers, keras.layers.Softmax()])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def synchronized(**options: Any) -> Any:
    return keras.layers.BatchNormalization(synchronized=True, momentum=0.8, **options)


class Block(keras.layers.Layer):  # type: ignore[misc]
    """Two parallel branches with batch normalisations of one shape, and one more that is called twice."""

    def __init__(self, skips_on: int = -1) -> None:
        super().__init__()
        self.branches = [(keras.layers.Dense(6), synchronized()) for _ in range(2)]
        self.shared = synchronized(center=False)
        self.skips_on = skips_on

    def call(self, inputs: Any, training: bool = False) -> Any:
        total = 0
        for number, (dense, norm) in enumerate(self.branches):
            x = dense(inputs)
            if number or not training or os.environ["DLSPARK_RANK"] != str(self.skips_on):
                x = norm(x, training=training)
            total += self.shared(keras.activations.relu(x), training=training)
        return total


def synchronized_model(skips_on: int = -1, **compile_options: Any) -> Any:
    """Batch normalisations on raw inputs, in a nested model, with renormalisation, frozen, and in a custom layer."""
    keras.utils.set_random_seed(1)
    frozen = synchronized()
    frozen.trainable = False
    renorm = synchronized(renorm=True, renorm_clipping={"rmax": 1.5, "rmin": 0.6, "dmax": 0.5}, renorm_momentum=0.8)
    nested = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(6), renorm, frozen])
    layers = [keras.layers.Input((8,)), synchronized(), nested, Block(skips_on), keras.layers.Dense(3, activation="softmax")]
    model = keras.Sequential(layers)
    options = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"], **compile_options}
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), **options)
    return model


def masked_model() -> Any:
    """Each rank has another number of valid steps in its rows, and sometimes none."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8,))
    x = keras.layers.Reshape((4, 2))(inputs + 5)
    x = synchronized()(x, mask=x[..., 0] > 6)
    x = keras.layers.Conv1D(4, 2)(x)
    x = keras.layers.Flatten()(keras.layers.Permute((2, 1))(synchronized(axis=1)(keras.layers.Permute((2, 1))(x))))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy", run_eagerly=True)
    return model


class Penalised(keras.Model):  # type: ignore[misc]
    """A custom train_step whose loss has a gradient in it, so that training takes second derivatives."""

    def train_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x, training=True)))
            # Of a mean over this rank's rows: times their number, it does not depend on how rows are distributed.
            slopes = inner.gradient(loss, x) * keras.ops.cast(keras.ops.shape(x)[0], "float32")
            total = loss + 0.1 * keras.ops.mean(keras.ops.square(slopes))
        self.optimizer.apply(tape.gradient(total, self.trainable_variables), self.trainable_variables)
        return {"loss": total}


def penalised_model() -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8,))
    x = keras.activations.tanh(synchronized()(keras.layers.Dense(6)(inputs)))
    model = Penalised(inputs, keras.layers.Dense(3, activation="softmax")(x))
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    return model


def mixed_precision_model() -> Any:
    """Loss scaling: the outermost optimizer must see the global gradient."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(16, activation="relu", dtype="mixed_float16"), keras.layers.Dense(3, dtype="float32")]
    model = keras.Sequential([keras.layers.Input((8,)), *layers, keras.layers.Softmax(dtype="float32")])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=64.0)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model


GIVEN = (
    "masked steps", "masked steps with weights", "ignored pixels", "two outputs", "two outputs with weights",
    "a trained scalar", "constants of many dtypes", "a counter", "a callback that evaluates", "frozen batch norm", "LoRA",
    "spectral norm", "mixed bfloat16 without its policy", "sample weights", "many metrics",
    "an activity regularizer", "one of two trackers, and a log",
)  # fmt: skip
"""Models of tests.given_models whose exchanges are special."""

CASES: dict[str, Callable[[], Any]] = {
    "momentum, clipping, regularisation": toys.dense_classifier,
    "adamw": lambda: toys.dense_classifier(keras.optimizers.AdamW(0.01, weight_decay=0.1)),
    "accumulation": lambda: toys.dense_classifier(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    "ema": lambda: toys.dense_classifier(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)),
    "schedule": lambda: toys.dense_classifier(
        keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5))
    ),
    "steps_per_execution": lambda: toys.dense_classifier(steps_per_execution=3),
    "run_eagerly": lambda: toys.dense_classifier(run_eagerly=True),
    "sparse gradients": embedding_classifier,
    "custom train_step": own_step_model,
    "callbacks decide alike": toys.dense_classifier,
    "weights that differ": toys.dense_classifier,
    "a validation that ends": toys.dense_classifier,
    "batch norm": batch_norm_model,
    "mixed precision": mixed_precision_model,
    "synchronized batch norm": synchronized_model,
    "synchronized batch norm, steps_per_execution": lambda: synchronized_model(steps_per_execution=3),
    "synchronized batch norm, masked": masked_model,
    "synchronized batch norm, second derivatives": penalised_model,
    "a skipped layer": lambda: synchronized_model(skips_on=1),
}
NOT_EQUAL = {"batch norm", "weights that differ", "a validation that ends", "a skipped layer"}
"""Cases in which several workers do not train as one process."""
