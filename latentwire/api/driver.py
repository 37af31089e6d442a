"""The driver of a sweep: holds its lease, heeds signals, and says how to go on where it stopped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from latentwire.api import tune as job
from latentwire.config import SweepConfig
from latentwire.planning.planner import Plan
from latentwire.storage import Place
from latentwire.tuning import lease, resume
from latentwire.tuning.searcher import objectives
from latentwire.tuning.stopping import SIGINT_STATUS, Stop
from latentwire.tuning.study import JOURNAL, own_trials, read_study


def drive(
    space: SweepConfig,
    plan: Plan,
    output: Place,
    arguments: Sequence[str],
    repeated: Mapping[str, Any] | None = None,
    *,
    retry: bool = False,
    force: bool = False,
) -> int:
    """Run a sweep as its only driver; returns the exit status.

    Args:
        space: what is searched.
        plan: how many trials fit.
        output: the sweep's directory.
        arguments: the command, as in ``sys.argv``.
        repeated: the manifest whose trial this is, where it is one.
        retry: take its failed trials up again.
        force: take the sweep over from a driver that has given no heartbeat for long.

    Raises:
        LeaseError: another driver has the sweep; nothing was touched.
    """
    stop = Stop()
    try:
        with lease.held(output, force, stop.lose) as stop.lease, stop.by_signals():
            resume.write_space(space, output)
            if retry:
                lines = resume.retry_failed(space, output) or ["no trial has failed"]
                print("\n".join(lines), flush=True)
            return job.search(space, plan, output, shlex.join(["python", *arguments]), repeated, stop)
    except KeyboardInterrupt:  # Ray raises one of its own where a signal's handler raised in the middle of a call
        stop.ask("Ctrl-C", SIGINT_STATUS)
    return tell(stop, space, output, shlex.join(["python", arguments[0], "--resume", str(output)]))


def tell(stop: Stop, space: SweepConfig, output: Place, again: str) -> int:
    """Print why a sweep stopped and how it goes on; returns the exit status. ``again``: the command
    that goes on with it."""
    with read_study(output / JOURNAL, output.name, objectives(space)) as study:
        states = [trial.state for trial in own_trials(study)]
    ended, trials = sum(state.is_finished() for state in states), space.tune.trials
    print(
        f"stopped: {stop.reason}; {ended} of {trials} trials have ended, what has not goes on from its "
        f"checkpoints; all is kept, nothing was scored",
        flush=True,
    )
    if stop.taken:
        return stop.status
    print(f"go on: {again}", flush=True)
    if 0 < ended < trials:
        print(f"or choose and score the best of those that have ended: {again} --set tune.trials={ended}", flush=True)
    return stop.status
