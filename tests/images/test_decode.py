"""F13 and F14: how each kind of image file is decoded, and which files are refused before they cost memory."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from dlspark.errors import DataError
from dlspark.images.decode import decode

RED = (200, 30, 10)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, black on the right."""
    image = Image.new("RGB", (width, height))
    image.paste(RED, (0, 0, width // 2, height))
    return image


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_allowed_formats_become_rgb_of_the_size_asked_for(format: str) -> None:
    options = {"quality": 100} if format in {"JPEG", "WEBP"} else {}
    found = decode(encoded(halves(), format, **options), (10, 30))
    assert found.shape == (10, 30, 3)
    assert found.dtype == np.uint8
    assert np.abs(found[5, 3].astype(int) - RED).max() < 12
    assert found[5, 27].max() < 12


def test_a_scaled_jpeg_is_like_the_whole_one_scaled() -> None:
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).resize((600, 450))
    data = encoded(smooth, "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((100, 80), Image.Resampling.BILINEAR))
    assert np.abs(decode(data, (80, 100)).astype(int) - whole).mean() < 3


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("upright", [True, False])
def test_crop_keeps_proportions_and_the_middle(format: str, upright: bool) -> None:
    """A square in the middle of a long image: ``fit`` squeezes it; ``crop`` keeps its shape and drops both ends."""
    image = Image.new("RGB", (300, 100))
    image.paste(RED, (125, 25, 175, 75))
    if not upright:
        image = image.rotate(90, expand=True)
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    data = encoded(image, format, **options)
    for resize, across in (("crop", 12), ("fit", 4)):
        red = decode(data, (24, 24), resize=resize)[..., 0] > 100
        assert (red.any(axis=0 if upright else 1).sum(), red.any(axis=1 if upright else 0).sum()) == (across, 12)
        assert red[:, ::-1].tolist() == red.tolist() == red[::-1].tolist()


def test_a_crop_of_other_proportions_of_a_turned_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = halves(60, 40)  # upright, it is 40 wide and 60 high, with red on top
    found = decode(encoded(image, "JPEG", quality=100, exif=exif), (10, 20), resize="crop")
    assert found.shape == (10, 20, 3)
    assert np.abs(found[1].astype(int) - RED).max() < 12
    assert found[-2].max() < 12


@pytest.mark.parametrize(("mode", "pixel"), [("L", (90, 90, 90)), ("1", (255, 255, 255)), ("P", RED), ("CMYK", RED)])
def test_other_modes(mode: str, pixel: tuple[int, ...]) -> None:
    image = Image.new("RGB", (8, 8), pixel)
    data = encoded(image.quantize(2) if mode == "P" else image.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    assert np.abs(decode(data, (4, 4)).astype(int) - pixel).max() <= 1
    if mode == "CMYK":
        assert np.abs(decode(encoded(image.convert(mode), "JPEG", quality=100), (4, 4)).astype(int) - pixel).max() < 6


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(format: str) -> None:
    grey = Image.fromarray(np.full((8, 8), 0xA1FF, np.uint16))
    assert decode(encoded(grey, format), (4, 4)).tolist() == [[[0xA1] * 3] * 4] * 4


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match="no known range"):
        decode(encoded(Image.new(mode, (8, 8)), "TIFF"), (4, 4))


def test_what_is_transparent_is_laid_over_black() -> None:
    half = Image.new("RGBA", (8, 8), (200, 100, 0, 128))
    assert np.abs(decode(encoded(half), (2, 2))[0, 0].astype(int) - (100, 50, 0)).max() <= 1
    clear = Image.new("LA", (8, 8), (255, 0))
    assert decode(encoded(clear), (2, 2)).max() == 0
    palette = halves().quantize(2)
    assert decode(encoded(palette, transparency=palette.getpixel((0, 0))), (2, 2)).max() == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    """Every stored orientation of one picture decodes to the same upright picture: red on top, blue on the left."""
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :, 0] = 255
    upright[:, :30, 2] = 255
    undo = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    image, turn = Image.fromarray(upright), undo[orientation]
    stored = image if turn is None else image.transpose(Image.Transpose[turn])
    if format == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        data = encoded(stored, format, tiffinfo=tags)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(stored, format, exif=exif)
    found = decode(data, (20, 30)).astype(int)
    for row, column, pixel in ((4, 5, (255, 0, 255)), (4, 25, (255, 0, 0)), (15, 5, (0, 0, 255)), (15, 25, (0, 0, 0))):
        assert np.abs(found[row, column] - pixel).max() < 40


def test_a_broken_exif_block_does_not_spoil_the_pixels() -> None:
    data = encoded(halves(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert decode(data, (4, 4)).shape == (4, 4, 3)


def test_one_pixel_fills_the_picture() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), RED)), (3, 2)).tolist() == [[list(RED)] * 2] * 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not a JPEG"),
        (b"\xff\xd8\xff\xe0 nothing", "not a JPEG|cannot be decoded"),
        (encoded(halves(), "GIF"), "not a JPEG"),
        (encoded(halves(400, 300), "JPEG")[:2500], "truncated: Premature end"),
        (encoded(halves(400, 300))[:200], "truncated"),
        (encoded(halves(400, 300), "BMP")[:5000], "cannot be decoded"),
    ],
)
def test_what_is_no_image_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode(data, (4, 4))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose frame header states another size."""
    data = bytearray(encoded(halves(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("data", [png_header(30_000, 30_000), jpeg_header(13_000, 13_000), png_header(10_000, 10_000)])
def test_a_huge_image_is_refused_from_its_header(data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(DataError, match="pixels"):
        decode(data, (4, 4))
    assert time.process_time() - start < 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6
