"""Messages survive encoding and decoding, and malformed ones are rejected."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dlspark.wire import failed, framing, messages
from dlspark.wire.messages import (
    EpochEnded,
    Failed,
    FromDriver,
    FromWorker,
    Message,
    Restarted,
    StepEnded,
    Stop,
    decode,
    encode,
    plain,
)

STEP = StepEnded(rank=1, epoch=0, step=3, steps=10, rows=96, loss=None)
FAILED = Failed(rank=1, host="here", error="OSError", message="no", traceback="", retryable=True)


EPOCH = EpochEnded(rank=0, epoch=1, logs={"loss": 0.5}, seconds=1)


@pytest.mark.parametrize("message", [STEP, FAILED, EPOCH, Stop(reason="\udcff")], ids=lambda message: message.kind)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message), Message) == message


def test_the_longest_report_of_an_error_fits_into_a_frame() -> None:
    assert len(encode(failed(0, ValueError("\N{BUG}" * 1_000_000)))) <= framing.MAX_FRAME_BYTES


def test_every_field_has_a_type_that_is_checked() -> None:
    for cls in messages._CLASSES.values():
        for field in messages.dataclasses.fields(cls):
            assert str(field.type).removesuffix(" | None") in messages._FITS, f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "unknown"},
        {"kind": None},
        {"kind": ["step"]},
        {"extra": 1},
        {"step": ...},
        {"kind": ...},
        {"step": "3"},
        {"step": 3.0},
        {"step": True},
        {"step": None},
        {"loss": "0.5"},
        {"rank": None},
    ],
    ids=str,
)
def test_what_is_no_message_is_refused(changes: dict[str, object]) -> None:
    values = {**plain(STEP), **changes}
    with pytest.raises(ValueError, match="expected"):
        decode(json.dumps({name: value for name, value in values.items() if value is not ...}).encode(), FromWorker)


@pytest.mark.parametrize("payload", [b"", b"[]", b"1", b"\xff", b"\x80\x04\x95", b"[" * 100_000])
def test_noise_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode(payload, FromWorker)


def test_a_message_in_the_wrong_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a message FromDriver; got kind 'step'"):
        decode(encode(STEP), FromDriver)


def test_the_keys_of_the_event_log() -> None:
    """The keys that users read in events.jsonl: an unknown place is omitted; an absent rank or checkpoint is null."""
    assert plain(Restarted(rank=None, number=1, from_=None)) == {"kind": "restart", "rank": None, "number": 1, "from": None}
    assert "loss" in plain(STEP)
    assert not {"epoch", "step", "connection"} & plain(FAILED).keys()


def test_the_guard_starts_without_packages() -> None:
    """Start it as a worker does, with only the standard library on the path."""
    from dlspark.worker.heartbeat import guard_program

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", guard_program()],
        input='{"host": "127.0.0.1", "port": 1, "secret": "00", "pid": 1}\n',
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "ConnectionRefusedError" in done.stderr
