"""Params that the stages share. A value is checked when it is set; combinations of values, when they are used."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, Self, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters

from dlspark.errors import did_you_mean
from dlspark.images import BITS, RESIZES
from dlspark.ml.network import Network
from dlspark.models import BACKBONES, Backbone, ClassifierOptions

S = TypeVar("S", bound=type)

_CONVERTERS = {"integer": TypeConverters.toInt, "number": TypeConverters.toFloat, "string": TypeConverters.toString}
_OF_LISTS = {
    "integer": TypeConverters.toListInt,
    "number": TypeConverters.toListFloat,
    "string": TypeConverters.toListString,
}


def with_accessors(cls: S) -> S:
    """Add a ``getX`` and a ``setX`` for each param of a stage that has none, as Spark's own stages have them."""
    for name in dir(cls):
        if isinstance(getattr(cls, name), Param):
            for verb, make in (("get", _getter), ("set", _setter)):
                method = f"{verb}{name[0].upper()}{name[1:]}"
                if not hasattr(cls, method):
                    setattr(cls, method, make(name, method))
    return cls


def _getter(name: str, method: str) -> Any:
    def get(self: Params) -> Any:
        return self.getOrDefault(name)

    get.__name__, get.__doc__ = method, f"The value of `{name}`, or its default."
    return get


def _setter(name: str, method: str) -> Any:
    def set_(self: Params, value: Any) -> Params:
        return self._set(**{name: value})

    set_.__name__, set_.__doc__ = method, f"Sets the value of `{name}`; returns the stage."
    return set_


def camel(name: str) -> str:
    """``fine_tune`` as ``fineTune``."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def option_param(option: Field[Any], converter: Any = None) -> Param[Any]:
    """The param of a field of `ClassifierOptions`; ``converter`` for values that its schema does not describe."""
    schema = option.metadata["schema"]
    if converter is None:
        of_list = schema.get("type") == "array"
        kind = (schema["items"] if of_list else schema).get("type", "string")
        converter = (_OF_LISTS if of_list else _CONVERTERS)[kind]
    return Param(Params._dummy(), camel(option.name), option.metadata["help"], typeConverter=converter)


def option_defaults(options: type) -> dict[str, Any]:
    """The default of each option that has one, by the name of its param."""
    defaults = {camel(each.name): each.default for each in fields(options) if each.default is not MISSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def with_options(options: type) -> Callable[[S], S]:
    """A class decorator: a param for each option of a classifier that the stage lacks, and accessors for all params.

    The constructor of the stage takes them as ``**options``; its signature then names them.
    """

    def decorate(cls: S) -> S:
        added = []
        for each in fields(options):
            name = camel(each.name)
            if not hasattr(cls, name):
                setattr(cls, name, option_param(each))
            default = None if each.default is MISSING else each.default
            added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=each.type))
        init: Any = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(init)
        named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        init.__signature__ = signature.replace(parameters=[*named, *added])
        return with_accessors(cls)

    return decorate


def to_backbone(value: Any) -> str | Backbone:
    """A converter: a name, or a `Backbone`, with which the stage cannot be saved."""
    return value if isinstance(value, Backbone) else one_of(BACKBONES)(value)


def one_of(allowed: Iterable[str]) -> Any:
    """A converter that accepts these words only."""
    allowed = tuple(allowed)

    def convert(value: Any) -> str:
        if value not in allowed:
            raise TypeError(f"Unknown value {value!r}. {did_you_mean(str(value), allowed)}")
        return str(value)

    return convert


def to_bits(value: Any) -> int:
    """A converter: one of `BITS`."""
    if value not in BITS:
        raise TypeError(f"Expected a whole number from {BITS[0]} to {BITS[-1]}; got {value!r}.")
    return int(value)


def to_weights(value: Any) -> str | None:
    """A converter: "imagenet", a file, or None."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected 'imagenet', a file or None; got {value!r}.")
    return None if value is None else os.fspath(value)


def to_image_size(value: Any) -> list[int]:
    """A converter: (height, width)."""
    size = TypeConverters.toListInt(value)
    if len(size) != 2 or min(size) < 1:
        raise TypeError(f"Expected (height, width) in pixels; got {value!r}.")
    return size


class HasSetParams(Params):
    """Mixin for setParams."""

    def setParams(self, **params: Any) -> Self:
        """Sets params by name. None leaves a param unchanged, except ``weights``, for which it means random ones."""
        unknown = [name for name in params if not self.hasParam(name)]
        if unknown:
            raise TypeError(f"Unknown param {unknown[0]!r}. {did_you_mean(unknown[0], [p.name for p in self.params])}")
        return self._set(**{name: value for name, value in params.items() if value is not None or name == "weights"})


class HasErrorCol(Params):
    """Mixin for param errorCol."""

    errorCol: Param[str] = Param(
        Params._dummy(),
        "errorCol",
        "column for the reason why a row has no output; null otherwise (default: output column + '_error')",
        typeConverter=TypeConverters.toString,
    )


class HasModel(Params):
    """Mixin for the params model, layer and batchBytes."""

    model: Param[Any] = Param(
        Params._dummy(),
        "model",
        "a Keras model, captured when it is set; a FitResult; or the path or URI of a .keras file",
        typeConverter=Network.of,
    )
    layer: Param[str] = Param(
        Params._dummy(),
        "layer",
        "name of the layer whose output is used (default: the output of the model)",
        typeConverter=TypeConverters.toString,
    )
    batchBytes: Param[int] = Param(
        Params._dummy(),
        "batchBytes",
        "maximum bytes of decoded pixels or numbers in a batch of the network (> 0)",
        typeConverter=TypeConverters.toInt,
    )

    def getModel(self) -> Any:
        """A new, uncompiled Keras model from the value of model."""
        return self.getOrDefault(self.model).model()


class HasBackbone(Params):
    """Mixin for the params backbone and weights."""

    backbone, weights = (
        option_param(each, {"backbone": to_backbone, "weights": to_weights}[each.name])
        for each in fields(ClassifierOptions)
        if each.name in ("backbone", "weights")
    )


class HasImageSize(Params):
    """Mixin for param imageSize."""

    imageSize: Param[list[int]] = Param(
        Params._dummy(),
        "imageSize",
        "[height, width] in pixels; images are scaled to this size",
        typeConverter=to_image_size,
    )


class HasResize(Params):
    """Mixin for params resize and bits."""

    resize: Param[str] = Param(
        Params._dummy(),
        "resize",
        "'fit' keeps the whole image and changes its proportions; 'crop' keeps them and the middle of the longer side",
        typeConverter=one_of(RESIZES),
    )
    bits: Param[int] = Param(
        Params._dummy(),
        "bits",
        "how many bits the values of 16-bit images use, 8 to 16",
        typeConverter=to_bits,
    )
