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
from ray.exceptions import RayError
from ray.tune import Callback, Stopper

from latentwire.config.resolve import ConfigError
from latentwire.distributed.controller import is_dead
from latentwire.distributed.trial import NUMBER
from latentwire.errors import UserError
from latentwire.exports import CheckpointError
from latentwire.storage import Place
from latentwire.tuning import clones, orders
from latentwire.tuning.objections import objection
from latentwire.tuning.orders import Given, Order
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import with_trials, write_space
from latentwire.tuning.stopping import NOT_THROUGH, Stop
from latentwire.tuning.study import (
    PAUSED,
    clone_record,
    evaluations,
    is_paused,
    keep_journal,
    own_trials,
    stopped_by,
)

LOOK_SECONDS = 5.0
"""Seconds between two looks for orders."""


class Steering(Callback, Stopper):
    """The orders of one sweep, for its driver; Tune asks it after every step and report.

    A trial that an order stops or pauses ends at its next report. All else happens at a look.
    """

    def __init__(
        self, search: StudySearch, output: Place, say: Callable[[str], None] = print
    ) -> None:
        """Steer ``search`` by the orders in ``output``, the sweep's directory; ``say`` prints a line."""
        self.search, self.output, self.say = search, output, say
        self.stops: dict[int, Order] = {}
        """Trial → the order that stops it at its next report."""
        self.pauses: dict[int, Order] = {}
        """Trial → the order that pauses it at its next report."""
        self.is_waiting = False
        """Whether a paused trial is to be taken up whose earlier process has not gone yet."""
        self._freed: dict[int, str] = {}
        """Trial that this driver has paused → the actor that ran it."""
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
        """Return whether an order stops or pauses this trial, which has just reported."""
        number = self.search.number_of(trial_id)
        return number in self.stops or number in self.pauses

    def stop_all(self) -> bool:
        """Return whether an order ends the search."""
        return self.ending is not None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for orders now and then."""
        self.look()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember the actor of a trial that ends here by a pause; Tune tells its searcher first."""
        number = trial.config[NUMBER]
        if number in self.pauses and trial.temporary_state.ray_actor is not None:
            self._freed[number] = trial.temporary_state.ray_actor._actor_id.hex()

    def has_room(self) -> bool:
        """Return whether a further trial may begin. A paused one keeps its place among them."""
        # With nothing running the search may end by this answer: no order may be overlooked then.
        self.look(now=not self.search.live)
        if self.ending is not None or self._is_full:
            return False
        trials = own_trials(self.search.study)
        ended_or_paused = sum(trial.state.is_finished() or is_paused(trial) for trial in trials)
        # Once all are handed out, only an order makes room; Tune asks ten times a second.
        self._is_full = ended_or_paused + len(self.search.live) >= self.search.space.tune.trials
        return not self._is_full

    def stop_if_all_is_paused(self) -> None:
        """Let the sweep stop where paused trials alone are left of it: nothing would ever end it."""
        paused = [trial.number for trial in own_trials(self.search.study) if is_paused(trial)]
        if not paused or self.search.live or self.is_waiting or self.has_room():
            return
        if self.ending is None:
            names = ", ".join(map(str, paused))
            self.search.stop.ask(
                f"of its trials only paused ones are left ({names}), which latentwire sweep "
                f"{self.output} resume TRIAL takes up",
                NOT_THROUGH,
            )

    # -------------------------------------------------------------------------------------- orders

    def look(self, now: bool = False) -> None:
        """Carry out what orders are open, at most every :data:`LOOK_SECONDS` unless ``now``.

        What cannot be read or written now (a store that does not answer, a full disk) is tried again
        at the next look.
        """
        if time.monotonic() < self._look_again and not now:
            return
        self._look_again = time.monotonic() + LOOK_SECONDS
        self.is_waiting = False
        if not self.search.stop.may_write():
            return
        # In the order in which they were given: ids sort by time.
        try:
            for each in orders.given(self.output, self._answered):
                if each.is_open:
                    self._carry_out(each)
                else:
                    self._answered.add(each.id)
        except (UserError, OSError) as error:
            print(f"orders not carried out this time: {error}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Settle the orders to a search that has ended; no trial of it runs any more."""
        self.search.live.clear()
        self.look(now=True)
        if self.ending is None:
            return
        trials = own_trials(self.search.study)
        ended = sum(trial.state.is_finished() for trial in trials)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        cut = [str(trial.number) for trial in running if not is_paused(trial)]
        before = self.search.space.tune.trials
        # A sweep is complete when as many trials have ended, so this one is now.
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
        # Before any objection: what a driver that died has done must not be refused now.
        if self._is_done(each, order):
            return
        # While a search ends its trials may still be stopped and paused, and nothing else.
        if self.ending is not None and self.ending != order and order.kind not in ("stop", "pause"):
            self._answer(
                order.id,
                "refused",
                f"the search ends by an order of {self.ending.who}; for more trials resume the sweep with "
                f"--set tune.trials=<more>",
            )
            return
        # An order that was begun was found good: what it has done itself may speak against it now.
        begun = each.outcome is not None
        reason = objection(order, self.search.study, self.search.space, self.output)
        if reason is not None and not begun:
            self._answer(order.id, "refused", reason)
            return
        if order.kind == "stop":
            self._stop(each, order)
        elif order.kind == "pause":
            self._pause(each, order)
        elif order.kind == "resume":
            self._resume(each, order)
        elif order.kind == "clone":
            self._clone(each, order)
        elif order.kind == "add":
            self._add(each, order)
        elif order.kind == "end":
            self.ending = order

    def _is_done(self, each: Given, order: Order) -> bool:
        """Return whether what an order asks of a trial is done already, and answer it then."""
        trials = self.search.study.get_trials(deepcopy=False)
        if order.trial is None or order.trial >= len(trials):
            return False
        trial = trials[order.trial]
        if order.kind == "stop" and trial.state.is_finished():
            by, done = stopped_by(trial), f"trial {trial.number} is stopped {_at_step(trial)}"
        elif order.kind == "pause" and is_paused(trial):
            by, done = trial.user_attrs[PAUSED], f"trial {trial.number} is paused {_at_step(trial)}"
        elif order.kind == "resume" and not is_paused(trial):
            by = trial.user_attrs.get(PAUSED, {})
            done = f"trial {trial.number} goes on {_at_step(trial)} when there is room"
        else:
            return False
        if by.get("order") != order.id:  # another order has done the same
            return False
        self.pauses.pop(trial.number, None)
        self._answer(order.id, "done", done)
        return True

    def _stop(self, each: Given, order: Order) -> None:
        """Stop a trial at its next report; at once where no worker has it."""
        assert order.trial is not None
        if order.trial in self.search.live:
            self.stops.setdefault(order.trial, order)
            return
        self.search.stop_unheld(order.trial, orders.record(order))
        # Not by the order, if the trial had come to its end: then it is refused with that reason.
        if not self._is_done(each, order):
            self._carry_out(each)

    def _pause(self, each: Given, order: Order) -> None:
        """Pause a trial at its next report; at once where no worker has it."""
        assert order.trial is not None
        if order.trial in self.search.live:
            self.pauses.setdefault(order.trial, order)
            return
        self.search.pause(order.trial, orders.record(order))
        self._is_done(each, order)

    def _resume(self, each: Given, order: Order) -> None:
        """Let a paused trial be handed out again, once the process that ran it has gone.

        Until then it could still write to the trial's directory.
        """
        assert order.trial is not None
        actor = self._freed.get(order.trial)
        if actor is not None and not _has_gone(actor):
            self.is_waiting = True
            return
        self._freed.pop(order.trial, None)
        self.search.take_up(order.trial, orders.record(order))
        self._is_done(each, order)

    def _add(self, each: Given, order: Order) -> None:
        """Raise the number of trials."""
        assert order.trials is not None
        trials = self._more_trials(each, order, order.trials)
        self._set_trials(trials)
        self._answer(order.id, "done", f"tune.trials is {trials}", trials)

    def _clone(self, each: Given, order: Order) -> None:
        """Enqueue a trial that begins with the last checkpoint of another, as one more of the sweep."""
        assert order.trial is not None
        parent = self.search.study.get_trials(deepcopy=False)[order.trial]
        trials = self._more_trials(each, order, 1)
        try:
            start = clones.copy_start(order, parent, self.output)
        except (ConfigError, CheckpointError, OSError) as error:
            self._answer(order.id, "refused", str(error))
            return
        number = clones.enqueue(self.search.study, order, parent, start)
        self._set_trials(trials)
        clone = self.search.study.get_trials(deepcopy=False)[number]
        done = f"trial {number} is a {clones.described(clone_record(clone))}"
        self._answer(order.id, "done", f"{done}; tune.trials is {trials}", trials)

    def _more_trials(self, each: Given, order: Order, count: int) -> int:
        """Return the number of trials with ``count`` more, as an earlier driver settled it where one did."""
        # Written before it is done: whoever dies in between, the count is added once.
        if each.outcome is not None and each.outcome.trials is not None:
            return max(self.search.space.tune.trials, each.outcome.trials)
        trials = self.search.space.tune.trials + count
        self._answer(order.id, "begun", f"tune.trials goes to {trials}", trials)
        return trials

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


def _has_gone(actor_id: str) -> bool:
    """Return whether an actor is known to have died; a busy cluster says so later."""
    try:
        return is_dead(actor_id)
    except (RayError, OSError, RuntimeError):
        return False


def _at_step(trial: FrozenTrial) -> str:
    reports = evaluations(trial)
    if not reports:
        return "before its first report"
    return f"at step {reports[-1]['step']} of {reports[-1]['total_steps']}"
