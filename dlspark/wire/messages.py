"""Every message between the processes of a run: one frozen dataclass for each kind, and their only encoding.

On the wire a message is one JSON object: its ``kind`` and its fields. ``decode`` is strict: an unknown kind, a missing or
extra field and a value of another type are errors, and the receiver drops the connection. Epochs and steps count from 0; a
``step`` is the number of complete steps of its epoch, which is the same for all workers. Times are in seconds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True, kw_only=True)
class Message:
    """The parent of all messages. ``kind`` names the class on the wire and in events.jsonl."""

    kind = ""


# From workers and their guards to the driver -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FromWorker(Message):
    """A report about one worker.

    Attributes:
        rank: the worker.
        connection: a number that the server assigns, larger for every new connection; None if the driver reports itself.
    """

    rank: int
    connection: int | None = None


@dataclass(frozen=True, kw_only=True)
class Connected(FromWorker):
    """The worker's process has connected. Sent once for each connection."""

    kind = "connected"
    pid: int
    host: str


@dataclass(frozen=True, kw_only=True)
class Started(FromWorker):
    """The worker has imported Keras and starts to load the model. ``device`` describes what it computes on."""

    kind = "started"
    pid: int
    host: str
    device: str


@dataclass(frozen=True, kw_only=True)
class StepEnded(FromWorker):
    """A training step has ended. Sent a few times a second at most.

    Attributes:
        epoch: the current epoch.
        step: complete steps of this epoch.
        steps: steps of the whole epoch.
        rows: rows of this epoch that all workers have seen.
        loss: the running mean of the epoch on this worker's rows; None if it was not read.
    """

    kind = "step"
    epoch: int
    step: int
    steps: int
    rows: int
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class EpochEnded(FromWorker):
    """An epoch has ended, including validation. ``logs`` are the metrics over the rows of all workers."""

    kind = "epoch"
    epoch: int
    logs: dict[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stopped(FromWorker):
    """A callback ended the worker's training, or its epoch, before the end. Several workers must do so after the same step.

    Attributes:
        epoch: the epoch of the first step that this worker leaves out; after a whole epoch, the next one.
        step: complete steps of ``epoch``.
        cause: what the callback did, in words.
    """

    kind = "stopped"
    epoch: int
    step: int
    cause: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(FromWorker):
    """The checkpoint ``name`` is complete in the store. ``seconds`` is the time to write it."""

    kind = "checkpoint"
    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Heartbeat(FromWorker):
    """The worker's process is alive. A thread of its own sends this every second; see `dlspark.worker.status.WorkerStatus`.

    Attributes:
        moves: a counter that grows with any progress.
        memory_bytes: resident memory of the process; 0 if unknown.
        phase: "loading", "step", "callbacks", "validation" or "checkpoint".
        step: complete steps of ``epoch``.
        waits: this rank has computed its part of the current step and waits for the other ranks.
        own_seconds: time that this rank's own part of ``steps`` steps has taken, without the waits for other ranks.
        steps: how many steps ``own_seconds`` covers.
        stack: innermost frames of the training thread if nothing has moved since the last heartbeat; otherwise empty.
        epoch: the current epoch; None before the first.
    """

    kind = "heartbeat"
    moves: int
    memory_bytes: int
    phase: str
    step: int
    waits: bool
    own_seconds: float
    steps: int
    stack: str
    epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Note(FromWorker):
    """A line of text for the user. Only rank 0's is shown."""

    kind = "note"
    text: str


@dataclass(frozen=True, kw_only=True)
class Failed(FromWorker):
    """An exception ended the worker.

    Attributes:
        host: name of the worker's machine.
        error: name of the exception's class.
        message: its text.
        traceback: its traceback.
        retryable: a restart may succeed.
        epoch: where it happened; None before the first epoch.
        step: complete steps of that epoch; None before the first epoch.
        waits: this rank waited for the other ranks, so that the cause may be theirs.
    """

    kind = "failed"
    host: str
    error: str
    message: str
    traceback: str
    retryable: bool
    epoch: int | None = None
    step: int | None = None
    waits: bool = False


@dataclass(frozen=True, kw_only=True)
class Interrupted(FromWorker):
    """The worker stopped after a step because the driver asked for it."""

    kind = "interrupted"


@dataclass(frozen=True, kw_only=True)
class Done(FromWorker):
    """The worker has finished. ``rows`` are the training rows that it saw, ``seconds`` its time since `Started`."""

    kind = "done"
    seconds: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Left(FromWorker):
    """The worker is about to close the connection: its process does not die."""

    kind = "left"


@dataclass(frozen=True, kw_only=True)
class Held(FromWorker):
    """The answer to `Hold`: the worker has completed ``calls`` calls of the training step and makes at most one more."""

    kind = "held"
    calls: int


@dataclass(frozen=True, kw_only=True)
class GuardConnected(FromWorker):
    """The guard of the worker's process ``pid`` has connected."""

    kind = "guard"
    pid: int


@dataclass(frozen=True, kw_only=True)
class ProcessEnded(FromWorker):
    """The guard saw the worker's process end.

    Attributes:
        pid: the process.
        out_of_memory: the kernel killed a process for memory there within the last seconds.
    """

    kind = "ended"
    pid: int
    out_of_memory: bool


@dataclass(frozen=True, kw_only=True)
class Lost(FromWorker):
    """A worker's connection ended without `Left`. The driver's server makes this message itself."""

    kind = "lost"


# From the driver to workers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FromDriver(Message):
    """An order to a worker."""


@dataclass(frozen=True, kw_only=True)
class Stop(FromDriver):
    """End the process now."""

    kind = "stop"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Hold(FromDriver):
    """Report the completed calls of the training step by `Held`, and wait before the call after the next."""

    kind = "hold"


@dataclass(frozen=True, kw_only=True)
class StopAfter(FromDriver):
    """Save a checkpoint and end after the call number ``calls`` of the training step. Every rank gets the same number."""

    kind = "stop_after"
    calls: int


# Between workers and a parameter server ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ToParameterServer(Message):
    """A request of the worker ``rank``."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class GetWeights(ToParameterServer):
    """Asks for the weights. `Accepted` answers, followed by one frame of raw arrays."""

    kind = "get_weights"


@dataclass(frozen=True, kw_only=True)
class SubtractFromWeights(ToParameterServer):
    """Asks to subtract the arrays in the next frame from the weights. `Accepted` or `Refused` answers that frame."""

    kind = "subtract_from_weights"


@dataclass(frozen=True, kw_only=True)
class FromParameterServer(Message):
    """The answer to a request."""


@dataclass(frozen=True, kw_only=True)
class Accepted(FromParameterServer):
    """The request was carried out."""

    kind = "accepted"


@dataclass(frozen=True, kw_only=True)
class Refused(FromParameterServer):
    """The request was not carried out, and the server closes the connection."""

    kind = "refused"
    reason: str


# Events of the driver, in events.jsonl only --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Event(Message):
    """An event that the driver records itself. ``rank`` is None if it concerns no single worker."""

    rank: int | None


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """The run has failed."""

    kind = "failure"
    message: str


@dataclass(frozen=True, kw_only=True)
class Restarted(Event):
    """The run starts again: ``number`` counts from 1; ``from_`` names the checkpoint, None for the beginning."""

    kind = "restart"
    number: int
    from_: str | None


# Encoding ------------------------------------------------------------------------------------------------------------------

_M = TypeVar("_M", bound=Message)


def plain(message: Message) -> dict[str, Any]:
    """``message`` as plain data, as in events.jsonl. Optional fields that are None are left out."""
    values = {
        field.name.rstrip("_"): getattr(message, field.name)  # "from" is a keyword of Python
        for field in dataclasses.fields(message)
        if not (field.default is None and getattr(message, field.name) is None)
    }
    return {"kind": message.kind, **values}


def encode(message: Message) -> bytes:
    """``message`` as the payload of a frame."""
    return json.dumps(plain(message), ensure_ascii=False).encode("utf-8", "surrogatepass")


def decode(payload: bytes, expected: type[_M]) -> _M:
    """The message that ``encode`` made.

    Args:
        payload: of one frame.
        expected: the class, or a parent of the classes, that the receiver accepts here.

    Raises:
        ValueError: this is no such message.
    """
    try:
        values = json.loads(payload)
    except RecursionError as error:
        raise ValueError("expected a message; got deeply nested JSON") from error
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    if cls is None or not issubclass(cls, expected):
        raise ValueError(f"expected a message {expected.__name__}; got kind {kind!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    missing = {name for name, field in known.items() if field.default is dataclasses.MISSING} - values.keys()
    if missing or values.keys() - known.keys():
        raise ValueError(f"expected the fields {sorted(known)} in {kind!r}; got {sorted(values)}")
    for name, value in values.items():
        if not _fits(value, str(known[name].type)):
            raise ValueError(f"expected {known[name].type} as {kind}.{name}; got {type(value).__name__}")
    return cls(**values)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


_FITS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "float": _number,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "dict[str, float]": lambda value: type(value) is dict and all(map(_number, value.values())),
}


def _fits(value: Any, annotation: str) -> bool:
    if value is None:
        return annotation.endswith(" | None")
    return _FITS[annotation.removesuffix(" | None")](value)


def _kinds(cls: type[Message]) -> Iterator[type[Message]]:
    for child in cls.__subclasses__():
        yield from _kinds(child)
        if child.kind:
            yield child


_CLASSES = {cls.kind: cls for cls in _kinds(Message)}
