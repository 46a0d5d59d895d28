"""ImageFeaturizer: images become the features that a network sees in them."""

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
    structs of ``spark.read.format("image")``. Images are decoded and scaled as `dlspark.images.decode` says, and
    preprocessed in the network as `build_classifier` does it: with ``backbone`` the features are those of the layer
    "pooling" of a classifier with the same weights.

    Args:
        inputCol: the images.
        outputCol: the vectors, new; null where there is a reason.
        errorCol: the reason why an image has no vector, new; ``outputCol`` + "_error" when it is not set.
        backbone: a network of `dlspark.models.backbones.BACKBONES`. Either this or ``model``.
        weights: of the backbone: "imagenet"; a file, as `build_classifier` takes it; None for random ones, drawn once for
            the stage and its copies.
        imageSize: (height, width) in pixels. Of a backbone (224, 224) when it is not set; of a model its own.
        resize: "fit" or "crop", see `dlspark.images.decode.RESIZES`.
        pooling: "avg": the mean of each of the backbone's maps; "none": all of the maps, flattened: 100,352 values from a
            ResNet50 at 224 x 224 pixels.
        model: a trained network that takes RGB images in [0, 255]: a Keras model, a `FitResult`, or a ``.keras`` file.
        layer: of the model: the layer whose output, flattened, is taken; the model's own output when it is not set.
        batchBytes: the most bytes of decoded pixels that the network takes at a time.
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
        pooling: str = "avg",
        model: Any = None,
        layer: str | None = None,
        batchBytes: int = BATCH_BYTES,
    ) -> None:
        super().__init__()
        self._setDefault(weights="imagenet", resize="fit", pooling="avg", batchBytes=BATCH_BYTES)
        self.setParams(**self._input_kwargs)

    def network_to_save(self) -> Network:
        """The model as it was given, or the backbone with its pooling."""
        if self.isDefined(self.backbone) == self.isDefined(self.model):
            raise ConfigError("ImageFeaturizer needs a network: set backbone or model, and not both.")
        if self.isDefined(self.model):
            return super().network_to_save()
        if self.isDefined(self.layer):
            raise ConfigError("layer is for a model; of a backbone set pooling='avg' or 'none'.")
        return self._once(self._key(), self._build)

    def take_saved(self, network: Network, metadata: Mapping[str, Any]) -> None:
        """Take what `network_to_save` gave before; other settings of the backbone build another one."""
        if self.isDefined(self.backbone):
            self._made[self._key()] = network
        else:
            super().take_saved(network, metadata)

    def _network(self) -> Network:
        network = super()._network()
        whole = self.network_to_save()
        if not takes_images(whole.input_shape):
            raise ConfigError(
                f"ImageFeaturizer needs a model that takes RGB images, (height, width, 3): this one takes "
                f"{whole.input_shape}. For arrays there is KerasTransformer."
            )
        return network

    def _key(self) -> tuple[Any, ...]:
        return (self.getBackbone(), self.getWeights(), tuple(self._size()), self.getPooling())

    def _size(self) -> list[int]:
        return self.getImageSize() if self.isDefined(self.imageSize) else [224, 224]

    def _build(self) -> Network:
        from dlspark.models import build_classifier

        height, width = self._size()
        # A whole classifier, cut: so the features are those of the classifiers that are trained, by construction.
        classifier = build_classifier(
            self.getBackbone(), 2, image_size=(height, width), weights=self.getWeights(), fine_tune="head"
        )
        pooling = classifier.get_layer("pooling")
        return Network.of(classifier, pooling.output if self.getPooling() == "avg" else pooling.input)

    def _source(self, spark: SparkSession, column: Column, kind: DataType, network: Network) -> tuple[Column, Reader]:
        check_images(spark, self.getInputCol(), kind)
        size = self._size() if self.isDefined(self.backbone) or self.isDefined(self.imageSize) else None
        return column, reader_of(network, size, self.getResize())
