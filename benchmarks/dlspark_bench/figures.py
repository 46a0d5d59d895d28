"""Read results: medians with their spread, ratios with an interval. Impossible results are rejected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark import DataError
from dlspark_bench.scenario import Figure, Scenario, Subject

LIMIT = 1.1
"""A result above this multiple of the measured peak is rejected. The peak is itself a measurement, so 1 is too strict."""

NOISY = 0.1
"""If a quarter of the turns deviate from the median by more than this, the machine was busy."""

_RESAMPLES = 2000


class ImpossibleError(DataError):
    """A result exceeds what the machine can do: the measurement is wrong."""


@dataclass(frozen=True)
class Spread:
    """A median and the interval that holds it with 95 % confidence, by the bootstrap over repeats (Efron, 1979).

    A single measurement (``count`` 1) has no interval: all three are its value.
    """

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class SubjectResult:
    """The measurements of one subject.

    Attributes:
        subject: its name, workers and threads.
        rows: images per epoch, over all workers.
        epoch_seconds: a steady epoch of each turn, in the order of the repeats, including work after the last step.
        steps_seconds: the part of each until the end of the last step.
        first_epoch_seconds: the first epoch, which traces the model.
        images_per_second: over all workers, in the steps of steady epochs.
        launch_seconds: from the call of ``fit`` to the first step of all workers, in the first launch.
        warm_launch_seconds: the same for later launches in the same Spark session.
        input_share: fraction of an epoch that the slowest worker waits for batches; None if not measured.
        communication_share: fraction of an epoch that is saved when the same workers do not exchange gradients; None if
            not measured. The rest of an epoch is compute.
        all_reduced_bytes: bytes that a worker sends, and receives, per epoch of ring all-reduces (Patarasuk and Yuan,
            2009); 0 if gradients are not summed in every step.
        gradient_bytes: bytes of the gradients, per step and worker.
        flops_per_second: over all workers; None if the model's operations are unknown.
        share_of_peak: flops_per_second as a fraction of the peak of matrix products on the same cores.
        peak_memory_bytes: largest resident set of a worker.
        driver_memory_bytes: largest resident set of the driver's Python and JVM; None if the driver is the worker.
        logs: loss and metrics of the last epoch.
        task: images per epoch and per step of one model. Final losses are comparable only between equal tasks.
        noisy: whether a quarter of the turns deviate from the median by more than `NOISY`.
    """

    subject: Subject
    rows: int
    epoch_seconds: tuple[float, ...]
    steps_seconds: tuple[float, ...]
    first_epoch_seconds: float
    images_per_second: Spread
    launch_seconds: float | None
    warm_launch_seconds: tuple[float, ...]
    input_share: float | None
    communication_share: float | None
    all_reduced_bytes: float
    gradient_bytes: int
    flops_per_second: float | None
    share_of_peak: float | None
    peak_memory_bytes: int
    driver_memory_bytes: int | None
    logs: Mapping[str, float]
    noisy: bool
    task: tuple[int, int]


@dataclass(frozen=True)
class FigureResult:
    """A figure and its measured value."""

    figure: Figure
    value: Spread

    @property
    def reached(self) -> bool:
        """Whether the median reaches the goal."""
        goal = self.figure.goal
        return self.value.median >= goal if self.figure.at_least else self.value.median <= goal

    @property
    def decided(self) -> bool:
        """Whether the whole interval is on one side of the goal."""
        return self.value.count > 1 and not self.value.low <= self.figure.goal <= self.value.high


class Run:
    """A results file.

    Raises:
        DataError: the file does not exist or was not written by `measure`.
        ImpossibleError: a subject exceeded `LIMIT` times the machine's measured peak.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            self.about: dict[str, Any] = next(line for line in lines if line["kind"] == "run")
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise DataError(f"Expected results in {str(path)!r}; got an error: {error}. Check the path.") from error
        self.path = Path(path)
        self.scenario = Scenario.from_dict(self.about["scenario"])
        self._lines = lines
        self.peaks = {line["threads"]: float(line["flops"]) for line in lines if line["kind"] == "peak"}
        # The model's properties are equal for all subjects, so take the first report.
        self._model: dict[str, Any] = next((line for line in lines if "flops_per_image" in line), {})
        self.results = {name: self._result(Subject.parse(name)) for name in self.scenario.subjects}
        for result in self.results.values():
            fastest = (result.share_of_peak or 0) * float(np.median(result.steps_seconds)) / min(result.steps_seconds)
            if fastest > LIMIT:
                raise ImpossibleError(
                    f"Expected {result.subject} in {str(path)!r} to stay below its cores' measured peak; got {fastest:.2f} "
                    f"times the peak. The measurement is wrong: nothing is reported. Check the clock and measure again."
                )

    @property
    def oversubscribed(self) -> set[str]:
        """Subjects with more threads than the machine has cores."""
        there = self.about["hardware"]["cores"]
        names = self.scenario.subjects
        return {name for name in names if Subject.parse(name).cores > there and self.scenario.device == "cpu"}

    def figures(self) -> list[FigureResult]:
        """Return the scenario's figures, each from paired repeats of its subjects."""
        return [FigureResult(figure, self._figure(figure)) for figure in self.scenario.figures]

    def ratio(self, of: str, over: str) -> Spread:
        """Return the ratio of the subjects' images per second, from paired repeats."""
        return spread(self._rates(of) / self._rates(over))

    def warnings(self) -> list[str]:
        """Return the reasons to doubt the numbers."""
        found = []
        noisy = [name for name, result in self.results.items() if result.noisy]
        if noisy:
            found.append(
                f"A quarter of the turns of {', '.join(noisy)} are over {NOISY:.0%} off the median: the machine was busy."
            )
        found += [
            f"{name} has more threads than the machine has cores, so its workers wait for each other."
            for name in sorted(self.oversubscribed)
        ]
        found += [
            f"{each.figure.id}: the spread {each.value} leaves open whether the goal {each.figure.goal:g} is reached."
            for each in self.figures()
            if not each.decided and each.value.count > 1
        ]
        found += [f"{name} was deliberately slowed by {delay} s per step." for name, delay in self.about["delays"].items()]
        by_task: dict[tuple[int, int], dict[str, float]] = {}
        for name, result in self.results.items():
            if "loss" in result.logs:
                by_task.setdefault(result.task, {})[name] = result.logs["loss"]
        for losses in by_task.values():
            if learned_less(max(losses.values()), min(losses.values())):
                said = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                found.append(f"Final losses differ for equal images and batches: {said}.")
        return found

    def _rates(self, name: str) -> NDArray[np.float64]:
        return self.results[name].rows / np.array(self.results[name].steps_seconds)

    def _figure(self, figure: Figure) -> Spread:
        of = self.results[figure.of]
        over = None if figure.over is None else self.results[figure.over]
        if figure.quantity in {"launch_seconds", "warm_launch_seconds"}:
            a = _launches(of, figure)
            return spread(a if over is None else a - _launches(over, figure))
        if figure.quantity == "images_per_second":
            return of.images_per_second if over is None else self.ratio(figure.of, str(over.subject))
        a = np.array(of.steps_seconds)
        return spread(a if over is None else a / np.array(over.steps_seconds))

    def _of_kind(self, kind: str, subject: Subject) -> list[dict[str, Any]]:
        return [line for line in self._lines if line["kind"] == kind and line["subject"] == str(subject)]

    def _result(self, subject: Subject) -> SubjectResult:
        turns = sorted(self._of_kind("turn", subject), key=lambda line: line["turn"])
        told = self._of_kind("process", subject)
        if len(turns) < 2 or not told:
            raise DataError(f"Expected steady turns of {subject} in {str(self.path)!r}; got none. Measure it again.")
        steps = np.array([line["steps_seconds"] for line in turns[1:]])
        rows = self.scenario.rows(subject)
        models = subject.processes
        rate = spread(rows / steps)
        operations = self._model.get("flops_per_image") if subject.trains else None
        flops = None if operations is None else operations * rate.median
        peak = self.peaks.get(subject.threads)
        workers = turns[-1]["workers"]
        epoch_seconds = tuple(float(line["seconds"]) for line in turns[1:])
        launches = self._launch_seconds(subject, told)
        return SubjectResult(
            subject=subject,
            rows=rows,
            epoch_seconds=epoch_seconds,
            steps_seconds=tuple(steps.tolist()),
            first_epoch_seconds=float(turns[0]["seconds"]),
            images_per_second=rate,
            launch_seconds=next(iter(launches), None),
            warm_launch_seconds=tuple(launches[1:]),
            input_share=self._input_share(told, float(np.median(epoch_seconds))),
            communication_share=self._communication_share(subject, epoch_seconds),
            all_reduced_bytes=self._all_reduced_bytes(subject),
            gradient_bytes=int(self._model.get("gradient_bytes", 0)),
            flops_per_second=flops,
            share_of_peak=None if flops is None or not peak else flops / (peak * subject.workers),
            peak_memory_bytes=max(worker["peak_memory_bytes"] for worker in self._workers(workers, told)),
            driver_memory_bytes=None if subject.alone else max(map(_driver_bytes, told)),
            # Equal on all of dlspark's workers; other workers report the logs of their own rows.
            logs={name: float(np.mean([each["logs"][name] for each in workers])) for name in workers[0]["logs"]},
            task=(rows // models, self.scenario.batch_size(subject) // models),
            noisy=float(np.quantile(np.abs(steps / np.median(steps) - 1), 0.75)) > NOISY,
        )

    def _launch_seconds(self, subject: Subject, told: list[dict[str, Any]]) -> list[float]:
        """Return the first launch, then the warm ones. Elephas reports no step, so ``fit`` does; bare Elephas has none."""
        seen = [line["seconds_to_first_step"] for line in self._of_kind("launch", subject)]
        if None in seen:
            return [fit["time_to_first_step_seconds"] for fit in told[0]["fits"]]
        return [float(seconds) for seconds in seen]

    def _workers(self, reports: list[dict[str, Any]], told: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the reports with the workers' memory: those of ``fit`` under dlspark, else those of the turn."""
        return [worker for each in told for fit in each["fits"][:1] for worker in fit["workers"]] or reports

    def _input_share(self, told: list[dict[str, Any]], epoch_seconds: float) -> float | None:
        waited = [worker["input_seconds"] for each in told for fit in each["fits"][:1] for worker in fit["workers"]]
        return max(waited) / self.scenario.all_epochs / epoch_seconds if waited else None

    def _communication_share(self, subject: Subject, epoch_seconds: tuple[float, ...]) -> float | None:
        """Return the fraction of an epoch saved when the same workers skip the all-reduce."""
        silent = str(Subject("local", subject.workers, subject.threads))
        if subject.alone or subject.name.startswith("bare-") or silent not in self.scenario.subjects:
            return None
        lines = self._of_kind("turn", Subject.parse(silent))
        without = np.array([line["seconds"] for line in sorted(lines, key=lambda line: line["turn"])[1:]])
        return float(np.median(1 - without / np.array(epoch_seconds)))

    def _all_reduced_bytes(self, subject: Subject) -> float:
        if subject.alone or subject.told_by_driver:
            return 0.0
        steps = -(-self.scenario.rows(subject) // self.scenario.batch_size(subject))
        return 2 * (subject.workers - 1) / subject.workers * self._model.get("gradient_bytes", 0) * steps


def _launches(result: SubjectResult, figure: Figure) -> NDArray[np.float64]:
    found = [result.launch_seconds] if figure.quantity == "launch_seconds" else list(result.warm_launch_seconds)
    if not found or None in found:
        raise DataError(f"Expected {figure.quantity} of {result.subject} for {figure.id!r}; got none. Remove the figure.")
    return np.array(found, np.float64)


def _driver_bytes(told: dict[str, Any]) -> int:
    return int(told["peak_memory_bytes"]) + int(told["jvm_peak_memory_bytes"] or 0)


def spread(values: Sequence[float] | NDArray[np.float64]) -> Spread:
    """Return the median of repeats and its 95 % interval."""
    array = np.asarray(values, np.float64)
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(array, (_RESAMPLES, len(array))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Spread(float(np.median(array)), float(low), float(high), len(array))


def learned_less(loss: float, other: float) -> bool:
    """Return whether a final loss is too much worse than another for a speed comparison."""
    return loss > 1.25 * other + 0.05


def differ(ratio: Spread) -> bool:
    """Return whether two subjects differ: the interval of their ratio excludes 1."""
    return not ratio.low <= 1 <= ratio.high
