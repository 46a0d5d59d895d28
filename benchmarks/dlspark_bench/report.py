"""Write results as tables, pictures and one offline page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark import ConfigError
from dlspark.report import Page, new_figure, png, shown
from dlspark_bench.figures import FigureResult, Run, Spread, SubjectResult, differ, learned_less

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
_NARROW = "\u202f"  # a no-break space

SPEED = ["subject", "images/s", "95 %", "epoch s", "first epoch s", "first step after s", "warm s"]
WORK = [
    "subject", "input", "communication", "compute", "GFLOP/s", "of peak", "all-reduced MB", "worker MB", "driver MB",
    "loss", "accuracy",
]  # fmt: skip
FIGURES = ["figure", "what", "result", "95 %", "goal", "reached"]
COMPARISON = ["run", "subject", "batch", "dtype", "images/s", "ratio", "95 %", "loss", "verdict"]
NOTES = (
    "Images per second are medians over the steps of steady epochs; an epoch's seconds also include the work after its last "
    "step. Intervals are 95 % confidence intervals of the median. The turns of all subjects interleave, and a figure is a "
    "ratio of two subjects, from paired repeats. Input, communication and compute are shares of an epoch: waiting for "
    "batches, the extra time over an epoch without gradient exchange, and the rest. All-reduced MB are sent per worker and "
    "epoch. The peak is that of matrix products on the same cores."
)


def speed_rows(run: Run) -> list[list[Any]]:
    """Return the speed of each subject, in the order of the scenario."""
    return [
        [
            str(result.subject) + (" (oversubscribed)" if str(result.subject) in run.oversubscribed else ""),
            number(result.images_per_second.median),
            interval(result.images_per_second),
            _rounded(_median(result.epoch_seconds), 2),
            round(result.first_epoch_seconds, 1),
            _rounded(result.launch_seconds, 1),
            _rounded(_median(result.warm_launch_seconds), 1),
        ]
        for result in run.results.values()
    ]


def work_rows(run: Run) -> list[list[Any]]:
    """Return the time shares, resources and final metrics of each subject."""
    return [_work(result) for result in run.results.values() if result.subject.trains]


def figure_rows(results: Sequence[FigureResult]) -> list[list[Any]]:
    """Return a row for each figure; a figure within the noise is labelled."""
    return [
        [
            each.figure.id,
            each.figure.title,
            number(each.value.median),
            interval(each.value),
            f"{'≥' if each.figure.at_least else '≤'}{_NARROW}{each.figure.goal:,g}",
            ("yes" if each.reached else "no") + _doubt(each),
        ]
        for each in results
    ]


def about(run: Run) -> dict[str, str]:
    """Describe the scenario and the machine."""
    scenario, machine = run.scenario, run.about["hardware"]
    versions = run.about["versions"]
    gpus = ", ".join(f"{gpu['name']} {gpu['uuid']}" for gpu in machine["gpus"]) if scenario.device == "gpu" else ""
    flags = f" ({', '.join(machine['cpu_flags'])})" if machine["cpu_flags"] else ""
    framework = run.about["keras_backend"]
    others = {"tensorflow", "jax", "torch"} - {framework}
    return {
        "scenario": f"{scenario.name}: {scenario.model}, {scenario.image_size} px, {scenario.batch_per_core} images a step "
        f"and {scenario.rows_per_core} an epoch for each core, {scenario.dtype}, trained: {scenario.fine_tune}, "
        f"{'generated images' if scenario.data is None else 'prepared images'}",
        "machine": f"{gpus or machine['cpu']}{flags}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB",
        "versions": ", ".join(f"{name} {versions[name]}" for name in versions if name not in others),
        "commit": run.about["commit"] or "unknown",
        "measured": f"{run.about['started']}, {scenario.repeats} repeats of {scenario.epochs} epochs, "
        f"{run.about['seconds']:.0f} s in total",
    }


def comparison(runs: Sequence[Run], prices: dict[str, float]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows that compare each subject with the first subject of the first run.

    Args:
        runs: the runs to compare.
        prices: price of a machine hour, by run id; adds a column with the cost of the first subject's epoch.

    Raises:
        ConfigError: the runs measured different work.
    """
    for run in runs[1:]:
        work = runs[0].scenario.work
        differing = [name for name, value in work.items() if run.scenario.work[name] != value]
        if differing:
            told = "; ".join(f"{name}: {work[name]!r} and {run.scenario.work[name]!r}" for name in differing)
            raise ConfigError(f"Expected runs of equal work; got {runs[0].path.name} and {run.path.name}: {told}. Drop one.")
    base = next(iter(runs[0].results.values()))
    columns = [*COMPARISON, *([f"cost of {base.rows:,} images"] if prices else [])]
    rows = []
    for run in runs:
        for name, result in run.results.items():
            if run is runs[0]:
                ratio = run.ratio(name, str(base.subject))
            else:  # not interleaved, so combine both intervals in full
                of, over = result.images_per_second, base.images_per_second
                ratio = Spread(of.median / over.median, of.low / over.high, of.high / over.low, min(of.count, over.count))
            told = "the base" if result is base else "" if differ(ratio) else "cannot be told apart"
            if name in run.oversubscribed:
                told = "oversubscribed"
            loss, other = result.logs.get("loss"), base.logs.get("loss")
            alike = loss is not None and other is not None and result.task == base.task
            if alike and learned_less(loss or 0.0, other or 0.0):
                told = ", ".join(filter(None, (told, "learned less")))
            row = [
                run.about["id"],
                name,
                run.scenario.batch_size(result.subject),
                run.scenario.dtype,
                number(result.images_per_second.median),
                round(ratio.median, 3),
                interval(ratio),
                _rounded(loss, 3),
                told,
            ]
            if prices:
                price = prices.get(run.about["id"])
                row.append(price and float(f"{price * base.rows / result.images_per_second.median / 3600:.3g}"))
            rows.append(row)
    return columns, rows


def number(value: float) -> float:
    """Round to three digits, or to a whole number."""
    return round(value) if abs(value) >= 100 else float(f"{value:.3g}")


def interval(value: Spread) -> str:
    """Format the bounds for a table, or "once" for a single measurement."""
    if value.count == 1:
        return "once"
    return f"{number(value.low):,}{_NARROW}–{_NARROW}{number(value.high):,}"


def write(runs: Sequence[Run], out: Path) -> Path:
    """Write the page and the pictures of runs; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    page = Page("dlspark: measured")
    for run in runs:
        page.heading(run.scenario.name)
        for warning in run.warnings():
            page.warning(warning)
        for name, value in about(run).items():
            page.text(f"{name}: {value}")
        found = run.figures()
        if found:
            page.table(FIGURES, figure_rows(found))
        page.table(SPEED, speed_rows(run))
        picture = png(_bars(run))
        page.picture(picture, f"images per second of each subject, scenario {run.scenario.name}")
        (out / f"{run.about['id']}.png").write_bytes(picture)
        if work_rows(run):
            page.table(WORK, work_rows(run))
    page.text(NOTES)
    path = out / PAGE
    path.write_text(page.render(), encoding="utf-8")
    return path


def _doubt(result: FigureResult) -> str:
    if result.decided:
        return ""
    return ", measured once" if result.value.count == 1 else ", within the noise"


def _work(result: SubjectResult) -> list[Any]:
    counted = [share for share in (result.input_share, result.communication_share) if share is not None]
    compute = 1 - sum(counted) if len(counted) == 2 or (counted and result.subject.alone) else None
    return [
        str(result.subject),
        _percent(result.input_share),
        _percent(result.communication_share),
        _percent(compute),
        _rounded(result.flops_per_second and result.flops_per_second / 1e9, 1),
        _percent(result.share_of_peak),
        round(result.all_reduced_bytes / 1e6),
        round(result.peak_memory_bytes / 1e6),
        None if result.driver_memory_bytes is None else round(result.driver_memory_bytes / 1e6),
        _rounded(result.logs.get("loss"), 3),
        _rounded(result.logs.get("accuracy"), 3),
    ]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _bars(run: Run) -> Figure:
    """Plot images per second by subject, with a dot for each turn."""
    names = list(run.results)
    figure = new_figure(8, 0.9 + 0.42 * len(names))
    axis = figure.subplots()
    for place, result in enumerate(run.results.values()):
        axis.barh(place, result.images_per_second.median, color="#9ecae1")
        rates = [result.rows / seconds for seconds in result.steps_seconds]
        axis.plot(rates, [place] * len(rates), "o", markersize=3, color="#08519c")
    axis.set_yticks(range(len(names)), [shown(name) for name in names])
    axis.invert_yaxis()
    axis.set(xlabel="images/s over all workers (bar: median; dots: turns)", title=run.scenario.name)
    return figure
