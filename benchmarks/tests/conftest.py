"""Recorded results, a file that `measure` wrote: reading and judging results needs no training."""

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
    """Every engine on two workers, with dlspark and without, measured once on two cores."""
    return Run(DATA / "recorded.jsonl")


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    """Write a copy of a results file with each line edited, and return its path."""

    def write(source: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        for line in lines:
            edit(line)
        path = tmp_path / source.name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write
