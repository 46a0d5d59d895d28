from __future__ import annotations

from tests.images.given import Given

PLACES: list[Given] = []
