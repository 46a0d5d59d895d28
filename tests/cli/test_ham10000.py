"""The command line on real skin lesions, with real ImageNet weights; skipped where that data is absent."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dlspark.cli.main import main

DATA = Path(__file__).parents[3] / "shared/data"
IMAGES = DATA / "ham10000"
WEIGHTS = DATA / "weights/mobilenet_v2_1.0_224_imagenet_notop.h5"


def subset(folder: Path, every: int) -> list[dict[str, str]]:
    """Every n-th image of HAM10000 in the collection's own layout: links to the images, and their rows of the CSV."""
    with (IMAGES / "HAM10000_metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::every]
    found = {path.stem: path for path in (IMAGES / "images").rglob("*.jpg")}
    (folder / "images").mkdir(parents=True)
    for row in rows:
        (folder / "images" / f"{row['image_id']}.jpg").symlink_to(found[row["image_id"]])
    with (folder / "HAM10000_metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not IMAGES.is_dir() or not WEIGHTS.is_file(), reason=f"no HAM10000 and no weights under {DATA}")
def test_ham10000_through_the_command_line(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = subset(tmp_path / "ham", every=80)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        assert main([*arguments, "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    prepared = run(
        *("prepare", "ham", "data", "--layout", "ham10000", "--image-size", "96", "--test", "0.25", "--group", "lesion_id")
    )
    assert prepared["classes"] == sorted({row["dx"] for row in rows})
    assert sum(part["rows"] for part in prepared["parts"].values() if part) == len(rows)

    trained = run(
        *("train", "data", "--backend", "mirrored", "--workers", "2", "--out", "run", "--epochs", "3", "--batch-size", "16"),
        *("--backbone", "mobilenetv2", "--weights", str(WEIGHTS), "--fine-tune", "head", "--augment", "flip,rotation"),
        *("--learning-rate", "0.003", "--verbose", "0"),
    )
    losses = trained["history"]["loss"]
    assert losses[-1] < losses[0]
    assert sum(worker["rows"] for worker in trained["workers"]) == 3 * prepared["parts"]["train"]["rows"]

    found = run("evaluate", "run", "data", "--by", "sex,localization,age:20", "--first", "mel", "--bootstrap", "100")
    assert (found["classes"][0], found["group"]) == ("mel", "lesion_id")
    assert found["scores"]["accuracy"]["value"] == pytest.approx(trained["history"]["val_accuracy"][-1])
    assert 0.5 < found["scores"]["auroc_micro"]["low"] < found["scores"]["auroc_micro"]["high"] < 1
    assert all(sum(part["rows"] for part in parts.values()) == found["rows"] for parts in found["by"].values())
