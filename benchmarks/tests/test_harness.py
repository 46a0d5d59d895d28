"""Measuring: a run from the command line, a failing subject, and interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dlspark_bench.cli import main
from dlspark_bench.figures import Run, differ
from dlspark_bench.run import MeasurementError, measure
from dlspark_bench.scenario import Scenario

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-m", "dlspark_bench.cli", "run", "--model", "small_cnn"]


@pytest.mark.spark
def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dlspark_mirrored")
    out = tmp_path / "results"
    flags = ["--image-size", "16", "--rows-per-core", "32", "--batch-per-core", "16", "--repeats", "1"]
    flags += ["--subjects", "loop:1x1,mirrored:2x1", "--out", str(out)]
    done = subprocess.run(
        [*COMMAND, *flags, "--format", "json"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    path = Path(json.loads(done.stdout)["written"])
    assert list(tmp_path.iterdir()) == [out]
    assert list(out.iterdir()) == [path]
    run = Run(path)
    assert {"keras", "tensorflow"} <= set(run.about["versions"])
    assert run.about["hardware"]["cores"] >= 1
    assert run.about["hardware"]["memory_bytes"] > 2**30
    assert run.about["seconds"] > 0
    assert list(run.results) == ["loop:1x1", "mirrored:2x1"]
    for result in run.results.values():
        assert len(result.epoch_seconds) == 1
        assert result.images_per_second.median > 0
        assert result.launch_seconds is not None
        assert result.launch_seconds > 0
        assert result.peak_memory_bytes > 50e6
        assert (result.driver_memory_bytes is None) == result.subject.alone
    assert main(["report", str(path), "--out", str(tmp_path / "pages")]) == 0
    assert main(["compare", str(path), str(path)]) == 0
    assert "mirrored:2x1" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_real_delay_of_a_tenth_inside_the_step_is_found(tmp_path: Path) -> None:
    base, slowed = "loop:1x1", "loop:1x1@again"
    scenario = Scenario(
        name="twice", model="small_cnn", image_size=32, rows_per_core=512, batch_per_core=32, repeats=31,
        subjects=(base, slowed),
    )  # fmt: skip
    alike = Run(measure(scenario, tmp_path))
    step = min(alike.results[slowed].steps_seconds) / (scenario.rows_per_core / scenario.batch_per_core)
    for attempt in range(3):
        run = Run(measure(scenario, tmp_path / str(attempt), delays={slowed: step / 10}))
        ratio = run.ratio(slowed, base)
        if differ(ratio):  # on a busy machine the spread can hide the delay
            break
    assert differ(ratio), ratio
    assert 0.75 < ratio.median < 0.97, ratio


def test_a_subject_that_fails_says_why_and_leaves_no_file(tmp_path: Path) -> None:
    scenario = Scenario(name="fails", model="no_such_net", image_size=32, subjects=("loop:1x1",))
    with pytest.raises(MeasurementError, match="no_such_net"):
        measure(scenario, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_no_file(number: int, tmp_path: Path) -> None:
    # A feed has no model, so it starts within seconds. All subjects end the same way.
    flags = ["--image-size", "8", "--rows-per-core", "64", "--subjects", "feed:2x1", "--out", str(tmp_path)]
    with subprocess.Popen([*COMMAND, *flags, "--repeats", "100000"], stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        assert any("launch and first epoch" in line for line in command.stderr)
        children = psutil.Process(command.pid).children()
        assert len(children) == 2
        command.send_signal(number)
        rest = command.stderr.read()
        code = command.wait(60)
    assert not psutil.wait_procs(children, timeout=30)[1]
    if number == signal.SIGINT:
        assert code == 130
        assert rest.endswith("dlspark-bench: interrupted\n")
    assert not list(tmp_path.iterdir())
