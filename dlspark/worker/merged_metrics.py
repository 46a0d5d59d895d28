"""The results of a pass over all workers' rows: of Keras' metrics, and of what a custom step returns besides.

The state of a metric is a sum over rows, so the sum of the workers' states is the state for all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dlspark.errors import DlsparkError
from dlspark.mends import keras_step_logs
from dlspark.worker.agreement import Agreement
from dlspark.worker.session import WorkerSession

Target = tuple[Any, str, Callable[..., Any]]


class MergedMetrics:
    """What Keras reports at the end of each pass of one ``fit``.

    Args:
        model: compiled and built.
        session: this worker's.
        last_step_rows: returns this worker's rows in the last step of the pass "train" or "test".
        own_seconds: returns the time that this rank's own part of all steps has taken so far.

    Attributes:
        callback: must be in the list of ``fit``.
        apart: a call of the user's runs, perhaps on one rank only: nothing may be exchanged.
    """

    def __init__(
        self, model: Any, session: WorkerSession, last_step_rows: Callable[[str], int], own_seconds: Callable[[], float]
    ) -> None:
        self._model = model
        self._session = session
        self._last_step_rows = last_step_rows
        self._agreement = Agreement(model, session)
        self._pass = "train"  # or "test", inside the evaluation that belongs to ``fit``
        self._ending = False  # Keras asks for the results of a pass
        self._merged: dict[str, Any] = {}  # the results of the last pass
        self._functions_apart: Any = None  # the test function that was traced there
        self.apart = False
        self.callback = passes_callback(self._agreement.begin, self._agreement.sums_so_far, own_seconds)

    def targets(self) -> list[Target]:
        """The attributes of the model to replace."""
        model = self._model
        calls = [
            (model, name, self._set_apart(getattr(model, name))) for name in ("evaluate", "test_on_batch", "train_on_batch")
        ]
        return [
            *calls,
            (model, "get_metrics_result", self._merging(model.get_metrics_result)),
            *keras_step_logs.targets(model, self._end),
        ]

    def _set_apart(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that users may call in a callback, without exchanges there; ``fit``'s own evaluation has them."""

        def called(*args: Any, **kwargs: Any) -> Any:
            callbacks = getattr(kwargs.get("callbacks"), "callbacks", ())
            if self.callback in callbacks:  # ``fit`` hands on its list of callbacks
                self._pass = "test"
                try:
                    return method(*args, **kwargs)
                finally:
                    self._pass = "train"
            self.apart = True
            ours, self._model.test_function = self._model.test_function, self._functions_apart
            try:
                return method(*args, **kwargs)
            finally:
                self._functions_apart, self._model.test_function = self._model.test_function, ours
                self.apart = False
                # Keras lets such a call change the metrics of the pass. Counted on rank 0, it counts once.
                if self._session.rank:
                    self._model.reset_metrics()

        return called

    def _merging(self, get_metrics_result: Callable[[], Any]) -> Callable[[], Any]:
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
                self._merged = _numbers(get_metrics_result())
                return self._merged
            finally:
                for variable, value in zip(variables, local, strict=True):
                    variable.assign(value)

        return merged

    def _end(self, result_or_logs: Callable[[Any], Any], logs: Any) -> Any:
        """Keras' results of a pass, over all workers: of its metrics, or what a custom step returned besides."""
        if self.apart:
            return result_or_logs(logs)
        if self._pass == "train":
            self._agreement.reach()
        else:
            self._check_all_evaluated()
        self._ending = True
        try:
            result = result_or_logs(logs)
        finally:
            self._ending = False
        return self._combined(logs) if result is logs and isinstance(logs, dict) and logs else result

    def _check_all_evaluated(self) -> None:
        import keras

        ended = np.array(float(bool(getattr(self._model, "stop_evaluating", False))), np.float32)
        (ranks,) = self._session.sum([keras.ops.convert_to_tensor(ended)])
        if 0 < float(ranks) < self._session.world_size:
            raise DlsparkError(
                f"Expected all ranks to evaluate the same batches; a callback set stop_evaluating on {float(ranks):.0f} of "
                f"{self._session.world_size} ranks. Decide by what all ranks share, not by the logs of a batch."
            )

    def _combined(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What a custom step returned: the results of metrics where it is those on every rank, otherwise means by rows.

        Like Keras, it takes the logs of the last step.
        """
        import keras

        logs = _flat(logs)
        here = _numbers(self._model.get_metrics_result())
        rows = np.float32(self._last_step_rows(self._pass))
        values = {name: np.asarray(keras.ops.convert_to_numpy(value), np.float32) for name, value in logs.items()}
        same = [[np.array_equal(np.float32(found), value) for found in here.values()] for value in values.values()]
        parts = [*(value * rows for value in values.values()), np.array(same, np.float32), rows]
        *sums, agreed, total = self._session.sum([keras.ops.convert_to_tensor(part) for part in parts])
        everywhere = keras.ops.convert_to_numpy(agreed) == self._session.world_size
        combined = {}
        for name, value, equal in zip(logs, sums, everywhere, strict=True):
            # A step may return a result under another name.
            results = sorted((each for each, same in zip(here, equal, strict=True) if same), key=lambda each: each != name)
            combined[name] = self._merged[results[0]] if results else float(value / total)
        return combined


def passes_callback(begin: Callable[[], None], sums: Callable[[], dict[str, Any]], seconds: Callable[[], float]) -> Any:
    """The callback that must be in the list of ``fit``; its presence tells ``fit``'s own evaluation from the user's."""
    import keras

    class Passes(keras.callbacks.Callback):
        own_seconds, sums_so_far = staticmethod(seconds), staticmethod(sums)

        def on_train_begin(self, logs: Any = None) -> None:
            begin()

    return Passes()


def _flat(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs without dicts in them, as Keras makes them at the end of an epoch."""
    flat: dict[str, Any] = {}
    for name, value in sorted(logs.items()):
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _numbers(results: Any) -> Any:
    """The results of metrics as floats."""
    import keras

    return keras.tree.map_structure(lambda value: float(keras.ops.convert_to_numpy(value)), results)
