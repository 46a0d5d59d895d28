"""Generated images of cells in two classes, with file names as in C-NMC 2019. Patients differ more than classes do.

A cell is a nucleus in cytoplasm on a dark background. The classes differ slightly, in the nucleus' share of the cell and in
the grain of its chromatin. Each patient has its own stain (two hues), brightness, cell size and blur, so a classifier can
easily recognise patients. As each patient has one diagnosis, that helps the classifier after a split by image, but not
after a split by patient.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SIDE = 72
"""Side length of an image, in pixels."""


@dataclass(frozen=True)
class Patient:
    """The properties that all cells of a patient share."""

    name: str
    ill: bool
    nucleus: NDArray[np.float64]
    cytoplasm: NDArray[np.float64]
    radius: float
    blur: float


def draw_patients(ill: int, healthy: int, seed: int = 0) -> list[Patient]:
    """Return patients 1 … ``ill`` with the disease, and H1 … H``healthy`` without."""
    draw = np.random.default_rng(seed)
    patients = []
    for number in range(ill + healthy):
        hue, value = draw.uniform(0.62, 0.95), draw.uniform(0.4, 0.85)
        colours = [np.array(colorsys.hsv_to_rgb(h % 1, s, v), np.float64) * 255.0 for h, s, v in _stain(draw, hue, value)]
        name = str(number + 1) if number < ill else f"H{number - ill + 1}"
        patients.append(Patient(name, number < ill, colours[0], colours[1], draw.uniform(20, 30), draw.uniform(0.3, 1.2)))
    return patients


def draw_cell(patient: Patient, draw: np.random.Generator) -> NDArray[np.uint8]:
    """Return one cell as RGB, of shape (SIDE, SIDE, 3)."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    angle, distance = np.arctan2(y, x), np.hypot(y, x)
    radius = patient.radius * draw.normal(1, 0.05)
    wobble = 1 + 0.06 * np.sin(2 * angle + draw.uniform(0, 6)) + 0.04 * np.sin(3 * angle + draw.uniform(0, 6))
    share = draw.normal(0.86 if patient.ill else 0.74, 0.05)
    offset = draw.normal(0, 0.06 * radius, 2)
    inner = np.hypot(y - offset[0], x - offset[1])
    pixels = np.zeros((SIDE, SIDE, 3))
    pixels[distance < radius * wobble] = patient.cytoplasm
    # Coarse grains in an ill nucleus, fine ones in a healthy one.
    side = 14 if patient.ill else 26
    grain = Image.fromarray(draw.integers(0, 255, (side, side), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    chromatin = 1 + 0.35 * (np.asarray(grain, np.float64)[..., None] / 255 - 0.5)
    nucleus = inner < radius * share * (1 + (wobble - 1) / 2)
    pixels[nucleus] = (patient.nucleus * chromatin)[nucleus]
    pixels *= draw.normal(1, 0.04)
    noisy = np.clip(pixels + draw.normal(0, 4, pixels.shape) * (pixels > 0), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(noisy).filter(ImageFilter.GaussianBlur(patient.blur)))


def cell_files(ill: int, healthy: int, cells: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield names such as ``all/UID_3_1_2_all.bmp`` and the contents of the files, ``cells`` per patient."""
    draw = np.random.default_rng([seed, 1])
    for patient in draw_patients(ill, healthy, seed):
        label = "all" if patient.ill else "hem"
        for number in range(cells):
            buffer = io.BytesIO()
            Image.fromarray(draw_cell(patient, draw)).save(buffer, "BMP")
            yield f"{label}/UID_{patient.name}_{number // 4 + 1}_{number % 4 + 1}_{label}.bmp", buffer.getvalue()


def _stain(draw: np.random.Generator, hue: float, value: float) -> list[tuple[float, float, float]]:
    """Return hue, saturation and value of nucleus and cytoplasm."""
    pale = min(value * draw.uniform(1.15, 1.4), 1.0)
    return [(hue, draw.uniform(0.5, 0.85), value), (hue + draw.uniform(-0.05, 0.05), draw.uniform(0.2, 0.45), pale)]
