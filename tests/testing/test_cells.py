"""The generated cells suit study B: patients are easy to distinguish, classes are harder, and file names state both."""

from __future__ import annotations

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dlspark.testing.cells import cell_files


def described(content: bytes) -> list[float]:
    """Colours, size and grain of a cell."""
    pixels = np.asarray(Image.open(io.BytesIO(content)), np.float64)
    cell = pixels[pixels.sum(axis=2) > 0]
    tenths = np.percentile(cell, [10, 50, 90], axis=0).ravel()
    return [*tenths, *cell.std(axis=0), len(cell), np.abs(np.diff(pixels, axis=0)).mean()]


def least_squares(x: NDArray[np.float64], ill: NDArray[np.bool_], groups: NDArray[np.str_]) -> float:
    """Accuracy of a linear classifier on each group, fitted on the other groups."""
    design = np.column_stack([np.ones(len(x)), (x - x.mean(axis=0)) / x.std(axis=0)])
    right = 0
    for group in np.unique(groups):
        mine = groups == group
        weights = np.linalg.lstsq(design[~mine], np.where(ill[~mine], 1.0, -1.0), rcond=None)[0]
        right += int(((design[mine] @ weights > 0) == ill[mine]).sum())
    return right / len(x)


def test_a_split_by_image_flatters_and_classes_can_be_learnt() -> None:
    files = dict(cell_files(ill=14, healthy=10, cells=12))
    x = np.array([described(content) for content in files.values()])
    named = [re.fullmatch(r"(all|hem)/UID_(H?\d+)_\d+_\d+_(all|hem)\.bmp", name) for name in files]
    assert all(match and match[1] == match[3] and (match[1] == "hem") == match[2].startswith("H") for match in named)
    ill = np.array([name.startswith("all/") for name in files])
    patients = np.array([name.split("_")[1] for name in files])

    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    distances = np.linalg.norm(scaled[:, None] - scaled[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    by_image = (ill[distances.argmin(axis=1)] == ill).mean()
    distances[patients[:, None] == patients[None]] = np.inf
    by_patient = (ill[distances.argmin(axis=1)] == ill).mean()
    assert by_image > 0.9
    assert by_image > by_patient + 0.2
    assert least_squares(x, ill, patients) > 0.65


def test_the_same_seed_draws_the_same_cells() -> None:
    assert dict(cell_files(2, 1, 2, seed=5)) == dict(cell_files(2, 1, 2, seed=5))
    assert dict(cell_files(2, 1, 2, seed=5)) != dict(cell_files(2, 1, 2, seed=6))
