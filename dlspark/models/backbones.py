"""Backbones: what is known of each network, how it is made, and where its ImageNet weights are."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from dlspark._require import whole_number
from dlspark.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import keras

_DOWNLOAD_TIMEOUT_SECONDS = 10.0  # of silence; a download that makes progress is never cut off


@dataclass(frozen=True)
class Backbone:
    """A network that classifiers are built on. `build_classifier` takes one of yours in place of a name.

    Attributes:
        name: of its layer in the classifier.
        constructor: its name in keras.applications, or a function that is called as those are, with
            ``include_top=False, weights=None, input_shape=(height, width, 3)``, and returns a Keras model that gives maps.
        preprocessing: what happens to pixels in [0, 255] before: "caffe": BGR minus the ImageNet mean; "scale": to [-1, 1];
            "included": nothing, the network has layers for it.
        min_size: smallest height and width in pixels.
        block: pattern that finds a layer's block in its name, for `depth_decay`; a layer without a match belongs to the
            block before it. With "" the network is one block.
        weights_file: name of its ImageNet file without top in keras.applications; ``{size}`` is filled in from `sizes`.
            "" for a network without such a file.
        sizes: image sizes with an ImageNet file of their own; every other size uses the file for 224.
    """

    name: str
    constructor: str | Callable[..., keras.Model]
    preprocessing: Literal["caffe", "scale", "included"] = "included"
    min_size: int = 1
    block: str = ""
    weights_file: str = ""
    sizes: tuple[int, ...] = ()

    def construct(self, size: tuple[int, int], weights: str | None = None) -> keras.Model:
        """The network without its top, for images of ``size`` (height, width)."""
        import keras

        made = self.constructor
        if isinstance(made, str):
            made = getattr(keras.applications, made)
        return made(include_top=False, weights=weights, input_shape=(*size, 3))

    def preprocess(self, x: Any) -> Any:
        """``preprocess_input`` of the network's module in keras.applications, in stock layers and float32."""
        import keras

        if self.preprocessing == "included":
            return x
        if self.preprocessing == "scale":
            return keras.layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="preprocessing")(x)
        mean, variance = [103.939, 116.779, 123.68], [1.0, 1.0, 1.0]  # of ImageNet in BGR, as in Caffe's models
        x = keras.ops.flip(x, axis=-1)
        return keras.layers.Normalization(mean=mean, variance=variance, dtype="float32", name="preprocessing")(x)

    def blocks(self, network: keras.Model) -> list[list[keras.layers.Layer]]:
        """The layers that carry weights by block, from the stem up."""
        blocks: dict[str, list[keras.layers.Layer]] = {}
        current = ""
        for layer in network.layers:
            match = re.search(self.block, layer.name)
            if match:
                current = match[match.lastindex or 0]
            if layer.weights:
                blocks.setdefault(current, []).append(layer)
        return list(blocks.values())

    def imagenet_file(self, image_size: tuple[int, int]) -> str:
        """Name of the file that keras.applications loads for images of ``image_size``."""
        height, width = image_size
        return self.weights_file.format(size=height if height == width and height in self.sizes else 224)


_KERNELS = "weights_tf_dim_ordering_tf_kernels"
_KNOWN = (
    Backbone("resnet50", "ResNet50", "caffe", 32, r"conv\d_block\d+|conv1", f"resnet50_{_KERNELS}_notop.h5"),
    Backbone("xception", "Xception", "scale", 71, r"block\d+", f"xception_{_KERNELS}_notop.h5"),
    Backbone(
        "mobilenet",
        "MobileNet",
        "scale",
        32,
        r"conv_(?:dw|pw|pad)(_\d+)|conv1",
        "mobilenet_1_0_{size}_tf_no_top.h5",
        sizes=(128, 160, 192, 224),
    ),
    Backbone(
        "mobilenetv2",
        "MobileNetV2",
        "scale",
        32,
        r"block_\d+|expanded_conv|Conv_?1",
        f"mobilenet_v2_{_KERNELS}_1.0_{{size}}_no_top.h5",
        sizes=(96, 128, 160, 192, 224),
    ),
    Backbone(
        "efficientnetv2b0",
        "EfficientNetV2B0",
        "included",
        32,
        r"stem|block\d+[a-z]|top",
        "efficientnetv2-b0_notop.h5",
    ),
)

#: The backbones that can be named.
BACKBONES: Mapping[str, Backbone] = MappingProxyType({backbone.name: backbone for backbone in _KNOWN})


def find_backbone(backbone: object) -> Backbone:
    """The backbone of that name, or the one given.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(backbone, Backbone):
        return backbone
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise ConfigError(f"Unknown backbone {backbone!r}. {did_you_mean(str(backbone), BACKBONES)}")
    return BACKBONES[backbone]


def check_backbone(backbone: object, image_size: object) -> tuple[Backbone, tuple[int, int]]:
    """The backbone, and (height, width).

    Raises:
        ConfigError: an unknown name, or a backbone that cannot take images of that size.
    """
    found = find_backbone(backbone)
    if isinstance(image_size, str) or not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise ConfigError(f"Expected image_size to be (height, width); got {image_size!r}. Write for instance (224, 224).")
    height, width = (whole_number(f"image_size of {found.name}", side, found.min_size) for side in image_size)
    return found, (height, width)


def cached_imagenet_file(backbone: Backbone, size: tuple[int, int]) -> Path:
    """The ImageNet file in Keras' cache, downloaded by Keras if it is missing.

    Raises:
        ConfigError: the download failed, or the backbone has no such file.
    """
    if not backbone.weights_file:
        raise ConfigError(
            f"Expected weights to be a file or None, as {backbone.name!r} has no ImageNet weights; got 'imagenet'."
        )
    name = backbone.imagenet_file(size)
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    # Keras uses the second folder when it cannot write to the first.
    fallback = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), ".keras")
    places = [folder / "models" / name for folder in (home, fallback)]
    if places[0].is_file():  # not through Keras, which deletes a file whose hash it does not know
        return places[0]
    error: Exception | None = None
    try:
        with _socket_timeout(_DOWNLOAD_TIMEOUT_SECONDS):
            backbone.construct(size, weights="imagenet")
    except Exception as failure:  # keras.utils.get_file raises a bare Exception
        error = failure
    else:
        for place in places:
            if place.is_file():
                return place
    raise ConfigError(
        f"Expected the keras-applications release file {name!r} in Keras' cache for weights='imagenet'; it is missing and "
        f"could not be downloaded ({error}). Download it elsewhere and put it at {str(places[0])!r}, or give a file "
        "with weights='path/to/file.h5', or train from scratch with weights=None."
    ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # Keras downloads with urlretrieve, which waits for minutes where a firewall drops packets.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
