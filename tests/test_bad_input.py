"""Bad input to Trainer: before any job starts, a DlsparkError states what was given and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from dlspark import ConfigError, DataError, DlsparkError, MissingDependencyError, Trainer, load_backend
from dlspark.local import LocalBackend
from dlspark.testing import toys

pytestmark = pytest.mark.timeout(60)

X, Y = toys.separable(60)


@pytest.fixture(autouse=True)
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which the backend is asked to train."""

    def launched(self: LocalBackend, job: Any) -> Any:
        pytest.fail("the job was launched")

    monkeypatch.setattr(LocalBackend, "fit", launched)


def fit(model: Any = None, data: Any = (X, Y), **options: Any) -> Any:
    workers = options.pop("num_workers", 1)
    return Trainer("local", num_workers=workers).fit(
        model or toys.dense_classifier(), data, **{"batch_size": 16, "verbose": 0, **options}
    )


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown backend 'horovot'. Did you mean 'horovod'"):
        Trainer("horovot")


def test_a_missing_plugin_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlspark.registry.BACKENDS", {})
    with pytest.raises(MissingDependencyError, match=r"'elephas' is not installed. Run: pip install"):
        load_backend("elephas")


def test_two_plugins_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dlspark_rival-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: dlspark-rival\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[dlspark.backends]\nlocal = rival:Rival\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"claim the backend name 'local'.*rival:Rival.*Uninstall"):
        load_backend("local")


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", True, np.bool_(True), np.array([1, 2]), np.array(1.5)])
def test_workers_that_are_no_number(workers: Any) -> None:
    with pytest.raises(ConfigError, match="Expected num_workers as a whole number of at least 1"):
        Trainer("local", num_workers=workers)


def test_names_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match=r"There is no timeout 1\. Known: end_seconds"):
        Trainer("local", timeouts={1: 2})
    with pytest.raises(ConfigError, match="has no option 1"):
        Trainer("local", options={1: 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "Expected epochs as a whole number"),
        ({"batch_size": 0}, "Expected batch_size as a whole number"),
        ({"seed": -1}, "Expected seed as a whole number of at least 0"),
        ({"verbose": 3}, "Expected verbose as one of"),
        ({"callbacks": [print]}, "Expected Keras callbacks"),
        ({"class_weight": {7: 1.0}}, "Expected classes 0 to 2 in class_weight.* got class 7"),
        ({"class_weight": {0: float("nan")}}, "as a finite number"),
    ],
)
def test_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(**options)


def test_a_model_that_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"compiled model; .* Call model.compile"):
        fit(keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(3)]))


def test_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match="got a str"):
        fit("resnet50")


def test_a_builder_that_returns_nothing() -> None:
    with pytest.raises(ConfigError, match="got a NoneType"):
        fit(lambda: None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, np.full(60, 3, np.int32)), "class indices from 0 to 2, as the model has 3 outputs; got labels from 3 to 3"),
        ((X, np.full(60, -1, np.int32)), "from -1 to -1"),
        ((X[:0], Y[:0]), "got none"),
        ((X, Y[:59]), r"equally many rows .* got \[59, 60\]"),
        ((X[:, :5], Y), r"rows of shape \(8,\) in data for the model's input .* got \(5,\)"),
        ((X.reshape(60, 2, 4), Y), r"got \(2, 4\)"),
        (((X, X), Y), "Expected 1 inputs per row .* got 2"),
        ((X.astype(str), Y), "NumPy arrays of numbers"),
        ([1, 2], "NumPy arrays of numbers"),
        ("a/folder", "a tuple .* or a Spark DataFrame; got str"),
        (X, "got numpy.ndarray"),
    ],
)
def test_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(data=data)


def test_validation_data_is_checked_alike() -> None:
    with pytest.raises(DataError, match="validation_data; got none"):
        fit(validation_data=(X[:0], Y[:0]))


def test_an_unregistered_class_is_refused_on_the_driver() -> None:
    class Unknown(keras.layers.Layer):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            return inputs

    model = keras.Sequential([keras.layers.Input((8,)), Unknown(), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ConfigError, match=r"cannot be sent to workers"):
        fit(model)


def test_a_lambda_layer_is_refused_on_the_driver() -> None:
    model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Lambda(lambda x: x), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(ConfigError, match="give fit a function that builds"):
        fit(model, (X, X[:, :3]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_restarts": -1}, "Expected max_restarts as a whole number of at least 0; got -1"),
        ({"checkpoint_steps": 0}, "Expected checkpoint_steps as a whole number of at least 1; got 0"),
        ({"timeouts": 60}, "Expected timeouts as a dict of seconds by name"),
    ],
)
def test_settings_for_failures_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer("local", **settings)


class TestSeveralWorkers:
    """Checks for more than one worker, before the backend is asked anything."""

    @pytest.fixture(autouse=True)
    def many_workers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from dlspark.backend import Capabilities

        everything = Capabilities(synchronous_gradients=True, exact_rows=True, deterministic=True, resumable=True)
        monkeypatch.setattr(LocalBackend, "capabilities", everything)

    def test_fewer_rows_in_a_step_than_workers(self) -> None:
        with pytest.raises(ConfigError, match=r"at least 3 rows in a step.* got 2: data has 60 rows in 30 steps"):
            fit(num_workers=3, batch_size=2)

    @pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "none"])
    def test_a_loss_without_an_exact_merge(self, reduction: str) -> None:
        loss = keras.losses.SparseCategoricalCrossentropy(reduction=reduction)
        with pytest.raises(ConfigError, match=f"has reduction '?{reduction}'?"):
            fit(toys.dense_classifier(loss=loss), num_workers=2)

    def test_a_metric_of_unknown_merge(self) -> None:
        class Largest(keras.metrics.Metric):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(name="largest")
                self.value = self.add_weight(name="value", initializer="zeros")

            def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
                self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

            def result(self) -> Any:
                return self.value

        with pytest.raises(ConfigError, match=r"got Largest, which does not declare.*merge = 'sum'"):
            fit(toys.dense_classifier(metrics=[Largest()]), num_workers=2)

    def test_backup_and_restore(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="BackupAndRestore restores one process"):
            fit(num_workers=2, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])


def test_every_refusal_is_a_dlspark_error_and_a_builtin() -> None:
    assert issubclass(ConfigError, DlsparkError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(DataError, ValueError)
    assert issubclass(MissingDependencyError, ImportError)
