"""Tune's searcher over one Optuna study that records what really happened.

Ray's own OptunaSearch records a trial that a scheduler stopped as COMPLETE with its early score. It
leaves a trial whose objective is NaN or missing RUNNING for ever, which biases sampling. It raises
inside the sweep for a report without the metric, and enqueues its starting points again after a
restart. Here a stopped trial is PRUNED with its intermediate values, and a trial without a usable
objective is FAIL with its cause. The study lies in a journal file beside the results, which
``optuna-dashboard`` opens and a restart goes on with.
"""

from __future__ import annotations

import json
import math
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search.searcher import Searcher

from latentwire.config import SweepConfig
from latentwire.config.resolve import with_values
from latentwire.distributed.task import EARLIER, cause_left
from latentwire.distributed.trial import NUMBER, TAKES_UP, trial_path
from latentwire.planning.resolved import objectives
from latentwire.planning.variants import check_metrics
from latentwire.storage import Place, StorageError, place
from latentwire.tuning import orders
from latentwire.tuning import study as studies
from latentwire.tuning.orders import Order
from latentwire.tuning.samplers import make_sampler
from latentwire.tuning.stopping import Stop
from latentwire.tuning.study import (
    CAUSE,
    EVALUATIONS,
    PAUSED,
    SESSION,
    STOPPED,
    draw,
    is_paused,
)

if TYPE_CHECKING:
    from latentwire.tuning.steering import Steering

COPY_PAUSE = 20
"""Pause between two copies of the journal, in times that the last copy took, unless a trial
ends."""


PLAIN = (int, float, str)
"""Types of a report's entries that the study keeps."""
DRAWS = 64
"""Random configurations that are validated before a sweep begins."""


def check_searchable(space: SweepConfig) -> None:
    """Check the sampler, the metrics and the study of ``tune.warm_start``.

    Raises :class:`~latentwire.config.resolve.ConfigError` for one that cannot serve.
    """
    check_metrics(space)
    make_sampler(space)
    if space.tune.warm_start is not None:
        studies.read_earlier(space.tune.warm_start, objectives(space))


def check_draws(space: SweepConfig) -> None:
    """Draw :data:`DRAWS` random configurations and raise for the first invalid one.

    The ends of every dimension have been tried by themselves. This tries values between them, and
    two dimensions together. Raises :class:`~latentwire.config.resolve.ConfigError`.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # this study is no news
    try:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=space.tune.seed))
        for _ in range(DRAWS if space.search else 0):
            values = draw(study.ask(), space.search)
            where = f"a trial that draws {values}; give a dimension a step, other choices or a condition"
            with_values(space.run, values, where)
    finally:
        optuna.logging.set_verbosity(before)


class StudySearch(Searcher):
    """Suggests trials by the space's sampler, and records in the study what happened to each.

    The study is the one record of a sweep: a new driver on the same journal hands out the trials
    that the one before left unfinished, then draws new ones. Trials are known by their number
    there; Tune's ids last as long as one driver.

    Reports must carry ``step`` and ``total_steps``: a trial that ends before its last step was
    stopped. A trial's values are those of its best evaluation by ``tune.metric``, since that is the
    checkpoint which is kept.
    """

    def __init__(
        self,
        space: SweepConfig,
        *,
        journal: Place,
        name: str,
        trial_dir: Place,
        protocol: str | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Prepare a search; the study is opened at first use.

        Args:
            trial_dir: holds a directory for every trial, where its driver leaves the cause of a
                failure.
            protocol: the protocol hash of every score, where it is known; earlier scores must have
                it too.
            stop: says when the sweep ends before its trials do.
        """
        super().__init__(metric=space.tune.metric, mode=space.tune.mode)
        self.space, self.journal, self.name, self.trial_dir = space, journal, name, trial_dir
        self.objectives = objectives(space)
        self.protocol, self.stop = protocol, stop or Stop()
        self.session = uuid.uuid4().hex
        self.steering: Steering | None = None
        """Orders to the sweep; None where it takes none, and Tune counts the trials."""
        self.live: set[int] = set()
        """Trials that this driver has handed out and that have not ended."""
        self._study: optuna.Study | None = None
        self._trials: dict[str, Trial] = {}
        self._copy_again = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the study out as Tune pickles its searcher: it is opened again from its journal."""
        return self.__dict__ | {"_study": None, "_trials": {}, "_copy_again": 0.0}

    @property
    def study(self) -> optuna.Study:
        """The study, with its starting points and the trials of a warm start."""
        if self._study is None:
            tune, earlier = self.space.tune, []
            if tune.warm_start is not None:
                earlier = studies.read_earlier(tune.warm_start, self.objectives, self.protocol)
            study = studies.open_study(self.journal, self.name, self.objectives)
            if self.protocol is not None:
                studies.record_protocol(study, self.protocol)
            studies.enqueue(study, tune.start_with)
            studies.warm_start(study, earlier, self.space.search, tune.constraints)
            self._study = study
        return self._study

    # ----------------------------------------------------------------------------- Tune's interface

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return a trial's values by path, and its number: an unfinished trial, else a new one.

        Unfinished are trials of a driver that is gone. What is drawn depends on the seed, the
        trial's number and the study alone, not on how often a driver died.
        """
        if self.stop.reason is not None or not self.stop.may_write():
            return Searcher.FINISHED
        # Tune asks again for None; after FINISHED never more.
        if self.steering is not None and not self.steering.has_room():
            may_go_on = self.live or self.steering.is_waiting
            if may_go_on and self.steering.ending is None:
                return None  # an order may still add trials
            self.steering.stop_if_all_is_paused()
            return Searcher.FINISHED
        trial = self._next_trial()
        # Marked as this driver's before it is drawn: it is handed out once.
        trial.set_user_attr(SESSION, self.session)
        self._trials[trial_id] = trial
        self.live.add(trial.number)
        self._keep()
        frozen = self._frozen(trial)
        directory = studies.directory_of(frozen)
        retried = {} if directory == trial.number else {TAKES_UP: directory}
        others = studies.clone_record(frozen).get("values", {})
        return draw(trial, self.space.search) | others | {NUMBER: trial.number} | retried

    def _next_trial(self) -> Trial:
        """Return a trial that another driver left running, else the next new one."""
        for unfinished in self._running():
            if unfinished.user_attrs.get(SESSION) != self.session and not is_paused(unfinished):
                # Values that it has not drawn yet are drawn as the other driver would have.
                self.study.sampler = make_sampler(self.space, unfinished.number)
                return Trial(self.study, unfinished._trial_id)
        # Starting points that wait are asked for first, the earliest before the others.
        trials = self.study.get_trials(deepcopy=False)
        waiting = [trial.number for trial in trials if trial.state is TrialState.WAITING]
        self.study.sampler = make_sampler(self.space, min(waiting, default=len(trials)))
        return self.study.ask()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an evaluation, and those before it that a resumed trial reports again.

        Evaluations without finite objectives are left out.
        """
        trial = self._trials[trial_id]
        if self._frozen(trial).state.is_finished() or not self.stop.may_write():
            return
        recorded = self._frozen(trial).user_attrs.get(EVALUATIONS, {})
        # Step, as text (attributes are JSON) → report.
        new: dict[str, dict[str, Any]] = {}
        for report in (*json.loads(result.get(EARLIER, "[]")), result):
            values = self._values(report)
            if values is None or (step := str(report["step"])) in recorded:
                continue
            if len(values) == 1:  # Optuna keeps intermediate values for one objective only
                trial.report(values[0], int(step))
            plain = {name: value for name, value in report.items() if isinstance(value, PLAIN)}
            plain.pop(EARLIER, None)
            new[step] = plain
        if new:
            trial.set_user_attr(EVALUATIONS, recorded | new)
            self._keep()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record a trial's end: PRUNED, FAIL or COMPLETE.

        PRUNED is a trial that was stopped early, FAIL one that raised or has no usable metric.
        """
        trial = self._trials[trial_id]
        self.live.discard(trial.number)
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
        if self._frozen(trial).state.is_finished() or not self.stop.may_write():
            return
        reports = studies.evaluations(self._frozen(trial))
        last = reports[-1] if reports else None
        is_whole = last is not None and last["step"] >= last["total_steps"]
        if self.stop.reason is not None and not is_whole:
            return  # cut, not ended: it goes on when the sweep does
        # The trial's own word comes first: Tune knows only that an actor has died.
        cause = self._cause(trial, whole=is_whole)
        limits = self.space.tune.constraints
        if cause is not None:
            self._fail(trial, cause)
        elif error:
            self._fail(trial, "the trial's driver died; see Tune's log")
        elif last is None or (result is not None and self._values(result) is None):
            reported = "no result"
            if result is not None:
                reported = str({name: result.get(name) for name in self.objectives})
            self._fail(trial, f"finite {', '.join(self.objectives)} needed, got {reported}")
        elif missing := [name for name in limits if self._number(last, name) is None]:
            needed, value = f"finite {', '.join(missing)} needed", last.get(missing[0])
            self._fail(trial, f"{needed} for tune.constraints, got {value}")
        # Tune stopped it for an order that pauses it: it stays unfinished.
        elif reports[-1]["step"] < reports[-1]["total_steps"] and (order := self._pause(trial)):
            self.pause(trial.number, orders.record(order))
        else:
            self._tell(trial, reports)
        self._keep(ended=True)

    # ------------------------------------------------------------------------------------- for orders

    def number_of(self, trial_id: str) -> int:
        """Return the study's number of one of Tune's trials."""
        return self._trials[trial_id].number

    def pause(self, number: int, record: Mapping[str, Any]) -> None:
        """Note in the study that nobody is to run an unfinished trial until it is taken up again.

        ``record``: the order that pauses it.
        """
        self._set_paused(number, record, True)

    def take_up(self, number: int, record: Mapping[str, Any]) -> None:
        """Let a paused trial be handed out again.

        ``record``: the order that takes it up.
        """
        self._set_paused(number, record, False)

    def _set_paused(self, number: int, record: Mapping[str, Any], on: bool) -> None:
        frozen = self.study.get_trials(deepcopy=False)[number]
        trial = Trial(self.study, frozen._trial_id)
        trial.set_user_attr(SESSION, "")  # no driver's: it may be handed out anew by this one too
        trial.set_user_attr(PAUSED, dict(record) | {"on": on})
        self._keep(ended=True)

    def _pause(self, trial: Trial) -> Order | None:
        """Return the order that pauses a trial which Tune has stopped, if one does."""
        if self.steering is None or trial.number in self.steering.stops:
            return None
        return self.steering.pauses.get(trial.number)

    def stop_unheld(self, number: int, record: Mapping[str, Any]) -> None:
        """Tell the study that an unfinished trial which nobody runs is stopped.

        ``record``: the order that stops it, for the trial's attributes.
        """
        # A Trial is a handle by the id in the storage; no process of this driver runs it.
        frozen = self.study.get_trials(deepcopy=False)[number]
        trial, reports = Trial(self.study, frozen._trial_id), studies.evaluations(frozen)
        whole = bool(reports) and reports[-1]["step"] >= reports[-1]["total_steps"]
        if not whole:
            trial.set_user_attr(STOPPED, dict(record))
        limits = self.space.tune.constraints
        if reports and all(self._number(reports[-1], name) is not None for name in limits):
            self._tell(trial, reports)
        else:
            self.study.tell(number, state=TrialState.PRUNED)
        self._keep(ended=True)

    def save(self, checkpoint_path: str) -> None:
        """Write only where the journal is, which holds everything."""
        Path(checkpoint_path).write_text(
            json.dumps({"journal": str(self.journal), "study": self.name})
        )

    def restore(self, checkpoint_path: str) -> None:
        """Go on with the study of a saved sweep."""
        saved = json.loads(Path(checkpoint_path).read_text())
        self.journal, self.name = place(saved["journal"]), saved["study"]
        self._study, self._trials = None, {}

    # ------------------------------------------------------------------------------------ internals

    def _cause(self, trial: Trial, whole: bool) -> str | None:
        """Return why a trial failed; ``None`` if it did not, as a ``whole`` one.

        A store that cannot be read ends no sweep.
        """
        try:
            return cause_left(trial_path(self.trial_dir, studies.directory_of(self._frozen(trial))))
        except StorageError as error:
            return None if whole else f"it ended early, for a reason that cannot be read: {error}"

    def _tell(self, trial: Trial, reports: list[dict[str, Any]]) -> None:
        for name, limit in self.space.tune.constraints.items():
            # Optuna's terms: at most 0 is within the limit.
            trial.set_constraint(name, float(reports[-1][name]) - limit.max)
        if reports[-1]["step"] < reports[-1]["total_steps"]:
            if self.steering is not None and (order := self.steering.stops.get(trial.number)):
                trial.set_user_attr(STOPPED, orders.record(order))
            self.study.tell(trial.number, state=TrialState.PRUNED)
            return
        best = self.space.tune.best_of(reports, key=lambda report: report[self.space.tune.metric])
        self.study.tell(trial.number, self._values(best))

    def _keep(self, ended: bool = False) -> None:
        """Copy the journal to its object store, where that is its place.

        It is copied whenever a trial has ended, and else in a small share of the time, since large
        studies take a while. A copy that fails is made up for by the next one.
        """
        began = time.monotonic()
        if (not ended and began < self._copy_again) or not self.stop.may_write():
            return
        try:
            studies.keep_journal(self.journal)
        except StorageError as error:
            print(f"study not copied this time: {error}", file=sys.stderr, flush=True)
        # A copy of t seconds is followed by a pause of 20 t.
        now = time.monotonic()
        self._copy_again = now + COPY_PAUSE * (now - began)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _running(self) -> list[FrozenTrial]:
        return studies.own_trials(self.study, (TrialState.RUNNING,))

    def _values(self, result: Mapping[str, Any]) -> list[float] | None:
        values = [self._number(result, name) for name in self.objectives]
        finite = [value for value in values if value is not None]
        return finite if len(finite) == len(values) else None

    @staticmethod
    def _number(result: Mapping[str, Any], name: str) -> float | None:
        value = result.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def _fail(self, trial: Trial, cause: str) -> None:
        trial.set_user_attr(CAUSE, cause)
        self.study.tell(trial.number, state=TrialState.FAIL)
