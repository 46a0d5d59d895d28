"""Steps: work whose result is kept in a store, and not done again while nothing that it depends on has changed.

A step's key is a digest of its settings, of the versions of the packages that decide its result, and of the keys of the
steps that it needs. Its result lies in a folder of that key and counts when ``result.json`` is there, which is written last.
So a study that was killed goes on where it was, and a changed setting repeats what hangs on it and nothing else. What
belongs to other settings stays: setting them back finds it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dlspark._require import installed_version
from dlspark.storage.store import Store

logger = logging.getLogger(__name__)

RESULT = "result.json"
ATTEMPTS = "attempts.json"

Document = dict[str, Any]
Work = Callable[["Folder"], Document]


@dataclass(frozen=True, eq=False)
class Step:
    """One step.

    Attributes:
        kind: what is done: "prepare", "train", …
        name: to which of them, for people; of steps of one kind no two have the same.
        settings: plain data that decides the result.
        run: does the work in a folder of the store and returns plain data about it.
        needs: the steps whose results it uses.
        packages: those whose versions decide the result; dlspark's own always does.
        resumes: ``run`` goes on with what it finds in its folder. Others find it empty.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]
    run: Work = field(repr=False)
    needs: Sequence[Step] = ()
    packages: Sequence[str] = ()
    resumes: bool = False

    @cached_property
    def key(self) -> str:
        """Equal for steps with the same result."""
        identity = [self.kind, self.settings, self.versions, [step.key for step in self.needs]]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of what decides the result."""
        return {name: installed_version(name) or "(not installed)" for name in ("dlspark", *self.packages)}


@dataclass(frozen=True)
class Result:
    """What a finished step has left.

    Attributes:
        store: its folder.
        document: what its work returned.
        seconds: how long that took, attempts that failed or were interrupted before included; not those that were killed.
        versions: under which it ran.
    """

    store: Store
    document: Document
    seconds: float
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Folder:
    """Where a step works, and what it needs.

    Attributes:
        store: the step's own folder.
        results: those of the steps that it needs, in their order.
    """

    store: Store
    results: Sequence[Result]


class KeptSteps:
    """The results of steps in a store.

    Args:
        store: each step has a folder of its own in it. One process at a time may write to it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def folder(self, step: Step) -> Store:
        """Where the result of ``step`` is, or will be."""
        return self._store.child(f"{step.kind}-{step.key}")

    def result(self, step: Step) -> Result | None:
        """The result of ``step``; None when it has not been finished."""
        folder = self.folder(step)
        if not folder.exists(RESULT):
            return None
        kept = folder.read_json(RESULT)
        return Result(folder, kept["document"], kept["seconds"], kept["versions"])

    def run(self, steps: Sequence[Step], *, on_step: Callable[[Step, Result, bool], None] | None = None) -> list[Result]:
        """Do what has not been done.

        Args:
            steps: each after those that it needs.
            on_step: called after every step with its result, and whether that had been kept from before.
        """
        results: dict[str, Result] = {}
        for number, step in enumerate(steps, start=1):
            found = self.result(step)
            kept = found is not None
            if found is None:
                logger.info("[%d/%d] %s %s …", number, len(steps), step.kind, step.name)
                found = self._do(step, [results[need.key] for need in step.needs])
            told = "kept" if kept else f"{found.seconds:.1f} s"
            logger.info("[%d/%d] %s %s: %s", number, len(steps), step.kind, step.name, told)
            results[step.key] = found
            if on_step is not None:
                on_step(step, found, kept)
        return [results[step.key] for step in steps]

    def _do(self, step: Step, needs: Sequence[Result]) -> Result:
        folder = self.folder(step)
        if not step.resumes:
            folder.delete_all()
        before = folder.read_json(ATTEMPTS)["seconds"] if folder.exists(ATTEMPTS) else 0.0
        started = time.perf_counter()
        try:
            returned = step.run(Folder(folder, needs))
        except BaseException:
            if step.resumes:
                folder.write_json(ATTEMPTS, {"seconds": before + time.perf_counter() - started})
            raise
        document = json.loads(json.dumps(returned, allow_nan=False))  # as a later run will find it
        seconds = before + time.perf_counter() - started
        about = {"kind": step.kind, "name": step.name, "settings": dict(step.settings), "versions": step.versions}
        folder.write_json(RESULT, {**about, "seconds": seconds, "document": document})
        return Result(folder, document, seconds, step.versions)
