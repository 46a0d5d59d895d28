"""Steps run once: kept results, changed settings, killed steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dlspark.storage.steps import ATTEMPTS, RESULT, Document, Folder, KeptSteps, Step
from dlspark.storage.store import Store


class Counting:
    """Consecutive steps that each add their number to the sum so far, and a list of the steps that ran."""

    def __init__(self, store: Path, *, fails: str | None = None) -> None:
        self.kept = KeptSteps(Store(store))
        self.done: list[str] = []
        self.fails = fails

    def steps(self, settings: Mapping[str, int]) -> list[Step]:
        steps: list[Step] = []
        for name, value in settings.items():
            steps.append(Step("add", name, {"value": value}, self.work(name, value), steps[-1:]))
        return steps

    def work(self, name: str, value: int) -> Callable[[Folder], Document]:
        def run(folder: Folder) -> Document:
            self.done.append(name)
            assert folder.store.list() == ()
            folder.store.write_bytes("data", b"half")
            if name == self.fails:
                raise KeyboardInterrupt
            return {"sum": value + sum(result.document["sum"] for result in folder.results)}

        return run

    def sums(self, settings: Mapping[str, int]) -> list[int]:
        self.done.clear()
        return [result.document["sum"] for result in self.kept.run(self.steps(settings))]


def test_a_change_repeats_what_hangs_on_it_and_nothing_else(tmp_path: Path) -> None:
    study = Counting(tmp_path)
    assert study.sums({"a": 1, "b": 2, "c": 3}) == [1, 3, 6]
    assert study.done == ["a", "b", "c"]
    assert study.sums({"a": 1, "b": 2, "c": 3}) == [1, 3, 6]
    assert study.done == []
    assert study.sums({"a": 1, "b": 5, "c": 3}) == [1, 6, 9]
    assert study.done == ["b", "c"]
    assert study.sums({"a": 1, "b": 2, "c": 4}) == [1, 3, 7]
    assert study.done == ["c"]


def test_a_killed_step_is_done_again_from_an_empty_folder(tmp_path: Path) -> None:
    killed = Counting(tmp_path, fails="b")
    with pytest.raises(KeyboardInterrupt):
        killed.sums({"a": 1, "b": 2})
    step = killed.steps({"a": 1, "b": 2})[1]
    assert killed.kept.folder(step).list() == ("data",)
    again = Counting(tmp_path)
    assert again.sums({"a": 1, "b": 2}) == [1, 3]
    assert again.done == ["b"]
    assert again.kept.folder(step).list() == ("data", RESULT)


def test_seconds_are_those_of_all_attempts(tmp_path: Path) -> None:
    kept = KeptSteps(Store(tmp_path))
    attempts: list[Folder] = []

    def run(folder: Folder) -> Document:
        attempts.append(folder)
        if len(attempts) < 3:
            raise KeyboardInterrupt
        return {}

    step = Step("train", "it", {}, run, resumes=True)
    told = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            kept.run([step])
        told.append(kept.folder(step).read_json(ATTEMPTS)["seconds"])
    (result,) = kept.run([step])
    assert 0 < told[0] < told[1] < result.seconds


def test_versions_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return Step("train", "it", {}, lambda folder: {}, packages=("keras",)).key

    before = key()
    assert key() == before
    versions: dict[str, Any] = {"keras": "0.0", "dlspark": "0.1.0"}
    monkeypatch.setattr("dlspark.storage.steps.installed_version", versions.get)
    assert key() != before
