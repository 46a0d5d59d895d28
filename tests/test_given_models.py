"""A fit trains exactly the model that it was given."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from dlspark import Trainer
from dlspark.data import Feed
from dlspark.data.shard_writer import write_rows
from dlspark.mends import keras_layers
from dlspark.storage.store import Store
from dlspark.testing import toys
from dlspark.worker.gradient_sync import optimizers_of
from tests.given_models import MODELS, ROWS, Given, given

EPOCHS, BATCH, SEED = 2, 25, 3
VALIDATION_ROWS = 33
# Keras applies an embedding's gradient as a sparse one, row by row; here it is dense, so that workers can sum it.
SPARSE = {"masked steps", "masked steps with weights"}


def rows_of(each: Given, rows: int) -> Any:
    return toys.separable(rows) if each.data is None else keras.tree.map_structure(lambda leaf: leaf[:rows], each.data)


def by_keras(each: Given, store: Store) -> dict[str, list[float]]:
    """Keras' own fit on the batches that ``Trainer("local")`` makes; returns the history."""
    rows = write_rows(store, "train", *rows_of(each, ROWS))
    validation = write_rows(store, "val", *rows_of(each, VALIDATION_ROWS))
    # Keras builds an optimizer inside the traced step, where ScheduleFreeAdamW does not see the weights that it starts from.
    if each.model.built and not each.model.optimizer.built:
        each.model.optimizer.build(each.model.trainable_variables)
    keras.utils.set_random_seed(SEED)
    with Feed(rows, batch_size=BATCH, seed=SEED) as feed, Feed(validation, batch_size=BATCH) as val_feed:
        epoch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda number, logs: setattr(feed, "epoch", number))
        history = each.model.fit(
            feed.dataset(), validation_data=val_feed.dataset(), epochs=EPOCHS, callbacks=[epoch, *each.callbacks],
            shuffle=False, verbose=0, **each.options,
        )  # fmt: skip
    return {name: [float(value) for value in values] for name, values in history.history.items()}


def fitted(each: Given, trainer: Trainer, **more: Any) -> dict[str, list[float]]:
    result = trainer.fit(
        each.model, rows_of(each, ROWS), validation_data=rows_of(each, VALIDATION_ROWS), epochs=EPOCHS, batch_size=BATCH,
        seed=SEED, callbacks=each.callbacks, verbose=0, **each.options, **more,
    )  # fmt: skip
    return dict(result.history)


def state_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Weights, the variables of all optimizers, and flags, by name."""
    variables = {f"weight {i} {variable.name}": variable for i, variable in enumerate(model.weights)}
    for number, optimizer in enumerate(optimizers_of(model)):
        variables |= {f"optimizer {number} {i}": each for i, each in enumerate(optimizer.variables)}
    arrays = {name: keras.ops.convert_to_numpy(variable) for name, variable in variables.items()}
    arrays["layers' flags"] = np.array([layer.trainable for layer in keras_layers.flatten(model)])
    return arrays | {"variables' flags": np.array([variable.trainable for variable in model.weights])}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_local_trains_the_model_that_was_given(name: str, tmp_path: Any) -> None:
    ours, theirs = given(name), given(name)
    expected = by_keras(theirs, Store(tmp_path))
    history = fitted(ours, Trainer("local"))
    assert set(history) == set(expected)
    mine, other = state_of(ours.model), state_of(theirs.model)
    assert set(mine) == set(other)
    tolerance = {"rtol": 0, "atol": 1e-6 if name in SPARSE else 0}
    for key, array in other.items():
        assert array.dtype == mine[key].dtype
        np.testing.assert_allclose(
            mine[key].astype(np.float64), array.astype(np.float64), **tolerance, err_msg=f"{name}: {key}"
        )
    for key, values in expected.items():
        np.testing.assert_allclose(history[key], values, **tolerance, err_msg=f"{name}: {key}")
