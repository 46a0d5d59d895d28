"""Every example runs as a user runs it and prints the expected results; the README's code is valid."""

from __future__ import annotations

import ast
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dlspark

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "first_steps.ipynb"
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE += [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "backends").glob("*/README.md"))]
PATH = os.pathsep.join(entry for entry in sys.path if entry)


def run_alone(script: str, folder: Path) -> str:
    """Run an example as a user does, in a process of its own, and return its output."""
    command = [sys.executable, str(EXAMPLES / script)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``run(script, *arguments)`` runs an example as the main module of this process and returns its output.

    Its working folder is empty, so that files left there are found.
    """

    def running(script: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        left = [path.name for path in tmp_path.iterdir()]
        assert not left, f"{script} leaves {left} in the current folder"
        return capsys.readouterr().out

    return running


def number(pattern: str, text: str) -> float:
    """The number that the group of ``pattern`` matches."""
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in {text!r}"
    return float(found[1])


def test_numpy_arrays(tmp_path: Path) -> None:
    printed = run_alone("numpy_arrays.py", tmp_path)
    assert number(r"validation accuracy ([\d.]+)", printed) > 0.8
    assert number(r"on new rows ([\d.]+)", printed) > 0.8


def test_custom_metric(run: Any) -> None:
    printed = run("custom_metric.py")
    assert 0.8 < number(r"mean_recall ([\d.]+)", printed) <= 1
    assert 0.8 < number(r"accuracy ([\d.]+)", printed) <= 1


def test_callbacks(run: Any) -> None:
    printed = run("callbacks.py")
    epochs = int(number(r"stopped after (\d+) of 40 epochs", printed))
    assert 3 <= epochs < 40
    assert len(re.findall(r"^rank 0, epoch \d+: val_accuracy", printed, re.MULTILINE)) == epochs
    assert number(r"the best model has (\d+) bytes", printed) > 1000


@pytest.mark.spark
@pytest.mark.slow
def test_any_backend(spark: Any, run: Any) -> None:
    printed = run("any_backend.py", "mirrored", "2")
    rows = [int(count) for count in re.findall(r"^rank \d on .*: (\d+) rows$", printed, re.MULTILINE)]
    assert len(rows) == 2
    assert sum(rows) == 5 * 1003
    assert number(r"mirrored: loss [\d.]+, accuracy ([\d.]+)", printed) > 0.8


@pytest.mark.spark
@pytest.mark.slow
def test_spark_dataframe(spark: Any, run: Any) -> None:
    printed = run("spark_dataframe.py")
    assert number(r"([\d]+) rows in 5 epochs", printed) == 5 * 800
    assert number(r"accuracy ([\d.]+)", printed) > 0.8


@pytest.mark.spark
@pytest.mark.slow
def test_spark_ml(spark: Any, run: Any) -> None:
    printed = run("spark_ml.py")
    assert "row 3: not a JPEG" in printed
    assert number(r"accuracy ([\d.]+)", printed) > 0.8


@pytest.mark.spark
@pytest.mark.slow
def test_image_folder(spark: Any, run: Any) -> None:
    printed = run("image_folder.py")
    assert "train: 60 images {'leaf': 30, 'sky': 30}" in printed
    assert "test: 20 images {'leaf': 10, 'sky': 10}" in printed
    assert "classes leaf, sky" in printed
    first, last = re.search(r"loss by epoch ([\d.]+), ([\d.]+)", printed).groups()  # type: ignore[union-attr]
    assert float(last) < float(first)
    assert number(r"(\d+) images seen", printed) == 2 * 60


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", PATH)  # the kernel is a process of its own
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = {cell.id: "".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells if "outputs" in cell}
    assert number(r"epoch 5: val_accuracy ([\d.]+)", said["result"]) > 0.8
    assert "num_workers=3" in said["errors"]
    (listed,) = next(cell.outputs for cell in notebook.cells if cell.id == "backends")
    assert "'local'" in listed["data"]["text/plain"]


def test_the_notebook_is_stored_without_outputs() -> None:
    import nbformat

    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_short_and_tested(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    assert any(f'"{path.name}"' in test.read_text() for test in TESTS), f"no test runs {path.name}"
    assert ast.get_docstring(ast.parse(path.read_text()))


# The README and the other pages.


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def public(function: ast.expr) -> Callable[..., Any] | None:
    """The function that a call in a text refers to, if it is one of dlspark's."""
    if isinstance(function, ast.Attribute) and function.attr == "fit":
        return dlspark.Trainer.fit
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    return getattr(dlspark, name) if name in dlspark.__all__ else None


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_in_texts_uses_what_there_is(path: Path) -> None:
    for block in blocks(path, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "dlspark":
                assert {alias.name for alias in node.names} <= set(dlspark.__all__)
            if isinstance(node, ast.Call):
                called = public(node.func)
                keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
                if called is not None:
                    known = set(inspect.signature(called).parameters)
                    assert keywords <= known, f"{ast.unparse(node.func)}() has no {keywords - known}"


def test_the_readme_has_a_script() -> None:
    (script,) = blocks(ROOT / "README.md", "python")
    compile(script, "README.md", "exec")
    for name in ("prepare_images(", "build_classifier(", "Trainer("):
        assert name in script


def test_commands_in_the_readme_are_commands() -> None:
    from dlspark.cli.main import build_parser

    parser, _ = build_parser()
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("dlspark ")]
    assert len(commands) >= 4
    for line in commands:
        parser.parse_args(shlex.split(line, comments=True)[1:])  # raises on an unknown word


@pytest.mark.parametrize("path", [*PROSE, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
