"""KerasTransformer: vectors or arrays become what a network gives for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyspark import keyword_only
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.param.shared import HasOutputCol
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

    The values of a row, float32 and row-major, must be as many as the network takes; where they are not, the row gets a null
    and a reason. An output of several axes is flattened.

    Args:
        inputCol: vectors, or arrays of numbers, nested at will.
        outputCol: the vectors, new; null where there is a reason.
        errorCol: the reason why a row has no vector, new; ``outputCol`` + "_error" when it is not set.
        model: the network: a Keras model, a `FitResult`, or the path or URI of a ``.keras`` file.
        layer: the layer whose output is taken; the model's own output when it is not set.
        batchBytes: the most bytes of numbers that the network takes at a time.
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
        if isinstance(kind, VectorUDT):
            return F.when(column.isNotNull(), vector_to_array(column, "float32")), reader  # of a null it would fail the job
        element = kind
        while isinstance(element, ArrayType):
            element = element.elementType
            if isinstance(element, ArrayType):  # arrays in arrays are slow to unpack in Python
                column = F.flatten(column)
        if not isinstance(kind, ArrayType) or not isinstance(element, NumericType):
            raise ConfigError(
                f"Expected vectors or arrays of numbers in column {self.getInputCol()!r}: it is of type "
                f"{kind.simpleString()}. For images there is ImageFeaturizer."
            )
        # To Python a null among numbers would be a NaN; here it makes the whole value null, and that is told.
        return F.when(~F.exists(column, lambda number: number.isNull()), column.cast("array<float>")), reader
