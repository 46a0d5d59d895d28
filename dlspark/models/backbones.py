"""The backbones of keras.applications: what is known of them, how they are made, and where their ImageNet weights are."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from dlspark.errors import ConfigError

if TYPE_CHECKING:
    import keras

_DOWNLOAD_TIMEOUT_SECONDS = 10.0  # of silence; a download that moves is never cut off


@dataclass(frozen=True)
class Backbone:
    """What dlspark knows of one network of keras.applications.

    Attributes:
        constructor: its name there.
        preprocessing: "caffe": BGR less the ImageNet mean; "scale": to [-1, 1]; "included": the network's own layers.
        min_size: least height and width in pixels that Keras accepts.
        block: pattern that finds a layer's block in its name; a layer without one belongs to the block before it.
        weights_file: name of the ImageNet file without top; ``{size}`` is filled in from `sizes`.
        sizes: image sizes with an ImageNet file of their own; every other size uses the file for 224.
    """

    constructor: str
    preprocessing: Literal["caffe", "scale", "included"]
    min_size: int
    block: str
    weights_file: str
    sizes: tuple[int, ...] = ()

    def imagenet_file(self, image_size: tuple[int, int]) -> str:
        """Name of the file that keras.applications loads for images of ``image_size``."""
        height, width = image_size
        return self.weights_file.format(size=height if height == width and height in self.sizes else 224)


_KERNELS = "weights_tf_dim_ordering_tf_kernels"

#: The backbones by name.
BACKBONES: Mapping[str, Backbone] = MappingProxyType(
    {
        "resnet50": Backbone("ResNet50", "caffe", 32, r"conv\d_block\d+|conv1", f"resnet50_{_KERNELS}_notop.h5"),
        "xception": Backbone("Xception", "scale", 71, r"block\d+", f"xception_{_KERNELS}_notop.h5"),
        "mobilenet": Backbone(
            "MobileNet",
            "scale",
            32,
            r"conv_(?:dw|pw|pad)(_\d+)|conv1",
            "mobilenet_1_0_{size}_tf_no_top.h5",
            sizes=(128, 160, 192, 224),
        ),
        "mobilenetv2": Backbone(
            "MobileNetV2",
            "scale",
            32,
            r"block_\d+|expanded_conv|Conv_?1",
            f"mobilenet_v2_{_KERNELS}_1.0_{{size}}_no_top.h5",
            sizes=(96, 128, 160, 192, 224),
        ),
        "efficientnetv2b0": Backbone(
            "EfficientNetV2B0", "included", 32, r"stem|block\d+[a-z]|top", "efficientnetv2-b0_notop.h5"
        ),
    }
)


def construct(spec: Backbone, size: tuple[int, int], weights: str | None = None) -> keras.Model:
    """The network without its top, for images of ``size`` (height, width); ``weights`` as keras.applications takes them."""
    import keras

    constructor = getattr(keras.applications, spec.constructor)
    return constructor(include_top=False, weights=weights, input_shape=(*size, 3))


def preprocess(x: Any, spec: Backbone) -> Any:
    """``preprocess_input`` of the backbone's module in keras.applications, in stock layers and float32."""
    import keras

    if spec.preprocessing == "included":
        return x
    if spec.preprocessing == "scale":
        return keras.layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="preprocessing")(x)
    mean, variance = [103.939, 116.779, 123.68], [1.0, 1.0, 1.0]  # of ImageNet in BGR, as Caffe's models had it
    x = keras.ops.flip(x, axis=-1)
    return keras.layers.Normalization(mean=mean, variance=variance, dtype="float32", name="preprocessing")(x)


def blocks(network: keras.Model, pattern: str) -> list[list[keras.layers.Layer]]:
    """The layers of a backbone by block, from the stem up."""
    blocks: dict[str, list[keras.layers.Layer]] = {}
    current = ""
    for layer in network.layers:
        match = re.search(pattern, layer.name)
        if match:
            current = match[match.lastindex or 0]
        if layer.weights:
            blocks.setdefault(current, []).append(layer)
    return list(blocks.values())


def imagenet_file(spec: Backbone, size: tuple[int, int]) -> Path:
    """The ImageNet file in Keras' cache, which Keras fills if it can."""
    name = spec.imagenet_file(size)
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    # Where Keras goes when it cannot write the first.
    fallback = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), ".keras")
    places = [folder / "models" / name for folder in (home, fallback)]
    if places[0].is_file():  # as it is: asked for it, Keras deletes a file whose hash it does not know
        return places[0]
    error: Exception | None = None
    try:
        with _socket_timeout(_DOWNLOAD_TIMEOUT_SECONDS):
            construct(spec, size, weights="imagenet")
    except Exception as failure:  # keras.utils.get_file raises a bare Exception
        error = failure
    else:
        for place in places:
            if place.is_file():
                return place
    raise ConfigError(
        f"weights='imagenet' expects the keras-applications release file {name!r} in Keras' cache; it is not there and "
        f"could not be downloaded ({error}). Download it elsewhere and put it at {str(places[0])!r}, or give a file "
        "with weights='path/to/file.h5', or train from scratch with weights=None."
    ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # Keras downloads with urlretrieve, which waits for minutes where a firewall swallows packets.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
