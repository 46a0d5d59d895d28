"""Measure every scenario of the README's table on this machine, and write the table from the results.

.venv/bin/python benchmarks/short.py            # measure, update benchmarks/results/ and the table
.venv/bin/python benchmarks/short.py --no-run   # write only the table, from existing results
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dlspark_bench import report
from dlspark_bench.figures import Run
from dlspark_bench.run import measure
from dlspark_bench.scenario import find
from dlspark_bench.turns import put

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
SCENARIOS = ("small-cnn", "resnet50-96", "resnet50-frozen", "resnet50-224", "feed")
SIDE_BY_SIDE = ("resnet50-96", "small-cnn")
BEGIN, END = "<!-- bench table -->", "<!-- /bench table -->"


def newest(scenario: str) -> Run:
    """Return the latest result of a scenario, from any machine."""
    paths = sorted(RESULTS.glob(f"*-{scenario}-??????.jsonl"))
    if not paths:
        raise SystemExit(f"Expected a result of {scenario!r} in {RESULTS}; got none. Run `make bench`.")
    return Run(paths[-1])


def refresh(scenario: str, begun: float) -> None:
    """Measure a scenario; the result replaces older ones from equal hardware."""

    def say(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - begun:4.0f} s] {scenario}: {line}\n")

    new = Run(measure(find(scenario), RESULTS, say=say))
    for path in RESULTS.glob(f"*-{scenario}-??????.jsonl"):
        old = Run(path)
        if path != new.path and old.about["hardware"] == new.about["hardware"]:
            path.unlink()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Format a Markdown table with numbers aligned to the right."""
    numbers = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    lines = [columns, ["---:" if number else "---" for number in numbers]]
    lines += [["–" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def table(runs: Sequence[Run]) -> str:
    """Return the part of the README between the marks."""
    by_name = {run.scenario.name: run for run in runs}
    facts = report.about(by_name[SIDE_BY_SIDE[0]])
    lines = [f"{facts['machine']}. {facts['versions']}.", ""]
    columns = ["subject"]
    for name in SIDE_BY_SIDE:
        columns += [f"{name}, images/s", "95 %"]
    subjects = list(dict.fromkeys(name for scenario in SIDE_BY_SIDE for name in by_name[scenario].results))
    rows: list[list[object]] = []
    for subject in subjects:
        row: list[object] = [subject]
        for name in SIDE_BY_SIDE:
            result = by_name[name].results.get(subject)
            found = None if result is None else result.images_per_second
            row += [None, None] if found is None else [report.number(found.median), report.interval(found)]
        rows.append(row)
    lines += [*markdown(columns, rows), ""]
    figures = [row for run in runs for row in report.figure_rows(run.figures())]
    lines += markdown(
        report.FIGURES, sorted(figures, key=lambda row: (int(re.findall(r"\d+", str(row[0]))[0]), str(row[0])))
    )
    warnings = [f"{run.scenario.name}: {text}" for run in runs for text in run.warnings() if "leaves open" not in text]
    if warnings:
        lines += ["", "Warnings:", "", *(f"- {text}" for text in warnings)]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-run", action="store_true", help="write only the table, from existing results")
    options = parser.parse_args()
    begun = time.monotonic()
    if not options.no_run:
        for name in SCENARIOS:
            refresh(name, begun)
    runs = [newest(name) for name in SCENARIOS]
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"Expected {BEGIN} and {END} in {README}; got a file without them. Restore the marks.")
    put(README, f"{before}{BEGIN}\n{table(runs)}\n{END}{after}")
    for run in runs:
        sys.stdout.write(f"{run.path.relative_to(ROOT)}\n")
    sys.stdout.write(f"Updated the table in README.md; {time.monotonic() - begun:.0f} s\n")


if __name__ == "__main__":
    main()
