"""KerasImageClassifier, an estimator that trains a network on any backend, and its model."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pyspark import keyword_only
from pyspark.ml import Estimator, Model
from pyspark.ml.functions import vector_to_array
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasHandleInvalid, HasInputCol, HasLabelCol, HasPredictionCol, HasProbabilityCol, HasSeed
from pyspark.ml.util import DefaultParamsReadable, DefaultParamsWritable
from pyspark.sql import functions as F

from dlspark.data import check_distinct, has_column, quoted
from dlspark.errors import ConfigError
from dlspark.ml.network import Network
from dlspark.ml.params import (
    HasBackbone,
    HasErrorCol,
    HasImageSize,
    HasResize,
    HasSetParams,
    camel,
    option_defaults,
    with_accessors,
    with_options,
)
from dlspark.ml.rows import ImageReader, Reader, check_column
from dlspark.ml.stage import NetworkStage
from dlspark.ml.training_rows import write_images
from dlspark.ml.udf import BATCH_BYTES, check_images, reader_of
from dlspark.models import ClassifierOptions, build_from_options
from dlspark.spark import is_local, session_master
from dlspark.storage import Store
from dlspark.trainer import Trainer
from dlspark.worker import random_states

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql.types import DataType


class _Columns(HasInputCol, HasErrorCol, HasProbabilityCol, HasPredictionCol, HasResize, HasHandleInvalid):
    """The params that the estimator copies to its model."""


def _param(name: str, doc: str, converter: Any) -> Param[Any]:
    return Param(Params._dummy(), name, doc, typeConverter=converter)


def _to_options(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected options by name; got {value!r}.")
    return dict(value)


@with_accessors
class KerasImageClassificationModel(NetworkStage, Model, _Columns):
    """The model of `KerasImageClassifier`: adds ``probabilityCol``, ``predictionCol`` and ``errorCol`` to a DataFrame.

    A row whose image cannot be read has nulls and a reason. With ``handleInvalid`` "skip" it is left out, because Spark's
    evaluators do not accept nulls. ``getModel()`` returns the Keras model.

    Attributes:
        history: metric → one float per epoch, as in `FitResult`.
    """

    history: Mapping[str, list[float]]

    def __init__(self) -> None:
        super().__init__()
        self.history = {}
        self._setDefault(
            batchBytes=BATCH_BYTES,
            resize="fit",
            bits=16,
            probabilityCol="probability",
            predictionCol="prediction",
            handleInvalid="error",
        )

    def more_to_save(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history}

    def take_saved(self, network: Network, metadata: Mapping[str, Any]) -> None:
        """The network and the history."""
        super().take_saved(network, metadata)
        self.history = metadata["history"]

    def getErrorCol(self) -> str:
        """The value of errorCol, or its default: predictionCol + "_error"."""
        return self.getOrDefault(self.errorCol) if self.isDefined(self.errorCol) else f"{self.getPredictionCol()}_error"

    def _output(self) -> str:
        return self.getProbabilityCol()

    def _source(self, spark: SparkSession, column: Column, kind: DataType, network: Network) -> tuple[Column, Reader]:
        check_images(spark, self.getInputCol(), kind)
        return column, reader_of(network, None, self.getResize(), self.getBits())

    def _transform(self, dataset: DataFrame) -> DataFrame:
        name = self.getPredictionCol()
        if has_column(dataset, name):
            raise ConfigError(f"The column {name!r} exists already. Set another predictionCol.")
        vector = F.col(quoted(self.getProbabilityCol()))
        values = vector_to_array(vector)
        highest = F.call_function("array_position", values, F.array_max(values)) - 1
        predicted = super()._transform(dataset).withColumn(name, F.when(vector.isNotNull(), highest.cast("double")))
        return predicted.filter(vector.isNotNull()) if self.getHandleInvalid() == "skip" else predicted


@with_options(ClassifierOptions)
class KerasImageClassifier(
    Estimator,
    _Columns,
    HasBackbone,
    HasImageSize,
    HasLabelCol,
    HasSeed,
    HasSetParams,
    DefaultParamsWritable,
    DefaultParamsReadable[Any],
):
    """A Spark ML estimator: `build_classifier` and `Trainer` over a DataFrame of images and class indices.

    ``fit`` decodes the images in the executors, writes them to the store as shards, trains on the backend, and deletes the
    shards. Spark's CrossValidator and TrainValidationSplit can tune the params; leave their parallelism at 1, as one
    training uses all workers.

    Args:
        inputCol: the images, as for `ImageFeaturizer`.
        labelCol: class indices 0, 1, …; if Spark's StringIndexer made them, its metadata gives the classes.
        probabilityCol, predictionCol, errorCol: columns that the model adds.
        backbone, weights, fineTune, batchNorm, dense, dropout, augment, learningRate, depthDecay: as for `build_classifier`.
            A stage whose backbone is a `Backbone` object cannot be saved.
        imageSize: (height, width) in pixels.
        resize: "fit" or "crop".
        bits: how many bits the values of 16-bit images use, as for `prepare_images`.
        epochs, batchSize, seed: as for `Trainer.fit`.
        backend, numWorkers, backendOptions: as for `Trainer`.
        store: folder or URI for shards and runs, which all workers must reach. Runs are kept, and never resumed. Without
            a store, which needs a local master, nothing is kept.
        handleInvalid: "error": an image that cannot be read fails the fit; "skip": such rows are left out, with a warning,
            and by the model too.
    """

    epochs = _param("epochs", "passes over the rows (>= 1)", TypeConverters.toInt)
    batchSize = _param("batchSize", "maximum rows of a step over all workers (>= 1)", TypeConverters.toInt)
    backend = _param("backend", "name of an installed backend", TypeConverters.toString)
    numWorkers = _param("numWorkers", "number of workers (>= 1)", TypeConverters.toInt)
    backendOptions = _param("backendOptions", "options of the backend by name", _to_options)
    store = _param("store", "folder or URI that all workers reach (default: a temporary folder)", TypeConverters.toString)

    @keyword_only
    def __init__(
        self,
        *,
        inputCol: str | None = None,
        labelCol: str = "label",
        probabilityCol: str = "probability",
        predictionCol: str = "prediction",
        errorCol: str | None = None,
        imageSize: Sequence[int] = (224, 224),
        resize: str = "fit",
        bits: int = 16,
        epochs: int = 1,
        batchSize: int = 32,
        seed: int = 0,
        backend: str = "local",
        numWorkers: int = 1,
        backendOptions: Mapping[str, Any] | None = None,
        store: str | None = None,
        handleInvalid: str = "error",
        **options: Any,
    ) -> None:
        super().__init__()
        self._setDefault(
            labelCol="label",
            probabilityCol="probability",
            predictionCol="prediction",
            imageSize=[224, 224],
            resize="fit",
            bits=16,
            epochs=1,
            batchSize=32,
            seed=0,
            backend="local",
            numWorkers=1,
            backendOptions={},
            handleInvalid="error",
            **option_defaults(ClassifierOptions),
        )
        self.setParams(**self._input_kwargs)

    def _fit(self, dataset: DataFrame) -> KerasImageClassificationModel:
        import keras

        spark, column = dataset.sparkSession, self._checked(dataset)
        trainer = Trainer(
            self.getBackend(),
            num_workers=self.getNumWorkers(),
            options=self.getBackendOptions() or None,
            store=self.getStore() if self.isDefined(self.store) else None,
        )
        options = ClassifierOptions(**{each.name: self.getOrDefault(camel(each.name)) for each in fields(ClassifierOptions)})
        height, width = self.getImageSize()
        with self._shards(spark) as store:
            rows, classes = write_images(
                store,
                dataset,
                image=column,
                label=self.getLabelCol(),
                reader=ImageReader((height, width), self.getResize(), self.getBits()),
                skip=self.getHandleInvalid() == "skip",
            )
            with random_states():
                keras.utils.set_random_seed(self.getSeed())
                network = build_from_options(options, len(classes), image_size=(height, width))
                result = trainer.fit(
                    network,
                    rows,
                    epochs=self.getEpochs(),
                    batch_size=self.getBatchSize(),
                    seed=self.getSeed(),
                    verbose=0,
                    resume=False,
                )
        model = KerasImageClassificationModel()
        model._resetUid(self.uid)
        model._set(model=Network.of(result))
        model.history = dict(result.history)
        return self._copyValues(model)

    def _checked(self, dataset: DataFrame) -> str:
        """The name of the column of images."""
        if not self.isDefined(self.backbone):
            raise ConfigError("KerasImageClassifier needs a network: set backbone.")
        if self.getHandleInvalid() not in ("error", "skip"):
            raise ConfigError(f"Expected handleInvalid as 'error' or 'skip'; got {self.getHandleInvalid()!r}.")
        name: str = self.getInputCol()
        check_column("inputCol", name, dataset.columns)
        check_distinct(dataset, "the DataFrame", (name, self.getLabelCol()))
        check_images(dataset.sparkSession, name, dataset.schema[name].dataType)
        return name

    @contextmanager
    def _shards(self, spark: SparkSession) -> Iterator[Store]:
        """A folder for the shards, deleted after the block."""
        if self.isDefined(self.store):
            store = Store(self.getStore()).child(f"shards-{uuid.uuid4().hex}")
            try:
                yield store
            finally:
                store.delete_all()
        elif is_local(spark):
            with tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
                yield Store(folder)
        else:
            raise ConfigError(
                f"Expected a store, as all executors of {session_master(spark)} must reach the images. Set store to a URI, "
                "such as 's3://…', or to a shared folder."
            )
