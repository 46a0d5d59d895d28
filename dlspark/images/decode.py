"""Decode image files to pixels of one size, or reject them with a reason.

JPEG, PNG, BMP, WebP and TIFF are decoded, the first frame only; other content is rejected, whatever the file name. The size
is checked in the header before pixels are decoded. EXIF orientation is applied. Grey, palette and CMYK images become RGB;
16-bit pixels keep the upper 8 of the bits in use; transparent pixels are composited over black. 32-bit, signed and
floating-point pixels are rejected because their range is unknown, and so are truncated files, and those with damage that
the decoder or a checksum shows.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dlspark.errors import DataError
from dlspark.images.intact import PNG, bare_png, check_png, load_tiff
from dlspark.images.jpeg import load_jpeg

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")

RESIZES = ("fit", "crop")
"""Ways to scale an image; see `decode_measured`."""

BITS = range(8, 17)
"""How many bits the values of 16-bit images may use; see `decode_measured`."""

MAX_PIXELS = 50_000_000
"""Larger images are rejected: 150 MB decoded, more than cameras and scanners of lesions or cells produce."""

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
_WHITE_IS_ZERO = 0
_TURNED = frozenset({5, 6, 7, 8})  # orientations whose width and height swap
_UPRIGHT = {  # the inverse of each orientation in EXIF 2.3, section 4.6.4
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_SIGNATURES = {b"\xff\xd8\xff": "JPEG", PNG: "PNG", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: uint8 of shape (height, width, 3), RGB.
        size: the original (height, width), upright.
        largest: the largest value of an image of 16 bits; None for one of other bits. It is exact for grey, and of color
            the largest that the upper eight bits allow.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    largest: int | None


def decode(data: bytes, image_size: tuple[int, int], *, resize: str = "fit", bits: int = 16) -> NDArray[np.uint8]:
    """The pixels of `decode_measured`."""
    return decode_measured(data, image_size, resize=resize, bits=bits).pixels


def decode_measured(data: bytes, image_size: tuple[int, int], *, resize: str = "fit", bits: int = 16) -> Decoded:
    """Decode an image file and scale it to ``image_size``.

    A JPEG much larger than ``image_size`` is decoded at 1/2, 1/4 or 1/8 of its size, never below ``image_size``, which takes
    half the time (Pillow's ``draft``). Scaling is bilinear, over all the source pixels of each new pixel.

    Args:
        data: the content of the file.
        image_size: (height, width) in pixels.
        resize: one of `RESIZES`: ``"fit"`` keeps the whole image and distorts it; ``"crop"`` keeps the aspect ratio and the
            largest centered window.
        bits: how many bits the values of 16-bit images use, one of `BITS`: 12 for those of many cameras and scanners.

    Raises:
        DataError: the image cannot be used; the message is the reason, without the name of the file.
    """
    if not data:
        raise DataError("the file is empty")
    if not data.startswith(PNG):
        return _decoded(data, image_size, resize, bits)
    check_png(data)
    try:
        return _decoded(data, image_size, resize, bits)
    except DataError as error:
        # Pillow limits the size of texts and color profiles, against decompression bombs. Pixels do not depend on them.
        if error.__cause__ is None:
            raise
        return _decoded(bare_png(data), image_size, resize, bits)


def _decoded(data: bytes, image_size: tuple[int, int], resize: str, bits: int) -> Decoded:
    from PIL import Image, UnidentifiedImageError

    height, width = image_size
    try:
        image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
        found = image.size
        depth = _depth(image, data)
        if image.format in {"JPEG", "MPO"}:  # MPO is a JPEG followed by others
            orientation = _orientation(image)
            image.draft("RGB", (height, width) if orientation in _TURNED else (width, height))
            image = load_jpeg(image, data)
        else:
            load_tiff(image, data) if image.format == "TIFF" else image.load()
            orientation = _orientation(image)  # Pillow has rotated a TIFF upright
        size = (height, width) if orientation in _TURNED else (width, height)
        if image.format == "TIFF":  # upright by now, and not scaled on load
            found = image.size
        image, largest = _of_eight_bits(image, depth, bits)
        image = _scaled(_to_rgb(image), size, resize)
        if orientation in _UPRIGHT:
            image = image.transpose(Image.Transpose[_UPRIGHT[orientation]])
        return Decoded(np.asarray(image), found if orientation in _TURNED else found[::-1], largest)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(_unidentified(data)) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"more than the {MAX_PIXELS:,} pixels allowed: {error}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, …
        plain = "its compressed pixels are damaged or truncated" if "decoder error" in str(error) else error
        raise DataError(f"cannot be decoded: {plain}") from error


def scale(pixels: NDArray[np.uint8], image_size: tuple[int, int], *, resize: str = "fit") -> NDArray[np.uint8]:
    """Scale decoded pixels as `decode` does.

    Args:
        pixels: uint8 of shape (height, width) or (height, width, 1), grey; (…, 3), RGB; (…, 4), RGBA.
        image_size: (height, width) in pixels.
        resize: one of `RESIZES`.
    """
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    return np.asarray(_scaled(_to_rgb(image), image_size[::-1], resize))


def _scaled(image: Any, size: tuple[int, int], resize: str) -> Any:
    """The image scaled to ``size``, (width, height)."""
    from PIL import Image

    return image.resize(size, Image.Resampling.BILINEAR, box=_window(image.size, size) if resize == "crop" else None)


def _window(found: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centered window (left, upper, right, lower) of ``found`` with the aspect ratio of ``size``."""
    scale = min(found[0] / size[0], found[1] / size[1])
    across, down = (found[0] - size[0] * scale) / 2, (found[1] - size[1] * scale) / 2
    return across, down, found[0] - across, found[1] - down


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if EXIF is missing or broken, as the pixels may be intact."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _depth(image: Any, data: bytes) -> int:
    """The bits of a sample."""
    if image.format == "PNG":
        return data[24]  # IHDR comes first
    return max(image.tag_v2.get(_BITS, (1,))) if image.format == "TIFF" else 8


def _of_eight_bits(image: Any, depth: int, bits: int) -> tuple[Any, int | None]:
    """The image with samples of 8 bits, and `Decoded.largest`."""
    from PIL import Image

    grey = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if depth == 16 and not grey and image.mode not in {"I", "F"}:  # Pillow has kept the upper eight
        if bits != 16:
            raise DataError(f"bits={bits} is for grey images; this one has 16-bit colors. Save it with 8 bits")
        extrema = image.getextrema()
        bands = zip(image.getbands(), extrema if isinstance(extrema[0], tuple) else [extrema], strict=True)
        return image, max(high for band, (_, high) in bands if band != "A") << 8 | 0xFF
    if not grey:
        return image, None
    used = bits if depth == 16 else depth  # packed samples of 12 bits state their range
    values = np.asarray(image)
    largest = int(values.max())
    if largest >> used:
        raise DataError(f"the value {largest:,} is outside the range of bits={bits}")
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 1 to 8 bits only
        values = (1 << used) - 1 - values
    return Image.fromarray((values >> (used - 8)).astype(np.uint8)), largest if depth == 16 else None


def _unidentified(data: bytes) -> str:
    kind = next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), None)
    if kind is None:
        return f"not a {', '.join(FORMATS)} image; it starts with {data[:16]!r}"
    if kind == "TIFF" and len(data) >= 8:
        directory = int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big")
        if directory + 2 > len(data):
            return f"truncated: a TIFF with its directory at byte {directory:,}; the file has {len(data):,} bytes"
    return f"a {kind} file whose header is damaged or truncated, or whose kind of pixels Pillow does not read"


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode in {"I", "F"}:
        raise DataError(f"pixels of mode {image.mode!r} have no known range; save it with 8 or 16 bits")
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")
