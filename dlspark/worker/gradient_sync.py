"""Make Keras' own ``fit`` synchronous by summing gradients and metrics over the workers.

Why N workers equal one process: let worker r have n_r rows of a step, and let g_r be the mean gradient over its rows. The
gradient of the whole step is Σ n_r·g_r / Σ n_r, so one sum of [n_r·g_r …, n_r] gives it, also for uneven parts. The state of
a metric is a sum over rows, so the sum of the workers' states is the state for all rows.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dlspark.errors import ConfigError, DlsparkError
from dlspark.mends import keras_batch_norm, keras_step_logs
from dlspark.mends.keras_compiled_metrics import compiled_metrics
from dlspark.worker.batch_moments import BatchMoments
from dlspark.worker.session import WorkerSession

MERGEABLE_REDUCTIONS = ("sum_over_batch_size", "mean", "auto")


def check_mergeable(model: Any) -> None:
    """Reject losses and metrics that cannot be computed exactly from the workers' parts.

    Raises:
        ConfigError: a loss has reduction "sum", "none" or "mean_with_sample_weight", or it is unknown how to merge a metric.
    """
    import keras

    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "mean")
        if reduction not in MERGEABLE_REDUCTIONS:
            raise ConfigError(
                f"Several workers need a loss that is the mean over rows (reduction {MERGEABLE_REDUCTIONS[0]!r}), and "
                f"{type(loss).__name__} has reduction {reduction!r}, which no merge of the workers' parts gives exactly. "
                "Set its reduction to 'sum_over_batch_size', or train with num_workers=1."
            )
    for metric in compiled_metrics(model):
        definer = next(cls for cls in type(metric).__mro__ if "update_state" in vars(cls))
        if not definer.__module__.startswith("keras.") and getattr(metric, "merge", None) != "sum":
            raise ConfigError(
                f"Several workers need metrics whose states are sums over rows. Of {type(metric).__name__} that is not "
                "known: if all its variables are such sums, say so by the class attribute merge = 'sum'; otherwise "
                "train with num_workers=1."
            )


@contextlib.contextmanager
def attached(model: Any, session: WorkerSession, last_step_rows: Callable[[str], int]) -> Iterator[Any]:
    """Attach ``model`` to ``session`` around ``fit``; yields a Keras callback that must be the first one of ``fit``.

    Args:
        model: compiled and built. Instance attributes replace some of its methods until the end of the block.
        session: this worker's.
        last_step_rows: returns this worker's rows in the last step of the pass "train" or "test".
    """
    link = _Link(model, session, last_step_rows)
    # Collect all targets before changing any: a model may hold several optimizers.
    targets = [(model, "train_step", link.noting(model.train_step)), (model, "test_step", link.noting(model.test_step))]
    targets += [(optimizer, "apply", link.summing(optimizer.apply)) for optimizer in optimizers_of(model)]
    targets += [(model, "get_metrics_result", link.merging(model.get_metrics_result))]
    targets += keras_step_logs.targets(model, link.average_logs)
    targets += keras_batch_norm.targets(model, BatchMoments(session, link.exchange, link.step_rows).of)
    if not session.exchanges:
        # Keras' Adam computes something else on sparse gradients, and one worker must equal several, which sum dense ones.
        targets = [(optimizer, "apply", _densifying(optimizer.apply)) for optimizer in optimizers_of(model)]
    for owner, name, function in targets:
        object.__setattr__(owner, name, function)
    try:
        yield link.callback()
    finally:
        for owner, name, _ in targets:
            object.__delattr__(owner, name)
        # Functions traced in this block contain our collectives, so the model must trace again without them. A worker that
        # exchanges nothing keeps its functions: tracing again in each of Elephas' rounds doubled the time of a short epoch.
        if session.exchanges:
            model.train_function = model.test_function = None


class _Link:
    """The state of one attachment."""

    def __init__(self, model: Any, session: WorkerSession, last_step_rows: Callable[[str], int]) -> None:
        self._model = model
        self._session = session
        self._last_step_rows = last_step_rows
        self._rows: Any = None  # rows of the batch in the step being traced or run, a scalar tensor
        self._in_step = False
        self._pass: str | None = None  # "train" or "test", from the beginning of a pass to the merge of its metrics
        self._merged: str | None = None  # the pass whose metrics were merged last; None after an evaluation of the user's
        self._fingerprints: list[int] = []
        self._step_began: Any = None
        self._own_seconds: Any = None  # a TensorFlow variable: total seconds between the beginning of a step and its sum

    def noting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """``step``, after recording the number of rows in its batch."""

        def noted(*args: Any) -> Any:
            import keras

            x, _, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
            first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
            self._rows = keras.ops.cast(keras.ops.shape(first)[0], "float32")
            self._step_began = self._now([])
            self._in_step = True
            try:
                return step(*args)
            finally:
                self._in_step = False

        return noted

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
        return self._rows if self._in_step else None

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
            if self._in_step:
                return get_metrics_result()
            self._merged, self._pass = self._pass, None
            if self._merged is None:  # the user's own evaluation, perhaps on one rank only
                return get_metrics_result()
            import keras

            if self._merged == "train":
                self._agree_on_weights()
            variables = self._model.metrics_variables
            local = [keras.ops.convert_to_numpy(variable) for variable in variables]
            totals = self._session.sum([keras.ops.cast(value, "float32") for value in local])
            for variable, total in zip(variables, totals, strict=True):
                variable.assign(keras.ops.cast(total, variable.dtype))
            try:
                result = get_metrics_result()
                return keras.tree.map_structure(lambda value: float(keras.ops.convert_to_numpy(value)), result)
            finally:
                for variable, value in zip(variables, local, strict=True):
                    variable.assign(value)

        return merged

    def average_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Average what a custom step returned besides metrics over the workers, weighted by the rows of the last step."""
        if self._merged is None:
            return logs
        import keras

        rows = float(self._last_step_rows(self._merged))
        values = [keras.ops.cast(value, "float32") * rows for value in logs.values()]
        *sums, total = self._session.sum([*values, keras.ops.convert_to_tensor(np.float32(rows))])
        return {name: float(value / total) for name, value in zip(logs, sums, strict=True)}

    def callback(self) -> Any:
        """The callback that tracks the passes of ``fit``."""
        import keras

        link = self

        class Passes(keras.callbacks.Callback):
            own_seconds = staticmethod(link.own_seconds)

            def on_train_begin(self, logs: Any = None) -> None:
                link._fingerprints = link._state_fingerprints()

            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                link._pass = "train"

            def on_test_begin(self, logs: Any = None) -> None:
                link._pass = "test"

        return Passes()

    def _float_states(self) -> list[Any]:
        return [v for v in self._model.non_trainable_weights if "float" in v.dtype]

    def _state_fingerprints(self) -> list[int]:
        return [_crc(v) for v in self._float_states()]

    def _agree_on_weights(self) -> None:
        """Average the states that a pass changed (batch-norm statistics), then check that all ranks have the same weights.

        States that changed on no rank, such as those of frozen layers, stay bit-identical.
        """
        import keras

        states, now = self._float_states(), self._state_fingerprints()
        changed = np.array([a != b for a, b in zip(self._fingerprints, now, strict=True)], np.float32)
        (anywhere,) = self._session.sum([keras.ops.convert_to_tensor(changed)]) if states else (np.zeros(0),)
        moving = [s for s, flag in zip(states, keras.ops.convert_to_numpy(anywhere), strict=True) if flag]
        if moving:
            sums = self._session.sum([keras.ops.convert_to_tensor(keras.ops.convert_to_numpy(s)) for s in moving])
            for state, total in zip(moving, sums, strict=True):
                state.assign(total / self._session.world_size)
        self._fingerprints = self._state_fingerprints()
        self._compare_weights()

    def _compare_weights(self) -> None:
        import keras

        checksum = 0
        for variable in self._model.weights:
            checksum = _crc(variable, checksum)
        # Every rank fills its row with two 16-bit halves, which float32 holds exactly; the sum gathers all rows.
        mine = np.zeros((self._session.world_size, 2), np.float32)
        mine[self._session.rank] = divmod(checksum, 1 << 16)
        (everyone,) = self._session.sum([keras.ops.convert_to_tensor(mine)])
        table = keras.ops.convert_to_numpy(everyone)
        differing = [rank for rank in range(len(table)) if (table[rank] != table[0]).any()]
        if differing:
            raise DlsparkError(
                f"After this epoch the weights on ranks {differing} differ from rank 0's. Synchronous training keeps them "
                "equal; something in the model or a callback changed them on one rank only (assigned weights, a new "
                "compile(), a random draw outside Keras). Do it on every rank alike."
            )


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


def _crc(variable: Any, start: int = 0) -> int:
    import keras

    return zlib.crc32(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes(), start)


def optimizers_of(model: Any) -> list[Any]:
    """The optimizers of ``model`` in a fixed order, without those that another one wraps."""
    import keras

    found: dict[int, Any] = {}
    for value in [model.optimizer, *(value for _, value in sorted(vars(model).items()))]:
        leaves = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for leaf in leaves:
            if isinstance(leaf, keras.optimizers.Optimizer):
                found.setdefault(id(leaf), leaf)
    inner = {id(getattr(optimizer, "inner_optimizer", None)) for optimizer in found.values()}
    return [optimizer for key, optimizer in found.items() if key not in inner]
