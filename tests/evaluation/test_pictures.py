"""Pictures: drawn once more they are the same, so a page shows what the file beside it shows."""

from __future__ import annotations

import numpy as np
import pytest

from dlspark.evaluation import evaluate_predictions
from dlspark.evaluation.pictures import figures_of
from dlspark.report.page import png


@pytest.mark.parametrize("classes", [2, 7])
def test_a_picture_is_settled_when_it_is_first_drawn(classes: int) -> None:
    draw = np.random.default_rng(0)
    labels, probabilities = draw.integers(0, classes, 60), draw.dirichlet([1] * classes, 60)
    names = tuple(f"class number {i}" for i in range(classes))
    figures = figures_of(evaluate_predictions(labels, probabilities, names, bootstrap=5))
    assert {"confusion", "recall", "roc", "precision-recall"} <= set(figures)
    for name, figure in figures.items():
        assert png(figure) == png(figure), name
