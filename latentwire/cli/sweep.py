"""``latentwire sweep``: look at a sweep, running or not, and give it orders."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

from cyclopts import Parameter

from latentwire.api.sweep import Sweep
from latentwire.cli.flags import input_place
from latentwire.config.overrides import assigned
from latentwire.reports import status as page
from latentwire.tuning.orders import OrderError

Deed = Literal["status", "stop", "pause", "resume", "clone", "add", "end"]
TRIAL_DEEDS = ("stop", "pause", "resume", "clone")
"""Of these, those that name a trial."""
CHANGED = Parameter(
    name="--set",
    help="With clone: PATH=VALUE of a knob, e.g. training.encoder_lr=3e-4; repeatable.",
    negative=(),
    allow_leading_hyphen=True,
)


def sweep(
    run: str,
    deed: Deed = "status",
    trial: int | None = None,
    /,
    *,
    trials: Annotated[int | None, Parameter(help="With add: how many trials more.")] = None,
    assignments: Annotated[list[str] | None, CHANGED] = None,
) -> int:
    """Show a sweep's trials, the best so far, its driver and its orders; or give it an order.

    Orders are files in the sweep's directory: its driver carries them out within seconds, and where none runs the next
    one does.

    Args:
        run: The sweep's directory or URI.
        deed: status shows it; stop ends a trial at its next report, PRUNED; pause gives its resources back there, and resume
            lets it go on; clone begins a further trial with its last checkpoint and the values of --set; add raises
            tune.trials; end starts no new trials, cuts those that run, and goes on to re-runs, scores and report.
        trial: Number of the trial that stop, pause, resume and clone mean.
    """
    steered = Sweep(input_place(run))
    values = assigned(assignments or [])
    # TRIAL, --trials and --set: each is given where the deed takes it, and nowhere else.
    needed = (deed in TRIAL_DEEDS, deed == "add", deed == "clone")
    if (trial is not None, trials is not None, bool(values)) != needed:
        raise OrderError(
            f"{', '.join(TRIAL_DEEDS)} take TRIAL, clone also --set PATH=VALUE, add --trials N, status and end nothing, got "
            f"{deed} with trial {trial}, --trials {trials}, --set {', '.join(values)}; latentwire sweep --help shows each"
        )
    if deed == "status":
        page.show(steered.status(), steered.again)
        return 0
    if deed == "end":
        order = steered.end()
    elif trials is not None:
        order = steered.add(trials)
    elif deed == "clone":
        order = steered.clone(trial or 0, values)
    else:
        order = getattr(steered, deed)(trial)
    status = steered.status()
    print(
        f"order {order.id}: {order.summary}; what becomes of it: latentwire sweep {shlex.quote(run)} status"
    )
    print(page.driver_line(status.driver, status.is_over, steered.again))
    return 0
