"""Scenarios as plain data: parsing, and rejecting invalid settings before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlspark import ConfigError
from dlspark_bench.cli import main
from dlspark_bench.scenario import Scenario, Subject, built_in, find


@pytest.mark.parametrize("name", built_in())
def test_what_comes_with_the_harness_is_valid(name: str) -> None:
    scenario = find(name)
    assert scenario.name == name
    assert scenario.repeats >= 5
    for subject in map(Subject.parse, scenario.subjects):
        assert scenario.rows(subject) % scenario.batch_size(subject) == 0, "a shorter last step would be traced again"


@pytest.mark.parametrize("text", ["horovod:2x1", "loop:1x2@again", "bare-mirrored:16x4"])
def test_a_subject_reads_what_it_writes(text: str) -> None:
    assert str(Subject.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('subjects = ["loop:0x1"]', "NAME:WORKERSxTHREADS"),
        ('subjects = ["loop", "loop:1x1"]', "each of them once"),
        ("image_sise = 3", "image_sise"),
        ("repeats = 0", "at least 1"),
        ('dtype = "int8"', "mixed_bfloat16"),
        ("model = [", "TOML"),
        ('[[figures]]\nid = "P9"\ntitle = "t"\nof = "horovod:2x1"\ngoal = 1.0', "Expected subject 'horovod:2x1'"),
    ],
)
def test_what_cannot_be_measured_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        find(str(path))


def test_work_grows_with_cores() -> None:
    scenario = Scenario(name="own", rows_per_core=96, batch_per_core=32)
    assert scenario.rows(Subject("loop", 1, 2)) == scenario.rows(Subject("mirrored", 2, 1)) == 192
    assert scenario.batch_size(Subject("mirrored", 2, 1)) == 64


def test_mistakes_on_the_command_line_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "resnet50-95"]) == 2
    assert "Known: feed, resnet50-224" in capsys.readouterr().err
    assert main(["run", "small-cnn", "--backend", "mirrored"]) == 2
    assert "got both" in capsys.readouterr().err
    assert main(["run", "--subjects", "horovd:2x1"]) == 2
    assert "Did you mean 'horovod'?" in capsys.readouterr().err
    assert main(["report", "missing.jsonl"]) == 1
    assert "missing.jsonl" in capsys.readouterr().err
    assert main(["list", "--results", "nowhere"]) == 0
    assert "small-cnn" in capsys.readouterr().out


def test_a_backend_is_compared_with_loops_and_its_bare_engine() -> None:
    from dlspark_bench import cli, hardware

    cores = hardware.cores()
    assert cli._subjects("horovod", 2, 1, "cpu") == tuple(
        dict.fromkeys(["loop:1x1", "loop:2x1", f"loop:1x{cores}", "local:2x1", "horovod:2x1", "bare-horovod:2x1"])
    )
    assert cli._subjects("local", 1, 1, "gpu") == ("loop:1x1", "local:1x1")
