"""KerasTransformer, a transformer from vectors or arrays to the outputs of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyspark import keyword_only
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.param.shared import HasOutputCol
from pyspark.mllib.linalg import VectorUDT as OldVectorUDT
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, NumericType

from dlspark.errors import ConfigError
from dlspark.ml.network import Network
from dlspark.ml.params import with_accessors
from dlspark.ml.rows import Reader
from dlspark.ml.stage import NetworkStage
from dlspark.ml.udf import BATCH_BYTES, array_reader

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession
    from pyspark.sql.types import DataType


@with_accessors
class KerasTransformer(NetworkStage, HasOutputCol):
    """A Spark ML transformer: a column of vectors or arrays becomes a column of vectors.

    A row must have as many values as the input of the network, in row-major order; they are converted to float32. A row
    with another number has a null and a reason. An output of several axes is flattened.

    Args:
        inputCol: vectors, also of ``pyspark.mllib``, or arrays of numbers, nested or not.
        outputCol: a new column for the vectors; null where a row cannot be predicted.
        errorCol: a new column for the reason; ``outputCol`` + "_error" by default.
        model: a Keras model, a `FitResult`, or the path or URI of a ``.keras`` file.
        layer: name of the layer whose output is used; the output of the model by default.
        batchBytes: maximum bytes of numbers in a batch of the network.
    """

    @keyword_only
    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        errorCol: str | None = None,
        model: Any = None,
        layer: str | None = None,
        batchBytes: int = BATCH_BYTES,
    ) -> None:
        super().__init__()
        self._setDefault(batchBytes=BATCH_BYTES)
        self.setParams(**self._input_kwargs)

    def _source(self, spark: SparkSession, column: Column, kind: DataType, network: Network) -> tuple[Column, Reader]:
        reader = array_reader(network)
        if isinstance(kind, (VectorUDT, OldVectorUDT)):
            return F.when(column.isNotNull(), vector_to_array(column, "float32")), reader  # for a null it would fail the job
        element = kind
        while isinstance(element, ArrayType):
            element = element.elementType
            if isinstance(element, ArrayType):  # arrays in arrays are slow to unpack in Python
                column = F.flatten(column)
        if not isinstance(kind, ArrayType) or not isinstance(element, NumericType):
            raise ConfigError(
                f"Expected vectors or arrays of numbers in column {self.getInputCol()!r}; it is of type "
                f"{kind.simpleString()}. For images use ImageFeaturizer."
            )
        # In Python a null among numbers would be a NaN; here it makes the whole value null, which has a reason.
        return F.when(~F.exists(column, lambda number: number.isNull()), column.cast("array<float>")), reader
