"""ImageFeaturizer, a transformer from images to the features of a network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyspark import keyword_only
from pyspark.ml.param import Param, Params
from pyspark.ml.param.shared import HasOutputCol

from dlspark.errors import ConfigError
from dlspark.ml.network import Network, takes_images
from dlspark.ml.params import HasBackbone, HasImageSize, HasResize, one_of, with_accessors
from dlspark.ml.rows import Reader
from dlspark.ml.stage import NetworkStage
from dlspark.ml.udf import BATCH_BYTES, check_images, reader_of

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession
    from pyspark.sql.types import DataType


@with_accessors
class ImageFeaturizer(NetworkStage, HasOutputCol, HasBackbone, HasImageSize, HasResize):
    """A Spark ML transformer: a column of images becomes a column of vectors.

    ``inputCol`` holds the bytes of image files, their paths or URIs (read by the executors; any that fsspec knows), or the
    structs of ``spark.read.format("image")``. Images are decoded and scaled by `dlspark.images.decode`, and preprocessed
    in the network as by `build_classifier`: with ``backbone`` the features are those of the layer "pooling" of a classifier
    with the same weights.

    Args:
        inputCol: the images.
        outputCol: a new column for the vectors; null where an image cannot be read.
        errorCol: a new column for the reason; ``outputCol`` + "_error" by default.
        backbone: a name of `dlspark.models.BACKBONES`, or a `Backbone`, with which the stage cannot be saved. Either this or
            ``model``.
        weights: of the backbone: "imagenet"; a file, as for `build_classifier`; None for random ones, drawn once for the
            stage and its copies.
        imageSize: (height, width) in pixels; by default (224, 224) for a backbone, and the size of the model's input.
        resize: "fit" or "crop", see `dlspark.images.decode.RESIZES`.
        bits: how many bits the values of 16-bit images use, as for `prepare_images`.
        pooling: "avg": the mean of each of the backbone's maps; "none": the flattened maps, 100,352 values for ResNet50 at
            224 x 224 pixels.
        model: a trained network that takes RGB images in [0, 255]: a Keras model, a `FitResult`, or a ``.keras`` file.
        layer: name of the model's layer whose flattened output is used; the output of the model by default.
        batchBytes: maximum bytes of decoded pixels in a batch of the network.
    """

    pooling: Param[str] = Param(
        Params._dummy(),
        "pooling",
        "'avg': the mean of each of the backbone's maps; 'none': the maps, flattened",
        typeConverter=one_of(("avg", "none")),
    )

    @keyword_only
    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        errorCol: str | None = None,
        backbone: str | None = None,
        weights: str | os.PathLike[str] | None = "imagenet",
        imageSize: Sequence[int] | None = None,
        resize: str = "fit",
        bits: int = 16,
        pooling: str = "avg",
        model: Any = None,
        layer: str | None = None,
        batchBytes: int = BATCH_BYTES,
    ) -> None:
        super().__init__()
        self._setDefault(weights="imagenet", resize="fit", bits=16, pooling="avg", batchBytes=BATCH_BYTES)
        self.setParams(**self._input_kwargs)

    def network_to_save(self) -> Network:
        """The model, or the backbone with its pooling."""
        if self.isDefined(self.backbone) == self.isDefined(self.model):
            raise ConfigError("ImageFeaturizer needs a network: set backbone or model, and not both.")
        if self.isDefined(self.model):
            return super().network_to_save()
        if self.isDefined(self.layer):
            raise ConfigError("layer is for a model; of a backbone set pooling='avg' or 'none'.")
        return self._once(self._key(), self._build)

    def take_saved(self, network: Network, metadata: Mapping[str, Any]) -> None:
        """Restore the network of a saved stage. Other settings of the backbone build another one."""
        if self.isDefined(self.backbone):
            self._made[self._key()] = network
        else:
            super().take_saved(network, metadata)

    def _network(self) -> Network:
        network = super()._network()
        whole = self.network_to_save()
        if not takes_images(whole.input_shape):
            raise ConfigError(
                f"Expected a model of RGB images, (height, width, 3); got one of {whole.input_shape}. For arrays use "
                "KerasTransformer."
            )
        return network

    def _key(self) -> tuple[Any, ...]:
        return (self.getBackbone(), self.getWeights(), tuple(self._size()), self.getPooling())

    def _size(self) -> list[int]:
        return self.getImageSize() if self.isDefined(self.imageSize) else [224, 224]

    def _build(self) -> Network:
        from dlspark.models import build_classifier

        height, width = self._size()
        # From a whole classifier, so that the features equal those of trained classifiers by construction.
        classifier = build_classifier(
            self.getBackbone(), 2, image_size=(height, width), weights=self.getWeights(), fine_tune="head"
        )
        pooling = classifier.get_layer("pooling")
        return Network.of(classifier, pooling.output if self.getPooling() == "avg" else pooling.input)

    def _source(self, spark: SparkSession, column: Column, kind: DataType, network: Network) -> tuple[Column, Reader]:
        check_images(spark, self.getInputCol(), kind)
        size = self._size() if self.isDefined(self.backbone) or self.isDefined(self.imageSize) else None
        return column, reader_of(network, size, self.getResize(), self.getBits())
