"""The log of a run: every report with its time, and scalars beside it, in local and remote stores."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dlspark import Trainer, WorkerError, local
from dlspark.driver.events import EVENTS_FILE, EventLog
from dlspark.storage.store import Store
from dlspark.testing import toys
from dlspark.wire import messages

pytestmark = pytest.mark.timeout(60)


def lines(text: bytes | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_leaves_its_reports_and_scalars(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    began = time.time()
    result = Trainer("local", store=tmp_path).fit(toys.dense_classifier(), toys.separable(100), epochs=2, verbose=0)
    (run,) = tmp_path.glob("run-*")
    events = lines((run / EVENTS_FILE).read_text())
    kinds = [event["kind"] for event in events]
    assert kinds[:2] == ["connected", "started"]
    assert kinds[-2:] == ["done", "left"]
    assert kinds.count("epoch") == kinds.count("checkpoint") == 2
    assert "heartbeat" not in kinds
    times = [event["time"] for event in events]
    assert times == sorted(times)
    assert began - 1 < times[0] < times[-1] < time.time() + 1
    accumulator = accumulators.EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    if accumulator.Tags()["scalars"]:
        losses = [event.value for event in accumulator.Scalars("loss")]
    else:
        losses = [event.tensor_proto.float_val[0] for event in accumulator.Tensors("loss")]
    assert losses == pytest.approx(result.history["loss"])


def test_an_engine_that_fails_by_itself_is_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any) -> Any:
        raise RuntimeError("no slots")

    monkeypatch.setattr(local, "run_worker", launch)
    with pytest.raises(WorkerError, match="no worker reported why"):
        Trainer("local", store=tmp_path).fit(toys.dense_classifier(), toys.separable(100), verbose=0)
    (run,) = tmp_path.glob("run-*")
    (event,) = lines((run / EVENTS_FILE).read_text())
    assert event["kind"] == "failure"
    assert event["message"].endswith("RuntimeError: no slots")


def test_text_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    """As in the name of a file whose bytes are not UTF-8."""
    with EventLog(Store(tmp_path)) as log:
        log.add(messages.Note(rank=0, text="größe \udcff"))
    assert [event["text"] for event in lines((tmp_path / EVENTS_FILE).read_text())] == ["größe \udcff"]


def test_a_remote_store_has_them_after_an_epoch_and_goes_on() -> None:
    store = Store("memory://events/run-1")
    for epoch in range(2):
        log = EventLog(store)
        log.open()
        log.add(messages.StepEnded(rank=0, epoch=epoch, step=1, steps=2, rows=3, loss=None))
        log.add(messages.EpochEnded(rank=0, epoch=epoch, logs={"loss": 0.5}, seconds=1.0))
        deadline = time.monotonic() + 20
        while not store.exists(EVENTS_FILE) or len(lines(store.read_bytes(EVENTS_FILE))) != 2 * epoch + 2:
            assert time.monotonic() < deadline, "nothing was uploaded at the end of the epoch"
            time.sleep(0.05)
        log.add(messages.Left(rank=0))
        log.close()
        log.close()
        store.delete("tensorboard", missing_ok=True)
        store.write_bytes(EVENTS_FILE, store.read_bytes(EVENTS_FILE).rsplit(b"\n", 2)[0] + b"\n")
    assert [event["epoch"] for event in lines(store.read_bytes(EVENTS_FILE))] == [0, 0, 1, 1]


def test_without_a_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Trainer("local").fit(toys.dense_classifier(), toys.separable(100), verbose=0)
    assert not list(tmp_path.iterdir())
