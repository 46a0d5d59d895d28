"""Every engine with dlspark and without, measured, reported and predicted from: the harness as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlspark import available_backends
from dlspark_bench import report
from dlspark_bench.cli import main
from dlspark_bench.figures import Run
from dlspark_bench.run import measure
from dlspark_bench.scenario import Scenario

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

ENGINES = [name for name in ("mirrored", "horovod", "elephas") if name in available_backends()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    if len(ENGINES) < 3:
        pytest.skip(f"not all engines are installed: {', '.join(ENGINES) or 'none'}")
    engines = [f"{prefix}{name}:2x1" for name in ENGINES for prefix in ("", "bare-")]
    scenario = Scenario(
        name="engines",
        model="small_cnn",
        image_size=16,
        rows_per_core=64,
        batch_per_core=16,
        repeats=3,
        warm_launches=1,
        subjects=("local:1x1", "local:2x1", *engines),
    )
    return Run(measure(scenario, tmp_path_factory.mktemp("results")))


def test_all_train_and_tell(run: Run) -> None:
    for name, result in run.results.items():
        assert len(result.epoch_seconds) == 3, name
        assert result.logs["loss"] > 0, name
        assert (result.driver_memory_bytes is None) == result.subject.alone, name
    for name in ("mirrored", "horovod"):
        found, bare = run.results[f"{name}:2x1"], run.results[f"bare-{name}:2x1"]
        # Eight steps of 32 images; 2(N - 1)/N is 1 for two workers.
        assert found.all_reduced_bytes == bare.all_reduced_bytes == 4 * found.gradient_bytes
        for each in (found, bare):
            assert each.launch_seconds is not None
            assert len(each.warm_launch_seconds) == 1
        assert found.communication_share is not None
        assert found.communication_share < 1
        assert found.input_share is not None
        assert 0 <= found.input_share < 1
    assert run.results["elephas:2x1"].launch_seconds is not None


def test_the_same_seed_gives_engines_that_sum_the_same_loss(run: Run) -> None:
    losses = [run.results[f"{name}:2x1"].logs["loss"] for name in ("mirrored", "horovod")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_tables_hold_them_all(run: Run) -> None:
    assert [row[0] for row in report.speed_rows(run)] == list(run.results)
    assert {len(row) for row in report.work_rows(run)} == {len(report.WORK)}


def test_more_workers_are_predicted_from_it(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--backend", "horovod", "--workers", "1,2,8", "--rows", "1024", "--batch-size", "64", "--bandwidth-gbit", "10"]
    gpu = tmp_path / run.path.name  # a faster one: the same results with a tenth of the seconds, and the peak to match
    lines = [json.loads(line) for line in run.path.read_text().splitlines()]
    for line in lines:
        for name in ("seconds", "steps_seconds"):
            if line["kind"] == "turn":
                line[name] /= 10
        if line["kind"] == "peak":
            line["flops"] *= 10
    gpu.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["predict", str(run.path), *flags, "--gpu", str(gpu), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [line["workers"] for line in told["predictions"]] == [1, 2, 8]
    assert told["predictions"][2]["extrapolated"] is True
    assert "left out of the fit" in told["checked"]
    assert any("bandwidth" in text for text in told["assumptions"])
    assert "workers" in told["break_even"]
    assert main(["predict", str(run.path), *flags, "--gpu", str(gpu), "--price-worker", "1", "--price-gpu", "9"]) == 0
    assert "cost of an epoch" in capsys.readouterr().out
