"""Find damage in PNG and TIFF files that Pillow's decoders pass over, and drop what they need not read.

BMP, WebP and TIFF have no checksum, except in TIFF's Deflate: a truncated file is found, overwritten bytes may not be.
libtiff stops where a strip is full, before its checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from dlspark.errors import DataError
from dlspark.images.jpeg import check_jpeg
from dlspark.mends import libtiff_messages

PNG = b"\x89PNG\r\n\x1a\n"

_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _PLANES, _SAMPLE_FORMAT, _JPEG_TABLES = 256, 257, 259, 277, 284, 339, 347
_DEFLATE = frozenset({8, 32946})
_PIECE = 1 << 20
_STRIP_OFFSETS, _STRIP_LENGTHS, _STRIP_HEIGHT = 273, 279, 278
_TILE_OFFSETS, _TILE_LENGTHS, _TILE_WIDTH, _TILE_HEIGHT = 324, 325, 322, 323


def check_png(data: bytes) -> None:
    """Check the checksums of the chunks that pixels depend on. Pillow skips them, and zlib's where an image is full early.

    Raises:
        DataError: a checksum differs, or what follows a chunk is none.
    """
    for start, kind, end, intact in _chunks(data):
        if not kind.isalpha():
            raise DataError(f"damaged: expected a chunk at byte {start:,}; got {kind!r}")
        if kind in _PIXELS and end > len(data):
            raise DataError(f"truncated: the chunk {kind.decode()} ends at byte {end:,}; the file has {len(data):,} bytes")
        if kind in _PIXELS and not intact:
            raise DataError(f"damaged: the checksum of the chunk {kind.decode()} at byte {start:,} differs")


def bare_png(data: bytes) -> bytes:
    """The PNG without texts and color profiles, whose size Pillow limits, and without damaged chunks."""
    needed = {*_PIXELS, b"eXIf"}
    return PNG + b"".join(data[start:end] for start, kind, end, intact in _chunks(data) if intact and kind in needed)


def load_tiff(image: Any, data: bytes) -> None:
    """Load the pixels of a TIFF.

    Args:
        image: what Pillow opened, before its pixels are loaded.
        data: the content of the file.

    Raises:
        DataError: samples are signed, or strips or tiles are missing or damaged.
    """
    _check_tiff(image, data)
    with libtiff_messages.reported() as found:
        image.load()
    if found:
        raise DataError(f"damaged: {found[0]}")


def _check_tiff(image: Any, data: bytes) -> None:
    """Check that all strips or tiles are in the file, that JPEGs and checksums in them hold, and that samples are unsigned.

    Args:
        image: what Pillow opened, before its pixels are loaded.
        data: the content of the file.

    Raises:
        DataError: they are not.
    """
    tags = image.tag_v2
    if set(tags.get(_SAMPLE_FORMAT, (1,))) - {1}:
        raise DataError("signed or floating-point pixels have no known range; save it with unsigned 8 or 16 bits")
    width, height = tags[_WIDTH], tags[_HEIGHT]
    if _TILE_OFFSETS in tags:
        name, offsets, lengths = "tile", tags[_TILE_OFFSETS], tags.get(_TILE_LENGTHS, ())
        count = -(-width // tags[_TILE_WIDTH]) * -(-height // tags[_TILE_HEIGHT])
    else:
        name, offsets, lengths = "strip", tags[_STRIP_OFFSETS], tags.get(_STRIP_LENGTHS, ())
        count = -(-height // (tags.get(_STRIP_HEIGHT) or height))
    count *= tags.get(_SAMPLES, 1) if tags.get(_PLANES, 1) == 2 else 1
    if len(offsets) < count:
        raise DataError(f"damaged: expected {count} {name}s; got {len(offsets)}")
    compressed, tables = tags.get(_COMPRESSION, 1) != 1, tags.get(_JPEG_TABLES)
    for number, offset in enumerate(offsets[:count]):
        end = offset + lengths[number] if compressed and number < len(lengths) else offset + 1
        if offset < 8 or end == offset:
            raise DataError(f"damaged: {name} {number} of {count} is missing")
        if end > len(data):
            raise DataError(f"truncated: {name} {number} of {count} ends at byte {end:,}; the file has {len(data):,} bytes")
        if image.info.get("compression") == "jpeg":
            part = data[offset:end]
            check_jpeg(tables[:-2] + part[2:] if tables else part)
        elif tags.get(_COMPRESSION) in _DEFLATE:
            _check_deflate(data[offset:end], f"{name} {number} of {count}")


def _check_deflate(part: bytes, name: str) -> None:
    """Check the checksum of a stream by decompressing it piece by piece. One that ends early has none."""
    stream = zlib.decompressobj()
    try:
        while part and stream.decompress(part, _PIECE):
            part = stream.unconsumed_tail
    except zlib.error as error:
        raise DataError(f"damaged: {name}: {error}") from error


def _chunks(data: bytes) -> Iterator[tuple[int, bytes, int, bool]]:
    """Yield the start, kind and end of each chunk of a PNG, and whether its checksum holds."""
    start, kind = len(PNG), b""
    while start + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        yield start, kind, end, zlib.crc32(memoryview(data)[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        start = end
