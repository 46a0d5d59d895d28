"""Checks of labels and sample weights against the model's outputs and losses, which Keras' own code pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlspark.driver import metric_checks
from dlspark.driver.array_checks import structure
from dlspark.errors import ConfigError, DataError

_OF_INDICES = ("sparse_categorical_crossentropy", "categorical_generalized_cross_entropy")
_OF_CLASSES = ("categorical_crossentropy", "categorical_focal_crossentropy", "categorical_hinge", "kl_divergence")
_OF_PROBABILITIES = ("binary_crossentropy", "binary_focal_crossentropy")
_OF_VALUES = (
    *("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error", "mean_squared_logarithmic_error"),
    *("huber", "log_cosh", "hinge", "squared_hinge", "poisson", "cosine_similarity", "dice", "tversky"),
)


_ROUNDING = 1e-5  # of probabilities that were computed in float32


@dataclass(frozen=True)
class Target:
    """Labels, the output that a loss compares them with, and their weights, as Keras pairs them."""

    loss: Any
    labels: Any
    output: Any
    weight: Any

    @property
    def kind(self) -> str:
        """The name of Keras' loss; empty for a loss that is not Keras' own."""
        import keras

        if str(self.loss).lower() in ("crossentropy", "ce"):  # Keras chooses by the shapes
            if self.output.shape[-1] == 1:
                return "binary_crossentropy"
            fewer = len(self.labels.shape) < len(self.output.shape) or self.labels.shape[-1] == 1
            return "sparse_categorical_crossentropy" if fewer else "categorical_crossentropy"
        try:
            loss = keras.losses.get(self.loss)
        except ValueError as error:
            raise ConfigError(f"Expected a loss that Keras knows; got {self.loss!r}.") from error
        function = getattr(loss, "fn", loss)
        if isinstance(loss, keras.losses.Loss) and not type(loss).call.__module__.startswith("keras."):
            return ""
        mine = str(getattr(function, "__module__", "")).startswith("keras.")
        return getattr(function, "__name__", "") if mine else ""

    @property
    def ignored(self) -> int | None:
        """The label of rows that do not count."""
        config = self.loss.get_config() if hasattr(self.loss, "get_config") and self.kind in _OF_INDICES else {}
        return config.get("ignore_class")


def labels(name: str, data: Any, model: Any) -> None:
    """Check ``(x, y)`` or ``(x, y, sample_weight)``, whose arrays have passed `array_checks.arrays`.

    Raises:
        ConfigError: a loss is unknown, or a metric gives several numbers.
        DataError: labels or weights do not fit the outputs and losses; the message says which would.
    """
    import keras

    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    if y is None:
        if _own_step(model) or model.loss is None:
            return
        raise DataError(
            f"Expected labels in {name}, as the model is compiled with a loss; got y=None. Give (x, y); a model that "
            "restores its input gets (x, x)."
        )
    outputs = None if _own_step(model) else _outputs(model, x)
    if outputs is not None:
        _weights_like_labels(name, y, weight)
        targets = _targets(name, model, outputs, y, weight)
        for target in targets:
            _check(name, target)
        shapes = {id(target.output): target.labels.shape for target in targets}
        metric_checks.trial(name, model, outputs, y, weight, shapes)
    metric_checks.one_number_each(model)


def classes_of(model: Any) -> int | None:
    """The number of classes of a model with one output that is trained on class indices; None for any other model."""
    target = _only_target(model)
    return int(target.output.shape[-1]) if target and target.kind in _OF_INDICES else None


def ignored_of(model: Any) -> int | None:
    """The label of rows that do not count for a model with one output."""
    target = _only_target(model)
    return target.ignored if target else None


def indices(name: str, classes: int, low: Any, high: Any, *, whole: bool = True) -> None:
    """Reject class indices outside the model's classes, or with fractions, which Keras would cut off."""
    if low is not None and not whole and np.isfinite([low, high]).all():
        raise DataError(
            f"Expected labels in {name} as class indices, whole numbers; got fractions from {low} to {high}. Round them, or "
            "use a loss for numbers, such as 'mse'."
        )
    if low is not None and not 0 <= low <= high < classes:
        raise DataError(
            f"Expected labels in {name} as class indices from 0 to {classes - 1}, as the model has {classes} outputs; got "
            f"labels from {low} to {high}. Number the classes from 0, or change the model's outputs."
        )


def _own_step(model: Any) -> bool:
    """Whether only the model knows what its labels mean."""
    import keras

    return any(getattr(type(model), step) is not getattr(keras.Model, step) for step in ("train_step", "compute_loss"))


def _outputs(model: Any, x: Any) -> Any:
    """The model's outputs, symbolic and nested as it returns them; None if they are unknown."""
    import keras

    if not model.built:
        return None
    if getattr(model, "inputs", None) and getattr(model, "outputs", None):
        found = getattr(model, "output", None)
        return model.outputs[0] if found is None and len(model.outputs) == 1 else found
    if x is None:
        return None
    try:
        given = keras.tree.map_structure(lambda leaf: keras.KerasTensor((None, *leaf.shape[1:]), str(leaf.dtype)), x)
        return model.compute_output_spec(given)
    except Exception:  # the user's own call; a worker reports its errors
        return None


def _only_target(model: Any) -> Target | None:
    outputs = _outputs(model, None)
    if outputs is None or isinstance(outputs, Mapping | tuple | list) or _own_step(model):
        return None
    found = _targets("data", model, outputs, np.zeros((1,)), None)
    return found[0] if len(found) == 1 and isinstance(outputs.shape[-1], int) else None


def _targets(name: str, model: Any, outputs: Any, y: Any, weight: Any) -> list[Target]:
    """What each loss of the model is computed from."""
    import keras

    found = []

    class Note(keras.losses.Loss):
        """Stands for a loss of the model, and notes what it gets."""

        def __init__(self, loss: Any) -> None:
            super().__init__()
            self.loss = loss

        def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
            found.append(Target(self.loss, y_true, y_pred, sample_weight))
            return 0.0

    if model.loss is None:
        return []
    losses = keras.tree.map_structure(lambda loss: None if loss is None else Note(loss), model.loss)
    probe = metric_checks.probe(model)
    probe.compile(loss=losses)
    try:
        probe.compute_loss(None, y, outputs, weight)
        if all(isinstance(target.labels, np.ndarray) for target in found):
            return found
    except Exception as error:  # Keras raises many kinds here
        cause: Exception | None = error
    else:
        cause = None
    if weight is not None:
        _targets(name, model, outputs, y, None)
        raise DataError(
            f"Expected sample_weight in {name} with the structure of the model's outputs, {structure(outputs)}; got "
            f"{structure(weight)}. Give them so, or one array for all outputs."
        ) from cause
    names = getattr(model, "output_names", None)
    raise DataError(
        f"Expected labels in {name} with the structure of the model's outputs, {structure(outputs)}; got {structure(y)}. "
        f"Give them so{f', or as a dict with the keys {names}' if names else ''}."
    ) from cause


def _check(name: str, target: Target) -> None:
    kind = target.kind
    want, have = tuple(target.output.shape[1:]), tuple(target.labels.shape[1:])
    values = target.labels
    if kind in _OF_INDICES:
        if not want:
            raise ConfigError(
                f"Expected a score per class as outputs of the model, for the loss {kind!r}; got one number per row. Return "
                "the scores, not their argmax."
            )
        if have == want and want[-1:] != (1,):
            raise DataError(
                f"Expected class indices as labels in {name}, for the loss {kind!r}; got labels of shape {have} per row, as "
                "one-hot labels have. Use the loss 'categorical_crossentropy', or give y.argmax(axis=-1)."
            )
        _same_shape(name, kind, want[:-1], have)
        if isinstance(want[-1], int):
            _indices_within(name, want[-1], target.ignored, values)
    elif kind in _OF_CLASSES and have in (want[:-1], (*want[:-1], 1)) and want[-1] != 1:
        raise DataError(
            f"Expected one-hot labels of shape {want} per row in {name}, for the loss {kind!r}; got labels of shape {have}. "
            f"Use the loss 'sparse_categorical_crossentropy', or give keras.utils.to_categorical(y, {want[-1]})."
        )
    elif kind in (*_OF_CLASSES, *_OF_PROBABILITIES, *_OF_VALUES):
        _same_shape(name, kind, want, have)
        if values.dtype.kind == "f" and not np.isfinite([values.min(), values.max()]).all():
            raise DataError(f"Expected finite numbers as labels in {name}; got NaN or infinity. Drop those rows.")
        if kind in _OF_PROBABILITIES and not -_ROUNDING <= values.min() <= values.max() <= 1 + _ROUNDING:
            raise DataError(
                f"Expected labels from 0 to 1 in {name}, for the loss {kind!r}; got labels from {values.min()} to "
                f"{values.max()}. Use 0 and 1 for two classes, or another loss."
            )
    if kind and isinstance(target.weight, np.ndarray):
        _weights_fit(name, want[:-1], target.weight.shape[1:])


def _weights_fit(name: str, want: tuple[int | None, ...], have: tuple[int, ...]) -> None:
    """Reject weights that Keras would broadcast along another axis than the rows'."""
    given = have[:-1] if len(have) == len(want) + 1 and have[-1] == 1 else have
    given = (1,) if have == () and want == (1,) else given
    if len(given) != len(want) or any(h not in (1, w or h) for w, h in zip(want, given, strict=True)):
        rows = f"of shape {want} per row, one for each label, or {(1,) * len(want)}" if want else "with one number per row"
        raise DataError(f"Expected sample_weight {rows}, in {name}; got shape {have} per row. Reshape the weights.")


def _same_shape(name: str, kind: str, want: tuple[int | None, ...], have: tuple[int, ...]) -> None:
    """Reject labels of another shape, apart from a last axis of 1, which Keras adds or removes. It broadcasts the rest."""
    if not any(_fits(want, shape) for shape in (have, (*have, 1), have[:-1] if have[-1:] == (1,) else have)):
        raise DataError(
            f"Expected labels of shape {want} per row in {name}, for the loss {kind!r} of the model's output; got shape "
            f"{have}. Reshape the labels, or change the outputs of the model."
        )


def _fits(want: tuple[int | None, ...], have: tuple[int, ...]) -> bool:
    return len(want) == len(have) and all(w in (None, h) for w, h in zip(want, have, strict=True))


def _indices_within(name: str, classes: int, ignored: int | None, values: Any) -> None:
    low, high = values.min(), values.max()
    if ignored is not None and not 0 <= low <= high < classes:
        used = values[values != ignored]
        low, high = (used.min(), used.max()) if used.size else (0, 0)
    whole = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    indices(name, classes, low, high, whole=whole)


def _weights_like_labels(name: str, y: Any, weight: Any) -> None:
    """Reject sample weights that Keras refuses for several outputs."""
    if weight is None or isinstance(y, np.ndarray):
        return
    if not isinstance(weight, np.ndarray):
        if structure(weight) != structure(y):
            raise DataError(
                f"Expected sample_weight with the structure of y in {name}, {structure(y)}, or one array for all outputs; "
                f"got {structure(weight)}."
            )
    elif weight.shape[1:] not in ((), (1,)):
        raise DataError(
            f"Expected one sample_weight per row for several outputs in {name}; got shape {weight.shape[1:]} per row. Give "
            f"weights with the structure of y, {structure(y)}."
        )
