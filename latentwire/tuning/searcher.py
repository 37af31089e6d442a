"""Tune's searcher over one Optuna study that is told the truth.

Ray's own OptunaSearch tells a trial that a scheduler stopped as COMPLETE with its early score, leaves a trial whose
objective is NaN or missing RUNNING for ever (which biases sampling), raises inside the sweep for a report without the
metric, and enqueues its starting points again after a restart. Here a stopped trial is PRUNED with its intermediate
values, a trial without a usable objective is FAIL with its cause, and the study lies in a journal file beside the
results, which ``optuna-dashboard`` opens and a restart goes on with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search.searcher import Searcher

from latentwire.config import SpaceFile
from latentwire.tuning import study as studies
from latentwire.tuning.samplers import make_sampler
from latentwire.tuning.space import check_metrics, draw
from latentwire.tuning.study import CAUSE, EVALUATIONS, TRIAL_ID


def objectives(space: SpaceFile) -> dict[str, str]:
    """What a space is searched by: metric → max or min, the scheduler's first."""
    return {space.tune.metric: space.tune.mode, **space.tune.objectives}


def check_searchable(space: SpaceFile) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for a sampler, metric or earlier study that cannot serve."""
    check_metrics(space)
    make_sampler(space)
    if space.tune.warm_start is not None:
        studies.read_earlier(space.tune.warm_start, objectives(space))


class StudySearch(Searcher):
    """Suggests by the space's sampler and tells the study what really happened to each trial.

    Reports must carry ``step`` and ``total_steps``: a trial that ends before its last step was stopped. A trial's values
    are those of its best evaluation by ``tune.metric``, since that is the checkpoint which is kept.
    """

    def __init__(self, space: SpaceFile, *, journal: Path, name: str) -> None:
        super().__init__(metric=space.tune.metric, mode=space.tune.mode)
        self.space, self.journal, self.name = space, journal, name
        self._study: optuna.Study | None = None
        self._trials: dict[int, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for a restart; the study is opened again from its journal."""
        return self.__dict__ | {"_study": None, "_trials": {}}

    @property
    def study(self) -> optuna.Study:
        """The study, opened at first use, with its starting points and what it was warmed with."""
        if self._study is None:
            tune, directed = self.space.tune, objectives(self.space)
            earlier = [] if tune.warm_start is None else studies.read_earlier(tune.warm_start, directed)
            study = studies.open_study(self.journal, self.name, directed, make_sampler(self.space))
            studies.enqueue(study, tune.start_with)
            studies.warm_start(study, earlier, self.space.search)
            self._study = study
        return self._study

    # ----------------------------------------------------------------------------------------------- Tune's interface

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Values for a new trial, by dotted path; the same ones when a restarted sweep asks again.

        A trial that was asked for by a driver which died before naming it is taken over: none is drawn in vain.
        """
        known = self._find(trial_id) or self._nameless()
        if known is not None and known.state.is_finished():
            return dict(known.params)
        if known is None:
            trial = self.study.ask()
            self._trials[trial.number] = trial
        else:
            trial = self._trial(known)
        values = draw(trial, self.space.search)
        trial.set_user_attr(TRIAL_ID, trial_id)
        return values

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep an evaluation; one without finite objectives is left out."""
        values, frozen = self._values(result), self._find(trial_id)
        if values is None or frozen is None or frozen.state.is_finished():
            return
        told, step = frozen.user_attrs.get(EVALUATIONS, {}), int(result["step"])
        if str(step) in told:
            return
        trial = self._trial(frozen)
        if len(values) == 1:  # Optuna keeps intermediate values for one objective only
            trial.report(values[0], step)
        trial.set_user_attr(EVALUATIONS, told | {str(step): values})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """PRUNED where the trial was stopped early, FAIL where it raised or has no usable metric, else COMPLETE."""
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
        frozen = self._find(trial_id)
        if frozen is None or frozen.state.is_finished():
            return
        if error:
            self._fail(frozen, "the trial raised an error; see error.txt in its directory")
        elif result is None or self._values(result) is None:
            wanted = ", ".join(objectives(self.space))
            found = "no result" if result is None else {name: result.get(name) for name in objectives(self.space)}
            self._fail(frozen, f"finite {wanted} needed, got {found}")
        elif missing := [name for name in self.space.tune.constraints if self._number(result, name) is None]:
            self._fail(frozen, f"finite {', '.join(missing)} needed for tune.constraints, got {result.get(missing[0])}")
        else:
            self._tell(frozen, result)

    def close(self, known: set[str]) -> None:
        """End of the sweep: what still runs in the study but not in Tune (``known`` trial ids) has failed."""
        for frozen in studies.own_trials(self.study, (TrialState.RUNNING,)):
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

    def _trial(self, frozen: FrozenTrial) -> Trial:
        """The study's handle of a trial; making one has the sampler start the trial, so it is made once."""
        if frozen.number not in self._trials:
            self._trials[frozen.number] = Trial(self.study, frozen._trial_id)
        return self._trials[frozen.number]

    def _tell(self, frozen: FrozenTrial, result: Mapping[str, Any]) -> None:
        trial = self._trial(frozen)
        for name, limit in self.space.tune.constraints.items():
            trial.set_constraint(name, float(result[name]) - limit.max)
        if result["step"] < result["total_steps"]:
            self.study.tell(frozen.number, state=TrialState.PRUNED)
            return
        best = (max if self.mode == "max" else min)(
            frozen.user_attrs[EVALUATIONS].values(), key=lambda values: values[0]
        )
        self.study.tell(frozen.number, best)

    def _find(self, trial_id: str) -> FrozenTrial | None:
        trials = reversed(self.study.get_trials(deepcopy=False))
        return next((trial for trial in trials if trial.user_attrs.get(TRIAL_ID) == trial_id), None)

    def _nameless(self) -> FrozenTrial | None:
        running = studies.own_trials(self.study, (TrialState.RUNNING,))
        return next((trial for trial in running if TRIAL_ID not in trial.user_attrs), None)

    def _values(self, result: Mapping[str, Any]) -> list[float] | None:
        values = [self._number(result, name) for name in objectives(self.space)]
        found = [value for value in values if value is not None]
        return found if len(found) == len(values) else None

    @staticmethod
    def _number(result: Mapping[str, Any], name: str) -> float | None:
        value = result.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def _fail(self, frozen: FrozenTrial, cause: str) -> None:
        self._trial(frozen).set_user_attr(CAUSE, cause)
        self.study.tell(frozen.number, state=TrialState.FAIL)
