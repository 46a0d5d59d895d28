"""Patches of four materials, cut from photographs that the scikit-image wheel carries: real images, and no download.

The pictures have what a microscope's have: which way is up means nothing, and one large photograph yields many small
images. Hence the one mistake to avoid: patches that share pixels must not sit on both sides of the split. Test patches
come from a band at the right edge of each photograph, training patches from what lies left of it, and a gap separates
the two.
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
"""Class name to file name in the wheel's ``skimage/data`` (512 x 512 px each; grey but for the stained tissue)."""

COLUMNS = ("file", "image_id", "label", "photograph", "x", "y", "size", "part")
METADATA_NAME = "metadata.csv"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class _Patch:
    """One row of the CSV; the fields are its columns, and ``file``."""

    image_id: str
    label: str
    photograph: str
    x: int
    y: int
    size: int
    part: str

    @property
    def file(self) -> str:
        """The path as the CSV has it, relative to the folder."""
        return self.path.as_posix()

    @property
    def path(self) -> Path:
        """Where its JPEG file lies within the folder."""
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

    Guarantees: the same arguments choose the same patches; nothing is downloaded; between a training patch and a test
    patch of one photograph lie at least ``gap`` columns; patches of one part may overlap, but no two are the same. The
    CSV is written last, so a folder that has one is complete, and a second call with the same arguments does nothing.

    Args:
        folder: Where to write; made if it is not there. It may hold an earlier call's patches, never other JPEG files.
        patch_size: Side of a patch, in pixels.
        train_per_class: Training patches of each class.
        test_per_class: Test patches of each class.
        test_fraction: Width of the test band, as a fraction of the photograph's.
        gap: Columns between the two regions that neither uses, in pixels.
        seed: Seeds the choice of positions.

    Returns:
        ``folder``.

    Raises:
        ValueError: A region is too small for the patches that are asked of it.
        FileExistsError: ``folder`` holds the patches of other arguments, or JPEG files of someone else.
        FileNotFoundError: The installed scikit-image does not carry a photograph.
    """
    photographs = {label: _read_photograph(name) for label, name in PHOTOGRAPHS.items()}
    patches: list[_Patch] = []
    for index, (label, photograph) in enumerate(photographs.items()):
        height, width = photograph.shape[:2]
        test_left = width - round(width * test_fraction)
        # One generator per photograph: adding a class leaves the patches of those before it as they are.
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
    """Return a photograph of the wheel, uint8 of shape (height, width, 3).

    It is opened as a file of the package, because ``skimage.data.<name>()`` downloads what it does not find.
    """
    source = files("skimage").joinpath("data", name)
    if not source.is_file():
        raise FileNotFoundError(
            f"Expected the photograph {name} inside the scikit-image package. Received: no file at {source}. "
            "Install a scikit-image that carries it: pip install 'scikit-image==0.26.0'."
        )
    with source.open("rb") as stream, Image.open(stream) as image:
        return np.asarray(image.convert("RGB"))


def _draw_corners(
    rng: np.random.Generator, columns: range, rows: range, patch_size: int, count: int
) -> list[tuple[int, int]]:
    """Draw ``count`` different corners (x, y) of patches that lie within ``columns`` and ``rows`` entirely."""
    across, down = len(columns) - patch_size + 1, len(rows) - patch_size + 1
    available = max(across, 0) * max(down, 0)
    if count > available:
        raise ValueError(
            f"Expected room for {count} patches of {patch_size} px. Received: a region of {len(columns)} x {len(rows)} "
            f"px, which has room for {available}. Ask for fewer or smaller patches, or change test_fraction or gap."
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
    """Say whether ``folder`` already holds exactly these patches; raise if it holds others."""
    found = {path.relative_to(folder) for path in folder.glob("*/*.jpg")}
    wanted = {patch.path for patch in patches}
    path = folder / METADATA_NAME
    differs = path.exists() and path.read_text(encoding="utf-8") != metadata
    if differs or found - wanted:
        raise FileExistsError(
            f"Expected an empty folder, or one with the same patches. Received: {folder}, which holds "
            f"{'a different ' + METADATA_NAME if differs else f'{len(found - wanted)} other JPEG files'}. "
            "Delete it, or name another folder."
        )
    return path.exists() and found == wanted
