"""Studies: networks and classifiers compared by one file of settings."""

from __future__ import annotations

from dlspark.study.judge import PAGE
from dlspark.study.page import first_table, model_table
from dlspark.study.study import Study
from dlspark.study.study_file import EXAMPLES, StudyFile, example

__all__ = [
    "EXAMPLES",
    "PAGE",
    "Study",
    "StudyFile",
    "example",
    "first_table",
    "model_table",
]
