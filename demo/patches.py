"""Cut patches of four materials from photographs in the scikit-image wheel: real images without a download.

As with microscope images, orientation has no meaning, and one large photograph yields many small images. Patches that
share pixels must therefore not be on both sides of the split. Test patches are cut from a band at the right edge of each
photograph, training patches from the rest, and a gap separates the two.
"""

import csv
import io
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PHOTOGRAPHS = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "tissue": "ihc.png",
}
"""Class name to file name in the wheel's ``skimage/data`` (512 x 512 px each; grey, except the stained tissue)."""

COLUMNS = ("file", "image_id", "label", "photograph", "x", "y", "size", "part")
METADATA_NAME = "metadata.csv"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class _Patch:
    """One row of the CSV; its columns are these fields and ``file``."""

    image_id: str
    label: str
    photograph: str
    x: int
    y: int
    size: int
    part: str

    @property
    def file(self) -> str:
        """The path in the CSV, relative to the folder."""
        return self.path.as_posix()

    @property
    def path(self) -> Path:
        """The path of the JPEG file, relative to the folder."""
        return Path(self.label, f"{self.image_id}.jpg")


def write_patches(
    folder: Path,
    *,
    patch_size: int = 80,
    train_per_class: int = 160,
    test_per_class: int = 30,
    test_fraction: float = 0.25,
    gap: int = 16,
    seed: int = 0,
) -> Path:
    """Cut the photographs into patches: ``folder/<class>/<image_id>.jpg`` and ``folder/metadata.csv``.

    The CSV has one row per image, with the columns ``file, image_id, label, photograph, x, y, size, part``: ``x`` and ``y``
    are the patch's top left corner in the photograph and ``size`` its side, in pixels; ``part`` is ``train`` or
    ``test``. Every image is RGB; grey ones repeat one channel.

    Guarantees: equal arguments select equal patches; nothing is downloaded; at least ``gap`` columns separate a training
    patch from a test patch of the same photograph; patches of one part may overlap, but all are distinct. The CSV is
    written last, so a folder with a CSV is complete, and a second call with the same arguments does nothing.

    Args:
        folder: Output folder, created if missing. It may hold an earlier call's patches, but no other JPEG files.
        patch_size: Side length of a patch, in pixels.
        train_per_class: Number of training patches per class.
        test_per_class: Number of test patches per class.
        test_fraction: Width of the test band, as a fraction of the photograph's width.
        gap: Width of the unused columns between the two regions, in pixels.
        seed: Seed for the positions.

    Returns:
        ``folder``.

    Raises:
        ValueError: A region is too small for the requested patches.
        FileExistsError: ``folder`` holds patches of other arguments, or unrelated JPEG files.
        FileNotFoundError: The installed scikit-image lacks a photograph.
    """
    photographs = {label: _read_photograph(name) for label, name in PHOTOGRAPHS.items()}
    patches: list[_Patch] = []
    for index, (label, photograph) in enumerate(photographs.items()):
        height, width = photograph.shape[:2]
        test_left = width - round(width * test_fraction)
        # One generator per photograph: adding a class does not change the patches of the others.
        rng = np.random.default_rng((seed, index))
        for part, columns, count in (
            ("train", range(test_left - gap), train_per_class),
            ("test", range(test_left, width), test_per_class),
        ):
            for number, (x, y) in enumerate(_draw_corners(rng, columns, range(height), patch_size, count)):
                image_id = f"{label}_{part}_{number:04d}"
                patches.append(_Patch(image_id, label, PHOTOGRAPHS[label], x, y, patch_size, part))

    metadata = _to_csv(patches)
    if _is_written(folder, patches, metadata):
        return folder
    for patch in patches:
        path = folder / patch.path
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = photographs[patch.label][patch.y : patch.y + patch_size, patch.x : patch.x + patch_size]
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
    (folder / METADATA_NAME).write_text(metadata, encoding="utf-8", newline="")
    return folder


def _read_photograph(name: str) -> NDArray[np.uint8]:
    """Return a photograph from the wheel, uint8 of shape (height, width, 3).

    This reads the package's file, because ``skimage.data.<name>()`` downloads missing photographs.
    """
    source = files("skimage").joinpath("data", name)
    if not source.is_file():
        raise FileNotFoundError(
            f"Expected the photograph {name} in the scikit-image package; got no file at {source}. "
            "Run pip install 'scikit-image==0.26.0'."
        )
    with source.open("rb") as stream, Image.open(stream) as image:
        return np.asarray(image.convert("RGB"))


def _draw_corners(
    rng: np.random.Generator, columns: range, rows: range, patch_size: int, count: int
) -> list[tuple[int, int]]:
    """Draw ``count`` distinct top left corners (x, y) of patches that lie fully within ``columns`` and ``rows``."""
    across, down = len(columns) - patch_size + 1, len(rows) - patch_size + 1
    available = max(across, 0) * max(down, 0)
    if count > available:
        raise ValueError(
            f"Expected room for {count} patches of {patch_size} px; got a region of {len(columns)} x {len(rows)} px, which "
            f"has room for {available}. Request fewer or smaller patches, or change test_fraction or gap."
        )
    corners = rng.choice(available, size=count, replace=False).tolist()
    return [(columns[corner % across], rows[corner // across]) for corner in corners]


def _to_csv(patches: list[_Patch]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(patch, column) for column in COLUMNS] for patch in patches)
    return stream.getvalue()


def _is_written(folder: Path, patches: list[_Patch], metadata: str) -> bool:
    """Return whether ``folder`` already holds exactly these patches; raise FileExistsError if it holds others."""
    found = {path.relative_to(folder) for path in folder.glob("*/*.jpg")}
    wanted = {patch.path for patch in patches}
    path = folder / METADATA_NAME
    differs = path.exists() and path.read_text(encoding="utf-8") != metadata
    if differs or found - wanted:
        raise FileExistsError(
            f"Expected an empty folder or one with the same patches; got {folder}, which holds "
            f"{'a different ' + METADATA_NAME if differs else f'{len(found - wanted)} other JPEG files'}. "
            "Delete it or choose another folder."
        )
    return path.exists() and found == wanted
