"""A sweep as it stands, for the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from latentwire.config import SweepConfig
from latentwire.evaluation.progress import duration
from latentwire.reports import tables
from latentwire.reports.tables import Grid, cell
from latentwire.tuning.clones import described
from latentwire.tuning.columns import column_names
from latentwire.tuning.lease import Driver, lives
from latentwire.tuning.orders import Given
from latentwire.tuning.standing import SweepStatus


def show(status: SweepStatus, again: str) -> None:
    """Print a sweep as it stands.

    ``again``: the command that goes on with it.
    """
    print(status.output)
    print(driver_line(status.driver, status.is_over, again))
    waiting = f", {status.waiting} starting points wait" if status.waiting else ""
    left = "" if status.seconds_left is None else f", about {duration(status.seconds_left)} left"
    print(f"{status.ended} of {status.space.tune.trials} trials have ended{waiting}{left}")
    print(best_line(status.best, status.space.tune.metric))
    table = trials_table(status.trials, status.space, status.has_driver)
    tables.show([table, orders_table(status.orders)])


def trials_table(rows: Sequence[dict[str, Any]], space: SweepConfig, running: bool) -> Grid:
    """Return a row per trial that has begun, best first.

    ``running``: whether a driver lives; else nobody works on those that have not ended.
    """
    tune = space.tune
    measured = tuple(dict.fromkeys((tune.metric, *tune.objectives, *tune.constraints)))
    names = column_names(space.search)
    body = []
    for row in rows:
        state = row["state"]
        # Without a driver nobody works on it, whatever the study says.
        if state == "unfinished" and running:
            state = "running" if "step" in row else "starting"
        step = f"{row['step']}/{row['total_steps']}" if "step" in row else "–"
        scores = [cell(row.get(name)) for name in measured]
        drawn = [cell(row["values"].get(path)) for path in names]
        body.append([str(row["trial"]), state, step, *scores, *drawn, _note(row)])
    header = ["trial", "state", "step", *measured, *names.values(), "note"]
    return f"{len(rows)} trials have begun", header, body


def orders_table(given: Sequence[Given]) -> Grid:
    """Return a row per order, the earliest first."""
    body = []
    for each in given:
        order, outcome = each.order, each.outcome
        what = "unreadable" if order is None else order.summary
        who = "–" if order is None else order.who
        when = "–" if order is None else time.strftime("%F %T", time.localtime(order.time))
        state = "open" if each.is_open or outcome is None else outcome.state
        reason = each.problem if outcome is None else outcome.reason
        body.append([each.id, when, who, what, state, reason])
    return f"{len(body)} orders", ["order", "given", "by", "what", "state", "outcome"], body


def driver_line(driver: Driver | None, is_over: bool, again: str) -> str:
    """Return who works on the sweep, and the next move where nobody does.

    ``again``: the command that goes on with it.
    """
    if driver is None:
        return "no driver: the sweep is over" if is_over else f"no driver; go on: {again}"
    if lives(driver):
        return f"driver: {driver}"
    # Gone: on this machine, where no process of that number is left. Elsewhere only silence tells.
    if driver.gone:
        return f"its driver is gone ({driver}); go on: {again}"
    silent = f"its driver has been silent for {duration(driver.age)} ({driver})"
    return f"{silent}: where it has ended, go on: {again} --force"


def best_line(row: dict[str, Any] | None, metric: str) -> str:
    """Return the best trial so far."""
    if row is None:
        return "best so far: none has reported"
    return (
        f"best so far: trial {row['trial']}, {metric} {row[metric]:.4g} at step {row['best_step']}"
    )


def _note(row: dict[str, Any]) -> str:
    """Return why a trial ended as it did, and where it came from."""
    notes = [row["error"].strip().splitlines()[-1]] if row["error"].strip() else []
    if "stopped_by" in row:
        notes.append(f"by {row['stopped_by']}")
    if "clone" in row:
        notes.append(described(row["clone"]))
    if "retries" in row:
        notes.append(f"retries {row['retries']}")
    return "; ".join(notes)
