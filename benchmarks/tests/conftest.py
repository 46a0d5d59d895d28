"""Recorded results of `measure`, so that tests of reading and judging results need no training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlspark_bench.figures import Run

DATA = Path(__file__).parent / "data"
Rewrite = Callable[[Path, Callable[[dict[str, Any]], None]], Path]


@pytest.fixture
def recorded() -> Run:
    """Return a run of every engine on two workers, with and without dlspark, measured on two cores."""
    return Run(DATA / "recorded.jsonl")


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    """Return a function that writes an edited copy of a results file and returns its path."""

    def write(source: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        for line in lines:
            edit(line)
        path = tmp_path / source.name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write
