"""Pictures: drawn once more they are the same, so a page shows what the file beside it shows; names are as in the data."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest

from dlspark.evaluation import evaluate_predictions
from dlspark.evaluation.pictures import figures_of
from dlspark.images.counts import bars, by_value
from dlspark.report import new_figure, png, shown, write_page
from dlspark.report.page import Page
from dlspark.storage import Store

STRANGE = ("$a$", "$\\frac", "cost $", "x^2_{y}", "_background", "a\\$b", "%_#&~", "<b>", "é—ß", "صورة", "皮肤", "x" * 250)


def evaluation_of(names: tuple[str, ...]) -> Any:
    draw = np.random.default_rng(0)
    labels, probabilities = draw.integers(0, len(names), 90), draw.dirichlet([1] * len(names), 90)
    return evaluate_predictions(labels, probabilities, names, by={"$^/": draw.choice(STRANGE[:4], len(labels))}, bootstrap=5)


@pytest.mark.parametrize("classes", [2, 7])
def test_a_picture_is_settled_when_it_is_first_drawn(classes: int) -> None:
    figures = figures_of(evaluation_of(tuple(f"class number {i}" for i in range(classes))))
    assert {"confusion", "recall", "roc", "precision-recall"} <= set(figures)
    for name, figure in figures.items():
        assert png(figure) == png(figure), name


def test_names_are_drawn_as_they_are_written(tmp_path: Any) -> None:
    figures = figures_of(evaluation_of(STRANGE))
    counts = by_value("_$x^", np.array(STRANGE, object), np.arange(len(STRANGE)), len(STRANGE))
    figures["counts"] = bars(counts, STRANGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns of a glyph that is missing
        pictures = {name: png(figure) for name, figure in figures.items()}
    ticks = [text.get_text() for text in figures["confusion"].axes[0].get_xticklabels()]
    assert ticks[:4] == list(STRANGE[:4])
    assert not any(text.get_parse_math() for text in figures["confusion"].axes[0].get_xticklabels())
    named = [text.get_text() for text in figures["roc"].legends[0].get_texts()]
    assert len(named) == len(STRANGE) + 1
    assert named[9].startswith("\u200eصورة\u200e  0.")  # or the limits of its interval would change places
    assert len(figures["counts"].axes[0].get_legend().get_texts()) == len(STRANGE)
    assert shown("a\u202eb 1") == "a\\u202eb 1"
    page = Page("pictures")
    page.table([*STRANGE, "\ud83d"], [])
    write_page(Store(tmp_path), "page.html", page, pictures)
    assert (tmp_path / "by-$^%2F.png").is_file()
    assert "<th>$\\frac</th>" in (tmp_path / "page.html").read_text().replace(' class="number"', "")


def test_a_font_that_has_the_character_is_found(caplog: pytest.LogCaptureFixture) -> None:
    font_manager = pytest.importorskip("matplotlib.font_manager")
    own, others = (
        set(font_manager.get_font(font_manager.findfont(name)).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")
    )
    character = chr(min(others - own))
    figure = new_figure(2, 1)
    text = figure.text(0, 0, shown(f"a {character}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(figure)
    assert text.get_text() == f"a {character}"
    assert len(text.get_fontfamily()) == 2
    assert not caplog.text


def test_a_character_without_a_font_is_shown_by_its_code(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert shown("a\U000e0fff\ud83d") == "a\\U000e0fff\\ud83d"  # not assigned; half of a character
        assert shown("b\U000e0fff\ud83d") == "b\\U000e0fff\\ud83d"
    assert caplog.text.count("No installed font has") == 1
