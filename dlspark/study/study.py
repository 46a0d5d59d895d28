"""A study, for each split: prepare → explore → train → featurize → fit classifiers → average ensembles → evaluate.

The split comes before everything else. Networks and pipelines are fitted on training rows only, pipelines within each
fold too (`dlspark.study.pipelines`). All models of a split use the same rows and folds.

A trained network has seen the training rows of all folds, so cross-validated scores on its features are too high. They only
choose between settings; the report has the scores on the test part, which no model has seen.
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
    """The steps of a study.

    Attributes:
        file: the settings.
        store: where all results are kept.
        steps: each after the steps that it needs.
    """

    file: StudyFile
    store: Store
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, file: StudyFile) -> Study:
        """Plan the steps, and check what can be checked without running one. Starts Spark if there are classifiers.

        Raises:
            ConfigError: an unknown option of a backend or parameter of a classifier, or a missing file.
        """
        store = Store(file.settings.store)
        return cls(file, store, tuple(StudyPlan(file.settings, store).steps()))

    def run(self, *, command: Sequence[str] = ()) -> Document:
        """Run the steps that have no kept result, and write ``study.json``, ``study.html`` and pictures to the store.

        Args:
            command: the command line, for the report.

        Returns:
            The report: for each split ``data``, ``networks``, ``models``, the name of the ``best`` by ``evaluate.best_by``
            and ``fits`` of classifiers; ``warnings``; ``steps`` with seconds, and whether their results were kept.

        Raises:
            DlsparkError: a step failed; the results of earlier steps are kept.
        """
        steps = KeptSteps(self.store)
        kept: dict[str, bool] = {}

        results: dict[str, Result] = {}
        first_rows = next(step for step in self.steps if step.kind == "rows")
        networks_to_do = any(steps.result(step) is None for step in self.steps if step.kind in ("network", "train"))

        def note(step: Step, result: Result, was_kept: bool) -> None:
            results[step.key] = result
            kept.setdefault(step.key, was_kept)  # steps with the same settings are one
            if step.kind == "rows":  # before any training
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
        """All steps, and whether their results are kept already."""
        steps = KeptSteps(self.store)
        return [(step, steps.result(step) is not None) for step in self.steps]
