"""A killed prepare leaves no partial dataset, and the next run finishes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from dlspark.data.split import Split
from dlspark.errors import DataError
from dlspark.images.dataset import ImageDataset
from dlspark.images.prepare import prepare_images

IMAGES = 600
SIZE = (64, 64)

# Writing is slowed down, so that the kill interrupts it on any machine.
SCRIPT = """
import sys, time
from dlspark.images import prepare, write
from dlspark.data.split import Split

def slowly(task, done, rows):
    for summary in write.write_counted(task, done, rows):
        time.sleep(0.5)
        yield summary

slowly.__module__ = "__main__"  # pickled by value
prepare.write_counted = slowly
prepare.prepare_images(sys.argv[1], sys.argv[2], layout="folders", image_size=(64, 64), split=Split(test=0.25))
"""


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_prepare_is_finished_by_the_next(spark: Any, tmp_path: Path) -> None:
    for name, colour in {"day": (200, 200, 80), "night": (10, 10, 60)}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(IMAGES // 2):
            Image.new("RGB", (80, 60), colour).save(tmp_path / "photos" / name / f"{number:03d}.jpg")
    out = tmp_path / "data"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "photos"), str(out)]
        # A process session of its own, so that Spark's Java process is killed with its driver.
        victim = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 150
        while not any(out.glob("*.arrow")):
            assert victim.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, "no shard came"
            time.sleep(0.05)
    finally:
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait(30)
        # Spark's Python workers have their own process groups: they outlive the kill and end by themselves soon after.
        deadline = time.monotonic() + 60
        while any(process.is_running() and os.getsid(process.pid) == victim.pid for process in psutil.process_iter()):
            assert time.monotonic() < deadline, "workers of the killed prepare still run"
            time.sleep(0.05)
    assert any(out.glob("*.arrow"))
    (out / ".dlspark-tmp-half.arrow").touch()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        ImageDataset.open(out)

    split = Split(test=0.25)
    data = prepare_images(tmp_path / "photos", out, layout="folders", image_size=SIZE, split=split, spark=spark)
    assert data.train is not None
    assert data.test is not None
    assert data.train.rows + data.test.rows == IMAGES
    named = {"manifest.json", *data.train.files, *data.test.files}
    assert {path.name for path in out.iterdir()} == named
