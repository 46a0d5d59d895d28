"""The base class of the transformers: a network, an input column, an output column and a column of errors."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pyspark.ml import Transformer
from pyspark.ml.functions import array_to_vector
from pyspark.ml.param.shared import HasInputCol
from pyspark.ml.util import MLReadable, MLReader, MLWritable, MLWriter
from pyspark.sql import functions as F

from dlspark.data import check_distinct, has_column, quoted
from dlspark.errors import ConfigError
from dlspark.ml.network import Network
from dlspark.ml.params import HasErrorCol, HasModel, HasSetParams
from dlspark.ml.persistence import NetworkReader, NetworkWriter
from dlspark.ml.rows import Reader, check_column
from dlspark.ml.udf import outcome_udf

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql.types import DataType

_OUTCOME = "__dlspark_outcome"
_making = threading.Lock()  # CrossValidator uses copies of a stage in several threads


class NetworkStage(Transformer, HasInputCol, HasErrorCol, HasModel, HasSetParams, MLWritable, MLReadable[Any]):
    """A transformer that adds the outputs of a network for ``inputCol``, as vectors.

    A row that cannot be predicted has a null there and the reason in ``errorCol``; it does not fail the job.
    The stage is lazy. Each Python worker of an executor loads the network once.
    """

    def __init__(self) -> None:
        super().__init__()
        # Networks by the Params that they were made from. Copies of a stage share this dict: random weights must not differ
        # between them, and a pre-trained network is built once.
        self._made: dict[Any, Network] = {}

    def getErrorCol(self) -> str:
        """The value of errorCol, or its default."""
        return self.getOrDefault(self.errorCol) if self.isDefined(self.errorCol) else f"{self._output()}_error"

    def _output(self) -> str:
        """The name of the output column."""
        return self.getOrDefault("outputCol")

    def write(self) -> MLWriter:
        """A writer of this stage, with its network as a ``.keras`` file."""
        return NetworkWriter(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        """A reader of saved stages of this class."""
        return NetworkReader(cls)

    def network_to_save(self) -> Network:
        """The network that is saved beside the Params."""
        if not self.isDefined(self.model):
            raise ConfigError(f"{type(self).__name__} needs a network: set model.")
        return self.getOrDefault(self.model)

    def take_saved(self, network: Network, metadata: Mapping[str, Any]) -> None:
        """Restore the network of a saved stage; ``metadata`` includes `more_to_save`."""
        self._set(model=network)

    def more_to_save(self) -> dict[str, Any]:
        """Plain data that is saved in the metadata beside the Params, by name."""
        return {}

    def _network(self) -> Network:
        """The network for predictions, cut at ``layer``."""
        whole = self.network_to_save()
        if not self.isDefined(self.layer):
            return whole
        return self._once((whole.digest, self.getLayer()), lambda: whole.cut(self.getLayer()))

    def _once(self, key: Any, make: Callable[[], Network]) -> Network:
        with _making:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]

    @abstractmethod
    def _source(self, spark: SparkSession, column: Column, kind: DataType, network: Network) -> tuple[Column, Reader]:
        """The column as input of the function, and the reader of its values."""

    def _transform(self, dataset: DataFrame) -> DataFrame:
        name, output, error = self.getInputCol(), self._output(), self.getErrorCol()
        check_column("inputCol", name, dataset.columns)
        check_distinct(dataset, "the DataFrame")
        for added in (output, error):
            if has_column(dataset, added) or output == error:
                raise ConfigError(f"The column {added!r} exists already. Set another outputCol or errorCol.")
        network = self._network()
        spark, kind = dataset.sparkSession, dataset.schema[name].dataType
        source, reader = self._source(spark, F.col(quoted(name)), kind, network)
        function = outcome_udf(spark, network, reader, self.getBatchBytes())
        kept = [F.col(quoted(column)) for column in dataset.columns]
        values = F.col(f"{_OUTCOME}.values")
        return dataset.withColumn(_OUTCOME, function(source)).select(
            *kept,
            F.when(values.isNotNull(), array_to_vector(values)).alias(output),
            F.col(f"{_OUTCOME}.error").alias(error),
        )
