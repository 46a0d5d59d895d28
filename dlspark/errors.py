"""Every error that dlspark raises on purpose.

A message says what was expected, what was received and what to do: "Expected X; got Y. Do Z." Each class is also the
matching builtin, so ``except ValueError`` works for callers who do not know dlspark. All errors survive pickling, because
executors send them to the driver.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class DlsparkError(Exception):
    """The base class: ``except DlsparkError`` catches every error that dlspark raises on purpose."""


class ConfigError(DlsparkError, ValueError):
    """A setting, an option or a cluster that cannot work; raised before any work starts."""


class DataError(DlsparkError, ValueError):
    """Rows, labels, shapes or files that cannot be used as requested."""


class MissingDependencyError(DlsparkError, ImportError):
    """A package that this call needs is not installed; the message has the command to install it."""


class WorkerError(DlsparkError, RuntimeError):
    """A worker failed. The driver raises it with the worker's own error.

    Attributes:
        rank: the worker's number, from 0; None if unknown.
        host: its host; None if unknown.
        remote_traceback: the worker's traceback as text, or the position of every rank if one got stuck; empty if unknown.
        epoch: the epoch of the failure, from 0; None before the first.
        step: the number of finished steps in that epoch.
        retryable: whether a restart may help. It cannot after an error in the settings or the data.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        remote_traceback: str = "",
        epoch: int | None = None,
        step: int | None = None,
        retryable: bool = True,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.remote_traceback = remote_traceback
        self.epoch = epoch
        self.step = step
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, dict(vars(self)))

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n\n{self.remote_traceback.rstrip()}" if self.remote_traceback else message


class NonFiniteLossError(DlsparkError, ArithmeticError):
    """The loss is NaN or infinite. Further training would spoil the weights of all workers."""


class RunInterruptedError(DlsparkError, SystemExit):
    """The run ended on SIGTERM and can be resumed. Uncaught, it ends the program with exit code 75.

    75 is EX_TEMPFAIL of sysexits.h, "try again later".
    """

    exit_code = 75

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = self.exit_code


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of an error message about an unknown ``name``: the nearest known name, then all of them."""
    known = sorted(known)
    return f"{nearest(name, known)}Known: {', '.join(known) or 'none'}."


def nearest(name: Any, known: Iterable[str]) -> str:
    """``Did you mean 'x'? `` with the known name nearest to ``name``; empty if none is near."""
    found = get_close_matches(str(name), sorted(known), n=1)
    return f"Did you mean {found[0]!r}? " if found else ""
