"""Decode image files to pixels of one size, or reject them with a reason.

JPEG, PNG, BMP, WebP and TIFF are decoded, the first frame only; other content is rejected, whatever the file name. The size
is checked in the header before pixels are decoded. EXIF orientation is applied. Grey, palette and CMYK images become RGB;
16-bit grey keeps its upper 8 bits; transparent pixels are composited over black. 32-bit and floating-point pixels are
rejected because their range is unknown, and so are truncated files.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.errors import DataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")

RESIZES = ("fit", "crop")
"""Ways to scale an image; see `decode_measured`."""

MAX_PIXELS = 50_000_000
"""Larger images are rejected: 150 MB decoded, more than cameras and scanners of lesions or cells produce."""

_ORIENTATION = 0x0112
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


def decode(data: bytes, image_size: tuple[int, int], *, resize: str = "fit") -> NDArray[np.uint8]:
    """The pixels of `decode_measured`."""
    return decode_measured(data, image_size, resize=resize)[0]


def decode_measured(
    data: bytes, image_size: tuple[int, int], *, resize: str = "fit"
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Decode an image file and scale it to ``image_size``.

    A JPEG much larger than ``image_size`` is decoded at 1/2, 1/4 or 1/8 of its size, never below ``image_size``, which takes
    half the time (Pillow's ``draft``). Scaling is bilinear, over all the source pixels of each new pixel.

    Args:
        data: the content of the file.
        image_size: (height, width) in pixels.
        resize: one of `RESIZES`: ``"fit"`` keeps the whole image and distorts it; ``"crop"`` keeps the aspect ratio and the
            largest centered window.

    Returns:
        (uint8 of shape (height, width, 3), RGB; the original (height, width), upright).

    Raises:
        DataError: the image cannot be used; the message is the reason, without the name of the file.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError("the file is empty")
    height, width = image_size
    try:
        image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
        found = image.size
        if image.format == "JPEG":
            image.draft("RGB", (height, width) if _orientation(image) in _TURNED else (width, height))
        image.load()
        orientation = _orientation(image)  # again: Pillow rotates a TIFF upright on load
        size = (height, width) if orientation in _TURNED else (width, height)
        if image.format == "TIFF":  # upright by now, and not scaled on load
            found = image.size
        image = _scaled(_to_rgb(image), size, resize)
        if orientation in _UPRIGHT:
            image = image.transpose(Image.Transpose[_UPRIGHT[orientation]])
        return np.asarray(image), found if orientation in _TURNED else found[::-1]
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not a {', '.join(FORMATS)} image; it starts with {data[:16]!r}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"more than the {MAX_PIXELS:,} pixels allowed: {error}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, …
        raise DataError(f"cannot be decoded: {error}") from error


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


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise DataError(f"pixels of mode {image.mode!r} have no known range; save it with 8 or 16 bits")
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")
