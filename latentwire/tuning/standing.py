"""A sweep as it stands: read from its directory, whether a driver runs or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from latentwire.config import SweepConfig
from latentwire.planning.resolved import objectives
from latentwire.storage import Place
from latentwire.tuning import lease, orders, results, resume
from latentwire.tuning.lease import Driver
from latentwire.tuning.orders import Given
from latentwire.tuning.results import STATES
from latentwire.tuning.study import JOURNAL, evaluations, own_trials, read_study


@dataclass(frozen=True)
class SweepStatus:
    """A sweep as it stands."""

    output: Place
    """Its directory."""
    space: SweepConfig
    """Its resolved configuration; ``tune.trials`` is how many trials it is to have."""
    trials: list[dict[str, Any]]
    """A row per trial that has begun, best first: those of :func:`~latentwire.tuning.results.trial_rows`, with ``total_steps``,
    ``best_step`` and its ``curve`` where it has reported."""
    ended: int
    """Trials that have ended."""
    waiting: int
    """Starting points whose trials have not begun."""
    driver: Driver | None
    """Who has its lease; None where nobody has."""
    orders: list[Given]
    """Its orders with their outcomes, the earliest first."""
    is_scored: bool
    """Whether there are results of all its trials."""

    @property
    def has_driver(self) -> bool:
        """Whether a driver lives, by the age of its lease."""
        return lease.lives(self.driver)

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended and are scored, and no driver is left."""
        return self.is_scored and not self.has_driver

    @property
    def best(self) -> dict[str, Any] | None:
        """Row of the best trial so far that keeps to the limits; None before the first report."""
        metric = self.space.tune.metric
        for row in self.trials:
            if metric in row and row["state"] != "beyond":
                return row
        return None

    @property
    def curves(self) -> list[tuple[int, list[tuple[int, float]]]]:
        """The metric at each evaluated step, by trial, the best trial first."""
        return [(row["trial"], row["curve"]) for row in self.trials if "curve" in row]

    @property
    def seconds_left(self) -> float | None:
        """About how long the trials still take; None where no driver works on them, or none has reported.

        As long a step as in the reports so far, as many at a time as have not ended now.
        """
        reported = [row for row in self.trials if "curve" in row]
        if not reported or not self.has_driver:
            return None
        seconds = sum(row["train_seconds"] for row in reported)
        step_seconds = seconds / sum(row["step"] for row in reported)
        mean_steps = sum(row["total_steps"] for row in reported) / len(reported)
        running = [row for row in self.trials if row["state"] == STATES[TrialState.RUNNING]]
        # Trials that have not begun, each of a mean length, and what those that run have before them.
        left = mean_steps * max(0, self.space.tune.trials - len(self.trials))
        for row in running:
            left += row.get("total_steps", mean_steps) - row.get("step", 0)
        return step_seconds * left / max(1, len(running))


def read(output: Place) -> SweepStatus:
    """Return a sweep as it stands; nothing is written.

    Raises :class:`~latentwire.config.resolve.ConfigError` where there is no sweep.
    """
    space = resume.read_space(output, [])
    with read_study(output / JOURNAL, output.name, objectives(space)) as study:
        rows = results.trial_rows(study, space.tune)
        trials = {trial.number: trial for trial in own_trials(study)}
    for row in rows:
        if reports := evaluations(trials[row["trial"]]):
            best = space.tune.best_of(reports, key=lambda report: report[space.tune.metric])
            row |= {
                "best_step": best["step"],
                "total_steps": reports[-1]["total_steps"],
                "curve": [(report["step"], report[space.tune.metric]) for report in reports],
            }
    states = [trial.state for trial in trials.values()]
    ended = sum(state.is_finished() for state in states)
    return SweepStatus(
        output,
        space,
        rows,
        ended,
        states.count(TrialState.WAITING),
        lease.read(output),
        orders.given(output),
        # Results of before trials were added are not those of all of them.
        (output / resume.RESULTS).exists() and ended >= space.tune.trials,
    )
