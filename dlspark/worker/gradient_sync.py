"""Make Keras' own ``fit`` synchronous by summing gradients and metrics over the workers.

Why N workers equal one process: let worker r have n_r rows of a step, and let g_r be the mean gradient over its rows. The
gradient of the whole step is Σ n_r·g_r / Σ n_r, so one sum of [n_r·g_r …, n_r] gives it, also for uneven parts. The state of
a metric is a sum over rows, so the sum of the workers' states is the state for all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dlspark.errors import DlsparkError
from dlspark.mends import keras_batch_norm, keras_step_logs
from dlspark.mends.keras_masked_means import masked_means
from dlspark.mends.keras_output_losses import output_losses
from dlspark.worker.agreement import Agreement
from dlspark.worker.batch_moments import BatchMoments
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
            yield _passes_callback(lambda: None, dict, lambda: 0.0)
        return
    link = _Link(model, session, last_step_rows)
    # Collect all targets before changing any: a model may hold several optimizers.
    targets = [(model, name, link.noting(getattr(model, name))) for name in ("train_step", "test_step")]
    targets += [(model, name, link.apart(getattr(model, name))) for name in ("evaluate", "test_on_batch", "train_on_batch")]
    targets += [(optimizer, "apply", link.summing(optimizer.apply)) for optimizer in optimizers_of(model)]
    targets += [(mean, "update_state", link.sharing(mean.update_state)) for mean in _step_means(model)]
    targets += [(model, "get_metrics_result", link.merging(model.get_metrics_result))]
    targets += keras_step_logs.targets(model, link.ending)
    targets += keras_batch_norm.targets(model, BatchMoments(session, link.exchange, link.step_rows).of)
    with _replaced(targets), masked_means(link.masked_share):
        try:
            yield link.passes
        finally:
            # Functions traced in this block contain our collectives, so the model must trace again without them.
            model.train_function = model.test_function = None


@contextlib.contextmanager
def _replaced(targets: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Replace attributes by instance attributes of (owner, name, function) inside the block."""
    for owner, name, function in targets:
        object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in targets:
            object.__delattr__(owner, name)


class _Link:
    """The state of one attachment."""

    def __init__(self, model: Any, session: WorkerSession, last_step_rows: Callable[[str], int]) -> None:
        self._model = model
        self._session = session
        self._last_step_rows = last_step_rows
        self._agreement = Agreement(model, session)
        self._rows: Any = None  # rows of the batch in the step being traced or run, a scalar tensor
        self._all_rows: Any = None  # those of all workers; None until the step needs them
        self._in_step = False
        self._pass = "train"  # or "test", inside the evaluation that belongs to ``fit``
        self._ending = False  # Keras asks for the results of a pass
        self._apart = False  # inside a call of the user's, perhaps on one rank only
        self._functions_apart: Any = None  # the test function that was traced there
        self._output_losses = output_losses(model)
        self._step_began: Any = None
        self._own_seconds: Any = None  # a TensorFlow variable: total seconds between the beginning of a step and its sum
        self.passes = _passes_callback(self._agreement.begin, self._agreement.sums_so_far, self.own_seconds)

    def noting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """``step``, after recording the number of rows in its batch."""

        def noted(*args: Any) -> Any:
            import keras

            x, _, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
            first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
            self._rows, self._all_rows = keras.ops.cast(keras.ops.shape(first)[0], "float32"), None
            self._step_began = self._now([])
            self._in_step = True
            try:
                result = step(*args)
            finally:
                self._in_step = False
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

        if not self._in_step or self._apart:
            return None
        valid = keras.ops.stop_gradient(valid)
        (everywhere,) = self.exchange([valid])
        return keras.ops.divide_no_nan(valid * self._rows_of_all(), self._rows * everywhere)

    def sharing(self, update_state: Callable[..., Any]) -> Callable[..., Any]:
        """``update_state`` of a mean over steps, where a step without a weight counts once over all workers."""

        def shared(values: Any, sample_weight: Any = None) -> Any:
            scalar = getattr(values, "shape", None) == ()
            if scalar and sample_weight is None and self._in_step and not self._apart:
                sample_weight = self._rows / self._rows_of_all()
            return update_state(values, sample_weight=sample_weight)

        return shared

    def apart(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that users may call in a callback, without exchanges there; ``fit``'s own evaluation has them."""

        def called(*args: Any, **kwargs: Any) -> Any:
            callbacks = getattr(kwargs.get("callbacks"), "callbacks", ())
            if self.passes in callbacks:  # ``fit`` hands on its list of callbacks
                self._pass = "test"
                try:
                    return method(*args, **kwargs)
                finally:
                    self._pass = "train"
            self._apart = True
            ours, self._model.test_function = self._model.test_function, self._functions_apart
            try:
                return method(*args, **kwargs)
            finally:
                self._functions_apart, self._model.test_function = self._model.test_function, ours
                self._apart = False
                # Keras lets such a call change the metrics of the pass. Counted on rank 0, it counts once.
                if self._session.rank:
                    self._model.reset_metrics()

        return called

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
            self._note_own_seconds(weighted)
            *sums, rows = self._session.sum([*weighted, self._rows])
            totals = iter(sums)
            means = []
            for gradient in grads:
                total = None if gradient is None else next(totals)
                means.append(None if total is None else total / keras.ops.cast(rows, total.dtype))
            return apply(means, trainable_variables)

        return applied

    def step_rows(self) -> Any:
        """This worker's rows in the current step, a scalar tensor; None outside a step."""
        return self._rows if self._in_step and not self._apart else None

    def exchange(self, tensors: Sequence[Any]) -> list[Any]:
        """The session's sum in the middle of a step. The wait for other ranks is not this rank's own time."""
        self._note_own_seconds(list(tensors))
        totals = self._session.sum(tensors)
        self._step_began = self._now(totals)
        return totals

    def own_seconds(self) -> float:
        """The time that this rank's own part of all steps has taken so far, without the waits for other ranks."""
        return 0.0 if self._own_seconds is None else float(self._own_seconds.numpy())

    def _note_own_seconds(self, gradients: list[Any]) -> None:
        now = self._now(gradients)
        if now is None:
            return
        import tensorflow as tf

        if self._own_seconds is None:
            with tf.init_scope():
                self._own_seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self._own_seconds.assign_add(now - self._step_began)

    def _now(self, after: list[Any]) -> Any:
        """The time inside a step after ``after`` was computed; None if ranks do not wait for each other."""
        import keras

        if not self._session.exchanges or keras.backend.backend() != "tensorflow":
            return None
        import tensorflow as tf

        with tf.control_dependencies(after):
            return tf.timestamp()

    def merging(self, get_metrics_result: Callable[[], Any]) -> Callable[[], Any]:
        """``get_metrics_result`` over the rows of all workers at the end of a pass; local otherwise."""

        def merged() -> Any:
            if not self._ending:
                return get_metrics_result()
            import keras

            variables = self._model.metrics_variables
            local = [keras.ops.convert_to_numpy(variable) for variable in variables]
            totals = self._session.sum([keras.ops.cast(value, "float64") for value in local])  # counts are exact
            for variable, total in zip(variables, totals, strict=True):
                variable.assign(keras.ops.cast(total, variable.dtype))
            try:
                result = get_metrics_result()
                return keras.tree.map_structure(lambda value: float(keras.ops.convert_to_numpy(value)), result)
            finally:
                for variable, value in zip(variables, local, strict=True):
                    variable.assign(value)

        return merged

    def ending(self, result_or_logs: Callable[[Any], Any], logs: Any) -> Any:
        """Keras' results of a pass, over all workers: of its metrics, or what a custom step returned besides."""
        if self._apart:
            return result_or_logs(logs)
        if self._pass == "train":
            self._agreement.reach()
        self._ending = True
        try:
            result = result_or_logs(logs)
        finally:
            self._ending = False
        return self._averaged(logs) if result is logs and isinstance(logs, dict) and logs else result

    def _averaged(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What a custom step returned besides metrics, averaged over the workers by the rows of the last step."""
        import keras

        rows = float(self._last_step_rows(self._pass))
        values = [keras.ops.cast(value, "float32") * rows for value in logs.values()]
        *sums, total = self._session.sum([*values, keras.ops.convert_to_tensor(np.float32(rows))])
        return {name: float(value / total) for name, value in zip(logs, sums, strict=True)}


def _step_means(model: Any) -> list[Any]:
    """The means that a step may update with one number: losses of outputs, and the trackers of a custom step."""
    import keras

    means = [metric for metric in [*output_losses(model), *model.metrics] if type(metric) is keras.metrics.Mean]
    return list({id(mean): mean for mean in means}.values())


def _passes_callback(begin: Callable[[], None], sums: Callable[[], dict[str, Any]], seconds: Callable[[], float]) -> Any:
    """The callback that must be in the list of ``fit``; its presence tells ``fit``'s own evaluation from the user's."""
    import keras

    class Passes(keras.callbacks.Callback):
        own_seconds, sums_so_far = staticmethod(seconds), staticmethod(sums)

        def on_train_begin(self, logs: Any = None) -> None:
            begin()

    return Passes()


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


def optimizers_of(model: Any) -> list[Any]:
    """The optimizers of ``model`` in a fixed order, without those that another one wraps."""
    import keras

    found: dict[int, Any] = {}
    for value in [getattr(model, "optimizer", None), *(value for _, value in sorted(vars(model).items()))]:
        leaves = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for leaf in leaves:
            if isinstance(leaf, keras.optimizers.Optimizer):
                found.setdefault(id(leaf), leaf)
    inner = {id(getattr(optimizer, "inner_optimizer", None)) for optimizer in found.values()}
    return [optimizer for key, optimizer in found.items() if key not in inner]
