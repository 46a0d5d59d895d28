"""Damaged files, and pixels whose range is not obvious."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dlspark.data.split import Split
from tests.images.files import encoded, lost, photograph, tiff, with_chunk, zeroed
from tests.images.given import Given, image


def _files(*, intact: dict[str, bytes], damaged: dict[str, bytes] | None = None) -> Callable[[Path], None]:
    """Writes them, in turn, into two folders of classes, of which each has one image more."""

    def make(folder: Path) -> None:
        for name in ("a", "b"):
            image(folder / name / f"plain-{name}.png")
        for number, (name, data) in enumerate({**intact, **(damaged or {})}.items()):
            (folder / "ab"[number % 2] / name).write_bytes(data)

    return make


_PHOTO = photograph()
_BASELINE, _PROGRESSIVE = encoded(_PHOTO, "JPEG", quality=95), encoded(_PHOTO, "JPEG", quality=95, progressive=True)
_DAMAGED = {
    f"{name}-{kind}.jpg": damage
    for kind, whole in (("baseline", _BASELINE), ("progressive", _PROGRESSIVE))
    for name, damage in (
        ("cut", whole[: len(whole) * 2 // 5] + b"\xff\xd9"),
        ("zeros", zeroed(whole, 4096, 0.3)),
        ("lost", lost(whole, 4096, 0.3)),
    )
}
_DAMAGED["zeros.png"] = zeroed(encoded(_PHOTO), 64)
_LZW = encoded(_PHOTO, "TIFF", compression="tiff_lzw")
_GREY = np.asarray(_PHOTO.convert("L"), "<u2") << 4 | 0xF

PIXELS = [
    Given(
        "damaged files",
        _files(
            intact={
                "garbage-after.jpg": _BASELINE + b"garbage",
                "many.jpg": encoded(_PHOTO, "MPO", save_all=True, append_images=[_PHOTO]),
                "long-text.png": with_chunk(encoded(_PHOTO), b"tEXt", b"Comment\0" + b"a" * 2_000_000),
                "white-is-zero.tif": tiff(_GREY << 4, 0),
            },
            damaged={**_DAMAGED, "cut.tif": _LZW[: len(_LZW) // 2], "signed.tif": tiff(np.zeros((8, 8), "i1"))},
        ),
        rows={"a": 3, "b": 3},
        rejected={
            **dict.fromkeys(_DAMAGED, "^damaged: "),
            "cut.tif": "^truncated: a TIFF with its directory at byte",
            "signed.tif": "^signed or floating-point pixels have no known range",
        },
    ),
    Given(
        "12 bits in 16",
        _files(intact={"1.tif": tiff(_GREY), "2.png": encoded(Image.fromarray(_GREY))}),
        rows={"a": 2, "b": 2},
        warning=r"2 images have values of 16 bits, and the largest is [34],\d\d\d: .* with bits=12 \(--bits 12\)",
        settings={"split": Split(test=0.0)},
    ),
    Given(
        "12 bits in 16, said so",
        _files(intact={"1.tif": tiff(_GREY)}, damaged={"2.png": encoded(Image.fromarray(_GREY << 1))}),
        rows={"a": 2, "b": 1},
        rejected={"2.png": r"^the value [\d,]+ is outside the range of bits=12"},
        settings={"bits": 12, "split": Split(test=0.0)},
    ),
]
