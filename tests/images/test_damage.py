"""Damaged files have a reason; unusual ones that are intact keep the pixels that Pillow reads."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dlspark.errors import DataError
from dlspark.images.decode import decode, decode_measured
from tests.images.files import chunk, encoded, jpeg, lost, photograph, tiff, with_chunk, zeroed

PHOTO = photograph()
JPEGS = {
    "baseline": encoded(PHOTO, "JPEG", quality=95),
    "progressive": encoded(PHOTO, "JPEG", quality=95, progressive=True),
    "restarts": encoded(PHOTO, "JPEG", quality=95, restart_marker_rows=2),
    "grey": encoded(PHOTO.convert("L"), "JPEG", quality=95),
    "CMYK": encoded(PHOTO.convert("CMYK"), "JPEG", quality=95),
}
_CMYK, _GREY = JPEGS["CMYK"], JPEGS["grey"]
JPEGS |= {
    "RGB": encoded(PHOTO, "JPEG", keep_rgb=True),
    "YCCK": _CMYK[: _CMYK.index(b"Adobe") + 11] + b"\x02" + _CMYK[_CMYK.index(b"Adobe") + 12 :],
    "grey 2x2": _GREY[: _GREY.index(b"\xff\xc0") + 11] + b"\x22" + _GREY[_GREY.index(b"\xff\xc0") + 12 :],
}
SIZES = ((200, 300), (100, 100), (20, 30), (1, 1))


def plainly(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """What Pillow reads, with draft."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", size[::-1])
    image.load()
    return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("kind", JPEGS)
def test_the_pixels_of_a_jpeg_are_pillows(kind: str) -> None:
    for size in SIZES:
        assert np.array_equal(decode(JPEGS[kind], size), plainly(JPEGS[kind], size))


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 8), (201, 333)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_the_pixels_of_small_and_odd_jpegs_are_pillows(size: tuple[int, int], subsampling: int) -> None:
    data = encoded(photograph(*size), "JPEG", subsampling=subsampling)
    for into in SIZES:
        assert np.array_equal(decode(data, into), plainly(data, into))


@pytest.mark.parametrize("factors", [(4, 2), (3, 1), (1, 4), (2, 2)])
def test_jpegs_of_rare_sampling_factors_are_read(factors: tuple[int, int]) -> None:
    data = jpeg(factors, (1, 1), (1, 1))
    assert decode(data, (4, 4)).tolist() == [[[128] * 3] * 4] * 4


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut at 40 % with an end": lambda data: data[: len(data) * 2 // 5] + b"\xff\xd9",
    "cut at 40 %": lambda data: data[: len(data) * 2 // 5],
    "zeros over 4 KB": lambda data: zeroed(data, 4096, 0.3),
    "4 KB lost": lambda data: lost(data, 4096, 0.3),
    "12 bytes lost before the end": lambda data: data[:-14] + data[-2:],
    "a block twice": lambda data: data[: len(data) // 2] + data[len(data) // 2 - 600 :],
    "line ends changed": lambda data: data[:700] + data[700:].replace(b"\n", b"\r\n"),
    "zeros to the end": lambda data: zeroed(data, len(data) // 2),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_damaged_jpeg_has_a_reason(kind: str, damage: str) -> None:
    for size in SIZES:
        with pytest.raises(DataError, match=r"^(damaged|truncated): |cannot be decoded"):
            decode(DAMAGE[damage](JPEGS[kind]), size)


def test_four_kilobytes_lost_anywhere_are_noticed() -> None:
    """Fewer may go unnoticed: Huffman codes fall into step again, and JPEG has no checksum."""
    draw = random.Random(0)
    for data in JPEGS.values():
        for _ in range(20):
            with pytest.raises(DataError):
                decode(lost(data, 4096, draw.uniform(0.1, 0.8)), (64, 64))


def test_a_deviation_in_the_header_spoils_no_jpeg() -> None:
    """As some cameras and programs write them: libjpeg warns, and all pixels are there."""
    whole = JPEGS["baseline"]
    expected = decode(whole, (64, 64))
    frame, scan = whole.index(b"\xff\xdb"), whole.index(b"\xff\xda")
    samsung = whole[: scan + 11] + bytes(3) + whole[scan + 14 :]
    odd = {
        "bytes between segments": whole[:frame] + bytes(11) + whole[frame:],
        "version of JFIF": whole[:11] + b"\x02" + whole[12:],
        "spectral selection": samsung,
        "two of them": samsung[:frame] + b"abc" + samsung[frame:],
        "bytes after the end": whole + b"garbage" * 100,
        "another image after the end": whole + JPEGS["grey"],
    }
    table = whole.index(b"\xff\xc4")
    with pytest.raises(DataError, match=r"^damaged"):  # libjpeg has standard tables, with which it decodes something
        decode(whole[:table] + b"\0\0" + whole[table + 2 :], (64, 64))
    for data in odd.values():
        assert np.array_equal(decode(data, (64, 64)), expected)
        with pytest.raises(DataError, match=r"^damaged"):
            decode(DAMAGE["zeros over 4 KB"](data), (64, 64))


def test_an_mpo_is_read_like_its_first_jpeg() -> None:
    photo = photograph(1500, 1000)
    whole, several = encoded(photo, "JPEG"), encoded(photo, "MPO", save_all=True, append_images=[photo, photo])
    assert Image.open(io.BytesIO(several)).format == "MPO"
    # Decoding it whole, which takes four times as long, gives other pixels.
    assert np.array_equal(decode(several, (100, 100)), decode(whole, (100, 100)))
    with pytest.raises(DataError, match=r"^damaged"):
        decode(zeroed(several, 4096, 0.1), (100, 100))


PNGS = {"RGB": encoded(PHOTO), "16 bits": encoded(Image.fromarray(np.asarray(PHOTO.convert("L"), np.uint16) * 257))}


@pytest.mark.parametrize("kind", PNGS)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) * 2 // 5], "^truncated: the chunk IDAT"),
        (lambda data: zeroed(data, len(data) * 3 // 10, 0.7), "^damaged|^truncated"),
        (lambda data: zeroed(data, 64), "^damaged: the checksum of the chunk IDAT"),
        (lambda data: lost(data, 64), "^damaged|^truncated"),
        (lambda data: zeroed(data, 1, 0.9), "^damaged: the checksum of the chunk IDAT"),
    ],
)
def test_a_damaged_png_has_a_reason(kind: str, damage: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode(damage(PNGS[kind]), (20, 30))


def test_texts_and_profiles_spoil_no_png() -> None:
    """Larger than Pillow's limits, which are against decompression bombs, or damaged: pixels do not depend on them."""
    whole = PNGS["RGB"]
    expected = decode(whole, (20, 30))
    bomb = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    several = PngImagePlugin.PngInfo()
    for i in range(70):
        several.add_text(f"text {i}", "a" * 1_000_000)
    odd = {
        "long text": with_chunk(whole, b"tEXt", b"Comment\0" + b"a" * 2_000_000),
        "compressed text": with_chunk(whole, b"zTXt", b"Comment\0\0" + bomb),
        "text after the pixels": whole[:-12] + chunk(b"zTXt", b"Comment\0\0" + bomb) + whole[-12:],
        "profile": with_chunk(whole, b"iCCP", b"profile\0\0" + bomb),
        "many texts": encoded(PHOTO, pnginfo=several),
        "damaged text": with_chunk(whole, b"tEXt", b"Comment\0text")[:-1] + whole[-1:],
    }
    odd["damaged text"] = odd["damaged text"].replace(b"Comment\0text", b"Comment\0tent")
    for data in odd.values():
        assert np.array_equal(decode(data, (20, 30)), expected)


def test_a_png_keeps_its_orientation_without_its_texts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(PHOTO, exif=exif)
    bomb = with_chunk(data, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1)))
    assert np.array_equal(decode(bomb, (30, 20)), decode(data, (30, 20)))


def halves(low: float, high: float, dtype: str, *shape: int) -> np.ndarray:
    """Low on the left, high on the right."""
    pixels = np.full((32, 32, *shape), low, dtype)
    pixels[:, 16:] = high
    return pixels


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "bits", "low", "high", "expected"),
    [
        ("u1", 1, 0, 1, (0, 255)),
        ("u1", 4, 2, 12, (34, 204)),
        ("u1", 8, 16, 240, (16, 240)),
        ("<u2", 12, 256, 3840, (16, 240)),
        ("<u2", 16, 4096, 61440, (16, 240)),
        (">u2", 16, 4096, 61440, (16, 240)),
    ],
)
def test_white_may_be_zero_in_a_tiff(
    dtype: str, bits: int, low: int, high: int, expected: tuple[int, int], photometric: int, tile: int, compression: int
) -> None:
    packed = bits in (1, 4, 12)
    if packed and tile:
        return  # the writer does not pack tiles
    data = tiff(halves(low, high, dtype), photometric, bits=bits if packed else None, compression=compression, tile=tile)
    if photometric == 0 and (bits == 12 or dtype == ">u2"):
        with pytest.raises(DataError, match="kind of pixels"):  # Pillow reads none of these
            decode(data, (4, 4))
        return
    left, right = expected if photometric else (255 - expected[0], 255 - expected[1])
    found = decode(data, (4, 4)).astype(int)
    assert np.abs(found[:, 0] - left).max() <= 1
    assert np.abs(found[:, -1] - right).max() <= 1


@pytest.mark.parametrize("dtype", ["i1", "<i2", "<i4", "<u4", "<f2", "<f4", "<f8"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_other_samples_of_a_tiff_are_refused(dtype: str, photometric: int) -> None:
    with pytest.raises(DataError, match=r"no known range|kind of pixels"):
        decode(tiff(halves(1, 2, dtype), photometric), (4, 4))
    with pytest.raises(DataError, match=r"no known range|kind of pixels"):
        decode(tiff(halves(1, 2, dtype, 3), 2), (4, 4))


def test_twelve_bits_in_sixteen() -> None:
    """The largest value is reported; ``bits`` scales by its range, also where white is zero."""
    grey = halves(1000, 4095, "<u2")
    for data in (tiff(grey), encoded(Image.fromarray(grey))):
        assert decode(data, (4, 4)).max() == 15
        assert decode_measured(data, (4, 4)).largest == 4095
        assert decode(data, (4, 4), bits=12)[0, [0, -1], 0].tolist() == [1000 >> 4, 255]
        with pytest.raises(DataError, match=r"4,095 is outside the range of bits=11"):
            decode(data, (4, 4), bits=11)
    assert decode(tiff(grey, 0), (4, 4), bits=12)[0, [0, -1], 0].tolist() == [(4095 - 1000) >> 4, 0]
    assert decode_measured(tiff(halves(16, 240, "u1")), (4, 4), bits=12).largest is None
    color = tiff(halves(1000, 4095, "<u2", 3), 2)
    assert decode_measured(color, (4, 4)).largest == 4095
    with pytest.raises(DataError, match="bits=12 is for grey"):
        decode(color, (4, 4), bits=12)


def test_a_tiff_without_all_its_strips_has_a_reason() -> None:
    grey = np.asarray(PHOTO.convert("L"))
    for compression in (1, 8):
        tiled = tiff(grey, tile=32, compression=compression)
        places = Image.open(io.BytesIO(tiled)).tag_v2[324]
        missing = tiled.replace(struct.pack("<3I", *places[4:7]), struct.pack("<3I", places[4], 0, places[6]))
        assert missing != tiled
        with pytest.raises(DataError, match=r"^damaged: tile 5 of 70 is missing"):
            decode(missing, (20, 30))
    with pytest.raises(DataError, match=r"^damaged: expected 2 strips; got 1"):
        decode(tiff(grey, _278=100), (20, 30))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg"])
def test_a_truncated_tiff_has_a_plain_reason(compression: str) -> None:
    data = encoded(PHOTO, "TIFF", compression=compression)
    with pytest.raises(DataError, match=r"truncated"):
        decode(data[: len(data) * 2 // 3], (20, 30))
    first = b"II*\0" + struct.pack("<I", len(data)) + data[8:]  # its directory is elsewhere
    with pytest.raises(DataError, match=r"^truncated: a TIFF with its directory at byte [\d,]+; the file has [\d,]+ bytes"):
        decode(first, (20, 30))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300), np.uint8))


@pytest.mark.parametrize(
    ("compression", "reason"),
    [("group4", "Bad code word at line"),
     ("tiff_adobe_deflate", "strip 0 .*incorrect data check"), ("tiff_deflate", "strip 0 .*incorrect data check")],
)  # fmt: skip
def test_what_libtiff_passes_over_has_a_reason(compression: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    pixels = NOISE.point(lambda value: 255 * (value > 200)).convert("1") if compression == "group4" else NOISE
    data = encoded(pixels, "TIFF", compression=compression)
    assert decode(data, (20, 30)).std() > 1
    middle = len(data) // 2
    with pytest.raises(DataError, match=f"^damaged: {reason}"):
        decode(data[:middle] + b"\x55" * 64 + data[middle + 64 :], (20, 30))
    assert capfd.readouterr().err == ""


def test_a_damaged_jpeg_in_a_tiff_has_a_reason() -> None:
    for options in ({}, {"quality": 95}):
        data = encoded(PHOTO, "TIFF", compression="jpeg", **options)
        assert np.abs(decode(data, (20, 30)).astype(int) - decode(encoded(PHOTO), (20, 30))).mean() < 5
        with pytest.raises(DataError, match=r"^damaged"):
            decode(zeroed(data, 1000, 0.3), (20, 30))


@pytest.mark.parametrize("lossless", [True, False])
def test_a_truncated_webp_has_a_reason(lossless: bool) -> None:
    data = encoded(PHOTO, "WEBP", lossless=lossless)
    for cut in (data[: len(data) // 2], data[: len(data) * 9 // 10]):
        for head in (cut[:8], b"RIFF" + struct.pack("<I", len(cut) - 8)):  # with its length, or that of what is left
            with pytest.raises(DataError, match="cannot be decoded"):
                decode(head + cut[8:], (20, 30))
