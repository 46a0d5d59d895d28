"""Adam with a learning rate for each variable. Importing this module imports keras.

A saved model that was compiled with it needs ``import dlspark.models.optimizers`` before it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from dlspark.errors import ConfigError


@keras.saving.register_keras_serializable(package="dlspark")
class DepthDecayAdam(keras.optimizers.Adam):  # type: ignore[misc, unused-ignore]
    """`keras.optimizers.Adam` with a constant factor on the learning rate of each variable.

    For a variable with multiplier c the step is exactly that of Adam with the learning rate c·rate: the moments are the
    same and the step is linear in the rate. Schedules, clipping, accumulation and loss scaling act as in Adam.
    Decoupled weight decay is not multiplied.

    Args:
        learning_rate: as for Adam: a float, a schedule or a callable.
        multipliers: from `Variable.path` to a factor ≥ 0; 1 for other variables.
        **kwargs: Adam's other arguments, as in `get_config`.

    Raises:
        ConfigError: a negative multiplier; or, when it is built, none of the paths is a trainable variable.
    """

    def __init__(self, learning_rate: Any = 0.001, *, multipliers: Mapping[str, float], **kwargs: Any) -> None:
        bad = {path: factor for path, factor in multipliers.items() if not factor >= 0}
        if bad:
            raise ConfigError(f"Expected multipliers of 0 or more; got {bad}.")
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.multipliers = dict(multipliers)
        self._factors: tuple[float, ...] = ()

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        if variables and self.multipliers and not any(variable.path in self.multipliers for variable in variables):
            raise ConfigError(
                f"{type(self).__name__} expected some of its {len(self.multipliers)} variables (the first is "
                f"{next(iter(self.multipliers))!r}) among those that train; got {len(variables)} others. It was made "
                "for another model, or for layers that are frozen now: compile the model with keras.optimizers.Adam."
            )
        self._factors = tuple(self.multipliers.get(variable.path, 1.0) for variable in variables)
        super().build(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        # By index, as Keras' own optimizers do: with TensorFlow `variable` is a tf.Variable, which has no path.
        factor = self._factors[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate if factor == 1.0 else learning_rate * factor)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "multipliers": dict(self.multipliers)}
