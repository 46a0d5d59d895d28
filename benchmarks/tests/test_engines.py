"""Every engine, with and without dlspark, measured by the harness. Slow, so only in `make test-all`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlspark import available_backends
from dlspark_bench.figures import Run
from dlspark_bench.run import measure
from dlspark_bench.scenario import Scenario

ENGINES = [name for name in ("mirrored", "horovod", "elephas") if name in available_backends()]


@pytest.mark.full
@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(len(ENGINES) < 3, reason=f"needs all three engines; installed: {', '.join(ENGINES) or 'none'}")
def test_every_engine_trains_with_dlspark_and_bare(tmp_path: Path) -> None:
    scenario = Scenario(
        name="engines",
        model="small_cnn",
        image_size=16,
        rows_per_core=64,
        batch_per_core=16,
        repeats=3,
        warm_launches=1,
        subjects=("local:1x1", "local:2x1", *(f"{prefix}{name}:2x1" for name in ENGINES for prefix in ("", "bare-"))),
    )
    run = Run(measure(scenario, tmp_path))
    for name, result in run.results.items():
        assert len(result.epoch_seconds) == 3, name
        assert result.logs["loss"] > 0, name
        assert (result.driver_memory_bytes is None) == result.subject.alone, name
    for name in ("mirrored", "horovod"):
        for each in (run.results[f"{name}:2x1"], run.results[f"bare-{name}:2x1"]):
            assert each.launch_seconds is not None
            assert len(each.warm_launch_seconds) == 1
        assert run.results[f"{name}:2x1"].communication_share is not None
    losses = [run.results[f"{name}:2x1"].logs["loss"] for name in ("mirrored", "horovod")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # same seed, and both sum gradients
