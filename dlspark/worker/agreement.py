"""Agreement of all ranks on the weights and states of the model, at the end of every training pass.

A state is a weight that the optimizer does not train. What a step does to it depends on the rows of one worker, so its value
over all rows must be known from its kind:

- batch-norm statistics are averaged;
- a layer of the user's declares its states by the class attribute ``merge``: "mean" averages them, "sum" adds up the
  changes of all workers, "same" asserts that they do not depend on the rows;
- all others must be equal on all ranks.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.errors import DlsparkError
from dlspark.mends import keras_layers
from dlspark.worker.attributes import foreign
from dlspark.worker.session import WorkerSession

MERGES = ("mean", "sum", "same")


def merge_of(layer: Any) -> str | None:
    """How the states of a layer are merged; None if that is not known."""
    import keras

    declared = getattr(layer, "merge", None)
    if isinstance(declared, str) and declared in MERGES:
        return declared
    if isinstance(layer, keras.layers.BatchNormalization):
        return "mean"
    return None if foreign(layer) else "same"


def states_of(model: Any) -> list[tuple[Any, Any]]:
    """(variable, its innermost layer) of each weight that is not trained."""
    owners = {id(variable): layer for layer in keras_layers.flatten(model) for variable in layer.variables}
    return [(variable, owners[id(variable)]) for variable in model.non_trainable_weights]


class Agreement:
    """The states of one model, and what they were at the end of the last pass."""

    def __init__(self, model: Any, session: WorkerSession) -> None:
        self._model = model
        self._session = session
        self._before: dict[int, NDArray[Any]] = {}

    def begin(self) -> None:
        """Remember the states that may be merged."""
        self._before = {id(variable): _value(variable) for variable, _ in self._merged()}

    def reach(self) -> None:
        """Merge the states that the pass has changed, then check that all ranks have equal weights.

        States that changed on no rank, such as those of frozen layers, stay bit-identical.

        Raises:
            DlsparkError: they differ; the message names the first variable.
        """
        import keras

        states = self._merged()
        now = [_value(variable) for variable, _ in states]
        before = [self._before[id(variable)] for variable, _ in states]
        if states:
            changed = np.array([a.tobytes() != b.tobytes() for a, b in zip(before, now, strict=True)], np.float32)
            anywhere = keras.ops.convert_to_numpy(self._session.sum([keras.ops.convert_to_tensor(changed)])[0])
            moving = [i for i, flag in enumerate(anywhere) if flag]
            # float64 adds up counts exactly.
            parts = [np.asarray(now[i] - before[i] if states[i][1] == "sum" else now[i], np.float64) for i in moving]
            totals = self._session.sum([keras.ops.convert_to_tensor(part) for part in parts]) if parts else []
            for i, total in zip(moving, totals, strict=True):
                variable, merge = states[i]
                value = keras.ops.convert_to_numpy(total)
                merged = before[i] + value if merge == "sum" else value / self._session.world_size
                variable.assign(np.asarray(merged).astype(now[i].dtype))
        self.begin()
        self._compare()

    def sums_so_far(self) -> dict[str, NDArray[Any]]:
        """The values over all ranks of the states that are summed, by their names in checkpoints. All ranks call it.

        Every rank may start from them, also in the middle of an epoch: only later changes are added then.
        """
        import keras

        numbers = {id(variable): i for i, variable in enumerate(self._model.weights)}
        summed = [variable for variable, merge in self._merged() if merge == "sum"]
        parts = [np.asarray(_value(variable) - self._before[id(variable)], np.float64) for variable in summed]
        totals = self._session.sum([keras.ops.convert_to_tensor(part) for part in parts]) if parts else []
        return {
            f"w{numbers[id(variable)]}": (self._before[id(variable)] + keras.ops.convert_to_numpy(total)).astype(
                self._before[id(variable)].dtype
            )
            for variable, total in zip(summed, totals, strict=True)
        }

    def _merged(self) -> list[tuple[Any, str]]:
        kinds = [(variable, merge_of(layer)) for variable, layer in states_of(self._model)]
        return [(variable, kind) for variable, kind in kinds if kind in ("mean", "sum")]

    def _compare(self) -> None:
        import keras

        weights = self._model.weights
        # Every rank fills its rows with two 16-bit halves of a checksum, which float32 holds exactly; the sum gathers all.
        mine = np.zeros((self._session.world_size, len(weights), 2), np.float32)
        mine[self._session.rank] = [divmod(zlib.crc32(_value(variable).tobytes()), 1 << 16) for variable in weights]
        (everyone,) = self._session.sum([keras.ops.convert_to_tensor(mine)])
        table = keras.ops.convert_to_numpy(everyone)
        differing = (table != table[0]).any(axis=2)
        if differing.any():
            ranks = [rank for rank in range(len(table)) if differing[rank].any()]
            first = weights[int(differing.any(axis=0).argmax())]
            raise DlsparkError(
                f"After this epoch the weights on ranks {ranks} differ from rank 0's, first {first.path}. Synchronous "
                "training keeps them equal; something in the model or a callback changed them on one rank only (assigned "
                "weights, a new compile(), a random draw outside Keras, a state that depends on the rows). Do the same on "
                "every rank, or write merge = 'mean' or 'sum' in the class of the layer with that state."
            )


def _value(variable: Any) -> NDArray[Any]:
    import keras

    return np.asarray(keras.ops.convert_to_numpy(variable))
