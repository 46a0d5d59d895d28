"""Saved stages: the folder ``metadata``, as for Spark's own stages, and beside it the network as a ``.keras`` file."""

from __future__ import annotations

from typing import Any

from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter

from dlspark.errors import DataError
from dlspark.mends import hadoop_files
from dlspark.ml.network import Network

NETWORK = "network.keras"


class NetworkWriter(MLWriter):
    """Writes a stage that has ``network_to_save()``. An existing folder is an error, unless ``overwrite()`` is called."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self._stage = stage

    def saveImpl(self, path: str) -> None:
        """Called by Spark's ``save``, which rejects an existing ``metadata``."""
        stage = self._stage
        network = stage.network_to_save()
        plain = {
            param.name: stage.getOrDefault(param) for param in stage.params if stage.isSet(param) and param.name != "model"
        }
        extra = {"network": {"sha256": network.digest}, **stage.more_to_save()}
        DefaultParamsWriter.saveMetadata(stage, path, self.sc, extraMetadata=extra, paramMap=plain)
        hadoop_files.write_file(self.sparkSession, f"{path.rstrip('/')}/{NETWORK}", network.data)


class NetworkReader(MLReader[Any]):
    """Reads a stage that `NetworkWriter` wrote, and gives it the network by ``take_saved``.

    The network is checked before Keras loads it, and code in it is rejected: see `dlspark.model_files`.
    """

    def __init__(self, cls: Any) -> None:
        super().__init__()
        self._cls = cls

    def load(self, path: str) -> Any:
        """The stage in the folder ``path``.

        Raises:
            DataError: the network is not the one that was saved with the stage.
            ConfigError: the network is rejected.
        """
        metadata = DefaultParamsReader.loadMetadata(path, self.sc, f"{self._cls.__module__}.{self._cls.__name__}")
        stage = DefaultParamsReader(self._cls).load(path)
        file = f"{path.rstrip('/')}/{NETWORK}"
        network = Network.from_bytes(hadoop_files.read_file(self.sparkSession, file))
        if network.digest != metadata["network"]["sha256"]:
            raise DataError(
                f"{file!r} is not the network that was saved with this stage: its SHA-256 differs. Save it again."
            )
        stage.take_saved(network, metadata)
        return stage
