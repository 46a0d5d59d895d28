"""Steps: work whose result is kept in a store and repeated only if something that it depends on has changed.

The key of a step is a digest of its settings, of the versions of the packages that determine its result, and of the keys
of the steps that it needs. The result is kept in a folder named after the key; it is complete when ``result.json`` exists,
which is written last. So a killed study resumes after its last finished step, and a changed setting repeats only the steps
that depend on it. Results of other settings stay, so changing a setting back finds them again.
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
        kind: kind of work: "prepare", "train", …
        name: for display; unique among the steps of one kind.
        settings: plain data that determines the result.
        run: does the work in a folder of the store and returns plain data about it.
        needs: the steps whose results it uses.
        packages: packages whose versions determine the result, besides dlspark.
        resumes: ``run`` resumes from what it finds in its folder; otherwise the folder is emptied first.
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
        """Version by package, for those that determine the result."""
        return {name: installed_version(name) or "(not installed)" for name in ("dlspark", *self.packages)}


@dataclass(frozen=True)
class Result:
    """The result of a finished step.

    Attributes:
        store: its folder.
        document: the plain data that its work returned.
        seconds: duration, including earlier attempts that failed or were interrupted, but not those that were killed.
        versions: versions of packages under which it ran.
    """

    store: Store
    document: Document
    seconds: float
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Folder:
    """The folder of a step, and the results that it needs.

    Attributes:
        store: the folder.
        results: in the order of `Step.needs`.
    """

    store: Store
    results: Sequence[Result]


class KeptSteps:
    """The results of steps in a store.

    Args:
        store: contains one folder for each step. One process at a time may write to it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def folder(self, step: Step) -> Store:
        """The folder of ``step``."""
        return self._store.child(f"{step.kind}-{step.key}")

    def result(self, step: Step) -> Result | None:
        """The result of ``step``; None if it has not finished."""
        folder = self.folder(step)
        if not folder.exists(RESULT):
            return None
        kept = folder.read_json(RESULT)
        return Result(folder, kept["document"], kept["seconds"], kept["versions"])

    def run(self, steps: Sequence[Step], *, on_step: Callable[[Step, Result, bool], None] | None = None) -> list[Result]:
        """Run the steps that have no kept result.

        Args:
            steps: each after the steps that it needs.
            on_step: called after every step with its result, and whether that was kept already.
        """
        results: dict[str, Result] = {}
        for number, step in enumerate(steps, start=1):
            found = self.result(step)
            kept = found is not None
            if found is None:
                logger.info("[%d/%d] %s %s …", number, len(steps), step.kind, step.name)
                found = self._do(step, [results[need.key] for need in step.needs])
            outcome = "kept" if kept else f"{found.seconds:.1f} s"
            logger.info("[%d/%d] %s %s: %s", number, len(steps), step.kind, step.name, outcome)
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
        document = json.loads(json.dumps(returned, allow_nan=False))  # as a later run reads it
        seconds = before + time.perf_counter() - started
        about = {"kind": step.kind, "name": step.name, "settings": dict(step.settings), "versions": step.versions}
        folder.write_json(RESULT, {**about, "seconds": seconds, "document": document})
        return Result(folder, document, seconds, step.versions)
