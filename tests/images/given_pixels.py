from __future__ import annotations

from tests.images.given import Given

PIXELS: list[Given] = []
