"""The cost model on synthetic runs of a known truth, whose formula is implemented here independently."""

import math

import numpy as np
import pytest

from dlspark import ConfigError
from dlspark_bench.predict import CostModel, Measured, break_even, check, cost, fit

GRADIENTS = 100_000_000
TRUTH = {"step": 0.05, "row": 0.03, "hop": 0.002, "byte": 1e-9}
ROWS = 6400
THREE_COUNTS = [(1, 64), (2, 64), (4, 64)]
ALL_TERMS = [*THREE_COUNTS, (1, 32), (4, 128)]


def truth(workers: int, batch_size: int, *, step: float, row: float, hop: float, byte: float) -> float:
    """Return the seconds of an epoch, for batch sizes that divide 6,400 and workers that divide the batch size."""
    exchange = 2 * (workers - 1) * (hop + byte * GRADIENTS / workers)
    return ROWS / batch_size * (step + row * batch_size / workers + exchange)


def run(
    workers: int, batch_size: int, *, noise: float = 0.0, repeats: int = 5, seed: int = 0, **changes: object
) -> Measured:
    terms = TRUTH | {name: changes.pop(name) for name in TRUTH if name in changes}
    scatter = np.random.default_rng([seed, workers, batch_size]).normal(1, noise, repeats)
    settings = {
        "workers": workers,
        "threads": 1,
        "rows": ROWS,
        "batch_size": batch_size,
        "epoch_seconds": tuple(truth(workers, batch_size, **terms) * scatter),
        "launch_seconds": 3 + 0.25 * workers,
        "gradient_bytes": GRADIENTS,
        "oversubscribed": False,
    }
    return Measured(**settings | changes)


def runs(configurations: list[tuple[int, int]], **changes: object) -> list[Measured]:
    return [run(workers, batch_size, **changes) for workers, batch_size in configurations]


def says(model: CostModel, words: str) -> bool:
    return any(words in sentence for sentence in model.assumptions)


class TestFit:
    def test_every_term_is_recovered_where_the_runs_tell_them_apart(self):
        model = fit(runs(ALL_TERMS))
        assert model.seconds == pytest.approx(TRUTH)
        assert model.assumptions == ()

    def test_an_epoch_of_eight_workers_is_inside_the_interval_nine_times_in_ten(self):
        expected = truth(8, 64, **TRUTH)
        found = [
            fit(runs(THREE_COUNTS, noise=0.02, seed=seed, hop=0.002)).predict(8, rows=ROWS, batch_size=64)
            for seed in range(100)
        ]
        assert 80 <= sum(each.low <= expected <= each.high for each in found) <= 99
        assert np.median([each.epoch_seconds for each in found]) == pytest.approx(expected, rel=0.03)

    def test_the_interval_grows_with_the_noise(self):
        wide, narrow = (fit(runs(ALL_TERMS, noise=noise)).predict(8, rows=ROWS, batch_size=64) for noise in (0.04, 0.01))
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low) > 0

    def test_the_same_seed_gives_the_same_interval(self):
        one, two, other = (fit(runs(THREE_COUNTS, noise=0.02), seed=seed) for seed in (1, 1, 2))
        assert np.array_equal(one.draws, two.draws)
        assert not np.array_equal(one.draws, other.draws)

    def test_oversubscribed_runs_change_nothing_and_are_counted(self):
        crowded = run(8, 64, step=5.0, oversubscribed=True, threads=2)
        alone, beside = fit(runs(ALL_TERMS)), fit([*runs(ALL_TERMS), crowded])
        assert np.array_equal(alone.draws, beside.draws)
        assert beside.measured_workers == (1, 4)
        assert beside.assumptions == ("Oversubscribed runs excluded from the fit: 1.",)

    def test_no_term_is_negative_where_workers_gain_more_than_their_number(self):
        seconds = {1: 100.0, 2: 45.0, 4: 20.0}
        model = fit([run(workers, 64, epoch_seconds=(value,) * 3) for workers, value in seconds.items()])
        assert min(model.seconds.values()) >= 0
        assert model.seconds["byte"] == model.seconds["hop"] == 0

    def test_a_relative_error_counts_alike_in_long_and_in_short_epochs(self):
        # Two of three runs agree. With absolute errors, the long epoch, twice too slow, would dominate.
        odd = [run(1, 64, epoch_seconds=(value,), rows=rows) for rows, value in ((6400, 400.0), (640, 20.0), (1280, 40.0))]
        assert fit(odd).seconds["row"] < 0.05


class TestWhatTheRunsCannotTell:
    def test_one_worker_alone_says_nothing_of_communication(self):
        model = fit(runs([(1, 64), (1, 32)]))
        assert says(model, "cannot separate communication from compute")
        assert model.predict(8, rows=ROWS, batch_size=64).epoch_seconds == pytest.approx(100 * (0.05 + 0.03 * 8))

    def test_a_held_batch_does_not_tell_a_fixed_cost_from_bandwidth_and_need_not_at_that_batch(self):
        model = fit(runs([(1, 64), (2, 64)], hop=0.0))
        assert says(model, "cannot separate the fixed cost of a step")
        assert says(model, "cannot separate latency")
        expected = truth(8, 64, **TRUTH | {"hop": 0.0})
        assert model.predict(8, rows=ROWS, batch_size=64).epoch_seconds == pytest.approx(expected)

    def test_shares_that_do_not_divide_evenly_do_not_tell_it_either(self):
        uneven = [run(workers, 100, rows=rows) for workers, rows in ((1, 6399), (3, 6399), (7, 6399))]
        assert says(fit(uneven), "cannot separate the fixed cost of a step")

    def test_few_repeats_are_said(self):
        assert says(fit(runs(ALL_TERMS, repeats=2)), "fewer than 3 repeats")


class TestBandwidthGiven:
    def test_it_takes_the_place_of_the_measured_one(self):
        model = fit(runs(ALL_TERMS), bandwidth_bytes_per_second=2e8)
        expected = truth(4, 64, **TRUTH | {"byte": 1 / 2e8})
        predicted = model.predict(4, rows=ROWS, batch_size=64)
        assert predicted.epoch_seconds == pytest.approx(expected)
        assert predicted.extrapolated
        assert not model.predict(1, rows=ROWS, batch_size=64).extrapolated
        assert says(model, "200,000,000 bytes/s was given, not measured")

    def test_runs_that_cannot_tell_are_taken_to_have_had_it(self):
        model = fit([run(4, 64, step=0.0, hop=0.0)], bandwidth_bytes_per_second=1e9)
        assert model.seconds["row"] == pytest.approx(TRUTH["row"])
        assert says(model, "assumed to have had it too")

    def test_a_fixed_cost_lost_with_the_measured_bandwidth_is_said(self):
        assert says(fit(runs(THREE_COUNTS), bandwidth_bytes_per_second=1e9), "removed part of it")

    def test_one_at_which_the_runs_were_impossible_is_refused(self):
        with pytest.raises(ConfigError, match="less than a measured epoch"):
            fit([run(4, 64)], bandwidth_bytes_per_second=1e6)

    @pytest.mark.parametrize("bandwidth", [0, -1.0, math.nan, math.inf])
    def test_none_at_all_is_refused(self, bandwidth):
        with pytest.raises(ConfigError, match="bandwidth_bytes_per_second above 0"):
            fit(runs(ALL_TERMS), bandwidth_bytes_per_second=bandwidth)


class TestPredict:
    @pytest.mark.parametrize(
        ("workers", "batch_size", "extrapolated"),
        [(2, 64, False), (3, 64, False), (4, 64, False), (8, 128, True), (1, 256, True), (4, 32, True)],
    )
    def test_outside_the_measured_workers_or_shares_is_extrapolated(self, workers, batch_size, extrapolated):
        model = fit(runs(THREE_COUNTS))
        assert model.predict(workers, rows=ROWS, batch_size=batch_size).extrapolated is extrapolated

    def test_an_epoch_is_linear_in_rows_and_has_one_more_step_for_the_rest(self):
        model = fit(runs([(1, 64), (1, 32)]))
        assert model.predict(1, rows=10 * ROWS, batch_size=64).epoch_seconds == pytest.approx(10 * truth(1, 64, **TRUTH))
        more = model.predict(1, rows=ROWS + 1, batch_size=64).epoch_seconds - truth(1, 64, **TRUTH)
        assert more == pytest.approx(TRUTH["step"] + TRUTH["row"])

    def test_the_slowest_worker_sets_the_pace(self):
        model = fit(runs([(1, 64), (1, 32)]))
        # 640 steps of 10 rows: the slowest of 4 workers takes 3 rows.
        assert model.predict(4, rows=ROWS, batch_size=10).epoch_seconds == pytest.approx(640 * (0.05 + 0.03 * 3))

    def test_launch_is_a_constant_and_a_slope(self):
        assert fit(runs(THREE_COUNTS)).predict(8, rows=ROWS, batch_size=64).launch_seconds == pytest.approx(5)

    def test_launch_of_one_worker_count_is_its_mean(self):
        measured = [run(2, 64, launch_seconds=4.0), run(2, 64, launch_seconds=5.0), run(2, 32, launch_seconds=None)]
        assert fit(measured).predict(8, rows=ROWS, batch_size=64).launch_seconds == pytest.approx(4.5)

    def test_launch_is_unknown_where_no_run_says(self):
        assert fit(runs(THREE_COUNTS, launch_seconds=None)).predict(8, rows=ROWS, batch_size=64).launch_seconds is None

    @pytest.mark.parametrize("asked", [(0, ROWS, 64), (1, 0, 64), (1, ROWS, 0), (65, ROWS, 64)])
    def test_what_cannot_run_is_refused(self, asked):
        workers, rows, batch_size = asked
        with pytest.raises(ConfigError, match="at least one row per worker in every step"):
            fit(runs(THREE_COUNTS)).predict(workers, rows=rows, batch_size=batch_size)


class TestCheck:
    def test_the_largest_is_predicted_from_the_others(self):
        left_out, said = check([*runs([(1, 64), (2, 64)], hop=0.0), run(4, 64, hop=0.0), run(8, 64, oversubscribed=True)])
        assert left_out.workers == 4
        assert left_out.measured_seconds == pytest.approx(truth(4, 64, **TRUTH | {"hop": 0.0}))
        assert left_out.error == pytest.approx(0, abs=1e-9)
        assert "4 workers, left out of the fit" in said

    def test_it_does_not_see_the_one_that_it_predicts(self):
        slow = run(4, 64, epoch_seconds=(2 * truth(4, 64, **TRUTH | {"hop": 0.0}),) * 5)
        left_out, said = check([*runs([(1, 64), (2, 64)], hop=0.0), slow])
        assert left_out.error == pytest.approx(-0.5)
        assert "-50.0%" in said

    def test_the_worst_of_several_runs_counts(self):
        good, bad = run(2, 64, byte=0.0, hop=0.0, step=0.0), run(2, 32, byte=0.0, hop=0.0, step=0.3)
        left_out, _ = check([run(1, 64, step=0.0), good, bad])
        assert left_out.measured_seconds == pytest.approx(np.median(bad.epoch_seconds))

    def test_what_the_others_cannot_tell_is_said(self):
        assert "cannot separate communication" in check(runs([(1, 64), (2, 64)]))[1]

    def test_one_worker_count_gives_the_reason(self):
        left_out, said = check([*runs([(2, 64), (2, 32)]), run(4, 64, oversubscribed=True)])
        assert left_out is None
        assert said == "Not checked: all runs in the fit have 2 workers. Measure a second number of workers."


class TestBreakEven:
    def test_the_fewest_workers_are_found(self):
        model = fit(runs(ALL_TERMS))
        gpu = truth(8, 64, **TRUTH) * 1.001
        found = break_even(model, (gpu,) * 3, rows=ROWS, batch_size=64)
        assert (found.workers, found.low, found.high) == (8, 8, 8)
        assert found.extrapolated
        assert not break_even(model, (truth(2, 64, **TRUTH) * 1.001,), rows=ROWS, batch_size=64).extrapolated

    def test_the_batch_grows_with_the_workers_when_asked_to(self):
        gpu = truth(10, 800, **TRUTH) * 1.001
        model = fit(runs(ALL_TERMS))
        assert break_even(model, (gpu,), rows=ROWS, batch_size_per_worker=80).workers == 10
        assert break_even(model, (gpu,), rows=ROWS, batch_size=64).workers is None

    def test_the_interval_holds_the_noise_of_both_sides(self):
        gpu = truth(8, 64, **TRUTH)
        quiet = break_even(fit(runs(ALL_TERMS)), (gpu * 0.8, gpu, gpu * 1.2), rows=ROWS, batch_size=64)
        noisy = break_even(fit(runs(ALL_TERMS, noise=0.05)), (gpu * 1.001,), rows=ROWS, batch_size=64)
        assert quiet.low < 8 < (quiet.high or 1025)
        assert noisy.low < (noisy.high or 1025)

    def test_none_where_communication_eats_what_workers_gain(self):
        found = break_even(fit(runs(ALL_TERMS)), (20.0,), rows=ROWS, batch_size=64)
        assert (found.workers, found.low, found.high, found.extrapolated) == (None, None, None, True)

    def test_an_open_end_where_some_draws_never_get_there(self):
        model = fit(runs(ALL_TERMS))
        best = min(truth(workers, 64, **TRUTH) for workers in (1, 2, 4, 8, 16, 32, 64))
        found = break_even(model, (best * 0.5, best * 1.1, best * 1.1), rows=ROWS, batch_size=64)
        assert found.low is not None
        assert found.high is None

    def test_a_number_of_workers_that_leaves_one_without_a_row_is_passed_over(self):
        # 11 rows in steps of at most 6 make steps of 5 and 6 rows: too few for 6 workers, and likewise up to 10.
        assert break_even(fit(runs(ALL_TERMS)), (0.6,), rows=11, batch_size_per_worker=1).workers == 11

    def test_it_stops_at_the_most_workers_allowed(self):
        gpu = truth(8, 64, **TRUTH) * 1.001
        assert break_even(fit(runs(ALL_TERMS)), (gpu,), rows=ROWS, batch_size=64, max_workers=7).workers is None

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "batch_size or batch_size_per_worker"),
            ({"batch_size": 64, "batch_size_per_worker": 32}, "batch_size or batch_size_per_worker"),
            ({"batch_size_per_worker": 0}, "one row per worker in every step"),
            ({"batch_size": 64, "max_workers": 0}, "max_workers of 1 or more"),
            ({"batch_size": 64, "gpu": ()}, "gpu_epoch_seconds above 0"),
            ({"batch_size": 64, "gpu": (0.0,)}, "gpu_epoch_seconds above 0"),
        ],
    )
    def test_a_question_without_sense_is_refused(self, settings, message):
        gpu = settings.pop("gpu", (10.0,))
        with pytest.raises(ConfigError, match=message):
            break_even(fit(runs(THREE_COUNTS)), gpu, rows=ROWS, **settings)


class TestMeasured:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"workers": 0}, "one row per worker in every step"),
            ({"workers": 65}, "one row per worker in every step"),
            ({"rows": 0}, "one row per worker in every step"),
            ({"batch_size": 0}, "one row per worker in every step"),
            ({"threads": 0}, "threads of 1 or more"),
            ({"gradient_bytes": -1}, "gradient_bytes of 0 or more"),
            ({"epoch_seconds": ()}, "epoch_seconds above 0"),
            ({"epoch_seconds": (1.0, math.nan)}, "epoch_seconds above 0"),
            ({"epoch_seconds": (1.0, 0.0)}, "epoch_seconds above 0"),
            ({"launch_seconds": -1.0}, "launch_seconds above 0"),
        ],
    )
    def test_a_run_that_cannot_be_is_refused(self, changes, message):
        fine = run(1, 64)
        with pytest.raises(ConfigError, match=message):
            Measured(**vars(fine) | changes)

    def test_nothing_to_fit_is_refused(self):
        with pytest.raises(ConfigError, match="a run that is not oversubscribed"):
            fit([run(4, 64, oversubscribed=True)])

    @pytest.mark.parametrize("changes", [{"threads": 2}, {"gradient_bytes": 5}])
    def test_runs_of_two_kinds_are_refused(self, changes):
        with pytest.raises(ConfigError, match="runs alike in threads per worker and gradient_bytes"):
            fit([run(1, 64), run(2, 64, **changes)])


def test_cost_is_the_price_of_all_workers_for_the_time():
    assert cost(1800, 8, 0.5) == pytest.approx(2.0)
