"""A study: prepare → explore → split → train → featurize → join → classifiers → evaluate → ensemble, for every split.

The split comes first. Augmentation is in the networks, which train on training rows; what is fitted on features sees
training rows only, within each fold too (`dlspark.study.classifiers`). Rows and folds are the same for every model of a
split.

One thing no fold can undo: a network that was trained has seen all training rows, so that cross-validated scores on its
features are better than those on test. They choose between settings; what is reported is the test part, which nothing saw.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dlspark.storage import Document, KeptSteps, Result, Step, Store, lease
from dlspark.study import judge as judging
from dlspark.study.networks import check_networks
from dlspark.study.plan import StudyPlan
from dlspark.study.steps import prepared_dataset
from dlspark.study.study_file import StudyFile

REPORT = "study.json"


@dataclass(frozen=True)
class Study:
    """The steps of a study, in an order in which they can be done.

    Attributes:
        file: what was asked for.
        store: where everything is kept.
        steps: all of them.
    """

    file: StudyFile
    store: Store
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, file: StudyFile) -> Study:
        """Lay out the steps. Checks what can be checked without doing any work; starts nothing but, once needed, Spark.

        Raises:
            ConfigError: a backend's option or a classifier's parameter that does not exist, or a file that is not there.
        """
        store = Store(file.settings.store)
        return cls(file, store, tuple(StudyPlan(file.settings, store).steps()))

    def run(self, *, command: Sequence[str] = ()) -> Document:
        """Do what is not kept, and write what came out to ``study.json`` and ``study.html`` in the store, with pictures.

        Args:
            command: how it was called, for the report.

        Returns:
            The report: for every split its ``data``, ``networks``, ``models`` (the best by ``evaluate.best_by`` marked)
            and classifiers' ``fits``; ``warnings``; the ``steps`` with seconds, and whether they were kept from before.

        Raises:
            DlsparkError: a step failed; those before it are kept.
        """
        steps = KeptSteps(self.store)
        kept: dict[str, bool] = {}

        results: dict[str, Result] = {}
        first_rows = next(step for step in self.steps if step.kind == "rows")
        networks_to_do = any(steps.result(step) is None for step in self.steps if step.kind in ("network", "train"))

        def note(step: Step, result: Result, was_kept: bool) -> None:
            results[step.key] = result
            kept.setdefault(step.key, was_kept)  # two steps with the same settings are one
            if step.kind == "rows":  # no training has begun yet
                prepared = results[step.needs[0].key]
                judging.check_against_data(self.file.settings, prepared.document, result)
                if step is first_rows and networks_to_do:
                    check_networks(self.file.settings, prepared_dataset(prepared))

        with lease(self.store):
            steps.run(self.steps, on_step=note)
            report = judging.report(self.file, self.steps, results, kept)
            report["command"] = shlex.join(command)
            self.store.write_json(REPORT, report)
            judging.write_page(report, self.store)
        return report

    def plan(self) -> list[tuple[Step, bool]]:
        """Every step, and whether its result is kept already."""
        steps = KeptSteps(self.store)
        return [(step, steps.result(step) is not None) for step in self.steps]
