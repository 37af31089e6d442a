"""Look at a sweep, running or not, and give it orders. No Ray is started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentwire.config.overrides import full_path
from latentwire.planning.resolved import objectives
from latentwire.storage import Place, place
from latentwire.tuning import lease, objections, orders, resume, standing
from latentwire.tuning.orders import Kind, Order, OrderError
from latentwire.tuning.standing import SweepStatus
from latentwire.tuning.study import JOURNAL, own_trials, read_study


class Sweep:
    """A sweep in a directory or bucket, whose driver may run anywhere.

    Every order is a file beside the study. The driver carries it out within seconds, a stop at the
    trial's next report; where no driver runs, the next one does. What became of it stands in
    ``status().orders``. An order that could not be carried out is refused at once by an
    :class:`~latentwire.tuning.orders.OrderError`.
    """

    def __init__(self, output: str | Path | Place) -> None:
        """Take a sweep by its directory or URI.

        Raises :class:`~latentwire.config.resolve.ConfigError` where there is none.
        """
        self.output = place(output).absolute()
        self.again = f"latentwire tune --resume {shlex.quote(str(self.output))}"
        resume.read_space(self.output, [])

    def status(self) -> SweepStatus:
        """Return its trials, the best so far, its driver, and its orders."""
        return standing.read(self.output)

    def stop(self, trial: int) -> Order:
        """Stop a trial at its next report: PRUNED in the study, and nothing is lost of what it reported."""
        return self._give("stop", trial=trial)

    def pause(self, trial: int) -> Order:
        """Take a trial's resources at its next report, until :meth:`resume`; it keeps its place among the trials."""
        return self._give("pause", trial=trial)

    def resume(self, trial: int) -> Order:
        """Let a paused trial go on from its last checkpoint, as soon as there is room."""
        return self._give("resume", trial=trial)

    def clone(self, trial: int, values: Mapping[str, Any]) -> Order:
        """Begin a further trial with a trial's last checkpoint, under changed values.

        ``values``: path of a knob → value, of those that :data:`latentwire.tuning.clones.CHANGEABLE` names.
        """
        changed = {full_path(path).removeprefix("run."): value for path, value in values.items()}
        return self._give("clone", trial=trial, values=changed)

    def add(self, trials: int) -> Order:
        """Let the sweep have so many trials more, in this driver and in every later one."""
        return self._give("add", trials=trials)

    def end(self) -> Order:
        """End the search: no new trials, running ones are cut and keep their checkpoints.

        Re-runs, scores, export and report follow, by what the trials have come to.
        """
        return self._give("end")

    def _give(
        self, kind: Kind, trial: int | None = None, trials: int | None = None, **more: Any
    ) -> Order:
        """Give an order; raise :class:`~latentwire.tuning.orders.OrderError` for one that cannot be carried out."""
        draft = orders.draft(kind, trial=trial, trials=trials, **more)
        space = resume.read_space(self.output, [])
        with read_study(self.output / JOURNAL, self.output.name, objectives(space)) as study:
            ended = sum(each.state.is_finished() for each in own_trials(study))
            reason = objections.objection(draft, study, space, self.output)
        # All trials have ended: the sweep is through, or its driver is past the search by now.
        is_scored = (self.output / resume.RESULTS).exists()
        if ended >= space.tune.trials and (is_scored or lease.lives(lease.read(self.output))):
            reason = objections.over(space, ended, self.output, self.again)
        if reason is not None:
            raise OrderError(reason)
        return orders.give(self.output, draft)
