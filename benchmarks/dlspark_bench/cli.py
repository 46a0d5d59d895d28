"""The command ``dlspark-bench``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlspark import ConfigError, DlsparkError
from dlspark.cli.arguments import local_folder
from dlspark.cli.output import Block, Facts, Report, Table
from dlspark.cli.output import write as write_report
from dlspark_bench import hardware, predict, report
from dlspark_bench.figures import Run
from dlspark_bench.run import measure
from dlspark_bench.scenario import BARE, Scenario, Subject, built_in, find

RESULTS = Path("benchmarks", "results")
_EPILOG = """\
example:
  dlspark-bench run resnet50-96
  dlspark-bench run --model small_cnn --image-size 32 --backend mirrored --workers 2
  dlspark-bench run --model small_cnn --image-size 32 --subjects loop:1x1,mirrored:2x1,horovod:2x1 --repeats 9
  dlspark-bench compare benchmarks/results/A.jsonl benchmarks/results/B.jsonl
  dlspark-bench report benchmarks/results/*.jsonl --out pages
  dlspark-bench predict benchmarks/results/*-small-cnn-*.jsonl --backend horovod --workers 4,8,16 --bandwidth-gbit 10
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dlspark-bench``; return the exit code: 0 done, 1 the run failed, 2 invalid settings, 130 interrupted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    options = _parser().parse_args(arguments)
    try:
        found: Report = options.run(options)
    except KeyboardInterrupt:
        sys.stderr.write("dlspark-bench: interrupted\n")
        return 130
    except DlsparkError as error:
        sys.stderr.write(f"dlspark-bench: error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    write_report(found, options.format, sys.stdout)
    return found.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dlspark-bench",
        description="Measure training on CPUs and GPUs, with engines and without.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="measure a scenario and write a file of results")
    run.add_argument("scenario", nargs="?", help=f"{', '.join(built_in())}, or a .toml file; flags override its settings")
    for field in dataclasses.fields(Scenario):
        if field.name in {"name", "figures"}:
            continue
        run.add_argument(f"--{field.name.replace('_', '-')}", type=_kind(field), default=None, metavar="VALUE")
    run.add_argument("--backend", help="measure this backend, a hand-written loop, and the engine without dlspark")
    run.add_argument("--workers", type=int, default=1, help="workers of --backend (default: 1)")
    run.add_argument("--threads", type=int, default=1, help="threads per worker of --backend (default: 1)")
    run.add_argument("--out", type=local_folder, default=RESULTS, help=f"folder for the results (default: {RESULTS})")
    run.set_defaults(run=_run)
    compare = commands.add_parser("compare", help="compare runs of the same work, on CPU or GPU")
    compare.add_argument("results", nargs="+", type=Path)
    compare.add_argument("--price", action="append", default=[], metavar="RUN=PER_HOUR", help="price of a machine hour")
    compare.set_defaults(run=_compare)
    ahead = commands.add_parser("predict", help="predict more workers, and how many match a GPU")
    ahead.add_argument("results", nargs="+", type=Path)
    ahead.add_argument("--backend", required=True)
    ahead.add_argument("--threads", type=int, default=1, help="threads per worker (default: 1)")
    ahead.add_argument("--workers", type=_counts, default=(1, 2, 4, 8, 16, 32), metavar="N,N,…")
    ahead.add_argument("--rows", type=int, help="rows per epoch (default: as in the largest measured configuration)")
    ahead.add_argument("--batch-size", type=int, help="rows per step, over all workers (default: the largest measured)")
    ahead.add_argument("--bandwidth-gbit", type=float, help="network bandwidth between workers, in Gbit/s each way")
    ahead.add_argument("--gpu", type=Path, help="results of a GPU; workers must match its local subject, else its first")
    ahead.add_argument("--price-worker", type=float, help="price of a worker hour")
    ahead.add_argument("--price-gpu", type=float, help="price of a GPU hour")
    ahead.set_defaults(run=_predict)
    page = commands.add_parser("report", help="write tables, pictures and one offline page")
    page.add_argument("results", nargs="+", type=Path)
    page.add_argument("--out", type=local_folder, help=f"folder for {report.PAGE} and the pictures")
    page.set_defaults(run=_report)
    listed = commands.add_parser("list", help="list built-in scenarios and results")
    listed.add_argument("--results", type=Path, default=RESULTS)
    listed.set_defaults(run=_list)
    for command in commands.choices.values():
        command.add_argument("--format", choices=("table", "json"), default="table")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _kind(field: dataclasses.Field[Any]) -> Any:
    if field.name == "subjects":
        return lambda text: tuple(text.split(","))
    if field.name == "jit_compile":
        return lambda text: {"true": True, "false": False}.get(text, text)
    return int if isinstance(field.default, int) else str


def _run(options: argparse.Namespace) -> Report:
    names = [field.name for field in dataclasses.fields(Scenario) if field.name not in {"name", "figures"}]
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.backend is not None:
        if "subjects" in changes or options.scenario is not None:
            raise ConfigError("Expected --backend, or a scenario or --subjects; got both. Give one of them.")
        changes["subjects"] = _subjects(options.backend, options.workers, options.threads, changes.get("device", "cpu"))
    if options.scenario is None:
        scenario = Scenario(name="own", **changes)
    else:
        scenario = find(options.scenario)
        if changes:
            subjects = {str(Subject.parse(text)) for text in changes.get("subjects", scenario.subjects)} | {None}
            kept = tuple(each for each in scenario.figures if {each.of, each.over} <= subjects)
            scenario = dataclasses.replace(scenario, **{"name": f"{scenario.name}-changed", "figures": kept, **changes})

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    path = measure(scenario, options.out, say=say)
    return _told([Run(path)], path)


def _subjects(backend: str, workers: int, threads: int, device: str) -> tuple[str, ...]:
    """Return the backend and its baselines: the hand-written loop and the bare engine."""
    found = ["loop:1x1", f"loop:{workers}x{threads}"]
    if device == "cpu":
        found.append(f"loop:1x{hardware.cores()}")
    if backend != "local" and workers > 1:
        found.append(f"local:{workers}x{threads}")
    found.append(f"{backend}:{workers}x{threads}")
    if f"bare-{backend}" in BARE:
        found.append(f"bare-{backend}:{workers}x{threads}")
    return tuple(dict.fromkeys(found))


def _predict(options: argparse.Namespace) -> Report:
    runs = [Run(path) for path in options.results]
    measured = predict.measured(runs, options.backend, options.threads)
    largest = max(measured, key=lambda each: (each.workers, each.batch_size))
    rows, batch_size = options.rows or largest.rows, options.batch_size or largest.batch_size
    bandwidth = None if options.bandwidth_gbit is None else options.bandwidth_gbit * 125e6
    model = predict.fit(measured, bandwidth_bytes_per_second=bandwidth)
    _, checked = predict.check(measured)
    columns = ["workers", "epoch s", "90 %", "launch s", "extrapolated"]
    priced = options.price_worker is not None
    table = []
    for workers in options.workers:
        found = model.predict(workers, rows=rows, batch_size=batch_size)
        interval = f"{found.low:.3g} – {found.high:.3g}"
        line = [
            workers,
            found.epoch_seconds,
            interval,
            found.launch_seconds,
            found.extrapolated,
        ]
        table.append([*line, *([predict.cost(found.epoch_seconds, workers, options.price_worker)] if priced else [])])
    columns += ["cost of an epoch"] if priced else []
    facts = {"epoch": f"{rows:,} images in steps of {batch_size:,}, {options.backend}, {options.threads} threads a worker"}
    facts |= {"checked": checked} | {f"note {i}": text for i, text in enumerate(model.assumptions, 1)}
    document: dict[str, Any] = {
        "rows": rows,
        "batch_size": batch_size,
        "seconds": model.seconds,
        "checked": checked,
        "assumptions": list(model.assumptions),
        "predictions": [dict(zip(columns, line, strict=True)) for line in table],
    }
    if options.gpu is not None:
        met, facts["GPU"] = _break_even(options, model, rows, batch_size)
        document["break_even"] = met
    return Report(document, [Facts(facts), Table(columns, table)])


def _break_even(options: argparse.Namespace, model: predict.CostModel, rows: int, batch_size: int) -> tuple[Any, str]:
    run = Run(options.gpu)
    result = next((each for each in run.results.values() if each.subject.name == "local"), next(iter(run.results.values())))
    seconds = [each * rows / result.rows for each in result.epoch_seconds]
    met = predict.break_even(model, seconds, rows=rows, batch_size=batch_size)
    median = sorted(seconds)[len(seconds) // 2]
    told = f"{report.about(run)['machine']}: {median:.3g} s an epoch ({result.subject}); "
    told += "no number of workers matches it" if met.workers is None else f"matching it takes {met.workers}"
    told += f" (90 %: {met.low or 'none'} to {met.high or 'none'}){', extrapolated' if met.extrapolated else ''}"
    if options.price_gpu is not None:
        told += f"; an epoch costs {predict.cost(median, 1, options.price_gpu):.3g}"
    return _plain(met), told


def _report(options: argparse.Namespace) -> Report:
    runs = [Run(path) for path in options.results]
    return _told(runs, report.write(runs, options.out) if options.out else None)


def _told(runs: Sequence[Run], path: Path | None) -> Report:
    blocks: list[Block] = []
    document: list[Any] = []
    for run in runs:
        figures = run.figures()
        warnings = run.warnings()
        facts = report.about(run) | {f"warning {number}": text for number, text in enumerate(warnings, 1)}
        blocks += [Facts(facts), Table(report.SPEED, report.speed_rows(run))]
        if figures:
            blocks.append(Table(report.FIGURES, report.figure_rows(figures)))
        if report.work_rows(run):
            blocks.append(Table(report.WORK, report.work_rows(run)))
        document.append(
            {
                **run.about,
                "subjects": {name: _plain(result) for name, result in run.results.items()},
                "figures": [_plain(figure) for figure in figures],
                "warnings": warnings,
            }
        )
    if path is not None:
        blocks.append(Facts({"written": str(path)}))
    return Report({"runs": document, "written": path and str(path)}, blocks)


def _compare(options: argparse.Namespace) -> Report:
    runs = [Run(path) for path in options.results]
    prices = dict(_price(text, {run.about["id"] for run in runs}) for text in options.price)
    columns, rows = report.comparison(runs, prices)
    return Report([dict(zip(columns, row, strict=True)) for row in rows], [Table(columns, rows)])


def _price(text: str, known: set[str]) -> tuple[str, float]:
    name, _, price = text.rpartition("=")
    matching = [run for run in known if name and run.startswith(name)]
    try:
        if len(matching) == 1:
            return matching[0], float(price)
    except ValueError:
        pass
    raise ConfigError(f"Expected --price RUN=PER_HOUR; got {text!r}. Let RUN be the start of exactly one run's name.")


def _list(options: argparse.Namespace) -> Report:
    scenarios = [[name, ", ".join(find(name).subjects)] for name in built_in()]
    results = []
    for path in sorted(options.results.glob("*.jsonl")):
        run = Run(path)
        results.append([path.name, run.scenario.name, report.about(run)["machine"], run.about["started"]])
    columns = ["file", "scenario", "machine", "measured"]
    return Report(
        {"scenarios": dict(scenarios), "results": [dict(zip(columns, row, strict=True)) for row in results]},
        [Table(["scenario", "subjects"], scenarios), Table(columns, results)],
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(value)))


if __name__ == "__main__":
    sys.exit(main())
