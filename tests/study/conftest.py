"""Fixtures of the tests of studies."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that adds a kind of classifier; its folder is on the path, as if installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stranger"))
