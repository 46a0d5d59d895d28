"""Params that the stages share. A value is checked when it is set; how values go together, when they are used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Self, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters

from dlspark.errors import did_you_mean
from dlspark.images import RESIZES
from dlspark.ml.network import Network
from dlspark.models import BACKBONES

S = TypeVar("S", bound=type)


def with_accessors(cls: S) -> S:
    """Give a stage ``getX`` and ``setX`` for all its params, as Spark's own stages have them, where it has none.

    Spark generates that code from a table; here it is made when the class is.
    """
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


def one_of(allowed: Iterable[str]) -> Any:
    """A converter that takes one of these words."""
    allowed = tuple(allowed)

    def convert(value: Any) -> str:
        if value not in allowed:
            raise TypeError(f"Unknown value {value!r}. {did_you_mean(str(value), allowed)}")
        return str(value)

    return convert


def to_weights(value: Any) -> str | None:
    """A converter: "imagenet", a file, or None."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected 'imagenet', a file or None: received {value!r}.")
    return None if value is None else os.fspath(value)


def to_image_size(value: Any) -> list[int]:
    """A converter: (height, width)."""
    size = TypeConverters.toListInt(value)
    if len(size) != 2 or min(size) < 1:
        raise TypeError(f"Expected (height, width) in pixels: received {value!r}.")
    return size


class HasSetParams(Params):
    """Mixin for setParams."""

    def setParams(self, **params: Any) -> Self:
        """Sets what is given, by the names of the arguments of the constructor. None leaves all but ``weights`` as it is."""
        unknown = [name for name in params if not self.hasParam(name)]
        if unknown:
            raise TypeError(f"Unknown param {unknown[0]!r}. {did_you_mean(unknown[0], [p.name for p in self.params])}")
        return self._set(**{name: value for name, value in params.items() if value is not None or name == "weights"})


class HasErrorCol(Params):
    """Mixin for param errorCol."""

    errorCol: Param[str] = Param(
        Params._dummy(),
        "errorCol",
        "column with the reason why a row has no output, or null (default: the output column's name + '_error')",
        typeConverter=TypeConverters.toString,
    )


class HasModel(Params):
    """Mixin for the params model, layer and batchBytes."""

    model: Param[Any] = Param(
        Params._dummy(),
        "model",
        "the network: a Keras model, as it is when it is set; a FitResult; or the path or URI of a .keras file",
        typeConverter=Network.of,
    )
    layer: Param[str] = Param(
        Params._dummy(),
        "layer",
        "name of the layer of the model whose output is taken (default: the model's output)",
        typeConverter=TypeConverters.toString,
    )
    batchBytes: Param[int] = Param(
        Params._dummy(),
        "batchBytes",
        "the most bytes of decoded pixels or of numbers that the network takes at a time (> 0)",
        typeConverter=TypeConverters.toInt,
    )

    def getModel(self) -> Any:
        """A new Keras model, not compiled, of the value of model."""
        return self.getOrDefault(self.model).model()


class HasBackbone(Params):
    """Mixin for the params backbone and weights."""

    backbone: Param[str] = Param(
        Params._dummy(),
        "backbone",
        f"name of a network of keras.applications: {', '.join(BACKBONES)}",
        typeConverter=one_of(BACKBONES),
    )
    weights: Param[Any] = Param(
        Params._dummy(),
        "weights",
        "weights of the backbone: 'imagenet', a file, or None for random ones",
        typeConverter=to_weights,
    )


class HasImageSize(Params):
    """Mixin for param imageSize."""

    imageSize: Param[list[int]] = Param(
        Params._dummy(),
        "imageSize",
        "[height, width] in pixels to which images are scaled",
        typeConverter=to_image_size,
    )


class HasResize(Params):
    """Mixin for param resize."""

    resize: Param[str] = Param(
        Params._dummy(),
        "resize",
        "'fit' keeps all of an image and gives up its proportions; 'crop' keeps them, and of the longer side the middle",
        typeConverter=one_of(RESIZES),
    )
