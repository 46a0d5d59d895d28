"""AsynchronousRoundWorker: one worker's part of an asynchronous round, inside a Spark task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.plugin import SocketEndpoint, Store, set_weights
from dlspark_elephas.exchange import ParameterClient, decoded, encoded
from dlspark_elephas.round import Outcome, round_part


class AsynchronousRoundWorker:
    """Replaces Elephas' AsynchronousSparkWorker.

    That worker skips a part of at most ``batch_size`` rows, loads its part as one array, starts a new optimizer in every
    round, ignores class weights in batches, and returns nothing.

    Args:
        server: the endpoint of the round's parameter server.
        frequency: "epoch" or "batch".
        config: arguments of `round_part`, and ``optimizer_changes``, a broadcast of values by the index of the variable.
    """

    def __init__(self, server: SocketEndpoint, frequency: str, config: Mapping[str, Any]) -> None:
        self._server = server
        self._frequency = frequency
        self._config = dict(config)
        self._changes = self._config.pop("optimizer_changes")

    def train(self, ranks: Iterable[int]) -> Iterator[Outcome]:
        """Train the part of the only rank in ``ranks``, exchange weights with the server, save the optimizer's state."""
        (rank,) = ranks
        with round_part(rank, **self._config) as part:
            store = Store(part.job.uri)
            if part.epoch:
                left = read_optimizer(store, part.epoch - 1, rank, optimizer_values(part.model))
                set_optimizer(part.model, dict(enumerate(left)))
            set_optimizer(part.model, self._changes.value)
            with ParameterClient(self._server, rank, part.model.get_weights()) as client:
                factors = shares(part.model, part.job.num_workers)
                outcome = part.train([_exchange(client, self._frequency, factors)])
            _optimizers(store, part.epoch).write_bytes(str(rank), encoded(optimizer_values(part.model)))
        yield outcome


def _exchange(client: ParameterClient, frequency: str, factors: list[float]) -> Any:
    import keras

    class Exchange(keras.callbacks.Callback):
        """Gets the server's weights before an epoch or a batch, and sends the difference after it."""

        def _take(self, _: int, logs: Any = None) -> None:
            self._before = client.get_parameters()
            set_weights(self.model, self._before)

        def _give(self, _: int, logs: Any = None) -> None:
            after = self.model.get_weights()
            client.update_parameters([difference(*each) for each in zip(self._before, after, factors, strict=True)])

        if frequency == "epoch":
            on_epoch_begin, on_epoch_end = _take, _give
        else:
            on_train_batch_begin, on_train_batch_end = _take, _give

    return Exchange()


def shares(model: Any, num_workers: int) -> list[float]:
    """The factor of each weight's delta, in the order of ``model.weights``.

    Trainable weights get the sum of all workers' deltas, as in Elephas. The statistics of batch normalisation move towards
    the mean of the batches: the sum of N moves would overshoot, and could make a variance negative. They get the mean of
    the moves.
    """
    trained = {id(variable) for variable in model.trainable_weights}
    return [1.0 / num_workers if id(v) not in trained and "float" in v.dtype else 1.0 for v in model.weights]


def difference(before: NDArray[Any], after: NDArray[Any], share: float) -> NDArray[Any]:
    """``share`` of the difference ``before - after``, in the dtype of ``before``."""
    return np.asarray((before - after) * share if share != 1.0 else before - after, before.dtype)


def optimizer_values(model: Any) -> list[NDArray[Any]]:
    """The values of the optimizer's variables."""
    import keras

    return [keras.ops.convert_to_numpy(variable) for variable in model.optimizer.variables]


def set_optimizer(model: Any, values: Mapping[int, NDArray[Any]]) -> None:
    """Assign ``values`` to the optimizer's variables of these indices."""
    variables = model.optimizer.variables
    for i, value in values.items():
        variables[i].assign(value)


def read_optimizer(store: Store, epoch: int, rank: int, like: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """The optimizer's state of ``rank`` at the end of ``epoch``, with the shapes of ``like``.

    Raises:
        StoreError: the state is missing. A worker never continues with a new optimizer.
    """
    return decoded(_optimizers(store, epoch).read_bytes(str(rank)), like)


def _optimizers(store: Store, epoch: int) -> Store:
    return store.child("optimizers", str(epoch))
