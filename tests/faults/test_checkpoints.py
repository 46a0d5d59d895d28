"""A checkpoint is written whole or not at all, and only one that fits the model is used."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark import ConfigError, DataError, FitResult, Trainer, WorkerError
from dlspark.driver.runs import identity
from dlspark.job import JobSettings
from dlspark.storage.checkpoints import Checkpoints, Position
from dlspark.storage.store import Store
from dlspark.testing import toys
from dlspark.worker.model_state import capture, restore, weight_shapes

pytestmark = pytest.mark.timeout(120)

# Writes checkpoints and kills itself at the n-th time that it opens, renames or removes a file for the last one.
KILLED_WRITER = """
import os, signal, sys
import numpy as np
from dlspark.storage.checkpoints import Checkpoints, Position
from dlspark.storage.store import Store

folder, deadly = sys.argv[1], int(sys.argv[2])
seen = 0

def hook(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.remove") and any(folder in str(argument) for argument in arguments):
        seen += 1
        if seen == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

checkpoints = Checkpoints(Store(folder))
for epoch in range(1, 4):
    checkpoints.save({"w0": np.full(1000, epoch, np.float32)}, Position(epoch=epoch, history={"loss": [1.0] * epoch}))
sys.addaudithook(hook)
checkpoints.save({"w0": np.full(1000, 4, np.float32)}, Position(epoch=4, history={"loss": [1.0] * 4}))
print("stages", seen)
"""


def write_and_die(folder: Path, stage: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(folder), str(stage)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The number of points at which the writing of one checkpoint can be interrupted."""
    run = write_and_die(tmp_path_factory.mktemp("whole"), 10**6)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[1])


def test_f6_killed_at_every_stage_of_a_write(tmp_path: Path, stages: int) -> None:
    """The previous or the new checkpoint loads whole, and the next write removes the files of a partial one."""
    assert stages > 5
    found = set()
    for stage in range(1, stages + 1):
        folder = tmp_path / str(stage)
        run = write_and_die(folder, stage)
        assert run.returncode == -9, run.stderr
        checkpoints = Checkpoints(Store(folder))
        latest = checkpoints.latest()
        assert latest in ("epoch-0003-step-000000", "epoch-0004-step-000000")
        arrays = checkpoints.load(latest)
        np.testing.assert_array_equal(arrays["w0"], np.full(1000, checkpoints.position(latest).epoch))
        found.add(latest)
        checkpoints.save({"w0": np.full(1000, 5, np.float32)}, Position(epoch=5, history={"loss": [1.0] * 5}))
        files = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert len(files) == 2 * len(checkpoints.names())
    assert len(found) == 2, "it was never cut before the manifest, or never after it"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_f7_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """The run fails in time and names path and bytes; the previous epoch's checkpoint is intact."""
    import keras

    class FillsTheDisk(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1 and not (tmp_path / "freed").exists():
                with open(small_disk / "ballast", "wb") as file:
                    try:
                        file.write(b"x" * (1 << 20))
                    except OSError:
                        return

    trainer = Trainer("local", store=small_disk / "store")
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"Cannot write [0-9,]+ bytes to '.*epoch-0002-step-000000.npz'.*No space left"):
        trainer.fit(toys.dense_classifier(), toys.separable(200), epochs=3, callbacks=[FillsTheDisk()], verbose=0)
    assert time.monotonic() - started < 30
    (run,) = (small_disk / "store").glob("run-*")
    assert Checkpoints(Store(run)).latest() == "epoch-0001-step-000000"
    (small_disk / "ballast").unlink()
    (tmp_path / "freed").touch()
    again = Trainer("local", store=small_disk / "store")
    result = again.fit(toys.dense_classifier(), toys.separable(200), epochs=3, callbacks=[FillsTheDisk()], verbose=0)
    assert result.resumed_from == "epoch-0001-step-000000"


def cut_short(folder: Path, epochs: int = 3) -> Path:
    """The folder of a run that failed in its last epoch."""
    import keras

    class Fails(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == epochs - 1 and not os.path.exists(folder / "failed"):
                (folder / "failed").touch()
                raise ArithmeticError("cut short")

    with pytest.raises(WorkerError, match="cut short"):
        Trainer("local", store=folder / "store").fit(
            toys.dense_classifier(), toys.separable(200), epochs=epochs, callbacks=[Fails()], verbose=0
        )
    (run,) = (folder / "store").glob("run-*")
    return run


def resume(folder: Path, **changes: Any) -> FitResult:
    import keras

    class Fails(keras.callbacks.Callback):
        """Has the name of the callback that failed: the same command after its error was fixed."""

    settings = {"epochs": 3, "verbose": 0, "callbacks": [Fails()], **changes}
    Fails.__qualname__ = "cut_short.<locals>.Fails"
    return Trainer("local", store=folder / "store").fit(toys.dense_classifier(), toys.separable(200), **settings)


def test_f24_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = cut_short(tmp_path)
    newest = run / "checkpoints" / "epoch-0002-step-000000.npz"
    os.truncate(newest, newest.stat().st_size - 10)
    result = resume(tmp_path)
    assert result.resumed_from == "epoch-0001-step-000000"
    assert "bytes in epoch-0002-step-000000.npz; got" in caplog.text
    whole = Trainer("local").fit(toys.dense_classifier(), toys.separable(200), epochs=3, verbose=0)
    assert result.history == whole.history
    assert all((a == b).all() for a, b in zip(result.weights, whole.weights, strict=True))


def test_f24_a_flipped_bit_is_found(tmp_path: Path) -> None:
    run = cut_short(tmp_path)
    newest = run / "checkpoints" / "epoch-0002-step-000000.npz"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert resume(tmp_path).resumed_from == "epoch-0001-step-000000"


def test_f24_a_checkpoint_of_another_architecture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first mismatch is named; if no checkpoint fits, the fit is refused."""
    run = cut_short(tmp_path)
    checkpoints = Checkpoints(Store(run))
    for name in checkpoints.names():
        arrays = checkpoints.load(name)
        arrays["w1"] = np.zeros(7, np.float32)
        checkpoints.save(arrays, checkpoints.position(name))
    with pytest.raises(DataError, match=r"'.*/bias' has the shape \(16,\) in the model and \(7,\) in the checkpoint"):
        resume(tmp_path)


def test_restore_refuses_before_it_changes_anything() -> None:
    model, other = toys.dense_classifier(), toys.dense_classifier("adam")
    before = model.get_weights()
    with pytest.raises(DataError, match="another model"):
        restore(model, {**capture(other), "w0": np.zeros((8, 17), np.float32)})
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert weight_shapes(model)["w0"][1] == (8, 16)


def test_the_last_the_one_before_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    losses: list[float] = []
    for epoch, loss in enumerate((0.5, 0.1, 0.3, 0.4, 0.2), start=1):
        losses.append(loss)
        checkpoints.save({"w0": np.zeros(1)}, Position(epoch=epoch, history={"loss": [9.0] * epoch, "val_loss": losses}))
    assert [name[:10] for name in checkpoints.names()] == ["epoch-0005", "epoch-0004", "epoch-0002"]
    assert checkpoints.best() == "epoch-0002-step-000000"


def test_a_loss_that_is_not_a_number_is_not_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    for epoch, loss in enumerate((0.1, 0.5, 0.4, float("nan")), start=1):
        checkpoints.save({"w0": np.zeros(1)}, Position(epoch=epoch, history={"loss": [loss] * epoch}))
    assert checkpoints.best() == "epoch-0001-step-000000"


def test_epoch_10000_comes_after_9999(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    for epoch in (9998, 9999, 10000, 10001):
        checkpoints.save({"w0": np.zeros(1)}, Position(epoch=epoch))
    assert checkpoints.names() == ["epoch-10001-step-000000", "epoch-10000-step-000000"]


def test_a_model_without_an_input_is_resumed(tmp_path: Path) -> None:
    """The model is built from the data, also in the attempt that resumes."""
    import keras

    def fit(callbacks: list[Any]) -> FitResult:
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3, activation="softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy")
        trainer = Trainer("local", store=tmp_path / "store")
        return trainer.fit(model, toys.separable(200), epochs=3, verbose=0, callbacks=callbacks)

    class Fails(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2 and not (tmp_path / "failed").exists():
                (tmp_path / "failed").touch()
                raise ArithmeticError("cut short")

    with pytest.raises(WorkerError, match="cut short"):
        fit([Fails()])
    assert fit([Fails()]).resumed_from == "epoch-0002-step-000000"


@pytest.mark.parametrize("kinds", [("model", "builder"), ("builder", "model")], ids=" then ".join)
def test_a_model_and_its_builder_resume_each_other(tmp_path: Path, kinds: tuple[str, str]) -> None:
    import keras

    def fit(kind: str) -> FitResult:
        keras.utils.set_random_seed(0)
        trainer = Trainer("local", store=tmp_path / "store")
        given = toys.dense_classifier if kind == "builder" else toys.dense_classifier()
        return trainer.fit(given, toys.separable(200), epochs=2, verbose=0, callbacks=[Fails()])

    class Fails(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1 and not (tmp_path / "failed").exists():
                (tmp_path / "failed").touch()
                raise ArithmeticError("cut short")

    with pytest.raises(WorkerError, match="cut short"):
        fit(kinds[0])
    assert fit(kinds[1]).resumed_from == "epoch-0001-step-000000"


def test_options_of_types_that_json_lacks() -> None:
    Options = dataclasses.make_dataclass("Options", ["bytes_per_pack", "seconds", "folder"])
    settings = JobSettings(num_workers=1, epochs=1, batch_size=8, seed=0)
    found = [
        identity(settings, "toy", Options(*options), toys.dense_classifier(), toys.separable(20), None, [])["options"]
        for options in ((np.int64(5), np.float32(0.5), Path("/there")), (5, 0.5, "/there"))
    ]
    assert found[0] == found[1] == {"bytes_per_pack": 5, "seconds": 0.5, "folder": "/there"}


def test_another_wiring_is_another_model() -> None:
    import keras

    from dlspark.driver.runs import identity_of_model

    def model(skipped: int) -> Any:
        tensors = [keras.layers.Input((4,))]
        for _ in range(3):
            tensors.append(keras.layers.Dense(4)(tensors[-1]))
        made = keras.Model(tensors[0], keras.layers.Add()([tensors[skipped], tensors[-1]]))
        made.compile("sgd", "mse")
        return made

    assert identity_of_model(model(1)) == identity_of_model(model(1))
    assert identity_of_model(model(1)) != identity_of_model(model(2))


def test_ctrl_c_is_not_a_failure_of_a_worker(tmp_path: Path) -> None:
    import keras

    class Interrupts(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer("local", max_restarts=3).fit(
            toys.dense_classifier(), toys.separable(200), verbose=0, callbacks=[Interrupts()]
        )


def test_whole_numbers_of_numpy_are_whole_numbers(tmp_path: Path) -> None:
    trainer = Trainer("local", store=tmp_path)
    result = trainer.fit(
        toys.dense_classifier(), toys.separable(200), epochs=np.int64(1), batch_size=np.int32(50), verbose=0
    )
    assert len(result.history["loss"]) == 1


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Expected finite weights"):
        Checkpoints(Store(tmp_path)).save({"w0": np.array([1.0, np.nan])}, Position(epoch=1))
    assert Checkpoints(Store(tmp_path)).latest() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 16}, "batch size was 32 and is 16"),
        ({"seed": 9}, "seed was 0 and is 9"),
        ({"epochs": 4}, "epochs was 3"),
    ],
)
def test_another_fit_does_not_go_on_with_the_run(tmp_path: Path, change: dict[str, int], message: str) -> None:
    cut_short(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resume(tmp_path, **change)
    assert resume(tmp_path, resume=False, **change).resumed_from is None


def test_other_initial_weights_are_told(tmp_path: Path) -> None:
    import keras

    cut_short(tmp_path)
    model = toys.dense_classifier()
    model.layers[0].kernel.assign(keras.random.normal((8, 16)))
    with pytest.raises(ConfigError, match=r"the initial weights .*set_random_seed"):
        Trainer("local", store=tmp_path / "store").fit(model, toys.separable(200), epochs=3, verbose=0)


def test_other_data_are_told(tmp_path: Path) -> None:
    cut_short(tmp_path)
    with pytest.raises(ConfigError, match="; data was"):
        Trainer("local", store=tmp_path / "store").fit(toys.dense_classifier(), toys.separable(201), epochs=3, verbose=0)


@pytest.mark.parametrize("built", [True, False])
def test_a_finished_run_is_given_back_with_a_warning(built: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fit(**settings: Any) -> FitResult:
        import keras

        model = toys.dense_classifier()
        if not built:
            keras.utils.set_random_seed(1)
            model = keras.Sequential([keras.layers.Dense(3, activation="softmax")])
            model.compile("adam", "sparse_categorical_crossentropy")
        trainer = Trainer("local", store=tmp_path)
        return trainer.fit(model, toys.separable(200), **{"epochs": 2, "verbose": 0, **settings})

    first = fit()
    again = fit()
    assert "This run has finished already" in caplog.text
    assert f"loss {first.history['loss'][-1]:.4g}" in caplog.text
    assert again.history == first.history
    assert all((a == b).all() for a, b in zip(again.model.get_weights(), first.weights, strict=True))
    for ours, theirs in zip(again.model.optimizer.variables, first.model.optimizer.variables, strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all()
    assert len(list(tmp_path.glob("run-*"))) == 1
    assert fit(resume=False).history == first.history
    assert len(list(tmp_path.glob("run-*"))) == 2
    assert len(fit(epochs=3).history["loss"]) == 3, "another fit is a new run beside the finished ones"


def test_a_run_that_is_still_running_is_left_alone(tmp_path: Path) -> None:
    run = cut_short(tmp_path)
    import psutil

    me = psutil.Process()
    held = {"host": __import__("socket").gethostname(), "pid": me.pid, "began": me.create_time(), "time": time.time()}
    (run / "running.json").write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=f"still running, on .* in process {me.pid}"):
        resume(tmp_path)
    (run / "running.json").write_text(json.dumps({**held, "began": me.create_time() - 100}))  # the process id was reused
    assert resume(tmp_path).resumed_from == "epoch-0002-step-000000"


def test_what_callbacks_remember_goes_on(tmp_path: Path) -> None:
    """EarlyStopping and ReduceLROnPlateau decide in a resumed run as in an uninterrupted one."""
    import keras

    def callbacks(failing: bool) -> list[Any]:
        class Fails(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                if failing and epoch == 4:
                    raise ArithmeticError("cut short")

        Fails.__qualname__ = "Fails"
        return [
            keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=2, min_delta=10.0),
            keras.callbacks.EarlyStopping(monitor="loss", patience=6, min_delta=10.0, restore_best_weights=True),
            Fails(),
        ]

    def fit(trainer: Trainer, failing: bool = False) -> FitResult:
        settings = {"epochs": 12, "batch_size": 50, "verbose": 0, "callbacks": callbacks(failing)}
        return trainer.fit(toys.dense_classifier(), toys.separable(200), **settings)

    with pytest.raises(WorkerError, match="cut short"):
        fit(Trainer("local", store=tmp_path), failing=True)
    resumed, whole = fit(Trainer("local", store=tmp_path)), fit(Trainer("local"))
    assert resumed.resumed_from == "epoch-0004-step-000000"
    assert len(whole.history["loss"]) == 7
    assert whole.history["learning_rate"][-1] < whole.history["learning_rate"][0]
    assert resumed.history == whole.history
    assert all((a == b).all() for a, b in zip(resumed.weights, whole.weights, strict=True))


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_going_on_within_an_epoch(tmp_path: Path, steps_per_execution: int) -> None:
    """Batch statistics, dropout, weight averages and metrics equal those of an uninterrupted run."""
    import keras

    def model() -> Any:
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3), keras.layers.Dense(3)]
        made = keras.Sequential([keras.layers.Input((8,)), *layers, keras.layers.Softmax()])
        made.compile(
            keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution,
        )
        return made

    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.epoch == 1 and batch >= 8 and not (tmp_path / "failed").exists():
                (tmp_path / "failed").touch()
                raise ArithmeticError("cut short")

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

    settings = {"epochs": 3, "batch_size": 16, "verbose": 0, "callbacks": [Fails()]}
    trainer = Trainer("local", store=tmp_path / "store", checkpoint_steps=3, max_restarts=1)
    resumed = trainer.fit(model(), toys.separable(200), **settings)
    assert resumed.restarts == 1
    names = [json.loads(line).get("name") for line in next(tmp_path.glob("store/*/events.jsonl")).read_text().splitlines()]
    assert "epoch-0001-step-000006" in names
    whole = Trainer("local").fit(model(), toys.separable(200), **settings)
    assert resumed.history == whole.history
    assert all((a == b).all() for a, b in zip(resumed.weights, whole.weights, strict=True))


def test_the_defaults_of_a_trainer_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint_steps needs a store"):
        Trainer("local", checkpoint_steps=5)
    with pytest.raises(ConfigError, match=r"no timeout 'step_second'\. Did you mean 'step_seconds'"):
        Trainer("local", timeouts={"step_second": 5})
    with pytest.raises(ConfigError, match="heartbeat_seconds as a number of seconds above 0"):
        Trainer("local", timeouts={"heartbeat_seconds": 0})
