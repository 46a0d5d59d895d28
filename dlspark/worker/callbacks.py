"""The loop's own callbacks, for reports, history and checkpoints; and the state of the user's callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from dlspark.data import Feed, step_range
from dlspark.errors import NonFiniteLossError, RunInterruptedError
from dlspark.job import TrainJob
from dlspark.storage import Checkpoints, Position
from dlspark.wire import Reporter, messages
from dlspark.worker.model_state import capture, capture_within_epoch, restore_within_epoch
from dlspark.worker.session import WorkerSession
from dlspark.worker.status import WorkerStatus

logger = logging.getLogger(__name__)

STEP_REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class Start:
    """Where a training starts: at the beginning, or at a checkpoint.

    Attributes:
        position: the complete epochs and steps.
        arrays: the checkpoint's arrays; empty at the beginning.
    """

    position: Position = field(default_factory=lambda: Position(epoch=0))
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def progress_callback(
    job: TrainJob,
    feed: Feed,
    session: WorkerSession,
    reporter: Reporter,
    status: WorkerStatus,
    start: Start,
    own_seconds: Callable[[], float],
) -> Any:
    """The callback that tracks the progress of the training, for the feed, ``status`` and the driver.

    Its ``rows_seen`` and ``input_seconds`` are those of `WorkerReport`. ``own_seconds`` returns the time that this rank's
    own part of all steps has taken; see `dlspark.worker.gradient_sync`.
    """
    import keras

    class Progress(keras.callbacks.Callback):
        """Sets the feed's epoch, and reports the progress of this rank to the driver. The first of all callbacks."""

        def __init__(self) -> None:
            super().__init__()
            self.rows_seen = 0
            self.input_seconds = 0.0
            self._own_seconds = 0.0
            self._steps = 0
            self._reported = self._step_began = self._step_ended = self._in_steps = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            feed.epoch = epoch
            self._offset = start.position.step if epoch == start.position.epoch else 0
            if self._offset:
                restore_within_epoch(self.model, start.arrays, session)
            # The heartbeat calls this in the middle of a step, to learn whether this rank's part of it is done.
            status.waits = lambda: own_seconds() > self._in_steps
            status.step, status.epoch = self._offset, epoch
            status.move("callbacks")

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self._step_began = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            status.move("callbacks")  # before the step counts as complete: see WorkerStatus.heartbeat
            # With steps_per_execution the last call may name a step past the end.
            step = min(self._offset + batch, feed.steps - 1)
            self.rows_seen += sum(feed.part_rows(each) for each in range(status.step, step + 1))
            first = status.step == self._offset
            # With several steps per execution, only the wait for the first one's batch can be measured.
            waited = max(0.0, feed.ready_at[status.step] - max(self._step_ended, feed.began_at))
            self.input_seconds += waited
            self._add_own_seconds(step + 1 - status.step)
            status.step = step + 1
            now = self._step_ended = time.perf_counter()
            due = first or now - self._reported > STEP_REPORT_SECONDS or step == feed.steps - 1
            loss = (logs or {}).get("loss")
            # Reading the loss waits for the step to end. Several workers wait for each other anyway.
            if loss is not None and (due or session.world_size > 1):
                loss = float(loss)
                if not math.isfinite(loss):
                    raise NonFiniteLossError(
                        f"The loss is {loss} at step {step + 1} of epoch {feed.epoch + 1}. Lower the learning rate, "
                        "clip gradients, or look for NaN and infinite values in the data."
                    )
            if due:
                self._reported = now
                _, rows = step_range(job.train.rows, job.batch_size, step)
                reporter.send(
                    messages.StepEnded(
                        rank=session.rank, epoch=feed.epoch, step=step + 1, steps=feed.steps, rows=rows, loss=loss
                    )
                )

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            status.move("validation")

        def on_test_end(self, logs: Any = None) -> None:
            status.move("callbacks")

        def _add_own_seconds(self, steps: int) -> None:
            """Record this rank's own time, callbacks included, excluding waits for other ranks."""
            between = max(0.0, self._step_began - self._step_ended) if self._step_ended else 0.0
            before, self._in_steps = self._in_steps, own_seconds()
            if self._step_ended:  # the first step includes tracing
                self._own_seconds += between + self._in_steps - before
                self._steps += steps
            status.own_seconds, status.steps = self._own_seconds, self._steps

    return Progress()


def saver_callback(
    job: TrainJob,
    feed: Feed,
    session: WorkerSession,
    reporter: Reporter,
    status: WorkerStatus,
    start: Start,
    checkpoints: Checkpoints | None,
    callbacks: Sequence[Any],
    sums_so_far: Callable[[], Mapping[str, NDArray[Any]]],
) -> Any:
    """The callback that saves checkpoints, ends an interrupted run, and has the ``history`` and ``epoch_seconds``."""
    import keras

    class Saver(keras.callbacks.Callback):
        """Keeps the history and saves checkpoints. The last callback, so that checkpoints include the others' changes."""

        def __init__(self) -> None:
            super().__init__()
            self.history = {name: list(values) for name, values in start.position.history.items()}
            self.epoch_seconds = list(start.position.epoch_seconds)
            self._epoch_began = 0.0
            self._step_before = 0
            self._interrupted = False

        def on_train_begin(self, logs: Any = None) -> None:
            restore_callbacks(callbacks, start.arrays)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._epoch_began = time.perf_counter()
            self._step_before = status.step

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            status.move("step")  # no callback can prevent the step from here on

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self._interrupted = self._interrupted or reporter.must_stop()
            step, before = status.step, self._step_before
            self._step_before = step
            if step == feed.steps:
                return  # on_epoch_end follows
            if self._interrupted:
                self._save_within_epoch(step)
                self._end()
            # With steps_per_execution several steps end at once.
            if (
                checkpoints is not None
                and job.checkpoint_steps
                and step // job.checkpoint_steps > before // job.checkpoint_steps
            ):
                self._save_within_epoch(step)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.epoch_seconds.append(time.perf_counter() - self._epoch_began)
            values = {name: float(value) for name, value in (logs or {}).items()}
            for name, value in values.items():
                self.history.setdefault(name, []).append(value)
            seconds = self.epoch_seconds[-1]
            reporter.send(messages.EpochEnded(rank=session.rank, epoch=epoch, logs=values, seconds=seconds))
            if checkpoints is not None:
                stopped = bool(self.model.stop_training)
                # The driver fails a run in which only some ranks stop. No later run may resume it as if all had stopped.
                agreed = self._total(stopped) == stopped * session.world_size or epoch + 1 == job.epochs
                if agreed and session.rank == 0:
                    synchronise(self.model)
                    self._save(capture(self.model), Position(epoch=epoch + 1, stopped=stopped, **self._so_far()))
            if self._interrupted:
                self._end()

        def _save_within_epoch(self, step: int) -> None:
            if checkpoints is None:
                return
            synchronise(self.model)
            arrays = {**capture_within_epoch(self.model, session), **sums_so_far()}
            if session.rank == 0:
                self._save(arrays, Position(epoch=feed.epoch, step=step, **self._so_far()))

        def _save(self, arrays: dict[str, Any], place: Position) -> None:
            status.phase = "checkpoint"
            began = time.perf_counter()
            name = checkpoints.save({**arrays, **callback_arrays(callbacks)}, place)  # type: ignore[union-attr]
            seconds = time.perf_counter() - began
            reporter.send(messages.CheckpointSaved(rank=session.rank, name=name, seconds=seconds))
            status.move("callbacks")

        def _so_far(self) -> dict[str, Any]:
            return {"history": self.history, "epoch_seconds": self.epoch_seconds}

        def _end(self) -> None:
            """End, but after rank 0 has saved: an engine may end all ranks when the first one ends."""
            self._total(0)
            raise RunInterruptedError("The driver interrupted the run.")

        def _total(self, value: float) -> float:
            """The sum of ``value`` over all ranks, which wait for each other here."""
            if not session.exchanges:
                return value * session.world_size
            (total,) = session.sum([keras.ops.convert_to_tensor(np.full(1, value, np.float32))])
            return float(keras.ops.convert_to_numpy(total)[0])

    return Saver()


def moving(status: WorkerStatus) -> Any:
    """A callback for a separate evaluation, which records its progress in ``status``."""
    import keras

    class Moving(keras.callbacks.Callback):
        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            status.move("validation")

    return Moving()


def synchronise(model: Any) -> None:
    """Update the model's variables, which under JAX lag behind within an epoch."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def callback_arrays(callbacks: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """The state of the callbacks, pickled, as one array of bytes called ``callbacks``.

    Keras' callbacks have no interface for their state, so all of their attributes are saved; some are only valid together
    (EarlyStopping changes the sign of ``min_delta`` once it knows the direction of its metric). Attributes that belong to
    the process, such as the model, its parts and open files, are left out.
    """
    import keras

    theirs = (keras.Model, keras.layers.Layer, keras.optimizers.Optimizer, keras.Variable)
    states: list[dict[str, bytes]] = []
    for callback in callbacks:
        state = {}
        for name, value in vars(callback).items():
            if name in ("_model", "params") or isinstance(value, theirs):
                continue
            try:
                state[name] = cloudpickle.dumps(value)
            except Exception as error:  # pickling runs the object's own code, which may raise anything
                logger.debug("%s.%s is not saved in checkpoints: %s", type(callback).__name__, name, error)
        states.append(state)
    return {"callbacks": np.frombuffer(cloudpickle.dumps(states), np.uint8)}


def restore_callbacks(callbacks: Sequence[Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Restore what `callback_arrays` saved. Call it after ``on_train_begin``, which resets callbacks."""
    if "callbacks" not in arrays:
        return
    for callback, state in zip(callbacks, cloudpickle.loads(arrays["callbacks"].tobytes()), strict=True):
        for name, pickled in state.items():
            vars(callback)[name] = cloudpickle.loads(pickled)


def of_rank(callbacks: Sequence[Any], rank: int) -> list[Any]:
    """All callbacks on rank 0; on other ranks those that write no files, so that all ranks take the same decisions."""
    import keras

    writers = (keras.callbacks.ModelCheckpoint, keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
    return [c for c in callbacks if rank == 0 or not (isinstance(c, writers) or getattr(c, "rank_zero_only", False))]
