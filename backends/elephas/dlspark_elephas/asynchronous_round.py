"""AsynchronousRoundWorker: one worker's part of an asynchronous round, inside a Spark task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.plugin import Store, set_weights
from dlspark_elephas.exchange import ParameterClient, ServerAddress, decoded, encoded
from dlspark_elephas.round import Outcome, round_part


class AsynchronousRoundWorker:
    """Takes the place of Elephas' AsynchronousSparkWorker.

    That one trains nothing on a part of at most ``batch_size`` rows, holds its part as one array, starts a new optimizer
    with every round, ignores class weights in batches, and returns nothing.

    Args:
        server: the round's parameter server.
        frequency: "epoch" or "batch".
        config: what `round_part` needs, and ``optimizer_changes``, a broadcast of values by the index of the variable.
    """

    def __init__(self, server: ServerAddress, frequency: str, config: Mapping[str, Any]) -> None:
        self._server = server
        self._frequency = frequency
        self._config = dict(config)
        self._changes = self._config.pop("optimizer_changes")

    def train(self, ranks: Iterable[int]) -> Iterator[Outcome]:
        """Train the part of the one rank in ``ranks``, exchange weights with the server, keep the optimizer's state."""
        (rank,) = ranks
        with round_part(rank, **self._config) as part:
            store = Store(part.job.uri)
            if part.epoch:
                left = read_optimizer(store, part.epoch - 1, rank, optimizer_values(part.model))
                set_optimizer(part.model, dict(enumerate(left)))
            set_optimizer(part.model, self._changes.value)
            client = ParameterClient(self._server, rank, part.model.get_weights())
            exchange = _exchange(client, self._frequency, shares(part.model, part.job.num_workers))
            outcome = part.train([exchange])
            _optimizers(store, part.epoch).write_bytes(str(rank), encoded(optimizer_values(part.model)))
        yield outcome


def _exchange(client: ParameterClient, frequency: str, factors: list[float]) -> Any:
    import keras

    class Exchange(keras.callbacks.Callback):
        """Takes the server's weights before an epoch or a batch, and gives it the difference after."""

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
    """By which factor each weight's delta counts, in the order of ``model.weights``.

    What is trained is added in full, as in Elephas: every worker's steps are taken. Statistics, which batch normalisation
    moves towards the mean of the batches, would be carried past it by the sum of N moves, and a variance below zero. They
    get the mean of the moves.
    """
    trained = {id(variable) for variable in model.trainable_weights}
    return [1.0 / num_workers if id(v) not in trained and "float" in v.dtype else 1.0 for v in model.weights]


def difference(before: NDArray[Any], after: NDArray[Any], share: float) -> NDArray[Any]:
    """``share`` of what training has taken from ``before``, in its dtype."""
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
    """What ``rank`` left of its optimizer at the end of ``epoch``, of the shapes of ``like``.

    Raises:
        StoreError: there is none. A worker never goes on with a fresh optimizer.
    """
    return decoded(_optimizers(store, epoch).read_bytes(str(rank)), like)


def _optimizers(store: Store, epoch: int) -> Store:
    return store.child("optimizers", str(epoch))
