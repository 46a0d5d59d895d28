"""Image files that Pillow does not write: photographs to damage, TIFFs of any samples, JPEGs of any sampling factors."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photograph(width: int = 300, height: int = 200) -> Image.Image:
    """As smooth and noisy as a photograph."""
    draw = np.random.default_rng(0)
    blobs = Image.fromarray(draw.integers(0, 256, (15, 20, 3), np.uint8))
    smooth = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + draw.normal(0, 6, (height, width, 1)), 0, 255).astype(np.uint8))


def zeroed(data: bytes, length: int, at: float = 0.5) -> bytes:
    """The file with zeros over some of its bytes."""
    start = int(len(data) * at)
    return data[:start] + bytes(length) + data[start + length :]


def lost(data: bytes, length: int, at: float = 0.5) -> bytes:
    """The file without some of its bytes."""
    start = int(len(data) * at)
    return data[:start] + data[start + length :]


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """The PNG with a chunk after its header."""
    return png[:33] + chunk(kind, body) + png[33:]


def tiff(
    pixels: NDArray[Any], photometric: int = 1, *, bits: int | None = None, compression: int = 1, tile: int = 0, **tags: int
) -> bytes:
    """A TIFF of one strip, or of tiles.

    Args:
        pixels: (height, width) or (height, width, channels); the dtype and its byte order are those of the file.
        photometric: 0 is MinIsWhite, 1 MinIsBlack, 2 RGB.
        bits: packs samples into 1, 4 or 12 bits.
        compression: 1 is none, 8 Deflate.
        tile: width and height of a tile.
        tags: further tags of one number, as ``_339=2``; 0 leaves a tag out.
    """
    (height, width), channels = pixels.shape[:2], pixels.shape[2] if pixels.ndim > 2 else 1
    order = "<" if pixels.dtype.newbyteorder("<") == pixels.dtype or pixels.dtype.itemsize == 1 else ">"
    rows: NDArray[Any] = pixels
    if bits == 1:
        rows = np.packbits(pixels, axis=1)
    elif bits == 4:
        rows = pixels[:, ::2] << 4 | pixels[:, 1::2]
    elif bits == 12:
        left, right = pixels[:, ::2], pixels[:, 1::2]
        rows = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8).reshape(height, -1)
    parts = [rows]
    if tile:
        grown = np.pad(rows, [(0, -height % tile), (0, -width % tile)])
        parts = [grown[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
    bodies = [zlib.compress(part.tobytes()) if compression == 8 else part.tobytes() for part in parts]
    offsets = [8 + sum(len(body) for body in bodies[:i]) for i in range(len(bodies))]
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    found = {256: [width], 257: [height], 258: [bits or pixels.dtype.itemsize * 8] * channels, 259: [compression]}
    found |= {262: [photometric], 277: [channels], 339: [kind] * channels}
    found |= {324 if tile else 273: offsets, 325 if tile else 279: [len(body) for body in bodies]}
    found |= {322: [tile], 323: [tile]} if tile else {278: [height]}
    found |= {int(name[1:]): [value] for name, value in tags.items()}
    content = b"".join(bodies)
    at = 8 + len(content)
    further = at + 2 + 12 * len(found) + 4
    entries, values = b"", b""
    for tag in sorted(found):
        numbers = struct.pack(f"{order}{len(found[tag])}I", *found[tag])
        where = numbers if len(numbers) == 4 else struct.pack(order + "I", further + len(values))
        entries += struct.pack(order + "HHI", tag, 4, len(found[tag])) + where
        values += numbers if len(numbers) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    return head + content + struct.pack(order + "H", len(found)) + entries + bytes(4) + values


def jpeg(*factors: tuple[int, int]) -> bytes:
    """A grey JPEG of 40 x 24 pixels, whose three components have these sampling factors, (horizontal, vertical)."""
    data = bytearray(encoded(Image.new("RGB", (40, 24), (128, 128, 128)), "JPEG", subsampling=0))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for i, (across, down) in enumerate(factors):
        data[frame + 11 + 3 * i] = across << 4 | down
    wide, high = (8 * max(factor[i] for factor in factors) for i in (0, 1))
    # Differences of 0 and ends of blocks, in the codes of the standard's tables for luminance and chrominance.
    unit = "".join(("001010" if i == 0 else "0000") * across * down for i, (across, down) in enumerate(factors))
    code = unit * (-(-40 // wide) * -(-24 // high))
    code += "1" * (-len(code) % 8)
    return bytes(data[: scan + 14]) + int(code, 2).to_bytes(len(code) // 8, "big") + b"\xff\xd9"
