"""The option ``bits``: when a warning names it, and datasets of before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlspark.errors import ConfigError
from dlspark.images import prepare_images
from dlspark.images.write import dark_warning
from dlspark.storage import Store


@pytest.mark.parametrize(
    ("largest", "bits"), [([], 0), ([65535, 300], 0), ([4095, 0, 300], 12), ([200], 8), ([16384], 15), ([0], 8)]
)
def test_a_warning_says_which_bits_all_images_use(largest: list[int], bits: int) -> None:
    shards = [{"deep_rows": 2, "largest": value} for value in largest] + [{"deep_rows": 0, "largest": 0}]
    assert not dark_warning(shards, bits or 16)  # bits is set already
    found = dark_warning(shards, 16)
    assert bool(found) == bool(bits)
    if bits:
        assert found.startswith(f"{2 * len(largest)} images have values of 16 bits, and the largest is {max(largest):,}: ")
        assert f"with bits={bits} (--bits {bits})" in found


def _prepared_before(source: Path, out: Path) -> dict[str, Any]:
    """Write the manifest of a dataset without ``bits`` and return its settings."""
    asked: dict[str, Any] = {"layout": "folders", "image_size": (8, 12)}
    split = {"test": 0.2, "validation": 0.0, "stratify": True, "group": None, "seed": 0, "column": None, "fold": None}
    settings = {"source": Store(source).uri, "layout": "folders", "image_size": [8, 12], "resize": "fit"}
    manifest = {"format": 2, "classes": ["a"], "image_size": [8, 12], "columns": ["image", "label"], "parts": {}}
    manifest["rejected"] = {"rows": 0, "of": 1, "file": None, "first": []}
    manifest["settings"] = {**settings, "split": {**split, "undersample": False}}
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps(manifest))
    return asked


def test_a_dataset_of_before_has_sixteen_bits(tmp_path: Path) -> None:
    asked = _prepared_before(tmp_path / "photos", tmp_path / "out")
    assert prepare_images(tmp_path / "photos", tmp_path / "out", **asked).classes == ("a",)
    with pytest.raises(ConfigError, match="bits: 16 there, 12 requested"):
        prepare_images(tmp_path / "photos", tmp_path / "out", **asked, bits=12)


@pytest.mark.parametrize("bits", [7, 17, "12", 12.5])
def test_bits_that_cannot_be_are_refused(bits: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Expected bits as one of 8, "):
        prepare_images(tmp_path, tmp_path / "out", layout="folders", image_size=(8, 12), bits=bits)
