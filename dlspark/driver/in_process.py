"""The endpoint of a worker in the driver's own process: a message is a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dlspark.wire import Reporter, messages


class InProcess:
    """The endpoint of the only worker.

    Args:
        receive: called with every message.
        asked_to_end: whether the worker must stop after its current step. It need not agree with others.
    """

    def __init__(self, receive: Callable[[messages.FromWorker], None], asked_to_end: Callable[[], bool]) -> None:
        self._receive = receive
        self._asked_to_end = asked_to_end

    def connect(self, rank: int) -> Reporter:
        return _CallReporter(self._receive, self._asked_to_end, rank)


class _CallReporter:
    def __init__(self, receive: Callable[[messages.FromWorker], None], asked_to_end: Callable[[], bool], rank: int) -> None:
        self.must_stop = asked_to_end
        self._receive = receive
        self._rank = rank

    def send(self, message: messages.FromWorker) -> None:
        self._receive(dataclasses.replace(message, connection=0))

    def close(self) -> None:
        self.send(messages.Left(rank=self._rank))
