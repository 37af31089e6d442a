"""``latentwire sweep``: look at a sweep, running or not, and give it orders."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from latentwire.api.sweep import Sweep
from latentwire.cli.flags import input_place
from latentwire.reports import status as page
from latentwire.tuning.orders import OF_A_TRIAL, OrderError

Deed = Literal["status", "stop", "add", "end"]


def sweep(
    run: str,
    deed: Deed = "status",
    trial: int | None = None,
    /,
    *,
    trials: Annotated[int | None, Parameter(help="With add: how many trials more.")] = None,
) -> int:
    """Show a sweep's trials, the best so far, its driver and its orders; or give it an order.

    Orders are files in the sweep's directory: its driver carries them out within seconds, and where none runs the next one
    does. stop ends a trial at its next report, PRUNED. add raises tune.trials. end starts no new trials, cuts those that
    run, and goes on to re-runs, scores and report.

    Args:
        run: The sweep's directory or URI.
        deed: What to do.
        trial: Number of the trial that stop means.
    """
    steered = Sweep(input_place(run))
    needed = {"trial": deed in OF_A_TRIAL, "trials": deed == "add"}
    if (trial is not None, trials is not None) != tuple(needed.values()):
        raise OrderError(
            f"stop takes TRIAL, add takes --trials N, status and end take neither, got {deed} with trial {trial} and "
            f"--trials {trials}; latentwire sweep --help shows each"
        )
    if deed == "status":
        page.show(steered.status(), steered.again)
        return 0
    if deed == "add":
        order = steered.add(trials or 0)
    else:
        order = steered.end() if deed == "end" else steered.stop(trial or 0)
    status = steered.status()
    print(f"order {order.id}: {order.summary}; what becomes of it: latentwire sweep {run} status")
    print(page.driver_line(status.driver, status.is_over, steered.again))
    return 0
