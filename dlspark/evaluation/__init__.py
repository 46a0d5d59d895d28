"""Evaluate predictions: scores, intervals, curves, pages."""

from __future__ import annotations

from dlspark.evaluation.evaluation import Evaluation, evaluate_predictions
from dlspark.evaluation.page import ScoreTable, evaluation_page, intervals_in_words, score_tables
from dlspark.evaluation.pictures import figures_of
from dlspark.evaluation.predictions import Predictions, bands, predict_rows, value_texts

__all__ = [
    "Evaluation",
    "Predictions",
    "ScoreTable",
    "bands",
    "evaluate_predictions",
    "evaluation_page",
    "figures_of",
    "intervals_in_words",
    "predict_rows",
    "score_tables",
    "value_texts",
]
