"""Make Keras' own ``fit`` synchronous by summing gradients over the workers.

Why N workers equal one process: let worker r have n_r rows of a step, and let g_r be the mean gradient over its rows. The
gradient of the whole step is Σ n_r·g_r / Σ n_r, so one sum of [n_r·g_r …, n_r] gives it, also for uneven parts. For metrics
see `dlspark.worker.merged_metrics`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dlspark.errors import DlsparkError
from dlspark.mends import keras_batch_norm
from dlspark.mends.keras_masked_means import masked_means
from dlspark.mends.keras_output_losses import output_losses
from dlspark.worker.batch_moments import BatchMoments
from dlspark.worker.merged_metrics import MergedMetrics, Target, passes_callback
from dlspark.worker.model_parts import optimizers_of
from dlspark.worker.own_time import OwnTime
from dlspark.worker.session import WorkerSession


@contextlib.contextmanager
def attached(model: Any, session: WorkerSession, last_step_rows: Callable[[str], int]) -> Iterator[Any]:
    """Attach ``model`` to ``session`` around ``fit``; yields a Keras callback that must be the first one of ``fit``.

    Args:
        model: compiled and built. Instance attributes replace some of its methods until the end of the block.
        session: this worker's.
        last_step_rows: returns this worker's rows in the last step of the pass "train" or "test".
    """
    if not session.exchanges:
        # Keras' Adam computes something else on sparse gradients, and one worker must equal several, which sum dense ones.
        targets = [(optimizer, "apply", _densifying(optimizer.apply)) for optimizer in optimizers_of(model)]
        with _replaced(targets):
            yield passes_callback(lambda: None, dict, lambda: 0.0)
        return
    clock = OwnTime()
    metrics = MergedMetrics(model, session, last_step_rows, clock.seconds)
    step = _Step(model, session, metrics, clock)
    # Collect all targets before changing any: a model may hold several optimizers.
    targets = [(model, name, step.noting(getattr(model, name))) for name in ("train_step", "test_step")]
    targets += [(optimizer, "apply", step.summing(optimizer.apply)) for optimizer in optimizers_of(model)]
    targets += [(mean, "update_state", step.sharing(mean.update_state)) for mean in _step_means(model)]
    targets += keras_batch_norm.targets(model, BatchMoments(session, step.exchange, step.rows).of)
    targets += metrics.targets()
    with _replaced(targets), masked_means(step.masked_share):
        try:
            yield metrics.callback
        finally:
            # Functions traced in this block contain our collectives, so the model must trace again without them.
            model.train_function = model.test_function = None


@contextlib.contextmanager
def _replaced(targets: list[Target]) -> Iterator[None]:
    """Replace attributes by instance attributes of (owner, name, function) inside the block."""
    for owner, name, function in targets:
        object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in targets:
            object.__delattr__(owner, name)


class _Step:
    """The step that is being traced or run, and what it exchanges."""

    def __init__(self, model: Any, session: WorkerSession, metrics: MergedMetrics, clock: OwnTime) -> None:
        self._model = model
        self._session = session
        self._metrics = metrics
        self._clock = clock
        self._rows: Any = None  # rows of its batch, a scalar tensor
        self._all_rows: Any = None  # those of all workers; None until the step needs them
        self._runs = False
        self._output_losses = output_losses(model)

    def rows(self) -> Any:
        """This worker's rows in the step, a scalar tensor; None outside a step of ``fit``."""
        return self._rows if self._runs and not self._metrics.apart else None

    def noting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """``step``, after recording the number of rows in its batch."""

        def noted(*args: Any) -> Any:
            import keras

            x, _, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
            first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
            self._rows, self._all_rows = keras.ops.cast(keras.ops.shape(first)[0], "float32"), None
            self._clock.start([])
            self._runs = True
            try:
                result = step(*args)
            finally:
                self._runs = False
            if len(output_losses(self._model)) != len(self._output_losses):
                raise DlsparkError(
                    "Expected the losses of all outputs before the first step; the step created them, and they cannot be "
                    "merged over workers. Call the model's compute_loss once before fit, or train with num_workers=1."
                )
            return result

        return noted

    def _rows_of_all(self) -> Any:
        """The rows of all workers in this step, by one sum for each step that needs them."""
        if self._all_rows is None:
            (self._all_rows,) = self.exchange([self._rows])
        return self._all_rows

    def masked_share(self, valid: Any) -> Any:
        """The factor that makes the mean over valid elements here, weighted by rows, one over those of all workers.

        With v_r valid elements in n_r rows here, v and n in all: the worker's mean is s_r / v_r, and the sum over
        workers of n_r/n · factor · s_r / v_r must be Σ s_r / v. So the factor is (v_r / n_r) · (n / v).
        """
        import keras

        if self.rows() is None:
            return None
        valid = keras.ops.stop_gradient(valid)
        (everywhere,) = self.exchange([valid])
        return keras.ops.divide_no_nan(valid * self._rows_of_all(), self._rows * everywhere)

    def sharing(self, update_state: Callable[..., Any]) -> Callable[..., Any]:
        """``update_state`` of a mean over steps, where a step without a weight counts once over all workers."""

        def shared(values: Any, sample_weight: Any = None) -> Any:
            scalar = getattr(values, "shape", None) == ()
            if scalar and sample_weight is None and self.rows() is not None:
                sample_weight = self._rows / self._rows_of_all()
            return update_state(values, sample_weight=sample_weight)

        return shared

    def summing(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """An optimizer's ``apply`` that gets the gradients of the whole step."""

        def applied(grads: Any, trainable_variables: Any = None) -> Any:
            import keras

            grads = list(grads)
            weighted = []
            for gradient in grads:
                if gradient is not None:
                    dense = _dense(gradient)
                    weighted.append(dense * keras.ops.cast(self._rows, dense.dtype))
            self._clock.stop(weighted)
            *sums, rows = self._session.sum([*weighted, self._rows])
            totals = iter(sums)
            means = []
            for gradient in grads:
                total = None if gradient is None else next(totals)
                means.append(None if total is None else total / keras.ops.cast(rows, total.dtype))
            return apply(means, trainable_variables)

        return applied

    def exchange(self, tensors: Sequence[Any]) -> list[Any]:
        """The session's sum in the middle of a step. The wait for other ranks is not this rank's own time."""
        self._clock.stop(list(tensors))
        totals = self._session.sum(tensors)
        self._clock.start(totals)
        return totals


def _step_means(model: Any) -> list[Any]:
    """The means that a step may update with one number: losses of outputs, and the trackers of a custom step."""
    import keras

    means = [metric for metric in [*output_losses(model), *model.metrics] if type(metric) is keras.metrics.Mean]
    return list({id(mean): mean for mean in means}.values())


def _densifying(apply: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's ``apply`` that gets an embedding's sparse gradient as a dense one."""

    def applied(grads: Any, trainable_variables: Any = None) -> Any:
        return apply([None if gradient is None else _dense(gradient) for gradient in grads], trainable_variables)

    return applied


def _dense(gradient: Any) -> Any:
    """``gradient`` as an ordinary tensor. TensorFlow's gradient of an embedding is an IndexedSlices."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)
