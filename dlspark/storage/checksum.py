"""Checksums: CRC-32 (RFC 1952) of files and of arrays."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file's content."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def checksum(arrays: Sequence[Any]) -> str:
    """A checksum over the values, shapes and dtypes of ``arrays``."""
    total = 0
    for array in arrays:
        whole = np.ascontiguousarray(array)
        total = zlib.crc32(f"{whole.shape}{whole.dtype}".encode(), total)
        total = zlib.crc32(whole.tobytes(), total)
    return f"{total:08x}"
