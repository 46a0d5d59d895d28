"""The training loop: Keras' own ``fit`` on one worker's part of the rows, with reports, checkpoints and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dlspark.data import Feed
from dlspark.job import TrainJob
from dlspark.storage import Checkpoints, Position
from dlspark.wire import Reporter, messages
from dlspark.worker.callbacks import Start, of_rank, progress_callback, saver_callback
from dlspark.worker.gradient_sync import attached
from dlspark.worker.model_state import fits_within_epoch, vary_random_layers
from dlspark.worker.session import WorkerSession
from dlspark.worker.status import WorkerStatus


@dataclass(frozen=True)
class Trained:
    """What `train` did in this worker.

    Attributes:
        history: metric → one float per epoch, including the epochs before the checkpoint that it resumed from.
        epoch_seconds: wall time of each epoch, validation included.
        rows: training rows seen by this worker.
        input_seconds: time spent waiting for them.
    """

    history: dict[str, list[float]]
    epoch_seconds: list[float]
    rows: int
    input_seconds: float


def train(
    job: TrainJob,
    model: Any,
    session: WorkerSession,
    reporter: Reporter,
    *,
    callbacks: Sequence[Any],
    epochs: range,
    status: WorkerStatus | None = None,
    start: Start | None = None,
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Run Keras' ``fit`` on this worker's part of ``epochs``.

    Args:
        job: the run.
        model: compiled and built; its weights are those at ``start``.
        session: this worker's.
        reporter: the connection to the driver.
        callbacks: the job's, in its order.
        epochs: the epochs of the whole training.
        status: updated during the training.
        start: the checkpoint to resume from.
        checkpoints: where to save checkpoints; None saves none.

    Raises:
        NonFiniteLossError: the loss of a step here is NaN or infinite.
        RunInterruptedError: the driver interrupted the run, after a checkpoint if ``checkpoints`` is given.
    """
    status = status or WorkerStatus()
    start = start or Start(Position(epoch=epochs.start))
    vary_random_layers(model, session.rank)
    with ExitStack() as opened:
        part = {"rank": session.rank, "world_size": session.world_size}
        feed = opened.enter_context(Feed(job.train, batch_size=job.batch_size, seed=job.seed, **part))
        validation = None
        if job.validation is not None:
            validation = opened.enter_context(Feed(job.validation, batch_size=job.batch_size, **part))
        last_rows = {
            "train": feed.part_rows(feed.steps - 1),
            "test": validation.part_rows(validation.steps - 1) if validation else 0,
        }
        build_before_tracing(model, feed)
        if start.position.step and not fits_within_epoch(model, start.arrays):
            model.test_on_batch(*feed.first_row())  # only a custom train_step knows how to create its metrics
            model.reset_metrics()
        passes = opened.enter_context(attached(model, session, last_rows.__getitem__))
        saver = saver_callback(job, feed, session, reporter, status, start, checkpoints, callbacks, passes.sums_so_far)
        progress = progress_callback(job, feed, session, reporter, status, start, passes.own_seconds)
        own = [passes, progress, *of_rank(callbacks, session.rank), saver]

        def stopped(epoch: int, step: int, cause: str) -> None:
            if session.exchanges:  # the other ranks would wait for this one
                reporter.send(messages.Stopped(rank=session.rank, epoch=epoch, step=step, cause=cause))

        _fit(model, feed, validation, job, own, epochs, start.position, status, stopped)
    return Trained(
        history=saver.history,
        epoch_seconds=saver.epoch_seconds,
        rows=progress.rows_seen,
        input_seconds=progress.input_seconds,
    )


def _fit(
    model: Any,
    feed: Feed,
    validation: Feed | None,
    job: TrainJob,
    callbacks: list[Any],
    epochs: range,
    start: Position,
    status: WorkerStatus,
    stopped: Callable[[int, int, str], None],
) -> None:
    """``fit`` from ``start`` to the end of ``epochs``.

    Resuming mid-epoch takes two ``fit`` calls, because the first epoch is partial. ``stopped`` is called before this rank
    leaves out a step, because a callback ends the epoch or the training: with the epoch of that step, the complete steps
    before it, and what the callback did.
    """
    import keras

    class OneTraining(keras.callbacks.CallbackList):
        """Callbacks that see one training, whether it takes one call of ``fit`` or two."""

        begun = False
        continues = False  # another call of ``fit`` follows

        def on_train_begin(self, logs: Any = None) -> None:
            if not self.begun:
                self.begun = True
                super().on_train_begin(logs)

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            with self._ending():
                super().on_train_batch_begin(batch, logs)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            with self._ending():
                super().on_train_batch_end(batch, logs)
            if model.stop_training and status.step < feed.steps:
                stopped(feed.epoch, status.step, "sets stop_training")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            super().on_epoch_end(epoch, logs)
            if model.stop_training and epoch + 1 < epochs.stop:
                stopped(epoch + 1, 0, "sets stop_training")

        @contextmanager
        def _ending(self) -> Iterator[None]:
            try:
                yield
            except StopIteration:  # Keras takes it for the end of the data
                if status.step < feed.steps:
                    stopped(feed.epoch, status.step, "raises StopIteration")
                raise

        def on_train_end(self, logs: Any = None) -> None:
            if not self.continues:
                super().on_train_end(logs)

    every = OneTraining(callbacks, add_history=True, model=model, epochs=epochs.stop, steps=feed.steps, verbose=0)

    def fit(first_epoch: int, end: int, first_step: int = 0) -> None:
        model.fit(
            feed.dataset(first_step),
            validation_data=None if validation is None else validation.dataset(),
            initial_epoch=first_epoch,
            epochs=end,
            shuffle=False,  # the feed has shuffled over all workers
            class_weight=None if job.class_weight is None else dict(job.class_weight),
            callbacks=every,
            verbose=0,
        )

    epoch, end = start.epoch, start.epoch if start.stopped else epochs.stop
    if start.step:
        every.continues = True
        finalize = model.optimizer.finalize_variable_values
        # Keras replaces weights by their moving averages at the end of ``fit``; this is not the end of the training.
        object.__setattr__(model.optimizer, "finalize_variable_values", lambda _: None)
        try:
            fit(epoch, epoch + 1, start.step)
        finally:
            object.__delattr__(model.optimizer, "finalize_variable_values")
        every.continues = False
        epoch += 1
        if model.stop_training or epoch == end:
            finalize(model.trainable_weights)
            every.on_train_end()
            return
    fit(epoch, end)


def build_before_tracing(model: Any, feed: Feed) -> None:
    """Create the variables of optimizer, loss and metrics, which Keras would create inside the first step.

    A traced function that creates variables is traced twice: 39 s instead of 21 s for ResNet50 on one slow core. A model
    with a custom ``train_step`` is left alone, because only that step knows what its loss and metrics take.
    """
    import keras

    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    outputs = getattr(model, "output", None)
    if outputs is None and len(getattr(model, "outputs", None) or ()) == 1:  # a Sequential has no "output"
        (outputs,) = model.outputs
    if model.loss is None or type(model).train_step is not keras.Model.train_step:
        return
    x, y, _ = keras.utils.unpack_x_y_sample_weight(feed.first_row())
    if outputs is None or any(None in t.shape[1:] for t in keras.tree.flatten(outputs)):
        if len(keras.tree.flatten(y)) < 2:
            return
        # The losses of several outputs must be there before the step is traced.
        outputs = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    predicted = keras.tree.map_structure(lambda t: keras.ops.zeros((1, *t.shape[1:]), t.dtype), outputs)
    model.compute_loss(x, y, predicted)
    model.compute_metrics(x, y, predicted)
    model.reset_metrics()
