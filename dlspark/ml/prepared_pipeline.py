"""A Spark ML pipeline for tuning its last stage. Importing this module imports pyspark."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from pyspark.ml import Pipeline, PipelineModel
from pyspark.sql import DataFrame

from dlspark.data import undersampled


class PreparedPipeline(Pipeline):  # type: ignore[misc, unused-ignore]
    """A pipeline that fits the stages before the last once per set of rows, not once per point of a grid.

    CrossValidator calls ``fitMultiple`` with the training rows of one fold and all points of the grid. The stages before the
    classifier (scalers, encoders, PCA) are equal for all points when the grid is over the classifier's own parameters, and
    PCA takes most of the time. They are still fitted on the training rows of the fold only.

    Attributes:
        undersample: None, or a seed: fit on as many rows of each label as the rarest one has (`dlspark.data.split`). The
            rows need the columns ``id``, ``label`` and ``part``, which is "train" in all of them.
    """

    def __init__(self, *, stages: Sequence[Any] | None = None, undersample: int | None = None) -> None:
        super().__init__()
        self.undersample = undersample
        if stages is not None:
            self.setStages(list(stages))

    def fitMultiple(self, dataset: DataFrame, paramMaps: Sequence[Any]) -> Iterator[tuple[int, PipelineModel]]:
        """A thread-safe iterator of (index, model); ``paramMaps`` are of the last stage's parameters."""
        return _Models(self, dataset, paramMaps)

    def _fit(self, dataset: DataFrame) -> PipelineModel:
        return next(_Models(self, dataset, [{}]))[1]


class _Models:
    def __init__(self, pipeline: PreparedPipeline, dataset: DataFrame, param_maps: Sequence[Any]) -> None:
        *before, last = pipeline.getStages()
        rows = dataset if pipeline.undersample is None else undersampled(dataset, seed=pipeline.undersample)
        self._before = Pipeline(stages=before).fit(rows)
        self._prepared = self._before.transform(rows).select(last.getLabelCol(), last.getFeaturesCol()).persist()
        self._models = last.fitMultiple(self._prepared, param_maps)
        self._left = len(param_maps)
        self._lock = threading.Lock()

    def __iter__(self) -> _Models:
        return self

    def __next__(self) -> tuple[int, PipelineModel]:
        try:
            index, model = next(self._models)
        finally:
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._prepared.unpersist()
        return index, PipelineModel([*self._before.stages, model])
