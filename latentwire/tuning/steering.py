"""Carries out orders to a running sweep, each once, whoever dies in between.

What an order changes stands in the study, with the order's id, or in ``space.json``. Its outcome is
written after that. A driver that dies in between leaves an open order, and the next driver finds
what is done of it already.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState
from ray.tune import Callback, Stopper

from latentwire.errors import UserError
from latentwire.storage import Place
from latentwire.tuning import orders
from latentwire.tuning.objections import objection
from latentwire.tuning.orders import Given, Order
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import with_trials, write_space
from latentwire.tuning.stopping import Stop
from latentwire.tuning.study import evaluations, keep_journal, own_trials, stopped_by

LOOK_SECONDS = 5.0
"""Seconds between two looks for orders."""
END_REASON = "the search ends by an order"


class Steering(Callback, Stopper):
    """The orders of one sweep, for its driver; Tune asks it after every step and report.

    A trial that an order stops ends at its next report. All else happens at a look.
    """

    def __init__(
        self, search: StudySearch, output: Place, say: Callable[[str], None] = print
    ) -> None:
        """``search``: whose trials are meant. ``output``: the sweep's directory. ``say``: prints a line."""
        self.search, self.output, self.say = search, output, say
        self.stops: dict[int, Order] = {}
        """Trial → the order that stops it at its next report."""
        self.ending: Order | None = None
        """The order that ends the search."""
        self._answered: set[str] = set()
        self._look_again = 0.0
        self._is_full = False
        search.steering = self

    def __reduce__(self) -> tuple[type[Stop], tuple[()]]:
        """Let Tune pickle it as a stopper that stops nothing: the copy is never asked."""
        return Stop, ()

    # ----------------------------------------------------------------------------- Tune's interface

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether an order stops this trial, which has just reported."""
        return self.search.number_of(trial_id) in self.stops

    def stop_all(self) -> bool:
        """Return whether an order ends the search."""
        return self.ending is not None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for orders now and then."""
        self.look()

    def has_room(self) -> bool:
        """Return whether a further trial may begin."""
        self.look(now=not self.search.live)
        if self.ending is not None or self._is_full:
            return False
        ended = sum(trial.state.is_finished() for trial in own_trials(self.search.study))
        # Once all are handed out, only an order makes room; Tune asks ten times a second.
        self._is_full = ended + len(self.search.live) >= self.search.space.tune.trials
        return not self._is_full

    # -------------------------------------------------------------------------------------- orders

    def look(self, now: bool = False) -> None:
        """Carry out what orders are open, at most every :data:`LOOK_SECONDS` unless ``now``.

        A store that does not answer is asked again at the next look.
        """
        if time.monotonic() < self._look_again and not now:
            return
        self._look_again = time.monotonic() + LOOK_SECONDS
        if not self.search.stop.may_write():
            return
        try:
            for each in orders.given(self.output, self._answered):
                if each.is_open:
                    self._carry_out(each)
                else:
                    self._answered.add(each.id)
        except UserError as error:
            print(f"orders not carried out this time: {error}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Settle the orders to a search that has ended; no trial of it runs any more."""
        self.search.live.clear()
        self.look(now=True)
        if self.ending is None:
            return
        trials = own_trials(self.search.study)
        ended = sum(trial.state.is_finished() for trial in trials)
        cut = [str(trial.number) for trial in trials if trial.state is TrialState.RUNNING]
        before = self.search.space.tune.trials
        self._set_trials(max(1, ended))
        rest = f"; cut, with their checkpoints kept: trials {', '.join(cut)}" if cut else ""
        self._answer(
            self.ending.id,
            "done",
            f"the search ended with {ended} of {before} trials{rest}; re-runs, scores, export and report follow",
            max(1, ended),
        )

    def _carry_out(self, each: Given) -> None:
        order = each.order
        if order is None:
            self._answer(each.id, "refused", each.problem)
            return
        if self._is_done(each, order):
            return
        if self.ending is not None and self.ending.id != order.id:
            self._answer(
                order.id,
                "refused",
                f"{END_REASON} of {self.ending.who}; for more trials resume the sweep with --set tune.trials=<more>",
            )
            return
        reason = objection(order, self.search.study, self.search.space, self.output)
        if reason is not None:
            self._answer(order.id, "refused", reason)
            return
        if order.kind == "stop":
            self._stop(each, order)
        elif order.kind == "add":
            self._add(each, order)
        elif order.kind == "end":
            self.ending = order

    def _is_done(self, each: Given, order: Order) -> bool:
        """Return whether an order is carried out already, and answer it then."""
        if order.kind != "stop":
            return False
        trials = self.search.study.get_trials(deepcopy=False)
        trial = trials[order.trial] if order.trial in range(len(trials)) else None
        if trial is None or not trial.state.is_finished():
            return False
        if stopped_by(trial).get("order") != order.id:
            return False
        self._answer(order.id, "done", f"trial {trial.number} is stopped {_at_step(trial)}")
        return True

    def _stop(self, each: Given, order: Order) -> None:
        """Stop a trial at its next report; at once where no worker has it."""
        assert order.trial is not None
        if order.trial in self.search.live:
            self.stops.setdefault(order.trial, order)
            return
        self.search.stop_unheld(order.trial, orders.record(order))
        if not self._is_done(each, order):
            self._carry_out(each)  # it had come to its end

    def _add(self, each: Given, order: Order) -> None:
        """Raise the number of trials, to what an earlier driver settled where one did."""
        assert order.trials is not None
        before = self.search.space.tune.trials
        if each.outcome is not None and each.outcome.trials is not None:
            trials = max(before, each.outcome.trials)
        else:
            trials = before + order.trials
            self._answer(order.id, "begun", f"tune.trials goes to {trials}", trials)
        self._set_trials(trials)
        self._answer(order.id, "done", f"tune.trials is {trials}", trials)

    def _set_trials(self, trials: int) -> None:
        self.search.space = with_trials(self.search.space, trials)
        write_space(self.search.space, self.output)

    def _answer(
        self,
        order_id: str,
        state: Literal["begun", "done", "refused"],
        reason: str,
        trials: int | None = None,
    ) -> None:
        """Write an outcome, after the study that it speaks of is in its store."""
        self._is_full = False
        keep_journal(self.search.journal)
        orders.answer(self.output, order_id, state, reason, trials)
        if state != "begun":
            self._answered.add(order_id)
            self.say(f"order {order_id} {state}: {reason}")


def _at_step(trial: FrozenTrial) -> str:
    reports = evaluations(trial)
    if not reports:
        return "before its first report"
    return f"at step {reports[-1]['step']} of {reports[-1]['total_steps']}"
