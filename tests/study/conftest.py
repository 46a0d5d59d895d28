"""What tests of studies share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with a kind of classifier, its folder on the path as an installation puts it there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stranger"))
