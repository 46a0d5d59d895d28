"""Models as people have them, each with rows and callbacks; for fits that are compared with Keras' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers, losses, metrics, ops, optimizers

from dlspark.testing import toys

PACKAGE = "dlspark.tests.given"
ROWS = 101


@dataclass
class Given:
    """What a user gives to ``fit``.

    Attributes:
        model: compiled.
        data: the training rows; those of `toys.separable` when None.
        callbacks: Keras callbacks.
        options: further arguments of ``fit``.
    """

    model: Any
    data: Any = None
    callbacks: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@keras.saving.register_keras_serializable(package=PACKAGE)
class Encoder(keras.Model):  # type: ignore[misc]
    """A subclassed model with a model and a layer inside."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(8, activation="relu")])
        self.head = layers.Dense(3, activation="softmax")

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.head(self.encoder(inputs, training=training))


@keras.saving.register_keras_serializable(package=PACKAGE)
class Counter(layers.Layer):  # type: ignore[misc]
    """Counts steps, rows and bytes, in several dtypes."""

    merge = "sum"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="rows")
        self.total = self.add_weight(shape=(), initializer="zeros", trainable=False, name="total")

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            self.rows.assign_add(ops.cast(ops.shape(inputs)[0], "int32"))
            self.total.assign_add(ops.cast(ops.shape(inputs)[0], "float32"))
        return inputs


@keras.saving.register_keras_serializable(package=PACKAGE)
class Scale(layers.Layer):  # type: ignore[misc]
    """Multiplies by a trained scalar."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, inputs: Any) -> Any:
        return inputs * self.factor


@keras.saving.register_keras_serializable(package=PACKAGE)
class Flag(layers.Layer):  # type: ignore[misc]
    """Holds constants of unusual dtypes and values."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.on = self.add_weight(shape=(2,), dtype="bool", initializer="zeros", trainable=False, name="on")
        self.many = self.add_weight(shape=(), dtype="int64", initializer="ones", trainable=False, name="many")
        self.least = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(np.inf), trainable=False, name="least"
        )

    def call(self, inputs: Any) -> Any:
        return inputs


@keras.saving.register_keras_serializable(package=PACKAGE)
def own_loss(y_true: Any, y_pred: Any) -> Any:
    """The loss of each row, as a user's function."""
    return ops.square(ops.cast(y_true, y_pred.dtype) - y_pred[:, 0])


@keras.saving.register_keras_serializable(package=PACKAGE)
def own_metric(y_true: Any, y_pred: Any) -> Any:
    return ops.cast(ops.equal(ops.cast(y_true, "int32"), ops.cast(ops.argmax(y_pred, -1), "int32")), "float32")


@keras.saving.register_keras_serializable(package=PACKAGE)
class OwnSchedule(optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A user's schedule."""

    def __call__(self, step: Any) -> Any:
        return 0.1 / (1.0 + ops.cast(step, "float32"))

    def get_config(self) -> dict[str, Any]:
        return {}


@keras.saving.register_keras_serializable(package=PACKAGE)
class TwoOptimizers(keras.Model):  # type: ignore[misc]
    """A custom train_step with a second optimizer, as in a GAN."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.body = layers.Dense(8, activation="relu")
        self.head = layers.Dense(3, activation="softmax")
        self.other_optimizer = optimizers.Adam(0.01)

    def call(self, inputs: Any) -> Any:
        return self.head(self.body(inputs))

    def train_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean(losses.sparse_categorical_crossentropy(y, self(x, training=True)))
        body, head = tape.gradient(loss, [self.body.trainable_variables, self.head.trainable_variables])
        self.other_optimizer.apply(body, self.body.trainable_variables)
        self.optimizer.apply(head, self.head.trainable_variables)
        return {"own_loss": loss}


@keras.saving.register_keras_serializable(package=PACKAGE)
class DropsOut(TwoOptimizers):
    """Draws at random, and has metrics."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dropout = layers.Dropout(0.5)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.head(self.dropout(self.body(inputs), training=training))

    def train_step(self, data: Any) -> dict[str, Any]:
        logs = super().train_step(data)
        self.compute_metrics(*data, self(data[0]))
        return logs


@keras.saving.register_keras_serializable(package=PACKAGE)
class Tracks(keras.Model):  # type: ignore[misc]
    """A custom train_step that tracks its loss by a mean over steps, as Keras' examples do."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = layers.Dense(8)
        self.tracker = metrics.Mean(name="tracked")

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker]

    def call(self, inputs: Any) -> Any:
        return self.head(inputs)

    def train_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(data[0] - self(data[0], training=True)))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        self.tracker.update_state(loss)
        return {"tracked": self.tracker.result()}

    def test_step(self, data: Any) -> dict[str, Any]:
        self.tracker.update_state(ops.mean(ops.square(data[0] - self(data[0]))))
        return {"tracked": self.tracker.result()}


@keras.saving.register_keras_serializable(package=PACKAGE)
class Selects(Tracks):
    """A custom train_step that returns one of two trackers, the other under another name, and a dict with a constant."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.second = metrics.MeanAbsoluteError(name="mae")

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker, self.second]

    def train_step(self, data: Any) -> dict[str, Any]:
        logs = super().train_step(data)
        self.second.update_state(data[0], self(data[0]))
        return {**logs, "error": self.second.result(), "more": {"constant": ops.convert_to_tensor(3.0)}}


class Closes(keras.callbacks.Callback):  # type: ignore[misc]
    """Acts on the model that it was given, and on parts of it, not on self.model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.mine, self.bias, self.rate = model, model.layers[1].bias, model.optimizer

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.bias.assign(ops.zeros_like(self.bias))
        self.mine.layers[0].bias.assign_add(ops.ones_like(self.mine.layers[0].bias))
        self.rate.learning_rate = 0.02


class Evaluates(keras.callbacks.Callback):  # type: ignore[misc]
    """Evaluates rows of its own in the middle of an epoch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            self.found = self.model.evaluate(*toys.separable(20, seed=7), verbose=0, return_dict=True)
            self.model.get_metrics_result()


def seeded(build: Callable[[], Any]) -> Any:
    keras.utils.set_random_seed(1)
    return build()


def dense(optimizer: Any = "sgd", *more: Any, loss: Any = "sparse_categorical_crossentropy", **options: Any) -> Any:
    """A small classifier with further layers, compiled."""
    model = keras.Sequential([layers.Input((8,)), layers.Dense(8, activation="relu"), *more, layers.Dense(3)])
    model.add(layers.Softmax(dtype="float32"))
    model.compile(optimizer, loss, **{"metrics": ["accuracy"], **options})
    return model


def encoder(built: bool = True) -> Any:
    model = Encoder()
    if built:
        model(np.zeros((1, 8), np.float32))
    return model


def compiled(model: Any, optimizer: Any = "sgd", loss: Any = "sparse_categorical_crossentropy", **options: Any) -> Any:
    model.compile(optimizer, loss, **options)
    return model


def used_encoder() -> Any:
    model = compiled(encoder(), metrics=["accuracy"])
    x, y = toys.separable(20)
    model.fit(x, y, validation_data=(x, y), verbose=0)
    model.predict(x, verbose=0)
    return model


def frozen_encoder() -> Any:
    model = encoder()
    model.encoder.trainable = False
    return compiled(model)


def frozen_bias() -> Any:
    model = dense()
    model.layers[0].bias.trainable = False
    return compiled(model)


def frozen_batch_norm() -> Any:
    model = dense("sgd", layers.BatchNormalization(), layers.Dense(4))
    model.layers[1].trainable = False
    return compiled(model)


def lora() -> Any:
    model = dense()
    model.layers[0].enable_lora(2)
    return compiled(model, optimizers.Adam(0.01))


def lora_after_training() -> Any:
    model = lora()
    model.fit(*toys.separable(20), verbose=0)
    return model


def without_decay(**excluded: Any) -> Any:
    model = dense(optimizers.AdamW(0.01, weight_decay=0.5))
    names = {name: [getattr(model.layers[0], each) for each in value] if name == "var_list" else value
             for name, value in excluded.items()}  # fmt: skip
    model.optimizer.exclude_from_weight_decay(**names)
    return model


def mixed(policy_at_compile: str = "mixed_float16", **options: Any) -> Any:
    """Built and compiled under a policy that is no longer set."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy_at_compile)
    try:
        return dense(optimizers.SGD(0.05), **options)
    finally:
        keras.config.set_dtype_policy(before)


def trained(optimizer: Any) -> Any:
    model = dense(optimizer)
    model.fit(*toys.separable(20), verbose=0)
    return model


def frozen_after_build() -> Any:
    """Its optimizer is built on more variables than are trainable now."""
    model = dense(optimizers.Adam(0.01))
    model.optimizer.build(model.trainable_variables)
    model.layers[0].trainable = False
    return model


def counted_steps() -> Any:
    """Its optimizer counts steps before it is built, as a user resumes a schedule."""
    model = dense(optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)))
    model.optimizer.iterations.assign(10)
    return model


def changed_rate() -> Any:
    model = dense(optimizers.SGD(0.1))
    model.optimizer.learning_rate = 0.003
    return model


def two_outputs(loss_weights: Any = None) -> tuple[Any, Any]:
    inputs = layers.Input((8,))
    hidden = layers.Dense(8, activation="relu")(inputs)
    outputs = {"cls": layers.Dense(3, activation="softmax")(hidden), "reg": layers.Dense(1)(hidden)}
    model = keras.Model(inputs, outputs)
    model.compile(
        "sgd", {"cls": "sparse_categorical_crossentropy", "reg": "mse"}, loss_weights=loss_weights,
        metrics={"cls": "accuracy", "reg": "mae"},
    )  # fmt: skip
    x, y = toys.separable(ROWS)
    return model, (x, {"cls": y, "reg": x[:, :1]})


def sequences(weights: bool = False) -> tuple[Any, Any]:
    """Masked steps, more of them in some rows than in others."""
    model = keras.Sequential([
        layers.Input((6,), dtype="int32"), layers.Embedding(9, 4, mask_zero=True), layers.GRU(5, return_sequences=True),
        layers.Dense(3, activation="softmax"),
    ])  # fmt: skip
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], weighted_metrics=["accuracy"])
    random = np.random.default_rng(0)
    x = random.integers(1, 9, (ROWS, 6)).astype(np.int32)
    x[np.arange(6)[None] >= random.integers(1, 7, (ROWS, 1))] = 0
    data = x, (x % 3).astype(np.int32)
    return model, (*data, random.uniform(0.1, 3, x.shape).astype(np.float32)) if weights else data


def weighted(data: Any) -> Any:
    return (*data, np.random.default_rng(3).uniform(0.1, 3, len(data[0])).astype(np.float32))


def ignoring(value: int) -> tuple[Any, Any]:
    """A segmentation whose labels have pixels without a class."""
    model = keras.Sequential([layers.Input((4, 4, 1)), layers.Conv2D(3, 3, padding="same", activation="softmax")])
    model.compile("sgd", losses.SparseCategoricalCrossentropy(ignore_class=value))
    random = np.random.default_rng(0)
    y = random.integers(0, 3, (ROWS, 4, 4)).astype(np.int32)
    y[random.uniform(size=y.shape) < random.uniform(size=(ROWS, 1, 1))] = value
    return model, (random.normal(size=(ROWS, 4, 4, 1)).astype(np.float32), y)


def autoencoder() -> tuple[Any, Any]:
    model = keras.Sequential([layers.Input((8,)), layers.Dense(3), layers.Dense(8)])
    model.compile(optimizers.RMSprop(0.01), "mse", metrics=[metrics.RootMeanSquaredError()])
    x, _ = toys.separable(ROWS)
    return model, (x, x)


def one_hot(**options: Any) -> tuple[Any, Any]:
    x, y = toys.separable(ROWS)
    return dense(loss=losses.CategoricalCrossentropy(**options), metrics=[metrics.AUC(), "accuracy"]), (x, np.eye(3)[y])


def two_inputs() -> tuple[Any, Any]:
    a, b = layers.Input((8,), name="a"), layers.Input((2,), name="b")
    model = keras.Model([a, b], layers.Dense(3, activation="softmax")(layers.Concatenate()([a, b])))
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = toys.separable(ROWS)
    return model, ({"a": x, "b": x[:, :2]}, y)


def closing() -> Given:
    model = dense(optimizers.SGD(0.1))
    return Given(model, callbacks=[Closes(model)])


def closing_over_variables() -> Given:
    model = dense(optimizers.SGD(0.1))
    rate, steps = model.optimizer.learning_rate, model.optimizer.iterations

    def halve(epoch: int, logs: Any) -> None:
        rate.assign(rate / 2)
        steps.assign(0)

    return Given(model, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=halve)])


def closing_over_more() -> Given:
    """A second optimizer, the seeds of a layer, a metric and its variables: in a model that has been trained."""
    model = build_on_rows(DropsOut())
    accuracy = metrics.SparseCategoricalAccuracy(name="own_accuracy")
    compiled(model, metrics=["accuracy", accuracy])
    model.fit(*toys.separable(20), verbose=0)
    other, seed, count = model.other_optimizer, model.dropout.seed_generator, accuracy.count

    def change(epoch: int, logs: Any) -> None:
        other.learning_rate = 0.001
        seed.state.assign(ops.ones_like(seed.state))
        logs["counted"] = logs["accuracy of it"] = float(count) + float(accuracy.result())

    return Given(model, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=change)])


@keras.saving.register_keras_serializable(package=PACKAGE)
class Heads(keras.Model):  # type: ignore[misc]
    """Has a list of layers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = [layers.Dense(4, kernel_regularizer="l2"), layers.Dense(3, activation="softmax")]

    def call(self, inputs: Any) -> Any:
        return self.heads[1](self.heads[0](inputs))


def closing_over_helpers() -> Given:
    """A schedule, a regularizer and a list of layers."""
    rate = optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    model = compiled(build_on_rows(Heads()), optimizers.SGD(rate))
    heads, penalty = model.heads, model.heads[0].kernel_regularizer

    def change(logs: Any) -> None:
        rate.initial_learning_rate, penalty.l2 = 0.01, 1.0
        heads[0].kernel.assign(heads[0].kernel / 2)

    return Given(model, callbacks=[keras.callbacks.LambdaCallback(on_train_begin=change)])


def build_on_rows(model: Any) -> Any:
    model(np.zeros((1, 8), np.float32))
    return model


SGD, ADAM = (lambda: dense(optimizers.SGD(0.1, momentum=0.9))), (lambda: dense(optimizers.Adam(0.01)))
MODELS: dict[str, Callable[[], Any]] = {
    "sgd with momentum": SGD,
    "adam": ADAM,
    "nadam": lambda: dense(optimizers.Nadam(0.01)),
    "adafactor": lambda: dense(optimizers.Adafactor(0.01)),
    "lion": lambda: dense(optimizers.Lion(0.001)),
    "ftrl": lambda: dense(optimizers.Ftrl(0.01)),
    "adagrad": lambda: dense(optimizers.Adagrad(0.05)),
    "muon": lambda: dense(optimizers.Muon(0.01)),
    "schedule-free AdamW, not built": lambda: dense(optimizers.ScheduleFreeAdamW(0.01)),
    "schedule-free AdamW, trained": lambda: trained(optimizers.ScheduleFreeAdamW(0.01)),
    "moving averages": lambda: dense(optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)),
    "accumulation": lambda: dense(optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    "clipped norms": lambda: dense(optimizers.SGD(0.5, clipnorm=0.1)),
    "an optimizer with a state": lambda: trained(optimizers.Adam(0.01)),
    "frozen after the optimizer was built": frozen_after_build,
    "a changed learning rate": changed_rate,
    "a changed number of steps": counted_steps,
    "a schedule": lambda: dense(optimizers.SGD(optimizers.schedules.CosineDecay(0.1, 7))),
    "a user's schedule": lambda: dense(optimizers.SGD(OwnSchedule())),
    "no decay of variables": lambda: without_decay(var_list=["bias"]),
    "no decay by name": lambda: without_decay(var_names=["bias"]),
    "mixed precision without its policy": mixed,
    "mixed bfloat16 without its policy": lambda: mixed("mixed_bfloat16"),
    "mixed precision without loss scaling": lambda: mixed(auto_scale_loss=False),
    "loss scaling by hand": lambda: dense(optimizers.LossScaleOptimizer(optimizers.SGD(0.05), initial_scale=64.0)),
    "a subclassed model": lambda: compiled(encoder()),
    "a subclassed model, not built": lambda: compiled(encoder(False)),
    "a subclassed model, used before": used_encoder,
    "a frozen model in a subclassed one": frozen_encoder,
    "a frozen bias": frozen_bias,
    "frozen batch norm": frozen_batch_norm,
    "batch norm": lambda: dense("sgd", layers.BatchNormalization()),
    "LoRA": lora,
    "LoRA, trained": lora_after_training,
    "dropout": lambda: dense("sgd", layers.Dropout(0.4)),
    "noise": lambda: dense("sgd", layers.GaussianNoise(0.3)),
    "spectral norm": lambda: dense("sgd", layers.SpectralNormalization(layers.Dense(8))),
    "layer norm": lambda: dense("adam", layers.LayerNormalization()),
    "a trained scalar": lambda: dense("sgd", Scale()),
    "constants of many dtypes": lambda: dense("sgd", Flag()),
    "a counter": lambda: dense("sgd", Counter()),
    "an activity regularizer": lambda: dense("sgd", layers.Dense(4, activity_regularizer="l2")),
    "constraints": lambda: dense("sgd", layers.Dense(4, kernel_constraint=keras.constraints.MaxNorm(1))),
    "two outputs": lambda: Given(*two_outputs()),
    "two outputs with weights": lambda: Given(*two_outputs({"cls": 1.0, "reg": 0.2})),
    "two inputs": lambda: Given(*two_inputs()),
    "masked steps": lambda: Given(*sequences()),
    "masked steps with weights": lambda: Given(*sequences(weights=True)),
    "ignored pixels": lambda: Given(*ignoring(255)),
    "ignored pixels, -1": lambda: Given(*ignoring(-1)),
    "sample weights": lambda: Given(SGD(), weighted(toys.separable(ROWS))),
    "class weights": lambda: Given(SGD(), options={"class_weight": {0: 1.0, 1: 3.0, 2: 0.2}}),
    "an autoencoder": lambda: Given(*autoencoder()),
    "one-hot labels": lambda: Given(*one_hot(label_smoothing=0.1)),
    "focal loss": lambda: Given(
        *(lambda model, data: (compiled(model, loss="categorical_focal_crossentropy"), data))(*one_hot())
    ),
    "a user's loss": lambda: dense(loss=own_loss, metrics=[own_metric]),
    "many metrics": lambda: dense(metrics=["accuracy", metrics.SparseTopKCategoricalAccuracy(2), own_metric]),
    "steps per execution": lambda: dense(steps_per_execution=2),
    "eager": lambda: dense(run_eagerly=True),
    "early stopping": lambda: Given(ADAM(), callbacks=[keras.callbacks.EarlyStopping("loss", min_delta=9, patience=0)]),
    "a rate that falls": lambda: Given(
        ADAM(), callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.1)]
    ),
    "a callback that closes over the model": closing,
    "a callback that closes over the optimizer's variables": closing_over_variables,
    "a callback that evaluates": lambda: Given(SGD(), callbacks=[Evaluates()]),
    "a callback that closes over a second optimizer, a seed and a metric": closing_over_more,
    "a callback that closes over a schedule, a regularizer and a list": closing_over_helpers,
    "a tracker": lambda: compiled(build_on_rows(Tracks()), loss=None),
    "one of two trackers, and a log": lambda: compiled(build_on_rows(Selects()), loss=None),
    "two optimizers": lambda: compiled(build_on_rows(TwoOptimizers())),
}


def given(name: str) -> Given:
    """The model of that name, the same in every process."""
    keras.utils.clear_session()  # names count up
    found = seeded(MODELS[name])
    return found if isinstance(found, Given) else Given(found)
