"""Decode the pixels of a JPEG, and reject a damaged one.

Where data is missing or wrong, libjpeg makes up pixels and only warns; Pillow does not report its warnings. simplejpeg does.
It wraps libjpeg-turbo as Pillow does: at every scale of ``draft``, its pixels equal Pillow's, and it is as fast.
"""

from __future__ import annotations

from typing import Any

from simplejpeg import decode_jpeg

from dlspark.errors import DataError

_COLORS = {"RGB": ("RGB", "RGB"), "L": ("GRAY", "L"), "CMYK": ("CMYK", "CMYK;I")}
"""simplejpeg's and Pillow's names for the channels of each mode; CMYK is stored inverted, as Adobe does."""

_UNSUPPORTED = "subsampling level"
"""In libjpeg-turbo's error for a JPEG with rare sampling factors, such as 4x2, which Pillow decodes, without the check."""

_LONGEST_GAP = 16
"""In bytes. Longer gaps may hold a Huffman table, of 17 bytes or more, instead of which libjpeg takes a standard one."""

_NO_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD8)})  # stuffing and markers without a segment


def load_jpeg(image: Any, data: bytes) -> Any:
    """The decoded pixels of a JPEG.

    Args:
        image: what Pillow opened, after ``draft``: its mode and size are those of the result.
        data: the content of the file. After the end of the first image, anything may follow.

    Raises:
        DataError: libjpeg cannot decode it, or warns. Deviations in the header that cannot affect a pixel are accepted:
            up to 16 bytes between segments, a version of JFIF other than 1, and the spectral selection of a sequential scan.
    """
    from PIL import Image

    name, raw = _COLORS[image.mode]

    def decoded(content: bytes) -> Any:
        return decode_jpeg(content, name, min_height=image.height, min_width=image.width, strict=True)

    try:
        pixels = decoded(data)
    except ValueError as error:
        if _UNSUPPORTED in str(error):
            image.load()
            return image
        try:
            pixels = decoded(_with_regular_header(data))
        except (ValueError, IndexError):
            raise _damaged(error) from error
    if pixels.shape[:2] != (image.height, image.width):
        raise DataError(f"damaged: its headers state {image.size[::-1]} and {pixels.shape[:2]} pixels")
    return Image.frombuffer(image.mode, image.size, pixels, "raw", raw, 0, 1)


def check_jpeg(data: bytes) -> None:
    """Decode a JPEG at an eighth of its size, for the warnings only.

    Raises:
        DataError: libjpeg cannot decode it, or warns.
    """
    try:
        decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)
    except ValueError as error:
        if _UNSUPPORTED not in str(error):
            raise _damaged(error) from error


def _damaged(error: ValueError) -> DataError:
    return DataError(f"{'truncated' if 'Premature end of JPEG file' in str(error) else 'damaged'}: {error}")


def _with_regular_header(data: bytes) -> bytes:
    """The file with the accepted deviations removed up to its first scan.

    libjpeg reports its first warning only, so this tells a warning about the header from one about the pixels.
    """
    parts, at, sequential = [data[:2]], 2, False
    while True:
        gap, at = at, data.index(b"\xff", at)
        if at - gap > _LONGEST_GAP:
            raise ValueError("a gap that may be the rest of a table")
        while data[at + 1] == 0xFF:
            at += 1
        marker = data[at + 1]
        if marker in _NO_LENGTH:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        segment = bytearray(data[at:end])
        if marker == 0xE0 and segment[4:9] == b"JFIF\0":
            segment[9] = 1
        sequential |= marker in (0xC0, 0xC1)
        if marker == 0xDA and sequential:
            segment[-3:] = b"\x00\x3f\x00"  # all coefficients, in one pass
        parts.append(bytes(segment))
        if marker == 0xDA:
            return b"".join([*parts, data[end:]])
        at = end
