"""The console of a running sweep: a table or lines of its trials, TensorBoard, and trackers.

Tune writes TensorBoard's files beside each trial's results by itself (tensorboardX comes with ``ray[tune]``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from ray.tune import Callback
from ray.tune.progress_reporter import TrialProgressCallback
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from latentwire.config import TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.distributed.driver_log import LOG
from latentwire.distributed.trial import NUMBER, TAKES_UP, trial_path
from latentwire.distributed.worker_output import log_file
from latentwire.evaluation.progress import duration, seconds_left
from latentwire.storage import Place
from latentwire.tuning.columns import column_names
from latentwire.tuning.results import NOT_ENDED, STATES, trial_rows
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import directory_of, evaluations, own_trials

LINE_SECONDS = 300.0
"""Seconds between two lines where no trial ends and there is no terminal."""
DRAW_SECONDS = 1.0
"""Seconds between two drawings of the table."""
ROWS_AROUND = 6
"""Lines of a terminal that the table leaves to its head, the bar and what was printed before."""
UNFINISHED = STATES[TrialState.RUNNING]
"""A row's state while its trial runs, or waits to go on."""
STORES = ("s3", "gs")
"""Schemes of addresses where MLflow keeps no runs: it needs a server or a database."""


def check_trackers(config: TuneConfig, output: Place) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for a tracker whose package is not installed, or that cannot write."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tune.trackers {name} needs the package {name}, which is not installed; pip install 'latentwire[tracking]'"
            )
    if "mlflow" in config.trackers:
        uri = os.environ.get("MLFLOW_TRACKING_URI", str(output))
        if uri.partition("://")[0] in STORES:
            raise ConfigError(
                f"tune.trackers mlflow keeps its runs in a server or a database, not in an object store, got {uri}; set "
                f"MLFLOW_TRACKING_URI to a server (http://…) or a file that outlives this machine (sqlite:////nfs/mlflow.db)"
            )


class SweepConsole(TrialProgressCallback):
    """The console of a search: what each trial comes to, and how long the rest will take.

    In a terminal it is one table of trials with a progress bar, which goes when the search ends.
    Elsewhere (a log file, CI, ``ray job submit``) it is a line for each trial that ends, and one
    every :data:`LINE_SECONDS` where none does. A failure is a line in both. States and scores are
    the study's; between evaluations workers tell their steps. Tune has a callback of this kind of
    its own, which prints whatever it is told, unless it is given one.
    """

    def __init__(
        self,
        search: StudySearch,
        steps: int,
        log: Path | None = None,
        console: Console | None = None,
    ) -> None:
        """Prepare a console that draws nothing yet.

        Args:
            search: whose study says what becomes of trials.
            steps: of the longest trial.
            log: the driver's.
            console: where to print; None: standard output.
        """
        super().__init__()
        self.search, self.steps, self.log = search, steps, log
        self.screen = console or Console()
        self.names = column_names(search.space.search)
        self.progress: dict[str, dict[str, Any]] = {}
        """Name of a trial's directory → what its worker said last."""
        trials = own_trials(search.study)
        self.ended = {trial.number for trial in trials if trial.state.is_finished()}
        """Trials that are done with: their line has been printed, or they ended before this driver."""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.screen,
            expand=True,
        )
        self.task = self.bar.add_task(search.name, left="")
        self.live = Live(console=self.screen, refresh_per_second=1, transient=True)
        self.began = self.last_line = time.monotonic()
        self.last_drawing = 0.0
        # Steps of earlier drivers say nothing of how fast this one is.
        self.steps_before = self._steps(self._rows())[0]

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Let Tune pickle its callbacks: the copy is never looked at."""
        return Callback, ()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draw in the block, of which the search is a part."""
        folder = self.search.trial_dir
        output = f"{folder}/trial-<number>/log.txt" if isinstance(folder, Path) else self.log
        before = f", {len(self.ended)} of them ended before" if self.ended else ""
        self.say(f"{self.search.space.tune.trials} trials{before}; their output: {output}")
        drawn = self.live if self.screen.is_interactive else contextlib.nullcontext()
        with LOG.listening(self.hear), drawn:
            yield

    def hear(self, values: dict[str, Any]) -> None:
        """Remember how far a trial's worker is."""
        self.progress[values["name"]] = values

    # ----------------------------------------------------------------------------- Tune's interface

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Draw, or say now and then how things are, while Tune waits."""
        now = time.monotonic()
        if self.screen.is_interactive and now - self.last_drawing >= DRAW_SECONDS:
            self.last_drawing = now
            self.live.update(self.drawing(self._rows()))
        elif not self.screen.is_interactive and now - self.last_line >= LINE_SECONDS:
            self.say(self.outlook(self._rows()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print nothing: the next drawing has it."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print how a trial ended."""
        self.report_end(trial.config[NUMBER])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print why a trial failed."""
        self.report_end(trial.config[NUMBER])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that a trial begins again: its failure may be none of its own."""
        number = trial.config[NUMBER]
        # A retry goes on in the failed trial's directory.
        folder = trial_path(self.search.trial_dir, trial.config.get(TAKES_UP, number))
        output = log_file(folder) or self.log
        self.say(f"trial {number} failed and goes on from its last checkpoint; output: {output}")

    # ------------------------------------------------------------------------------- what is shown

    def say(self, line: str) -> None:
        """Print a line, above the table where there is one."""
        self.last_line = time.monotonic()
        with contextlib.suppress(OSError):  # a console that is gone ends no sweep
            self.screen.print(line, markup=False, highlight=False, soft_wrap=True)

    def report_end(self, number: int) -> None:
        """Print how a trial ended, once; one that was cut has not. Where there is a table, it has all but failures."""
        rows = self._rows()
        row = next((row for row in rows if row["trial"] == number), None)
        if row is None or row["state"] in NOT_ENDED or number in self.ended:
            return
        self.ended.add(number)
        if self.screen.is_interactive and row["state"] != "failed":
            return
        metric = self.search.space.tune.metric
        line = f"trial {number} {row['state']}"
        if metric in row:
            line += f", {metric} {row[metric]:.4g} at step {row['step']}"
        if row["state"] == "failed":
            line += f": {row['error']}"
            if "output: " not in row["error"] and self.log is not None:
                line += f"; output: {self.log}"
        self.say(f"{line}; {self.outlook(rows)}")

    def outlook(self, rows: list[dict[str, Any]]) -> str:
        """Return how many trials have ended, and about how long the others will take."""
        ended = sum(row["state"] not in NOT_ENDED for row in rows)
        running = sum(row["state"] == UNFINISHED for row in rows)
        trials = f"{ended} of {self.search.space.tune.trials} trials ended, {running} running"
        if paused := len(rows) - ended - running:
            trials += f", {paused} paused"
        return ", ".join(filter(None, (trials, self._time_left(rows))))

    def drawing(self, rows: list[dict[str, Any]]) -> Group:
        """Return the table and the bar."""
        done, every = self._steps(rows)
        self.bar.update(self.task, completed=done, total=every, left=self._time_left(rows))
        return Group(self.table(rows), self.bar)

    def table(self, rows: list[dict[str, Any]]) -> Table:
        """Return a row per trial: those that run first, then the best, as many as the screen holds."""
        tune = self.search.space.tune
        # Each once: a metric may be searched by and limited too.
        measured = dict.fromkeys(
            (tune.metric, *tune.objectives, *tune.constraints, "train_loss", "examples_per_s")
        )
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("trial", "state", "step", *measured, *self.names.values()):
            table.add_column(name, no_wrap=True)
        # A stable sort: within both halves the best stay first.
        rows = sorted(rows, key=lambda row: row["state"] not in NOT_ENDED)
        for row in rows[: max(1, self.screen.height - ROWS_AROUND)]:
            state = row["state"]
            if state == UNFINISHED:
                state = "running" if "step" in row else row.get("stage", "starting")
            step = f"{row['step']}/{row['total_steps']}" if "step" in row else None
            cells = [row["trial"], state, step, *(row.get(name) for name in measured)]
            cells += [row["values"].get(path) for path in self.names]
            table.add_row(*map(_cell, cells))
        return table

    # ------------------------------------------------------------------------------------- figures

    def _rows(self) -> list[dict[str, Any]]:
        """Return the study's rows, best first, with what workers of running trials have told since."""
        trials = {trial.number: trial for trial in own_trials(self.search.study)}
        rows = trial_rows(self.search.study, self.search.space.tune)
        for row in rows:
            trial = trials[row["trial"]]
            # Before its first report a trial is taken to be as long as the longest.
            totals = (report["total_steps"] for report in evaluations(trial))
            row["total_steps"] = next(totals, self.steps)
            news = self.progress.get(f"trial-{directory_of(trial)}")
            if news is None or row["state"] != UNFINISHED:
                continue
            if "stage" in news:  # an earlier one, whose steps are none of the trial's
                row["stage"] = f"stage {news['stage']}: {news['step']}/{news['total_steps']}"
            # A trial that began again is behind its own last report for a while.
            elif news["step"] >= row.get("step", 0):
                row |= news
        return rows

    def _steps(self, rows: list[dict[str, Any]]) -> tuple[int, int]:
        """Return the steps that are done, and all that there will be if no further trial is stopped."""
        done = sum(row.get("step", 0) for row in rows)
        running = [row for row in rows if row["state"] == UNFINISHED]
        left = sum(row["total_steps"] - row.get("step", 0) for row in running)
        # Trials that have not begun are taken to be as long as the longest.
        to_begin = max(0, self.search.space.tune.trials - len(rows))
        return done, done + left + to_begin * self.steps

    def _time_left(self, rows: list[dict[str, Any]]) -> str:
        """Return about how long the steps that are left will take: as long a step as those that this driver has seen."""
        done, every = self._steps(rows)
        if done <= self.steps_before:
            return ""
        elapsed = time.monotonic() - self.began
        # Both counted from what earlier drivers had done.
        left = seconds_left(done - self.steps_before, every - self.steps_before, elapsed)
        return f"about {duration(left)} left"


def _cell(value: Any) -> str:
    # Not equal to itself is not a number: a loss before the first line of a training.
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trackers(config: TuneConfig, output: Place) -> list[Callback]:
    """Return Ray's callbacks for MLflow and Weights & Biases, a run per trial, grouped by the sweep's name.

    MLflow writes to ``MLFLOW_TRACKING_URI``, else to ``<output>/mlflow.db``; W&B follows its own variables (``WANDB_MODE``).
    """
    callbacks: list[Any] = []
    # Imported here: neither package need be installed.
    if "mlflow" in config.trackers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{output / 'mlflow.db'}")
        callbacks.append(MLflowLoggerCallback(tracking_uri=uri, experiment_name=output.name))
    if "wandb" in config.trackers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project="latentwire", group=output.name))
    return callbacks
