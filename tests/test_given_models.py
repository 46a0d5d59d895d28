"""A fit trains exactly the model that it was given."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import keras
import numpy as np
import pytest

from dlspark import ConfigError, Trainer, WorkerError
from dlspark.data import Feed
from dlspark.data.shard_writer import write_rows
from dlspark.mends import keras_layers
from dlspark.storage.store import Store
from dlspark.testing import toys
from dlspark.worker.model_parts import optimizers_of
from tests.given_models import MODELS, PACKAGE, ROWS, Given, OwnSchedule, dense, given, one_hot

EPOCHS, BATCH, SEED = 2, 25, 3
VALIDATION_ROWS = 33
# Keras applies an embedding's gradient as a sparse one, row by row; here it is dense, so that workers can sum it.
SPARSE = {"masked steps", "masked steps with weights"}


def rows_of(each: Given, rows: int) -> Any:
    return toys.separable(rows) if each.data is None else keras.tree.map_structure(lambda leaf: leaf[:rows], each.data)


def by_keras(each: Given, store: Store) -> dict[str, list[float]]:
    """Keras' own fit on the batches that ``Trainer("local")`` makes; returns the history."""
    rows = write_rows(store, "train", *rows_of(each, ROWS))
    validation = write_rows(store, "val", *rows_of(each, VALIDATION_ROWS))
    # Keras builds an optimizer inside the traced step, where ScheduleFreeAdamW does not see the weights that it starts from.
    if each.model.built and not each.model.optimizer.built:
        each.model.optimizer.build(each.model.trainable_variables)
    keras.utils.set_random_seed(SEED)
    with Feed(rows, batch_size=BATCH, seed=SEED) as feed, Feed(validation, batch_size=BATCH) as val_feed:
        epoch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda number, logs: setattr(feed, "epoch", number))
        history = each.model.fit(
            feed.dataset(), validation_data=val_feed.dataset(), epochs=EPOCHS, callbacks=[epoch, *each.callbacks],
            shuffle=False, verbose=0, **each.options,
        )  # fmt: skip
    return {name: [float(value) for value in values] for name, values in history.history.items()}


def fitted(each: Given, trainer: Trainer, **more: Any) -> dict[str, list[float]]:
    result = trainer.fit(
        each.model, rows_of(each, ROWS), validation_data=rows_of(each, VALIDATION_ROWS), epochs=EPOCHS, batch_size=BATCH,
        seed=SEED, verbose=0, **{"callbacks": each.callbacks, **each.options, **more},
    )  # fmt: skip
    return dict(result.history)


def state_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Weights, the variables of all optimizers, and flags, by name."""
    variables = {f"weight {i} {variable.name}": variable for i, variable in enumerate(model.weights)}
    for number, optimizer in enumerate(optimizers_of(model)):
        variables |= {f"optimizer {number} {i}": each for i, each in enumerate(optimizer.variables)}
    arrays = {name: keras.ops.convert_to_numpy(variable) for name, variable in variables.items()}
    arrays["layers' flags"] = np.array([layer.trainable for layer in keras_layers.flatten(model)])
    return arrays | {"variables' flags": np.array([variable.trainable for variable in model.weights])}


# Others of a kind that another row has.
FULL = {
    "nadam", "adafactor", "lion", "ftrl", "adagrad", "moving averages", "accumulation", "clipped norms", "a schedule",
    "no decay by name", "loss scaling by hand", "batch norm", "noise", "layer norm", "constraints", "two outputs",
    "ignored pixels, -1", "focal loss", "a rate that falls", "masked steps", "mixed bfloat16 without its policy",
    "an autoencoder", "early stopping", "a subclassed model", "class weights", "steps per execution", "LoRA",
}  # fmt: skip


def marked(names: Iterable[str], full: Collection[str]) -> list[Any]:
    """Parameters, of which ``full`` are for make test-all."""
    return [pytest.param(name, marks=pytest.mark.full) if name in full else name for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(MODELS, FULL))
def test_local_trains_the_model_that_was_given(name: str, tmp_path: Any) -> None:
    ours, theirs = given(name), given(name)
    expected = by_keras(theirs, Store(tmp_path))
    history = fitted(ours, Trainer("local"))
    assert set(history) == set(expected)
    mine, other = state_of(ours.model), state_of(theirs.model)
    assert set(mine) == set(other)
    tolerance = {"rtol": 0, "atol": 1e-6 if name in SPARSE else 0}
    for key, array in other.items():
        assert array.dtype == mine[key].dtype
        np.testing.assert_allclose(
            mine[key].astype(np.float64), array.astype(np.float64), **tolerance, err_msg=f"{name}: {key}"
        )
    for key, values in expected.items():
        np.testing.assert_allclose(history[key], values, **tolerance, err_msg=f"{name}: {key}")


# Those that exchange differently: masks, output losses, states, scalars, other dtypes, several optimizers, callbacks. What
# an engine itself does with them shows in the first; tests/worker/test_gradient_sync.py has them without an engine.
EXCHANGED = (
    "constants of many dtypes", "two optimizers", "a counter", "masked steps with weights", "two outputs", "ignored pixels",
    "a trained scalar", "a tracker", "a callback that evaluates", "LoRA", "mixed precision without its policy",
)  # fmt: skip
USUAL = {"mirrored": EXCHANGED[:5], "horovod": EXCHANGED[:2]}
TOLERANCE = {"mixed precision without its policy": 2e-2}


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(backend, name, marks=() if name in usual else pytest.mark.full)
        for backend, usual in USUAL.items()
        for name in EXCHANGED
    ],
)
def test_two_workers_train_the_model_that_was_given(backend: str, name: str, spark: Any) -> None:
    ours, theirs = given(name), given(name)
    expected = fitted(theirs, Trainer("local"))
    history = fitted(ours, Trainer(backend, num_workers=2))
    assert set(history) == set(expected)
    tolerance = {"rtol": 0, "atol": TOLERANCE.get(name, 1e-5)}
    mine, other = state_of(ours.model), state_of(theirs.model)
    assert set(mine) == set(other)
    for key, array in other.items():
        assert array.dtype == mine[key].dtype
        np.testing.assert_allclose(mine[key].astype(np.float64), array.astype(np.float64), **tolerance, err_msg=key)
    for key, values in expected.items():
        np.testing.assert_allclose(history[key], values, **tolerance, err_msg=key)


@pytest.mark.slow
def test_a_callback_cannot_change_what_layers_share() -> None:
    """A file does not keep that two layers share one regularizer."""
    penalty = keras.regularizers.L2(0.1)
    hidden = [keras.layers.Dense(3, kernel_regularizer=penalty) for _ in range(2)]
    model = keras.Sequential([keras.layers.Input((8,)), *hidden])
    model.compile("sgd", "sparse_categorical_crossentropy")
    callback = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: setattr(penalty, "l2", 1.0))
    with pytest.raises(WorkerError, match="kernel_regularizer of layer 2, kernel_regularizer of layer 3 are one"):
        Trainer("local").fit(model, toys.separable(20), callbacks=[callback], verbose=0)


@keras.saving.register_keras_serializable(package=PACKAGE)
class Forgets(keras.layers.Dense):  # type: ignore[misc]
    """Has an argument that its configuration lacks."""

    def __init__(self, units: int, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.temperature = temperature


@keras.saving.register_keras_serializable(package=PACKAGE)
class Minimum(keras.layers.Layer):  # type: ignore[misc]
    """Keeps a running minimum and does not say how to merge it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.least = self.add_weight(shape=(), initializer="ones", trainable=False, name="least")

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            self.least.assign(keras.ops.minimum(self.least, keras.ops.min(inputs)))
        return inputs


@keras.saving.register_keras_serializable(package=PACKAGE)
class Sums(keras.layers.Layer):  # type: ignore[misc]
    """Adds a loss that is a sum over rows."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(keras.ops.sum(keras.ops.square(inputs)))
        return inputs


@keras.saving.register_keras_serializable(package=PACKAGE)
class Heats(keras.layers.Layer):  # type: ignore[misc]
    """Keeps private what its own configuration lacks: a number, a function or a tensor."""

    def __init__(self, heat: Any = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._heat = heat

    def call(self, inputs: Any) -> Any:
        return self._heat(inputs) if callable(self._heat) else inputs * self._heat

    def get_config(self) -> dict[str, Any]:
        return dict(super().get_config())


@keras.saving.register_keras_serializable(package=PACKAGE)
class Tempered(keras.losses.SparseCategoricalCrossentropy):  # type: ignore[misc]
    """Has an argument that its configuration lacks."""

    def __init__(self, heat: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heat = heat


@keras.saving.register_keras_serializable(package=PACKAGE)
class Scaled(keras.metrics.SparseCategoricalAccuracy):  # type: ignore[misc]
    """Has an argument that its configuration lacks."""

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale


@keras.saving.register_keras_serializable(package=PACKAGE)
class Forgotten(OwnSchedule):
    """Has an argument that its configuration lacks."""

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate


@keras.saving.register_keras_serializable(package=PACKAGE)
class Penalty(keras.regularizers.Regularizer):  # type: ignore[misc]
    """Has an argument that its configuration lacks."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, kernel: Any) -> Any:
        return self.factor * keras.ops.sum(kernel * kernel)

    def get_config(self) -> dict[str, Any]:
        return {}


class Unregistered(keras.layers.Dense):  # type: ignore[misc]
    """Not registered."""


class UnregisteredSchedule(keras.optimizers.schedules.ExponentialDecay):  # type: ignore[misc]
    """Not registered."""


class UnregisteredLoss(keras.losses.SparseCategoricalCrossentropy):  # type: ignore[misc]
    """Not registered."""


def unregistered_loss(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(y_pred, axis=-1)


@keras.saving.register_keras_serializable(package=PACKAGE)
def one_number(y_true: Any, y_pred: Any) -> Any:
    """A metric of the whole batch."""
    return keras.ops.mean(keras.ops.cast(y_true, "float32") - y_pred[:, 0])


def replaced_call() -> Any:
    model = dense()
    layer = model.layers[0]
    layer.call = lambda inputs: keras.layers.Dense.call(layer, inputs) * 2
    return model


def shares_layers() -> Given:
    model = dense()
    callback = keras.callbacks.LambdaCallback()
    callback.view = keras.Model(model.inputs, model.layers[0].output)
    return Given(model, callbacks=[callback])


def stateful() -> Given:
    model = keras.Sequential([keras.layers.Input(batch_shape=(25, 8, 1)), keras.layers.GRU(3, stateful=True)])
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = toys.separable(100)
    return Given(model, (x[..., None], y))


REFUSED: dict[str, tuple[Any, str]] = {
    "an unregistered layer": (lambda: dense("sgd", Unregistered(4)), "Unregistered of .* not registered"),
    "an unregistered layer inside a layer": (
        lambda: dense("sgd", keras.layers.SpectralNormalization(Unregistered(4))), "Unregistered of .* not registered",
    ),
    "an unregistered schedule": (
        lambda: dense(keras.optimizers.SGD(UnregisteredSchedule(0.1, 3, 0.5))), "UnregisteredSchedule of .* not registered",
    ),
    "an unregistered loss": (lambda: dense(loss=UnregisteredLoss()), "UnregisteredLoss of .* not registered"),
    "an unregistered function": (lambda: dense(loss=unregistered_loss), "unregistered_loss(.|\n)*register_keras_serial"),
    "a lambda as a metric": (lambda: dense(metrics=[lambda y, p: p[:, 0]]), "lambda(.|\n)*register_keras_serializable"),
    "an argument that get_config lacks": (lambda: dense("sgd", Forgets(4, 0.3)), "temperature=0.3, in its file 1.0"),
    "a private argument that get_config lacks": (lambda: dense("sgd", Heats(0.3)), "_heat=0.3, in its file 1.0"),
    "a function that get_config lacks": (lambda: dense("sgd", Heats(keras.activations.tanh)), "_heat=<function tanh"),
    "a tensor that get_config lacks": (lambda: dense("sgd", Heats(keras.ops.convert_to_tensor(0.3))), "_heat=<tf.Tensor"),
    "an argument of a loss": (lambda: dense(loss=Tempered(0.3)), "loss .* has heat=0.3, in its file 1.0"),
    "an argument of a metric": (lambda: dense(metrics=[Scaled(0.3)]), "metric .* has scale=0.3, in its file 1.0"),
    "an argument of a schedule": (
        lambda: dense(keras.optimizers.SGD(Forgotten(0.3))), "optimizer .* has _learning_rate.rate=0.3, in its file 0.1",
    ),
    "an argument of a regularizer": (
        lambda: dense("sgd", keras.layers.Dense(4, kernel_regularizer=Penalty(0.3))), "kernel_regularizer.factor=0.3",
    ),
    "a method of one layer": (replaced_call, "a call of its own"),
    "a callback with a view of the model": (shares_layers, "shares the variable"),
    "a state that no rule merges": (lambda: dense("sgd", Minimum()), "how to merge .*least.*Minimum, write merge = 'sum'"),
    "a loss of the whole batch": (lambda: Given(dense(loss="dice"), one_hot()[1]), "mean over rows.*dice"),
    "a metric of one number": (lambda: dense(metrics=[one_number]), "one value for each row.*one_number"),
    "a sum over rows": (lambda: dense("sgd", Sums()), "mean over rows.*a loss that a layer adds"),
    "a state of each row": (stateful, "stateful"),
}  # fmt: skip


@pytest.mark.spark
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_otherwise_is_refused_by_name(name: str, spark: Any) -> None:
    build, message = REFUSED[name]
    keras.utils.clear_session()
    found = build()
    each = found if isinstance(found, Given) else Given(found)
    before = each.model.get_weights()
    data = each.data or toys.separable(ROWS)
    with pytest.raises(ConfigError, match=message):
        Trainer("mirrored", num_workers=2).fit(each.model, data, batch_size=25, callbacks=each.callbacks, verbose=0)
    assert all((a == b).all() for a, b in zip(before, each.model.get_weights(), strict=True))
