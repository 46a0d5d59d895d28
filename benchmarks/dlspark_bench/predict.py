"""Predict the epoch of N workers, and how many workers match a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlspark import ConfigError
from dlspark_bench.cost_model import (
    DRAWS,
    INTERVAL,
    CostModel,
    Measured,
    Prediction,
    comparable,
    epoch_terms,
    expect,
    expect_seconds,
    expect_shares,
    fewest_rows,
    fit,
    resampled_medians,
)
from dlspark_bench.figures import Run

__all__ = ["BreakEven", "CostModel", "LeftOut", "Measured", "Prediction", "break_even", "check", "cost", "fit", "measured"]


def measured(runs: Sequence[Run], backend: str, threads: int = 1) -> list[Measured]:
    """Return the measured configurations of ``backend``; one `local` worker counts as its single worker.

    Args:
        runs: runs of one model, in one fine-tuning mode.
        backend: a subject's name.
        threads: per worker.

    Raises:
        ConfigError: no configuration matches, or the runs measured different work.
    """
    found = []
    for run in runs:
        if run.scenario.work != runs[0].scenario.work:
            raise ConfigError(f"Expected runs of equal work; got {run.scenario.work} in {run.path.name}. Leave it out.")
        for name, result in run.results.items():
            subject = result.subject
            if subject.threads != threads or (subject.name, subject.workers == 1) not in {
                (backend, False), (backend, True), ("local", True)
            }:  # fmt: skip
                continue
            found.append(
                Measured(
                    workers=subject.workers,
                    threads=threads,
                    rows=result.rows,
                    batch_size=run.scenario.batch_size(subject),
                    epoch_seconds=result.epoch_seconds,
                    launch_seconds=None if subject.name == "local" else result.launch_seconds,
                    gradient_bytes=result.gradient_bytes,
                    oversubscribed=name in run.oversubscribed,
                )
            )
    if not any(each.workers > 1 for each in found) and backend != "local":
        raise ConfigError(f"Expected runs of {backend!r} with {threads} threads per worker; got none. Measure them first.")
    return found


@dataclass(frozen=True)
class LeftOut:
    """The largest worker count, its median epoch, the prediction from fewer workers, and predicted / measured − 1."""

    workers: int
    measured_seconds: float
    predicted: Prediction
    error: float


@dataclass(frozen=True)
class BreakEven:
    """The fewest workers whose epoch takes no longer than the GPU's, with a 90 % interval.

    None: no allowed number of workers suffices. ``high`` is None if that is so in more than one draw in twenty.
    """

    workers: int | None
    low: int | None
    high: int | None
    extrapolated: bool


def check(measured: Sequence[Measured], *, seed: int = 0) -> tuple[LeftOut | None, str]:
    """Predict the runs with the most workers from those with fewer; return the worst prediction and a description.

    Returns None and the reason if the runs that are not oversubscribed have only one worker count. ConfigError as in `fit`.
    """
    kept = comparable(measured)
    largest = max(run.workers for run in kept)
    fewer = [run for run in kept if run.workers < largest]
    if not fewer:
        return None, f"Not checked: all runs in the fit have {largest} workers. Measure a second number of workers."
    model, results = fit(fewer, seed=seed), []
    for run in (run for run in kept if run.workers == largest):
        of = model.predict(largest, rows=run.rows, batch_size=run.batch_size)
        seconds = float(np.median(run.epoch_seconds))
        results.append(LeftOut(largest, seconds, of, of.epoch_seconds / seconds - 1))
    worst = max(results, key=lambda result: abs(result.error))
    of, seconds = worst.predicted, worst.measured_seconds
    said = (
        f"predicted {of.epoch_seconds:.3g} s ({of.low:.3g} to {of.high:.3g}), measured {seconds:.3g} s: {worst.error:+.1%}."
    )
    return worst, " ".join([f"{largest} workers, left out of the fit: {said}", *model.assumptions])


def break_even(
    model: CostModel,
    gpu_epoch_seconds: Sequence[float],
    *,
    rows: int,
    batch_size: int | None = None,
    batch_size_per_worker: int | None = None,
    max_workers: int = 1024,
    seed: int = 0,
) -> BreakEven:
    """Return the fewest workers that match the GPU's median epoch over the same ``rows``.

    ``batch_size`` keeps the batch constant, so the number of workers does not affect training. ``batch_size_per_worker``
    makes it grow with the workers: fewer, larger steps, which may learn less. ConfigError for both or neither.
    """
    batches = (batch_size, batch_size_per_worker)
    expect(batches.count(None) == 1, "batch_size or batch_size_per_worker", batches, "Give one of them.")
    expect(max_workers >= 1, "max_workers of 1 or more", max_workers, "Leave it out for 1024.")
    expect_seconds("gpu_epoch_seconds", gpu_epoch_seconds)

    def batch(workers: int) -> int:
        return batch_size if batch_size is not None else workers * (batch_size_per_worker or 0)

    expect_shares(1, rows, batch(1))
    counts = np.array([n for n in range(1, max_workers + 1) if n <= fewest_rows(rows, batch(n))])
    epochs = model.draws @ np.array([epoch_terms(n, rows, batch(n), model.gradient_bytes) for n in counts.tolist()]).T
    # Not the fit's seed, because the GPU's repeats are independent of the workers'.
    met = epochs <= resampled_medians(gpu_epoch_seconds, np.random.default_rng(seed + 1))[:, None]
    fewest = np.sort(np.where(met.any(axis=1), counts[met.argmax(axis=1)], max_workers + 1)).tolist()
    low, high = (fewest[round(at * (DRAWS - 1))] for at in INTERVAL)
    enough = counts[np.median(epochs, axis=0) <= np.median(gpu_epoch_seconds)].tolist()
    workers = enough[0] if enough else None
    outside = workers is None or model.predict(workers, rows=rows, batch_size=batch(workers)).extrapolated
    return BreakEven(workers, low if low <= max_workers else None, high if high <= max_workers else None, outside)


def cost(epoch_seconds: float, workers: int, price_per_worker_hour: float) -> float:
    """Return the cost of an epoch, in the currency of the price. A GPU is one worker."""
    return epoch_seconds / 3600 * workers * price_per_worker_hour
