"""The runs of one store: which of them a ``fit`` resumes, and what makes two runs the same."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dlspark.data import ShardedRows
from dlspark.errors import ConfigError
from dlspark.job import IDENTITY_FILE, JOB_FILE, RESULT_FILE, FitResult, JobSettings, versions
from dlspark.storage import Checkpoints, Store, StoreError, checksum, refuse_if_running

logger = logging.getLogger(__name__)

Identity = dict[str, Any]


def find(store: Store, wanted: Identity) -> Store | None:
    """The run in ``store`` that a fit of this identity resumes or has finished; None when it begins a new one.

    Raises:
        ConfigError: the same run is still running; or the newest run is unfinished, can be resumed and
            differs from this fit. The message names the differences.
    """
    wanted = json.loads(json.dumps(wanted))
    runs = (store.child(name) for name in sorted(store.list(), reverse=True) if name.startswith("run-"))
    begun = (run for run in runs if run.exists(IDENTITY_FILE) and run.exists(JOB_FILE))
    newest_unfinished: tuple[Store, Identity] | None = None
    for number, run in enumerate(begun):
        theirs = run.read_json(IDENTITY_FILE)  # JSON has no tuples
        finished = run.exists(RESULT_FILE)
        if theirs == wanted:
            if finished:
                return run
            refuse_if_running(run)
            return run if Checkpoints(run).names() else None
        if number == 0 and not finished and Checkpoints(run).names():
            newest_unfinished = run, theirs
    if newest_unfinished is not None:
        run, theirs = newest_unfinished
        raise ConfigError(
            f"The run in {run.uri!r} is unfinished and can be resumed, but not by this fit, which differs: "
            f"{'; '.join(differences(theirs, wanted))}. Repeat the fit of that run, or pass resume=False to begin a "
            "new run beside it."
        )
    return None


def new(store: Store) -> Store:
    """The folder of a new run in ``store``. Names sort as the runs began (UTC)."""
    return store.child(f"run-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:4]}")


def forget_if_refused(run: Store) -> None:
    """Remove the folder of a fit that was refused or failed before it had a job."""
    try:
        if not run.exists(JOB_FILE):
            run.delete_all()
    except (StoreError, OSError) as error:  # the error of the fit itself says more
        logger.debug("The folder of a refused run stays: %s", error)


def finish(run: Store, result: FitResult) -> None:
    """Mark the run as finished and keep its result."""
    run.write_bytes(RESULT_FILE, (result.to_json() + "\n").encode())


def finished(run: Store) -> FitResult | None:
    """The result of a run that has finished, with a warning that nothing is trained; None for any other run."""
    if not run.exists(RESULT_FILE):
        return None
    result = FitResult.from_json(run.read_bytes(RESULT_FILE).decode())
    last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in result.history.items() if values)
    logger.warning(
        "This run has finished already (%s): its result and weights are given back from %s. Pass resume=False to train anew "
        "beside it, or more epochs to train longer.",
        last,
        run.uri,
    )
    return result


def differences(before: Identity, now: Identity) -> list[str]:
    """The differences between two identities, by name, with both values."""
    found = []
    for name in sorted({*before, *now}):
        was, is_ = before.get(name), now.get(name)
        if was == is_:
            continue
        if name == "initial_weights":
            found.append("the initial weights (seed Keras before the model is built: keras.utils.set_random_seed)")
        else:
            found.append(f"{name.replace('_', ' ')} was {_short(was)} and is {_short(is_)}")
    return found


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({zlib.crc32(text.encode()):08x})"


def identity(
    settings: JobSettings, backend: str, options: Any, model: Any, data: Any, validation_data: Any, callbacks: Sequence[Any]
) -> Identity:
    """What a fit must have in common with an unfinished run to resume it. ``options`` is the backend's dataclass."""
    weights = settings.class_weight
    return {
        "backend": backend,
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=_plain)),
        "workers": settings.num_workers,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "class_weight": None if weights is None else {str(k): float(v) for k, v in weights.items()},
        "keras_backend": settings.keras_backend,
        "dtype_policy": settings.dtype_policy,
        "callbacks": identity_of_callbacks(callbacks),
        "model": identity_of_model(model),
        "initial_weights": checksum(model.get_weights()),
        "data": identity_of_data(data),
        "validation_data": identity_of_data(validation_data),
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    """``value``, which JSON does not have, as something that it has: NumPy's numbers as Python's, the rest as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def identity_of_data(data: Any) -> Any:
    """Identify a data set: by files and checksums, by the values of arrays, or by the columns of a DataFrame."""
    if data is None:
        return None
    if isinstance(data, ShardedRows):
        return zlib.crc32(data.to_json().encode())
    if isinstance(data, tuple | list):
        import keras

        return checksum([leaf for leaf in keras.tree.flatten(tuple(data)) if leaf is not None])
    # A DataFrame has no identity. A resumed run reads the rows that were written when it began.
    return data.dtypes


def identity_of_callbacks(callbacks: Sequence[Any]) -> list[str]:
    """The callbacks' names, and the settings of Keras' own callbacks."""
    found = []
    for callback in callbacks:
        cls, settings = type(callback), ""
        if cls.__module__.startswith("keras."):
            plain: Mapping[str, Any] = {k: v for k, v in vars(callback).items() if isinstance(v, bool | int | float | str)}
            settings = f"({', '.join(f'{name}={value!r}' for name, value in sorted(plain.items()))})"
        found.append(cls.__qualname__ + settings)
    return found


def identity_of_model(model: Any, *, seeds: bool = True) -> str:
    """A checksum of the model's layers, their connections and its compilation, as far as its config describes them.

    Args:
        model: the model.
        seeds: include the seeds of layers and initializers.
    """
    try:
        described: Any = json.loads(model.to_json())
    except Exception:  # get_config is the user's own code, and many models have none
        shapes = [(type(layer).__name__, [tuple(w.shape) for w in layer.weights]) for layer in model.layers]
        described = [shapes, str(model.loss), str(model.optimizer.get_config())]
    # Keras numbers layers per process: "dense_3" here is "dense" when the command runs again. So a name counts by the place
    # where it appears first.
    numbers: dict[str, int] = {}

    def renamed(text: str) -> str:
        return re.sub(r"_[0-9]+$", "", text) + f"#{numbers.setdefault(text, len(numbers))}"

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            counted = {k: v for k, v in node.items() if seeds or k != "seed"}
            return {k: renamed(v) if k == "name" and isinstance(v, str) else walk(v) for k, v in counted.items()}
        if isinstance(node, list):
            if node and isinstance(node[0], str) and node[0] in numbers:  # a reference: [layer, node, tensor]
                return [renamed(node[0]), *map(walk, node[1:])]
            return [walk(each) for each in node]
        return node

    return f"{zlib.crc32(json.dumps(walk(described), default=str).encode()):08x}"
