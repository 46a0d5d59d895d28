"""Attaching: N workers train as one, through everything that Keras does around a step.

The workers here are threads of one process, each with its own model, and their sum is a barrier: the arithmetic of
attach.py without an engine. The contract tests the same with real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from dlspark import DlsparkError
from dlspark.attach import attached
from dlspark.data.feed import Feed
from dlspark.data.shard_writer import write_rows
from dlspark.session import WorkerSession
from dlspark.store import Store
from dlspark.testing import toys

pytestmark = pytest.mark.timeout(180)

BATCH = 17


class Rendezvous:
    """Adds what all ranks bring, in rank order, so that everybody gets the same bits."""

    def __init__(self, world_size: int) -> None:
        self.box: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=60)


class ThreadSession(WorkerSession):
    def __init__(self, rank: int, world_size: int, rendezvous: Rendezvous) -> None:
        super().__init__(rank, world_size)
        self._meet = rendezvous

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        import tensorflow as tf

        def exchange(*mine: Any) -> list[Any]:
            self._meet.box[self.rank] = mine
            self._meet.barrier.wait()
            totals = [np.sum(parts, axis=0) for parts in zip(*self._meet.box, strict=True)]
            self._meet.barrier.wait()
            return totals

        totals = tf.numpy_function(exchange, list(tensors), [tensor.dtype for tensor in tensors])
        return [tf.ensure_shape(total, tensor.shape) for total, tensor in zip(totals, tensors, strict=True)]


def train(make: Callable[[], Any], world_size: int, tmp_path: Path, **options: Any) -> list[tuple[Any, Any]]:
    """[(model, history)] of every rank after training on the same rows."""
    options = {"epochs": 2, "rows": 103, "callbacks": list, **options}
    store = Store(tmp_path)
    rows = write_rows(store, "train", *toys.separable(options["rows"]))
    validation = write_rows(store, "val", *toys.separable(41, seed=5))
    rendezvous = Rendezvous(world_size)
    models = [make() for _ in range(world_size)]

    def work(rank: int) -> Any:
        session = ThreadSession(rank, world_size, rendezvous)
        part = {"batch_size": BATCH, "rank": rank, "world_size": world_size}
        with Feed(rows, seed=1, **part) as feed, Feed(validation, **part) as val_feed:
            last = {"train": feed.part_rows(feed.steps - 1), "test": val_feed.part_rows(val_feed.steps - 1)}
            epoch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda number, logs: setattr(feed, "epoch", number))
            with attached(models[rank], session, last.__getitem__) as passes:
                return models[rank].fit(
                    feed.dataset(),
                    validation_data=val_feed.dataset(),
                    epochs=options["epochs"],
                    callbacks=[passes, epoch, *options["callbacks"]()],
                    shuffle=False,
                    class_weight=options.get("class_weight"),
                    verbose=0,
                )

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(work, rank) for rank in range(world_size)]
        histories = [future.result(timeout=150).history for future in futures]
    return list(zip(models, histories, strict=True))


def assert_equal_to_one_process(make: Callable[[], Any], tmp_path: Path, world_size: int = 2, **options: Any) -> None:
    ((alone, expected),) = train(make, 1, tmp_path / "one", **options)
    together = train(make, world_size, tmp_path / "many", **options)
    for model, history in together:
        for ours, theirs in zip(model.get_weights(), alone.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        assert set(history) == set(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(history[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    first = together[0][0].get_weights()
    assert all((a == b).all() for model, _ in together for a, b in zip(model.get_weights(), first, strict=True))


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
    "wrapped metric": lambda: toys.dense_classifier(
        metrics=["accuracy", keras.metrics.MeanMetricWrapper(keras.losses.sparse_categorical_crossentropy, name="ce")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(case: str, tmp_path: Path) -> None:
    assert_equal_to_one_process(CASES[case], tmp_path)


def test_three_workers(tmp_path: Path) -> None:
    assert_equal_to_one_process(toys.dense_classifier, tmp_path, world_size=3)


def test_class_weights(tmp_path: Path) -> None:
    assert_equal_to_one_process(toys.dense_classifier, tmp_path, class_weight={0: 1.0, 1: 3.0, 2: 0.2})


def test_callbacks_decide_alike(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            keras.callbacks.EarlyStopping("val_loss", min_delta=1.0, patience=1),
            keras.callbacks.ReduceLROnPlateau("val_loss", min_delta=1.0, patience=0, factor=0.1),
        ]

    assert_equal_to_one_process(toys.dense_classifier, tmp_path, epochs=5, callbacks=callbacks)


def embedding_classifier() -> Any:
    """Its embedding's gradient is sparse."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8,))
    whole = keras.ops.clip(keras.ops.cast(inputs * 3 + 10, "int32"), 0, 19)
    x = keras.layers.Flatten()(keras.layers.Embedding(20, 4)(whole))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def test_sparse_gradients_and_add_loss(tmp_path: Path) -> None:
    assert_equal_to_one_process(embedding_classifier, tmp_path)


class OwnStep(keras.Model):  # type: ignore[misc]
    """A custom train_step with an optimizer of its own and a log that is no metric."""

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
    model.build((None, 8))
    model.other_optimizer.build(model.trainable_variables)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def test_custom_train_step(tmp_path: Path) -> None:
    assert_equal_to_one_process(own_step_model, tmp_path)


def test_batch_norm_statistics_are_averaged_and_frozen_weights_are_left_alone(tmp_path: Path) -> None:
    def make() -> Any:
        keras.utils.set_random_seed(1)
        frozen = keras.layers.Dense(8, name="frozen")
        frozen.trainable = False
        layers = [keras.layers.Input((8,)), frozen, keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        model = keras.Sequential([*layers, keras.layers.Softmax()])
        model.compile("sgd", "sparse_categorical_crossentropy")
        return model

    before = make().get_layer("frozen").get_weights()
    (a, _), (b, _), (c, _) = train(make, 3, tmp_path)
    for model in (a, b, c):
        assert all((x == y).all() for x, y in zip(model.get_layer("frozen").get_weights(), before, strict=True))
    norms = [model.layers[1].moving_mean.numpy() for model in (a, b, c)]
    assert (norms[0] == norms[1]).all()
    assert (norms[0] == norms[2]).all()
    assert (norms[0] != 0).any()


def test_weights_that_differ_are_noticed(tmp_path: Path) -> None:
    class Strays(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if threading.current_thread().name.endswith("_1"):
                self.model.layers[-1].bias.assign([9.0, 9.0, 9.0])

    with pytest.raises(DlsparkError, match="weights on ranks"):
        train(toys.dense_classifier, 2, tmp_path, callbacks=lambda: [Strays()])


def test_the_model_is_as_before_afterwards(tmp_path: Path) -> None:
    ((model, _), _) = train(toys.dense_classifier, 2, tmp_path)
    for owner in (model, model.optimizer):
        assert not {"train_step", "test_step", "get_metrics_result", "apply"} & set(vars(owner))
    model.fit(*toys.separable(32), verbose=0)  # and it still trains, alone
