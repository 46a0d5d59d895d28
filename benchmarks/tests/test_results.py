"""Reading, checking, comparing and predicting from recorded results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlspark_bench import figures, report
from dlspark_bench.cli import main
from dlspark_bench.figures import ImpossibleError, Run, differ

BASE, SLOWER = "loop:2x1", "local:2x1"
Rewrite = Callable[[Path, Callable[[dict[str, Any]], None]], Path]


def test_a_run_reports_each_subject(recorded: Run) -> None:
    assert list(recorded.results) == list(recorded.scenario.subjects)
    for name, result in recorded.results.items():
        assert len(result.epoch_seconds) == recorded.scenario.repeats, name
        assert result.images_per_second.low <= result.images_per_second.median <= result.images_per_second.high
        assert 0 < (result.share_of_peak or 0) < figures.LIMIT
        assert result.peak_memory_bytes > 50e6
        assert 0 < result.logs["loss"] < 2.3  # guessing among ten classes has a loss of log 10
        assert (result.driver_memory_bytes is None) == result.subject.alone, name


def test_a_subject_slower_by_a_tenth_is_told_apart(recorded: Run, rewrite: Rewrite) -> None:
    assert not differ(recorded.ratio(BASE, BASE))
    turns = iter(recorded.results[BASE].steps_seconds)

    def slow(line: dict[str, Any]) -> None:
        if line["kind"] == "run":
            line["delays"] = {SLOWER: 0.006}  # twelve steps of 63 ms
        if line["kind"] == "turn" and line["subject"] == SLOWER and line["turn"]:
            line["steps_seconds"] = next(turns) + 12 * 0.006

    run = Run(rewrite(recorded.path, slow))
    assert differ(run.ratio(SLOWER, BASE))
    assert 0.88 < run.ratio(SLOWER, BASE).median < 0.94
    assert f"{SLOWER} was deliberately slowed by 0.006 s per step." in run.warnings()


def test_a_result_above_the_physical_limit_is_refused(
    recorded: Run, rewrite: Rewrite, capsys: pytest.CaptureFixture[str]
) -> None:
    def faster(line: dict[str, Any]) -> None:
        if line["kind"] == "turn" and line["subject"] == BASE and line["turn"] == 3:
            line["steps_seconds"] /= 50

    path = rewrite(recorded.path, faster)
    with pytest.raises(ImpossibleError, match=BASE):
        Run(path)
    assert main(["report", str(path)]) == 1
    assert "nothing is reported" in capsys.readouterr().err


def test_a_noisy_machine_is_reported(recorded: Run, rewrite: Rewrite) -> None:
    def shaken(line: dict[str, Any]) -> None:
        if line["kind"] == "turn" and line["turn"] % 2:
            line["steps_seconds"] *= 1.5

    assert any(f"turns of {BASE}, {SLOWER}" in text for text in Run(rewrite(recorded.path, shaken)).warnings())


def test_more_threads_than_cores_are_labelled(recorded: Run, rewrite: Rewrite, capsys: pytest.CaptureFixture[str]) -> None:
    def fewer(line: dict[str, Any]) -> None:
        if line["kind"] == "run":
            line["hardware"]["cores"] = 0

    assert main(["report", str(rewrite(recorded.path, fewer))]) == 0
    assert "(oversubscribed)" in capsys.readouterr().out


def test_a_subject_that_learned_less_is_reported(recorded: Run, rewrite: Rewrite) -> None:
    def forgetful(line: dict[str, Any]) -> None:
        if line["kind"] == "turn" and line["subject"] == SLOWER:
            for worker in line["workers"]:
                worker["logs"]["loss"] = 2.3

    warnings = Run(rewrite(recorded.path, forgetful)).warnings()
    assert any("Final losses differ for equal images" in text for text in warnings)


def test_the_page_needs_no_network(recorded: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(recorded.path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert SLOWER in page
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert (tmp_path / f"{recorded.about['id']}.png").stat().st_size > 1000
    assert "images/s" in capsys.readouterr().out


def test_prices_make_costs(recorded: Run, capsys: pytest.CaptureFixture[str]) -> None:
    name = recorded.about["id"]
    assert main(["compare", str(recorded.path), "--price", f"{name}=3.6", "--format", "json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    # 3.6 per hour is 0.001 per second.
    assert first["cost of 1,536 images"] == pytest.approx(1.536 / first["images/s"], rel=0.01)
    assert main(["compare", str(recorded.path), "--price", "other=1"]) == 2
    assert "--price RUN=PER_HOUR" in capsys.readouterr().err


def test_engines_report_launches_communication_and_input(recorded: Run) -> None:
    for name in ("mirrored", "horovod"):
        found, bare = recorded.results[f"{name}:2x1"], recorded.results[f"bare-{name}:2x1"]
        # Twelve steps of 128 images; 2(N - 1)/N is 1 for two workers.
        assert found.all_reduced_bytes == bare.all_reduced_bytes == 12 * found.gradient_bytes
        for each in (found, bare):
            assert each.launch_seconds is not None
            assert len(each.warm_launch_seconds) == 1
        assert found.communication_share is not None
        assert found.communication_share < 1
        assert found.input_share is not None
        assert 0 <= found.input_share < 1
    assert recorded.results["elephas:2x1"].launch_seconds is not None


def test_the_tables_hold_every_subject(recorded: Run) -> None:
    assert [row[0] for row in report.speed_rows(recorded)] == list(recorded.results)
    assert {len(row) for row in report.work_rows(recorded)} == {len(report.WORK)}


def test_more_workers_are_predicted(recorded: Run, rewrite: Rewrite, capsys: pytest.CaptureFixture[str]) -> None:
    def faster(line: dict[str, Any]) -> None:  # imitate a GPU: a tenth of the seconds, ten times the peak
        if line["kind"] == "turn":
            line["seconds"] /= 10
            line["steps_seconds"] /= 10
        if line["kind"] == "peak":
            line["flops"] *= 10

    gpu = str(rewrite(recorded.path, faster))
    flags = ["--backend", "horovod", "--workers", "1,2,8", "--rows", "1024", "--batch-size", "64", "--bandwidth-gbit", "10"]
    flags += ["--gpu", gpu]
    assert main(["predict", str(recorded.path), *flags, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["workers"] for line in found["predictions"]] == [1, 2, 8]
    assert found["predictions"][2]["extrapolated"] is True
    assert "all runs in the fit have 2 workers" in found["checked"]
    assert any("bandwidth" in text for text in found["assumptions"])
    assert "workers" in found["break_even"]
    assert main(["predict", str(recorded.path), *flags, "--price-worker", "1", "--price-gpu", "9"]) == 0
    assert "cost of an epoch" in capsys.readouterr().out
