"""The interface of a backend: one method, or a way to launch a function in N processes."""

from __future__ import annotations

import dataclasses
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from dlspark.driver import RunMonitor
from dlspark.errors import ConfigError, did_you_mean
from dlspark.job import FitResult, JobSettings, TrainJob, WorkerResult
from dlspark.spark import cancellable, check_cluster, driver_host, get_session
from dlspark.worker import WorkerSession, run_worker

WorkerFunction = Callable[[WorkerSession], WorkerResult]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend promises. The contract picks its clauses by these.

    Attributes:
        synchronous_gradients: N workers train as one process would, to 1e-5.
        exact_rows: every row is seen exactly once per epoch.
        deterministic: same seed, same weights.
        resumable: a run that is interrupted and resumed ends with the weights of an uninterrupted run.
        max_workers: the most workers that it can run; None if only the cluster limits them.
    """

    synchronous_gradients: bool
    exact_rows: bool
    deterministic: bool
    resumable: bool
    max_workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a backend runs on. The preflight, ``dlspark doctor``, the contract and the benchmarks read it here only.

    Attributes:
        packages: distributions of the engine and the plug-in, which driver and executors must have in equal versions.
        modules: heavy modules of the engine, which importing the plug-in must not load.
        environment: variables that a launch sets in its processes and puts back.
        barrier: it needs all its Spark tasks at once, in one stage.
        open_ports: what listens on executors during a run without asking who connects, for warnings; empty for nothing.
    """

    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    barrier: bool = False
    open_ports: str = ""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a backend that has none."""


class Backend(ABC):
    """Carries out a job.

    Subclasses set ``name``, ``capabilities`` and ``engine``, and ``options_type``, a frozen keyword-only dataclass that
    checks its values in ``__post_init__``. ``__init__`` stores the options and does nothing else. If these options cannot
    keep what the class promises, it sets narrower ``capabilities`` on the instance.
    """

    name: ClassVar[str]
    engine: ClassVar[Engine] = Engine()
    options_type: ClassVar[type] = NoOptions
    capabilities: Capabilities

    def __init__(self, options: Any = None) -> None:
        self.options = self.options_type() if options is None else options

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | Any | None) -> Backend:
        """Create the backend from a mapping of options, an ``options_type``, or None for the defaults.

        Raises:
            ConfigError: an unknown option (the message names the nearest valid one) or an invalid value.
        """
        if options is None or isinstance(options, cls.options_type):
            return cls(options)
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"Expected options as a dict or a {cls.options_type.__name__}; got a {type(options).__name__}."
            )
        known = [field.name for field in dataclasses.fields(cls.options_type)]
        for name in options:
            if name not in known:
                raise ConfigError(f"Backend {cls.name!r} has no option {name!r}. {did_you_mean(name, known)}")
        return cls(cls.options_type(**options))

    def check(self, settings: JobSettings, uri: str) -> None:  # noqa: B027 - optional, not abstract
        """Refuse a job that cannot work, before any work starts: in under a second if the executors' Python runs already.

        Args:
            settings: what is asked of the run. Its data may not have been written yet.
            uri: the run's folder of the store, which all workers must reach.

        Raises:
            ConfigError: the job cannot work here; the message says what would.
        """

    @abstractmethod
    def fit(self, job: TrainJob) -> FitResult:
        """Carry out ``job``. Rank 0 saves the trained variables in the job's folder of the store.

        Returns:
            The result without ``weights`` and ``model``, which the trainer adds.

        Raises:
            WorkerError: a worker failed; has its rank, host and traceback.
        """

    def close(self) -> None:  # noqa: B027 - optional, not abstract
        """Release what the backend holds. Calling it twice is fine."""


@contextmanager
def watched(job: TrainJob, backend: str, host: str | None, **settings: Any) -> Iterator[RunMonitor]:
    """Run an engine inside the block under a `RunMonitor`, which SIGTERM interrupts.

    The signal handler is installed in the main thread only, and only if the program has none of its own.
    """
    with RunMonitor(job, backend, host, **settings) as monitor:
        mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if mine:
            signal.signal(signal.SIGTERM, lambda *_: monitor.interrupt())
        try:
            yield monitor
        finally:
            if mine:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


class LaunchBackend(Backend):
    """A backend whose engine can run a function on N processes at once."""

    @abstractmethod
    def launch(self, function: WorkerFunction, num_workers: int) -> list[WorkerResult]:
        """Call ``function(session)`` once in each of ``num_workers`` processes, all of them running at the same time.

        Args:
            function: picklable by cloudpickle, a few hundred bytes.
            num_workers: the world size.

        Returns:
            The results of the calls, in rank order. If a call raises, ``launch`` raises in bounded time.
        """

    def driver_host(self) -> str:
        """The address at which workers reach this process."""
        return "127.0.0.1"

    @contextmanager
    def abortable(self) -> Iterator[Callable[[], None] | None]:
        """Yield a function that makes a running ``launch`` return, callable from another thread; None if nothing can.

        It is the last resort, when all workers have ended or never started and the engine still waits.
        """
        yield None

    def fit(self, job: TrainJob) -> FitResult:
        with self.abortable() as abort, watched(job, self.name, self.driver_host(), abort=abort) as monitor:
            with monitor.explaining_failures(), monitor.launched():
                results = self.launch(partial(run_worker, job.uri, monitor.endpoint), job.num_workers)
            return monitor.result(results)


class SparkLaunchBackend(LaunchBackend):
    """A `LaunchBackend` whose engine runs its processes in the tasks of Spark jobs."""

    def check(self, settings: JobSettings, uri: str) -> None:
        check_cluster(settings, uri, backend=self.name, barrier=self.engine.barrier, packages=self.engine.packages)

    def driver_host(self) -> str:
        return driver_host(get_session())

    @contextmanager
    def abortable(self) -> Iterator[Callable[[], None] | None]:
        with cancellable(get_session()) as cancel:
            yield cancel
