"""What the driver concludes from messages and the clock: the Watch alone, with a fake clock and without processes."""

from __future__ import annotations

from typing import Any

import pytest

from dlspark.driver.failure import Failure
from dlspark.driver.health import Watch
from dlspark.driver.stops import lone_stop
from dlspark.timeouts import Timeouts
from dlspark.wire import messages

LIMITS = Timeouts(launch_seconds=100, first_step_seconds=50, step_seconds=20, heartbeat_seconds=10, end_seconds=5)
PLACE = {"epoch": 1, "step": 3, "phase": "step", "stack": "", "waits": False, "own_seconds": 0.0, "steps": 0}


class Case:
    """A Watch over two launched ranks, and the clock that it reads."""

    def __init__(self, timeouts: Timeouts = LIMITS) -> None:
        self.now = 1000.0
        self.watch = Watch(2, timeouts, clock=lambda: self.now)
        self.watch.launching()
        self._moves = 0

    def connect(self, *ranks: int, connection: int | None = None) -> None:
        for rank in ranks:
            number = rank if connection is None else connection
            self.watch.note(messages.Connected(rank=rank, connection=number, pid=100 + number, host=f"host{rank}"))

    def beat(self, rank: int, *, moved: bool = False, connection: int | None = None, **changes: Any) -> Failure | None:
        self._moves += moved
        values = {**PLACE, "moves": self._moves, "memory_bytes": 0, **changes}
        return self.watch.note(
            messages.Heartbeat(rank=rank, connection=rank if connection is None else connection, **values)
        )

    def step(self, rank: int, step: int, epoch: int = 0) -> None:
        report = messages.StepEnded(rank=rank, connection=rank, epoch=epoch, step=step, steps=9, rows=32, loss=None)
        assert self.watch.note(report) is None

    def leave(self, *ranks: int) -> None:
        for rank in ranks:
            self.watch.note(messages.Left(rank=rank, connection=rank))

    def lose(self, rank: int, connection: int | None = None) -> Failure | None:
        return self.watch.note(messages.Lost(rank=rank, connection=rank if connection is None else connection))

    def end(self, rank: int, *, out_of_memory: bool = False) -> Failure | None:
        """Report that the process of ``rank`` ended, on the guard's own connection."""
        return self.watch.note(
            messages.ProcessEnded(rank=rank, connection=50 + rank, pid=100 + rank, out_of_memory=out_of_memory)
        )

    def verdict(self, after: float) -> Failure | None:
        self.now += after
        return self.watch.verdict()

    def live_until(self, after: float, *ranks: int) -> Failure | None:
        """Let ``ranks`` send heartbeats without progress for ``after`` seconds."""
        end = self.now + after
        while self.now < end:
            self.now = min(self.now + 1, end)
            for rank in ranks:
                self.beat(rank, epoch=None, step=0, phase="loading")
        return self.watch.verdict()


@pytest.fixture
def case() -> Case:
    return Case()


class TestTimeouts:
    def test_a_rank_that_does_not_start(self, case: Case) -> None:
        assert case.verdict(100) is None
        failure = case.verdict(0.1)
        assert failure is not None
        assert (failure.rank, failure.host) == (0, None)
        assert "rank 0, 1 did not start within 100 s (timeouts: launch_seconds)" in failure.message

    def test_only_the_missing_rank_is_named(self) -> None:
        case = Case(Timeouts(launch_seconds=100))
        case.connect(0)
        assert case.live_until(100, 0) is None
        failure = case.live_until(0.1, 0)
        assert failure is not None
        assert failure.rank == 1
        assert failure.message.startswith("rank 1 did not start within 100 s")

    def test_a_first_step_that_does_not_end(self, case: Case) -> None:
        case.connect(0, 1)
        assert case.live_until(50, 0, 1) is None
        failure = case.live_until(0.1, 0, 1)
        assert failure is not None
        assert (failure.epoch, failure.step) == (None, None)
        assert "before the first step, made no progress for 50 s (timeouts: first_step_seconds)" in failure.message

    def test_a_step_that_does_not_end(self, case: Case) -> None:
        case.connect(0, 1)
        case.step(0, 4)
        case.step(1, 4)
        for _ in range(20):
            case.now += 1
            case.beat(0, epoch=0, step=4, waits=True)
            case.beat(1, epoch=0, step=4, stack="in user code")
            assert case.watch.verdict() is None
        failure = case.verdict(0.1)
        assert failure is not None
        assert (failure.rank, failure.host, failure.epoch, failure.step) == (1, "host1", 0, 4)
        assert (
            "rank 1 on host1, epoch 1, after step 4, made no progress for 20 s (timeouts: step_seconds)" in failure.message
        )
        assert failure.remote_traceback.startswith("Rank 1: epoch 1, after step 4, step\nin user code\nRank 0: ")

    def test_any_progress_extends_the_limit(self, case: Case) -> None:
        case.connect(0, 1)
        case.step(0, 1)
        case.step(1, 1)
        for _ in range(60):
            case.now += 1
            case.beat(0, moved=True, phase="validation")
            case.beat(1, moved=True, phase="validation")
            assert case.watch.verdict() is None

    def test_the_end_of_an_epoch_is_progress(self, case: Case) -> None:
        case.connect(0, 1)
        case.step(0, 9)
        case.step(1, 9)
        case.verdict(8)
        for rank in (0, 1):
            case.watch.note(messages.EpochEnded(rank=rank, connection=rank, epoch=0, logs={}, seconds=1.0))
        assert case.verdict(9) is None

    def test_a_process_without_heartbeats(self, case: Case) -> None:
        case.connect(0, 1)
        case.step(0, 2)
        case.step(1, 2)
        case.now += 1
        case.beat(0)
        assert case.verdict(9) is None
        failure = case.verdict(0.1)
        assert failure is not None
        assert failure.rank == 1
        assert "gave no sign of life for 10 s (timeouts: heartbeat_seconds)" in failure.message

    def test_a_rank_that_does_not_come_back_to_the_next_round(self, case: Case) -> None:
        case.connect(0, 1)
        case.leave(0, 1)
        case.now += 3
        case.watch.launching()
        case.connect(0, connection=10)
        assert case.verdict(10) is None
        failure = case.live_until(0.1)
        assert failure is not None
        assert failure.rank == 1
        assert "rank 1 worked before, and did not come back within 10 s of the others" in failure.message

    def test_an_engine_that_does_not_return(self, case: Case) -> None:
        case.connect(0, 1)
        case.leave(0)
        case.now += 3
        case.leave(1)
        assert case.verdict(5) is None
        failure = case.verdict(0.1)
        assert failure is not None
        assert failure.rank is None
        assert "the engine has not returned for 5 s (timeouts: end_seconds)" in failure.message

    def test_an_engine_that_has_returned_has_no_limit(self, case: Case) -> None:
        case.connect(0, 1)
        case.leave(0, 1)
        case.watch.returned()
        assert case.verdict(1000) is None

    def test_a_driver_that_was_stopped_blames_nobody(self, case: Case) -> None:
        case.connect(0, 1)
        case.step(0, 2)
        case.step(1, 2)
        case.now += 500
        case.watch.forgive(500)
        assert case.watch.verdict() is None
        assert case.verdict(10) is None
        assert case.verdict(0.1) is not None

    def test_forgiving_extends_the_other_limits_too(self, case: Case) -> None:
        case.now += 100
        case.watch.forgive(100)
        assert case.verdict(100) is None
        case.connect(0, 1)
        case.leave(0, 1)
        case.now += 100
        case.watch.forgive(100)
        assert case.verdict(5) is None
        assert case.verdict(0.1) is not None


class TestCulprit:
    def test_the_rank_that_holds_up_the_others_is_blamed_though_another_one_was_heard_of_first(self) -> None:
        case = Case(Timeouts(step_seconds=60, heartbeat_seconds=100))
        case.beat(0, moves=7)
        case.now += 1
        case.beat(1, moves=7)
        case.beat(0, moves=7, waits=True)
        case.beat(1, moves=7, waits=False)
        assert case.verdict(59) is None
        failure = case.verdict(0.5)
        assert failure is not None
        assert failure.rank == 1
        assert "made no progress for 60 s (timeouts: step_seconds)" in failure.message

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"epoch": 0, "step": 8}, {"epoch": 1, "step": 0}),
            ({"epoch": 1, "step": 2}, {"epoch": 1, "step": 3}),
            ({"epoch": None, "step": 0}, {"epoch": 0, "step": 0}),
            ({"waits": False}, {"waits": True}),
            ({"phase": "callbacks"}, {"phase": "step"}),
        ],
        ids=["epoch", "step", "before the first", "waits", "callback"],
    )
    @pytest.mark.parametrize("culprit", [0, 1])
    def test_the_rank_furthest_behind_is_blamed(self, first: Any, second: Any, culprit: int) -> None:
        case = Case(Timeouts(step_seconds=60, first_step_seconds=60, heartbeat_seconds=100))
        case.beat(culprit, moves=7, **first)
        case.beat(1 - culprit, moves=7, **second)
        failure = case.verdict(60.1)
        assert failure is not None
        assert failure.rank == culprit


class TestDeaths:
    def test_a_lost_connection_is_a_death_and_the_guard_adds_the_cause(self, case: Case) -> None:
        case.connect(0, 1)
        case.step(1, 4)
        failure = case.lose(1)
        assert failure is not None
        assert not failure.complete
        assert (
            "rank 1 on host1, epoch 1, after step 4: its process (pid 101) ended without a word; it was" in failure.message
        )
        cause = case.end(1)
        assert cause is not None
        failure.add(cause)
        assert failure.complete
        assert "ended without a word: killed by a signal (not by the kernel for memory)" in failure.message

    def test_the_kernel_killed_it_for_memory(self, case: Case) -> None:
        case.connect(0, 1)
        case.beat(1, memory_bytes=3 << 30)
        failure = case.end(1, out_of_memory=True)
        assert failure is not None
        assert failure.complete
        assert failure.message.startswith("out of memory: rank 1 on host1, epoch 2, after step 3: its process (pid 101)")
        assert failure.message.endswith("as the kernel killed a process for memory there. It held 3.0 GiB")

    def test_details_of_another_rank_are_not_merged(self, case: Case) -> None:
        case.connect(0, 1)
        failure, other = case.lose(1), case.end(0)
        assert failure is not None
        assert other is not None
        before = failure.message
        failure.add(other)
        assert (failure.message, failure.complete) == (before, False)

    def test_a_process_that_dies_before_it_connects(self, case: Case) -> None:
        failure = case.end(1)
        assert failure is not None
        assert failure.message.startswith("rank 1 on an unknown host, before it connected: its process (pid 101)")

    def broken(self, case: Case, rank: int) -> Failure | None:
        words = {"host": "there", "error": "UnavailableError", "message": "", "traceback": ""}
        return case.watch.note(messages.Failed(rank=rank, connection=rank, retryable=True, waits=True, **words))

    def test_the_rank_that_died_is_blamed_though_the_sum_that_it_broke_was_heard_of_first(self, case: Case) -> None:
        case.connect(0, 1)
        assert self.broken(case, 0) is None
        assert case.verdict(1.0) is None
        failure = case.lose(1)
        assert failure is not None
        assert failure.rank == 1

    def test_a_sum_that_breaks_while_all_live_is_told_as_the_first_rank_saw_it(self, case: Case) -> None:
        case.connect(0, 1)
        assert self.broken(case, 1) is None
        assert case.verdict(0.5) is None
        assert self.broken(case, 0) is None
        failure = case.verdict(0.6)
        assert failure is not None
        assert failure.rank == 1
        assert failure.message.startswith("UnavailableError on rank 1")

    def test_a_stopped_driver_still_waits_for_the_cause(self, case: Case) -> None:
        case.connect(0, 1)
        assert self.broken(case, 0) is None
        case.now += 500
        case.watch.forgive(500)
        assert case.verdict(1.0) is None
        assert case.verdict(0.1) is not None

    def test_who_has_left_does_not_die(self, case: Case) -> None:
        case.connect(0, 1)
        case.leave(1)
        assert case.lose(1) is None
        assert case.end(1) is None

    def test_a_lost_rank_has_no_limits(self, case: Case) -> None:
        case.connect(0, 1)
        assert case.lose(1) is not None
        assert case.live_until(30, 0) is None


class TestConnections:
    def test_a_replaced_connection_is_ignored(self, case: Case) -> None:
        case.connect(0, 1)
        case.connect(1, connection=7)
        assert case.lose(1, connection=1) is None
        case.now += 9
        case.beat(0)
        case.beat(1, connection=1)
        failure = case.verdict(2)
        assert failure is not None
        assert failure.rank == 1
        assert case.lose(1, connection=7) is not None

    def test_a_guard_and_the_driver_itself_are_no_workers(self, case: Case) -> None:
        for rank in (0, 1):
            case.watch.note(messages.GuardConnected(rank=rank, connection=rank, pid=1))
            case.watch.note(messages.Note(rank=rank, text="from the driver"))
        failure = case.verdict(100.1)
        assert failure is not None
        assert "rank 0, 1 did not start" in failure.message


class TestStops:
    """A rank that a callback stops alone, and ranks that stop together, whichever is heard of first."""

    def stop(self, case: Case, rank: int, epoch: int, step: int) -> None:
        report = messages.Stopped(rank=rank, connection=rank, epoch=epoch, step=step, cause="sets stop_training")
        assert case.watch.note(report) is None

    def test_within_an_epoch(self, case: Case) -> None:
        case.connect(0, 1)
        self.stop(case, 1, 0, 3)
        case.beat(1, epoch=0, step=3, phase="callbacks")
        case.beat(0, epoch=0, step=3, phase="step")
        failure = case.watch.verdict()
        assert failure is not None
        assert (failure.rank, failure.host, failure.epoch, failure.step, failure.retryable) == (1, "host1", 0, 3, False)
        assert failure.message.startswith(
            "rank 1 stopped training after step 3 of epoch 1, and rank 0 went on to step 4: a callback sets stop_training "
            "on rank 1 only."
        )

    def test_after_an_epoch_by_a_rank_that_has_ended(self, case: Case) -> None:
        case.connect(0, 1)
        self.stop(case, 0, 2, 0)
        case.leave(0)
        case.beat(1, epoch=2, step=0, phase="callbacks")
        assert case.watch.verdict() is None
        case.beat(1, epoch=2, step=0, phase="step")
        failure = case.watch.verdict()
        assert failure is not None
        assert "rank 0 stopped training after epoch 2, and rank 1 went on to epoch 3:" in failure.message

    @pytest.mark.parametrize(
        "behind",
        [
            {"epoch": None, "step": 0, "phase": "loading"},
            {"epoch": 0, "step": 2, "phase": "step"},
            {"epoch": 0, "step": 3, "phase": "callbacks"},
        ],
        ids=["loading", "in the step before", "in the same callback"],
    )
    def test_a_slower_rank_that_may_stop_at_the_same_place(self, case: Case, behind: Any) -> None:
        case.connect(0, 1)
        self.stop(case, 1, 0, 3)
        case.beat(0, **behind)
        assert case.watch.verdict() is None

    def test_ranks_that_stop_together_and_train_on(self, case: Case) -> None:
        """StopIteration ends an epoch only."""
        case.connect(0, 1)
        for rank in (0, 1):
            self.stop(case, rank, 0, 3)
            case.beat(rank, epoch=1, step=5)
        assert case.watch.verdict() is None

    def test_one_of_two_that_stopped_together_continues(self, case: Case) -> None:
        case.connect(0, 1)
        for rank in (0, 1):
            self.stop(case, rank, 0, 3)
        self.stop(case, 1, 1, 0)
        case.beat(0, epoch=1, step=0, phase="step")
        failure = case.watch.verdict()
        assert failure is not None
        assert "rank 1 stopped training after epoch 1, and rank 0 went on to epoch 2:" in failure.message

    def test_several_ranks(self) -> None:
        found = lone_stop({0: {(0, 3): "A"}, 1: {}, 2: {(0, 3): "A"}, 3: {}, 4: {}}, {1: (0, 3), 3: (1, 0), 4: (0, 2)})
        assert found is not None
        assert (list(found.stopped), found.continued) == ([0, 2], [1, 3])
        assert "rank 0, 2 stopped training after step 3 of epoch 1, and rank 1, 3 went on to step 4:" in str(found)

    def test_a_sum_that_breaks_as_the_stopped_rank_ends(self, case: Case) -> None:
        case.connect(0, 1)
        self.stop(case, 1, 1, 0)
        case.leave(1)
        case.beat(0, epoch=1, step=0, phase="step", waits=True)
        words = {"host": "there", "error": "UnavailableError", "message": "", "traceback": ""}
        failure = case.watch.note(messages.Failed(rank=0, connection=0, retryable=True, waits=True, **words))
        assert failure is not None
        assert failure.message.startswith("rank 1 stopped training")


class TestReports:
    def failed(self, case: Case, error: str, message: str, **place: int) -> Failure:
        report = messages.Failed(
            rank=1, connection=1, host="there", error=error, message=message, traceback="T", retryable=False, **place
        )
        failure = case.watch.note(report)
        assert failure is not None
        return failure

    def test_a_failure_is_reported_as_it_is(self, case: Case) -> None:
        failure = self.failed(case, "ValueError", "no", epoch=2, step=5)
        error = failure.as_error("local")
        assert failure.message == "ValueError on rank 1 on there, epoch 3, after step 5: no"
        assert (error.rank, error.host, error.epoch, error.step, error.retryable) == (1, "there", 2, 5, False)
        assert str(error) == f"Training on backend 'local' failed: {failure.message}\n\nT"

    def test_before_the_first_step(self, case: Case) -> None:
        failure = self.failed(case, "ValueError", "no")
        assert failure.message == "ValueError on rank 1 on there: no"
        assert (failure.epoch, failure.step) == (None, None)

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            ("MemoryError", ""),
            ("ResourceExhaustedError", "OOM when allocating tensor"),
            ("OutOfMemoryError", "CUDA"),
            ("XlaRuntimeError", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
            ("RuntimeError", "CUDA out of memory. Tried to allocate"),
        ],
    )
    def test_memory_is_named_whoever_says_it(self, case: Case, error: str, message: str) -> None:
        assert self.failed(case, error, message).message.startswith(f"out of memory: {error} on rank 1")

    def test_other_errors_are_not_about_memory(self, case: Case) -> None:
        assert not self.failed(case, "ValueError", "memory of an elephant").message.startswith("out of memory")


class TestStragglers:
    def test_one_slow_rank_is_warned_about_once(self, case: Case) -> None:
        case.beat(0, own_seconds=2.0, steps=10)
        case.beat(1, own_seconds=9.0, steps=10)
        (text,) = case.watch.warnings()
        assert text.startswith("rank 1 on None needs 0.9 s for its part of a step, the others 0.2 s")
        assert case.watch.warnings() == []

    @pytest.mark.parametrize(
        "slow",
        [
            {"own_seconds": 5.9, "steps": 10},  # less than three times the others'
            {"own_seconds": 4.0, "steps": 10},  # too few seconds
            {"own_seconds": 9.0, "steps": 4},  # too few steps
        ],
        ids=["ratio", "seconds", "steps"],
    )
    def test_no_warning_without_evidence(self, case: Case, slow: Any) -> None:
        case.beat(0, own_seconds=2.0, steps=10)
        case.beat(1, **slow)
        assert case.watch.warnings() == []

    def test_no_warning_while_a_rank_is_missing(self, case: Case) -> None:
        case.beat(1, own_seconds=90.0, steps=10)
        assert case.watch.warnings() == []
