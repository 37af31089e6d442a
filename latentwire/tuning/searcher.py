"""Tune's searcher over one Optuna study that is told the truth.

Ray's own OptunaSearch tells a trial that a scheduler stopped as COMPLETE with its early score, leaves a trial whose
objective is NaN or missing RUNNING for ever (which biases sampling), and raises inside the sweep for a report without
the metric. Here a stopped trial is PRUNED with its intermediate values, a trial without a usable objective is FAIL
with its cause, and the study lies in a journal file beside the results, which ``optuna-dashboard`` opens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search.searcher import Searcher

TRIAL_ID, CAUSE = "tune_trial_id", "cause"
"""User attributes of the study's trials: Tune's id, and why a trial failed."""


def open_study(journal: Path, name: str, mode: str, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """The study ``name`` of a journal file, made where it is not there yet."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name=name,
        direction={"max": "maximize", "min": "minimize"}[mode],
        sampler=sampler,
        load_if_exists=True,
    )


class StudySearch(Searcher):
    """Suggests by an Optuna sampler and tells the study what really happened to each trial.

    Reports must carry ``step`` and ``total_steps``: a trial that ends before its last step was stopped. A trial's value
    is its best evaluation, since that is the checkpoint which is kept.
    """

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        *,
        metric: str,
        mode: str,
        journal: Path,
        name: str,
        sampler: optuna.samplers.BaseSampler,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self.distributions, self.journal, self.name, self.sampler = dict(distributions), journal, name, sampler
        self._study: optuna.Study | None = None
        self._trials: dict[str, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for a restart; the study is opened again from its journal."""
        return self.__dict__ | {"_study": None, "_trials": {}}

    @property
    def study(self) -> optuna.Study:
        """The study, opened at first use."""
        if self._study is None:
            self._study = open_study(self.journal, self.name, str(self.mode), self.sampler)
        return self._study

    # ----------------------------------------------------------------------------------------------- Tune's interface

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Values for a new trial, by dotted path; the same ones when a restarted sweep asks again."""
        known = self._find(trial_id)
        if known is not None:
            return dict(known.params)
        trial = self.study.ask(fixed_distributions=self.distributions)
        trial.set_user_attr(TRIAL_ID, trial_id)
        self._trials[trial_id] = trial
        return dict(trial.params)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An evaluation becomes an intermediate value; one without a finite metric is left out."""
        value = self._value(result)
        frozen = self._find(trial_id)
        if (
            value is None
            or frozen is None
            or frozen.state.is_finished()
            or result["step"] in frozen.intermediate_values
        ):
            return
        if trial_id not in self._trials:  # asked for by a driver that is gone
            self._trials[trial_id] = Trial(self.study, frozen._trial_id)
        self._trials[trial_id].report(value, int(result["step"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """PRUNED where the trial was stopped early, FAIL where it raised or has no usable metric, else COMPLETE."""
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
        frozen = self._find(trial_id)
        if frozen is None or frozen.state.is_finished():
            return
        if error:
            self._fail(frozen, "the trial raised an error; see error.txt in its directory")
        elif result is None or self._value(result) is None:
            found = "no result" if result is None else f"{self.metric} = {result.get(str(self.metric))}"
            self._fail(frozen, f"a finite {self.metric} is needed, got {found}")
        elif result["step"] < result["total_steps"]:
            self.study.tell(frozen.number, state=TrialState.PRUNED)
        else:
            best = (max if self.mode == "max" else min)(frozen.intermediate_values.values())
            self.study.tell(frozen.number, best)

    def close(self, known: set[str]) -> None:
        """End of the sweep: what still runs in the study but not in Tune (``known`` trial ids) has failed."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.user_attrs.get(TRIAL_ID) not in known:
                self._fail(frozen, "the driver ended before the trial started")

    def save(self, checkpoint_path: str) -> None:
        """The journal holds everything; what Tune keeps is where it is."""
        Path(checkpoint_path).write_text(json.dumps({"journal": str(self.journal), "study": self.name}))

    def restore(self, checkpoint_path: str) -> None:
        """Go on with the study of a saved sweep."""
        saved = json.loads(Path(checkpoint_path).read_text())
        self.journal, self.name = Path(saved["journal"]), saved["study"]
        self._study, self._trials = None, {}

    # ------------------------------------------------------------------------------------------------------ internals

    def _find(self, trial_id: str) -> FrozenTrial | None:
        trials = reversed(self.study.get_trials(deepcopy=False))
        return next((trial for trial in trials if trial.user_attrs.get(TRIAL_ID) == trial_id), None)

    def _value(self, result: Mapping[str, Any]) -> float | None:
        value = result.get(str(self.metric))
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def _fail(self, frozen: FrozenTrial, cause: str) -> None:
        Trial(self.study, frozen._trial_id).set_user_attr(CAUSE, cause)
        self.study.tell(frozen.number, state=TrialState.FAIL)
