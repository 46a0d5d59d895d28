"""The options of `build_classifier`. Command-line flags, Spark ML Params and the schema of studies are made from them."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dlspark._require import choice, number, whole_number
from dlspark.errors import ConfigError
from dlspark.models.augment import AUGMENTATIONS, check_augment
from dlspark.models.backbones import BACKBONES, Backbone, find_backbone

if TYPE_CHECKING:
    import keras

Schema = Mapping[str, Any]
"""A JSON Schema of plain values: ``enum``, or ``type`` with bounds, a ``pattern`` or ``items``."""

_WEIGHT_SUFFIXES = (".h5", ".keras")
_BOUNDS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.ge),
    "exclusiveMinimum": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "exclusiveMaximum": ("below", operator.lt),
}


def option(
    help: str,
    schema: Schema,
    *,
    check: Callable[[str, Any, Schema], Any] | None = None,
    metavar: str | None = None,
    training: bool = False,
) -> Mapping[str, Any]:
    """The metadata of a field of `ClassifierOptions`.

    Args:
        help: a phrase for users, without the default.
        schema: the values that a command line or a file can give.
        check: takes the name, the value and the schema, and returns the value to keep or raises ConfigError; `by_schema`
            when None. It may accept objects besides plain values.
        metavar: placeholder of the value in the help of a flag; when None, an ``enum`` lists its values there.
        training: the option describes a training, so each phase of a study has its own, and not the network.
    """
    return {"help": help, "schema": schema, "check": check or by_schema, "metavar": metavar, "training": training}


def by_schema(name: str, value: Any, schema: Schema) -> Any:
    """``value`` as plain Python.

    Raises:
        ConfigError: the schema does not allow it.
    """
    if "enum" in schema:
        choice(name, value, schema["enum"])
        return value
    if schema["type"] == "array":
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"Expected {name} to be a sequence; got {value!r}. Write for instance (512, 128).")
        return tuple(by_schema(f"each item of {name}", item, schema["items"]) for item in value)
    if schema["type"] == "integer":
        return whole_number(name, value, schema["minimum"])
    if schema["type"] == "string":
        if not isinstance(value, str) or not re.search(schema.get("pattern", ""), value):
            raise ConfigError(f"Expected {name} to be a text like {schema.get('pattern', 'a name')}; got {value!r}.")
        return value
    bounds = [(word, schema[key], holds) for key, (word, holds) in _BOUNDS.items() if key in schema]
    expected = " and ".join(f"{word} {limit}" for word, limit, _ in bounds) or "a finite number"
    return number(name, value, f"to be {expected}", lambda found: all(holds(found, limit) for _, limit, holds in bounds))


def _check_backbone(name: str, value: Any, schema: Schema) -> Backbone:
    return find_backbone(value)


def _check_weights(name: str, value: Any, schema: Schema) -> str | Path | None:
    if value is None or value == "imagenet":
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"Expected {name} to be 'imagenet', a file or None; got {value!r}.")
    expected, file = f"Expected {name} to be 'imagenet', a local file or None", Path(value).expanduser()
    if re.match(r"\w\w+:/", str(value)):
        raise ConfigError(f"{expected}; got {str(value)!r}, a URI. Copy it to a local file.")
    if not file.is_file():
        what = "which is a folder" if file.is_dir() else "which does not exist"
        raise ConfigError(f"{expected}; got {str(file)!r}, {what}.")
    if file.suffix not in _WEIGHT_SUFFIXES:
        suffixes = " or ".join(_WEIGHT_SUFFIXES)
        raise ConfigError(f"Expected a weights file that ends in {suffixes}; got {file.name!r}. Use Keras' save_weights.")
    return file


def _check_fine_tune(name: str, value: Any, schema: Schema) -> str:
    if not isinstance(value, str) or not re.search(schema["pattern"], value):
        raise ConfigError(
            f"Expected {name} to be 'all', 'head' or 'top:N' with N ≥ 1; got {value!r}. "
            "Write for instance 'top:30' to train the backbone's last 30 layers that carry weights."
        )
    return value


def _check_augment(name: str, value: Any, schema: Schema) -> tuple[Any, ...]:
    check_augment(value)
    return tuple(value)


def _check_rate(name: str, value: Any, schema: Schema) -> Any:
    if not isinstance(value, str | Real):
        import keras

        if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
            return value
    return by_schema(name, value, schema)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """The options of `build_classifier`, checked. Plain values are checked without loading Keras.

    Raises:
        ConfigError: a value that cannot work.
    """

    backbone: str | Backbone = field(
        metadata=option(
            f"network of keras.applications: {', '.join(BACKBONES)}",
            {"enum": list(BACKBONES)},
            check=_check_backbone,
            metavar="BACKBONE",
        )
    )
    weights: str | os.PathLike[str] | None = field(
        default="imagenet",
        metadata=option("imagenet, none or a file", {"type": "string"}, check=_check_weights, metavar="WEIGHTS"),
    )
    batch_norm: str = field(
        default="train",
        metadata=option(
            "frozen: as given by the weights; synchronized: statistics of the whole step, not of one worker's part",
            {"enum": ["train", "frozen", "synchronized"]},
        ),
    )
    dense: Sequence[int] = field(
        default=(),
        metadata=option(
            "widths of the dense layers after pooling",
            {"type": "array", "items": {"type": "integer", "minimum": 1}},
            metavar="N,N",
        ),
    )
    dropout: float = field(
        default=0.0,
        metadata=option(
            "fraction dropped before the output layer",
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            metavar="FRACTION",
        ),
    )
    augment: Sequence[str | keras.layers.Layer] = field(
        default=(),
        metadata=option(
            f"{', '.join(AUGMENTATIONS)} or rotation:FRACTION",
            {"type": "array", "items": {"type": "string"}},
            check=_check_augment,
            metavar="NAME,NAME",
        ),
    )
    fine_tune: str = field(
        default="all",
        metadata=option(
            "layers of the backbone that train: all, head (none) or top:N",
            {"type": "string", "pattern": "^(all|head|top:[1-9][0-9]*)$"},
            check=_check_fine_tune,
            metavar="WHAT",
            training=True,
        ),
    )
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = field(
        default=1e-4,
        metadata=option(
            "learning rate of Adam",
            {"type": "number", "exclusiveMinimum": 0},
            check=_check_rate,
            metavar="RATE",
            training=True,
        ),
    )
    depth_decay: float = field(
        default=1.0,
        metadata=option(
            "factor on the learning rate from each block of the backbone to the one below",
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            metavar="FACTOR",
            training=True,
        ),
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name), each.metadata["schema"])
            object.__setattr__(self, each.name, value)
        if self.depth_decay != 1.0 and self.fine_tune == "head":
            raise ConfigError(
                f"depth_decay={self.depth_decay} expects a backbone that trains; got fine_tune='head', which freezes it. "
                "Leave depth_decay at 1.0, or choose fine_tune='all' or 'top:N'."
            )

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """The options among the settings of a command or a file, where the weights "none" stand for None."""
        found = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        if str(found.get("weights")).lower() == "none":
            found["weights"] = None
        return cls(**found)


def option_schemas(options: type[ClassifierOptions], *, training: bool) -> dict[str, dict[str, Any]]:
    """The JSON Schema of each option by name, with its help and default: those of a training, or those of the network."""
    found: dict[str, dict[str, Any]] = {}
    for each in fields(options):
        if each.metadata["training"] is training:
            found[each.name] = {**each.metadata["schema"], "description": each.metadata["help"]}
            if each.default is not MISSING:
                found[each.name]["default"] = list(each.default) if isinstance(each.default, tuple) else each.default
    return found
