"""Why an order to a sweep cannot be carried out, for whoever gives it and for the driver alike."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError
from latentwire.storage import Place
from latentwire.tuning import clones
from latentwire.tuning.orders import Order
from latentwire.tuning.samplers import make_sampler
from latentwire.tuning.space_file import with_trials
from latentwire.tuning.study import CAUSE, RETRIES, WARM, is_paused, stopped_by

ENDED = {
    TrialState.COMPLETE: "it came to its end",
    TrialState.PRUNED: "it was stopped early",
    TrialState.FAIL: "it failed",
}


def objection(order: Order, study: optuna.Study, space: SweepConfig, sweep: Place) -> str | None:
    """Return why an order must not be carried out, with the next move; None where it may be.

    ``study``: the sweep's, which nothing is written to. ``space``: the sweep's as it stands.
    """
    trials = study.get_trials(deepcopy=False)
    if order.kind == "add":
        return _objection_to_more(order, space)
    if order.kind == "end":
        return None
    assert order.trial is not None
    if order.trial >= len(trials) or WARM in trials[order.trial].user_attrs:
        return _unknown(order, trials, sweep)
    trial = trials[order.trial]
    # Optuna's trials end once, so a failed one goes on as another.
    for other in trials:
        if other.user_attrs.get(RETRIES) == trial.number:
            return (
                f"trial {trial.number} failed and is retried as trial {other.number}; "
                f"give the order for that one"
            )
    if trial.state.is_finished() and order.kind != "clone":
        return _ended(order, trial)
    if trial.state is TrialState.WAITING:
        return (
            f"{order.kind} is for a trial that has begun, trial {trial.number} waits for its turn; "
            f"give the order when it runs"
        )
    if order.kind == "clone":
        try:
            clones.check(order, trial, space, sweep)
            # A grid has no further points than its own.
            make_sampler(with_trials(space, space.tune.trials + 1))
        except ConfigError as error:
            return str(error)
    if order.kind == "pause" and is_paused(trial):
        return (
            f"pause is for a trial that runs, trial {trial.number} is paused already; "
            f"latentwire sweep {sweep} resume {trial.number} takes it up"
        )
    if order.kind == "resume" and not is_paused(trial):
        return (
            f"resume is for a paused trial, trial {trial.number} is not paused; where a pause is open, "
            f"wait for the trial's next report"
        )
    return None


def over(space: SweepConfig, ended: int, sweep: Place, again: str) -> str:
    """Return the objection to any order for a sweep whose search is over.

    ``ended``: how many of its trials have. ``again``: words of the command that goes on with it.
    """
    return (
        f"orders are for a search that goes on, that of {sweep} is over: {ended} of {space.tune.trials} "
        f"trials have ended; for more trials, once it is scored: {again} --set tune.trials={ended + 1}"
    )


def came_late(sweep: Place, again: str) -> str:
    """Return the objection to an order that was given as the sweep came to its end."""
    return (
        f"the search of {sweep} had ended when the driver could have carried it out; "
        f"for more trials: {again} --set tune.trials=<more>"
    )


def _unknown(order: Order, trials: Sequence[FrozenTrial], sweep: Place) -> str:
    numbers = [trial.number for trial in trials if WARM not in trial.user_attrs]
    known = f"trials {numbers[0]} to {numbers[-1]}" if numbers else "no trial yet"
    return (
        f"{order.kind} must name a trial of the sweep, which has {known}, got {order.trial}; "
        f"latentwire sweep {sweep} status lists them"
    )


def _ended(order: Order, trial: FrozenTrial) -> str:
    how = ENDED[trial.state]
    if CAUSE in trial.user_attrs:
        how = f"{how} ({trial.user_attrs[CAUSE]})"
    elif record := stopped_by(trial):
        how = f"{how} by {record['who']}"
    return (
        f"{order.kind} is for a trial that runs, trial {trial.number} has ended: {how}; "
        f"nothing is left to {order.kind}"
    )


def _objection_to_more(order: Order, space: SweepConfig) -> str | None:
    assert order.trials is not None
    try:
        make_sampler(with_trials(space, space.tune.trials + order.trials))
    except ConfigError as error:
        return str(error)
    return None
