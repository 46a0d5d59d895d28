"""Every error that dlspark raises on purpose.

A message says what was expected, what came and what to do about it. Each class is also the matching builtin, so that
``except ValueError`` keeps working for people who do not know dlspark. All of them survive pickling, because they cross
from executors to the driver.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DlsparkError(Exception):
    """The parent of all of them: ``except DlsparkError`` catches whatever dlspark refuses or reports."""


class ConfigError(DlsparkError, ValueError):
    """A setting, an option or a cluster that cannot work, found before any work starts."""


class DataError(DlsparkError, ValueError):
    """Rows, labels, shapes or files that do not fit what was asked of them."""


class MissingDependencyError(DlsparkError, ImportError):
    """A package that this call needs is not installed; the message holds the command that installs it."""


class WorkerError(DlsparkError, RuntimeError):
    """A worker failed. The driver raises it with what the worker itself had to say.

    Attributes:
        rank: the worker's number, from 0; None when no worker could be named.
        host: where it ran; None when unknown.
        remote_traceback: the worker's own traceback as text, or where the ranks stood when one got stuck; empty when
            nothing is known.
        epoch: the epoch in which it happened, from 0; None before the first.
        step: the steps of that epoch that had ended.
        retryable: a restart may help. It does not for what dlspark itself refused or found to be wrong with the data.
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
    """The loss is NaN or infinite. Training on would spoil the weights of all workers."""


class RunInterruptedError(DlsparkError, SystemExit):
    """The run was asked to end (SIGTERM) and can be resumed. Uncaught, it ends the program with exit code 75.

    75 is EX_TEMPFAIL of sysexits.h, "try again later".
    """

    exit_code = 75

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = self.exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown ``name``: the nearest known one, then all of them."""
    known = sorted(known)
    return f"{nearest(name, known)}Known: {', '.join(known) or 'none'}."


def nearest(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'? `` with the known name nearest to ``name``; empty if none is near."""
    found = get_close_matches(name, sorted(known), n=1)
    return f"Did you mean {found[0]!r}? " if found else ""
