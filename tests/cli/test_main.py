"""The command itself: usage errors, exit codes, and what it writes to which stream."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dlspark.cli import backends
from dlspark.cli.main import main
from dlspark.cli.output import Facts, Report
from dlspark.errors import ConfigError, DataError, MissingDependencyError, WorkerError
from dlspark.storage.store import StoreError

TRAIN = ("train", "data", "--out", "runs")
PREPARE = ("prepare", "photos", "out", "--layout", "folders", "--image-size", "32")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Replace what ``dlspark backends`` does by a function."""

    def replace(function: Callable[[], Any]) -> None:
        def run(options: argparse.Namespace) -> Report:
            return Report({"done": True}, [Facts({"found": function()})])

        monkeypatch.setattr(backends, "run", run)

    return replace


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["--verson"], "Did you mean '--version'?"),
        ([*TRAIN, "--epoch", "3"], "Did you mean '--epochs'?"),
        ([*TRAIN, "--epochs=three"], "argument --epochs: invalid int value: 'three'"),
        ([*TRAIN, "--workers", "0"], "Expected num_workers as a whole number of at least 1"),
        ([*TRAIN, "--backend", "horovd"], "Did you mean 'horovod'?"),
        ([*TRAIN, "--option", "nics"], "expected NAME=VALUE, got 'nics'"),
        ([*TRAIN, "--option", "nics=lo"], "Backend 'local' has no option 'nics'"),
        ([*TRAIN, "--dense", "512,many"], "expected whole numbers as 512,128, got '512,many'"),
        ([*TRAIN, "--format", "yaml"], "choose from 'table', 'json'"),
        ([*TRAIN], "got no manifest.json there"),
        ([*TRAIN, "more"], "takes no 'more'"),
        (["train", "data"], "required: --out"),
        ([*PREPARE[:-1], "large"], "expected pixels as 224 or HEIGHTxWIDTH, got 'large'"),
        ([*PREPARE, "--test", "1.5"], "Expected test and validation as fractions from 0 to below 1"),
        ([*PREPARE, "--layout", "folder"], "Did you mean 'folders'?"),
        ([*PREPARE, "--layout-option", "csv=a.csv"], "Layout 'folders' has no options"),
        ([*PREPARE, "--layout", "csv", "--layout-option", "lable_column=dx"], "Did you mean 'label_column'?"),
        (["evaluate", "model.keras", "data"], "got no manifest.json there"),
        (["evaluate", "model.keras", "data", "--part", "tset"], "choose from 'test', 'validation', 'train'"),
        (["doctor", "--workers", "0"], "Expected --workers as a whole number of at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dlspark: error: ")
    assert told in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate", "backends", "doctor"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"example:\n  dlspark {name}" in capsys.readouterr().out


def test_no_command_shows_the_commands_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "prepare" in err


def test_it_loads_no_framework_until_a_command_runs() -> None:
    heavy = ("keras", "tensorflow", "jax", "torch", "pyspark", "numpy", "rich")
    code = (
        f"import sys; from dlspark.cli.main import main; main(['--help']); print([n for n in {heavy} if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_python_m_dlspark() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "dlspark", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.startswith("dlspark ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a setting"), 2),
        (DataError("a row"), 2),
        (MissingDependencyError("a package"), 2),
        (ModuleNotFoundError("No module named 'jax'", name="jax"), 2),
        (StoreError("a disk"), 1),
        (WorkerError("a worker"), 1),
        (RuntimeError("a surprise"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(command: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert main(["backends"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert main(["backends", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_message_of_several_lines_is_told_in_one(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ConfigError("first\nsecond")

    command(fail)
    assert main(["backends"]) == 2
    assert capsys.readouterr().err == "dlspark: error: first second\n"


def test_a_worker_tells_its_own_traceback(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise WorkerError("rank 1 failed", remote_traceback='Traceback (most recent call last):\n  File "user.py"\n')

    command(fail)
    assert main(["backends"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dlspark: error: rank 1 failed\n")
    assert 'File "user.py"' in err
    assert "dlspark/cli" not in err


def test_stdout_is_for_the_result_alone(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda: print(">>> Fit model"))
    assert main(["backends", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"done": True}
    assert err == ">>> Fit model\n"


def test_stdout_is_for_the_result_alone_whoever_writes() -> None:
    code = (
        "import os, sys; from dlspark.cli import backends, main; from dlspark.cli.output import Report\n"
        "backends.run = lambda options: os.system('echo from a child') or print('from Python') or Report({'done': 1}, [])\n"
        "sys.exit(main.main(['backends', '--format', 'json']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(ran.stdout) == {"done": 1}
    assert sorted(ran.stderr.splitlines()) == ["from Python", "from a child"]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    line = f"{sys.executable} -m dlspark backends | true"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stderr == ""
