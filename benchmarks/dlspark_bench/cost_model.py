"""CostModel: predict the epoch of N workers from measured runs.

A synchronous step lasts as long as its slowest worker computes, plus a ring all-reduce among N workers::

    epoch = steps × (step + row × rows of the slowest worker + hop × 2(N−1) + byte × 2(N−1)/N × gradient bytes)

with steps = ceil(rows / batch_size). ``step``, ``row``, ``hop`` and ``byte`` are seconds, none below 0; 1 / ``byte`` is
the bandwidth. Communication that overlaps with compute costs nothing, so a fitted bandwidth may exceed the network's.

Ring all-reduce: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal of
Parallel and Distributed Computing 69(2), 2009: 2(N−1) rounds, in each of which a worker sends an N-th of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from dlspark import ConfigError

Array = np.ndarray[Any, np.dtype[np.float64]]
TERMS = ("step", "row", "hop", "byte")
STEP, ROW, HOP, BYTE = range(4)
DRAWS = 500
INTERVAL = (0.05, 0.95)

# Uneven division of rows changes a column by about a row. A column within this distance (the sine of the angle) of the
# chosen columns differs from them by little more than such rounding; fitting it too would only fit noise.
SEPARABLE = 0.05


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One configuration, run once or several times; ConfigError if it is impossible.

    Attributes:
        workers: number of workers.
        threads: per worker.
        rows: per epoch, over all workers.
        batch_size: the most rows of a step, over all workers.
        epoch_seconds: one steady epoch for each repeat.
        launch_seconds: from the call of fit to the first step; None when unknown.
        gradient_bytes: per worker and all-reduce.
        oversubscribed: more threads than cores. Such runs are excluded from the fit.
    """

    workers: int
    threads: int
    rows: int
    batch_size: int
    epoch_seconds: tuple[float, ...]
    launch_seconds: float | None
    gradient_bytes: int
    oversubscribed: bool

    def __post_init__(self) -> None:
        expect_shares(self.workers, self.rows, self.batch_size)
        expect(self.threads >= 1, "threads of 1 or more", self.threads, "Give the threads of each worker.")
        expect(self.gradient_bytes >= 0, "gradient_bytes of 0 or more", self.gradient_bytes, "Give 0 for no all-reduce.")
        expect_seconds("epoch_seconds", self.epoch_seconds)
        if self.launch_seconds is not None:
            expect_seconds("launch_seconds", [self.launch_seconds])


@dataclass(frozen=True)
class Prediction:
    """The median epoch and its 90 % interval, which covers the scatter of the repeats but not `CostModel.assumptions`.

    ``extrapolated``: the worker count or a worker's rows per step are outside the measured range, or a bandwidth was given.
    """

    workers: int
    epoch_seconds: float
    low: float
    high: float
    extrapolated: bool
    launch_seconds: float | None


@dataclass(frozen=True, eq=False)
class CostModel:
    """A fitted model, valid for one network, one fine-tuning mode and one number of threads per worker.

    Attributes:
        draws: float64, shape (500, 4): the seconds named in ``TERMS``, refitted to each draw of the bootstrap.
        launch: the seconds of a launch and the further seconds per worker; None if not measured.
        gradient_bytes: per worker and all-reduce.
        measured_workers: the smallest and the largest measured worker count.
        measured_shares: the smallest and the largest measured number of rows per worker and step.
        bandwidth_given: whether the bandwidth was given instead of fitted.
        assumptions: sentences on what the runs could not determine and what was assumed instead.
    """

    draws: Array
    launch: tuple[float, float] | None
    gradient_bytes: int
    measured_workers: tuple[int, int]
    measured_shares: tuple[float, float]
    bandwidth_given: bool
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> dict[str, float]:
        """The median of each term, in seconds per step, row, hop and byte."""
        return dict(zip(TERMS, np.median(self.draws, axis=0).tolist(), strict=True))

    def predict(self, workers: int, *, rows: int, batch_size: int) -> Prediction:
        """Predict an epoch of ``rows`` in steps of at most ``batch_size``, over all workers; ConfigError if impossible."""
        expect_shares(workers, rows, batch_size)
        terms = epoch_terms(workers, rows, batch_size, self.gradient_bytes)
        low, median, high = np.quantile(self.draws @ terms, [INTERVAL[0], 0.5, INTERVAL[1]]).tolist()
        (fewest, most), share = self.measured_shares, terms[ROW] / terms[STEP]
        inside = self.measured_workers[0] <= workers <= self.measured_workers[1] and fewest - 1 < share < most + 1
        launch = None if self.launch is None else self.launch[0] + self.launch[1] * workers
        return Prediction(workers, median, low, high, not inside or (self.bandwidth_given and workers > 1), launch)


def fit(measured: Sequence[Measured], *, bandwidth_bytes_per_second: float | None = None, seed: int = 0) -> CostModel:
    """Fit the terms that the runs can separate, by non-negative least squares on relative errors of medians.

    Args:
        measured: runs of one model, with one number of threads per worker.
        bandwidth_bytes_per_second: of the network to predict, per worker and direction, without overlap with compute; None
            keeps the measured one. Runs that cannot separate communication from compute are assumed to have had it.
        seed: of the bootstrap; equal runs and seeds give equal models.

    Raises:
        ConfigError: there is no run to fit, the runs are not comparable, or the bandwidth is impossible.
    """
    kept, given = comparable(measured), bandwidth_bytes_per_second
    terms = np.array([epoch_terms(run.workers, run.rows, run.batch_size, run.gradient_bytes) for run in kept])
    weights = 1 / np.array([np.median(run.epoch_seconds) for run in kept])
    rng = np.random.default_rng(seed)
    seconds = np.stack([resampled_medians(run.epoch_seconds, rng) for run in kept], axis=1)
    separable = _separable(terms * weights[:, None])
    expect(given is None or 0 < given < math.inf, "bandwidth_bytes_per_second above 0", given, "10 Gbit/s are 1.25e9.")
    if given is not None and BYTE not in separable:
        seconds = seconds - terms[:, BYTE] / given
        enough = "a bandwidth at which the all-reduces take less than a measured epoch"
        expect(seconds.min() > 0, enough, given, "Give the bandwidth of these runs.")
    draws = np.zeros((DRAWS, len(TERMS)))
    draws[:, separable] = _non_negative(terms[:, separable] * weights[:, None], seconds * weights)
    if given is not None:
        draws[:, BYTE] = 1 / given
    workers, shares = [run.workers for run in kept], (terms[:, ROW] / terms[:, STEP]).tolist()
    return CostModel(
        draws=draws,
        launch=_launch(kept),
        gradient_bytes=kept[0].gradient_bytes,
        measured_workers=(min(workers), max(workers)),
        measured_shares=(min(shares), max(shares)),
        bandwidth_given=given is not None,
        assumptions=_assumptions(kept, len(measured) - len(kept), separable, given),
    )


def epoch_terms(workers: int, rows: int, batch_size: int, gradient_bytes: int) -> Array:
    """Return the factors of the terms of an epoch, shape (4,). Steps, and shares of a step, differ by at most a row."""
    steps = -(-rows // batch_size)
    least, larger = divmod(rows, steps)
    slowest = (steps - larger) * -(-least // workers) + larger * -(-(least + 1) // workers)
    rounds = 2 * (workers - 1) * steps
    return np.array([steps, slowest, rounds, rounds / workers * gradient_bytes], np.float64)


def _separable(columns: Array) -> list[int]:
    """Return the terms that the runs can separate. Earlier terms absorb the seconds of those that they cannot."""
    lengths = np.linalg.norm(columns, axis=0)
    columns, chosen = columns / np.where(lengths > 0, lengths, 1), list[int]()
    for term in (ROW, BYTE, STEP, HOP):
        others, column = columns[:, chosen], columns[:, term]
        if np.linalg.norm(column - others @ (np.linalg.pinv(others) @ column)) > SEPARABLE:
            chosen.append(term)
    return chosen


def _non_negative(columns: Array, targets: Array) -> Array:
    """Solve non-negative least squares for each row of targets."""
    return np.array([nnls(columns, target)[0] for target in targets])


def resampled_medians(seconds: Sequence[float], rng: np.random.Generator) -> Array:
    """Return the medians of the bootstrap, shape (500,)."""
    return np.median(rng.choice(seconds, size=(DRAWS, len(seconds))), axis=1)


def _launch(kept: Sequence[Measured]) -> tuple[float, float] | None:
    known = [(run.workers, run.launch_seconds) for run in kept if run.launch_seconds is not None]
    if not known:
        return None
    workers, seconds = np.array(known, np.float64).T
    if len(set(workers)) == 1:
        return float(seconds.mean()), 0.0
    constant, slope = _non_negative(np.stack([np.ones_like(workers), workers], axis=1), seconds[None])[0].tolist()
    return constant, slope


def _assumptions(kept: Sequence[Measured], dropped: int, separable: list[int], given: float | None) -> tuple[str, ...]:
    said = []
    if BYTE not in separable and given is None:
        said.append(
            "The runs cannot separate communication from compute, so more workers are predicted too fast: give a bandwidth."
        )
    if given is not None:
        had = "" if BYTE in separable else " The runs are assumed to have had it too."
        said.append(f"A bandwidth of {given:,.0f} bytes/s was given, not measured, and does not overlap with compute.{had}")
    if HOP not in separable:
        said.append("The runs cannot separate latency from bandwidth, so an all-reduce is assumed to cost only its bytes.")
    if STEP not in separable:
        lost = " Replacing the measured bandwidth removed part of it." if given is not None and BYTE in separable else ""
        said.append(f"The runs cannot separate the fixed cost of a step from rows and all-reduces, which include it.{lost}")
    if min(len(run.epoch_seconds) for run in kept) < 3:
        said.append("Some runs have fewer than 3 repeats: the interval is narrower than it should be.")
    if dropped:
        said.append(f"Oversubscribed runs excluded from the fit: {dropped}.")
    return tuple(said)


def comparable(measured: Sequence[Measured]) -> list[Measured]:
    kept = [run for run in measured if not run.oversubscribed]
    expect(
        bool(kept), "a run that is not oversubscribed", f"{len(measured)} runs", "Measure with no more threads than cores."
    )
    alike = sorted({(run.threads, run.gradient_bytes) for run in kept})
    expect(len(alike) == 1, "runs alike in threads per worker and gradient_bytes", alike, "Fit each kind separately.")
    return kept


def fewest_rows(rows: int, batch_size: int) -> int:
    """Return the fewest rows of a step, over all workers."""
    return rows // -(-rows // batch_size)


def expect_shares(workers: int, rows: int, batch_size: int) -> None:
    counted = {"workers": workers, "rows": rows, "batch_size": batch_size}
    enough = min(counted.values()) >= 1 and workers <= fewest_rows(rows, batch_size)
    expect(enough, "at least one row per worker in every step", counted, "Use fewer workers or a larger batch.")


def expect_seconds(name: str, seconds: Sequence[float]) -> None:
    fine = len(seconds) > 0 and all(0 < value < math.inf for value in seconds)
    expect(fine, f"{name} above 0", seconds, "Leave out runs that failed.")


def expect(holds: bool, expected: str, received: object, do: str) -> None:
    if not holds:
        raise ConfigError(f"Expected {expected}; got {received!r}. {do}")
