"""Run a sweep: plan, lease, shards, trials, re-runs, scores, export, report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentwire.config import SweepConfig
from latentwire.config.knobs import knob_of
from latentwire.config.overrides import full_path
from latentwire.config.places import at_home, with_home
from latentwire.config.resolve import (
    ConfigError,
    load_space,
    stages_of,
    with_overrides,
    with_values,
)
from latentwire.data import sources
from latentwire.data.stages import placed, reports
from latentwire.distributed import cluster, orphans, remote, replica_sets, sweep_files
from latentwire.distributed.driver_log import LOG, path_beside
from latentwire.errors import fail
from latentwire.evaluation import scoring
from latentwire.planning import forecast, planner
from latentwire.planning.planner import Plan
from latentwire.planning.resolved import ResolvedSweep, objectives, resolve
from latentwire.planning.stages import check_start
from latentwire.planning.variants import variant_key
from latentwire.reports import html, tables
from latentwire.storage import Place, place
from latentwire.tuning import (
    checkpoint_budget,
    lease,
    manifest,
    objections,
    orders,
    reruns,
    results,
    resume,
)
from latentwire.tuning import sweep as searching
from latentwire.tuning.console import check_trackers
from latentwire.tuning.results import Best, SweepError
from latentwire.tuning.searcher import check_draws, check_searchable
from latentwire.tuning.space_file import with_trials, write_space
from latentwire.tuning.stopping import SIGINT_STATUS, Stop
from latentwire.tuning.study import JOURNAL, own_trials, read_study

if TYPE_CHECKING:
    import optuna
    import pandas as pd


@dataclass(frozen=True)
class SweepResult:
    """A sweep that lies in a directory: its trials, its winner, and where its files are."""

    output: Place
    """The sweep's directory."""

    @cached_property
    def config(self) -> SweepConfig:
        """The resolved configuration."""
        return resume.read_space(self.output, [])

    @cached_property
    def study(self) -> optuna.Study:
        """A copy in memory of the Optuna study, with every trial."""
        import optuna

        with read_study(self.output / JOURNAL, self.output.name, objectives(self.config)) as stored:
            # A copy is no news.
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            study = optuna.create_study(study_name=stored.study_name, directions=stored.directions)
            study.add_trials(own_trials(stored))
            for key, value in stored.user_attrs.items():
                study.set_user_attr(key, value)
        return study

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A table with a row per trial, best first: its state, metrics, and a column per searched path."""
        import pandas as pd

        rows = results.trial_rows(self.study, self.config.tune)
        # A row's values become columns behind the others.
        table = []
        for row in rows:
            others = {key: row[key] for key in row if key != "values"}
            table.append(others | row["values"])
        return pd.DataFrame(table)

    @cached_property
    def best(self) -> Best:
        """The winner. Raises :class:`~latentwire.tuning.results.SweepError` where no trial left a checkpoint."""
        return results.find_best(self.study, self.config.tune)

    @property
    def export(self) -> Place:
        """Directory of the winner's wire, for :meth:`LatentWire.from_pretrained`."""
        return self.output / "best"

    @property
    def report(self) -> Place:
        """The report, one HTML file that opens offline."""
        return self.output / html.FILE


def tune(
    config: SweepConfig | str | Path = "toy",
    *,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> SweepResult:
    """Search a space on Ray, score the best wire once on the untouched split, and export it.

    Args:
        config: a configuration, the name of a shipped one, or a YAML file.
        output: directory or URI for everything that is written; None: a new one under ``tune.storage_path``.
        overrides: path → value laid over the configuration, e.g. ``{"tune.trials": 2}``.
        verbose: show what workers and libraries print.

    Raises:
        UserError: a value that cannot be, too little memory, a directory that is taken.
        SweepError: the sweep stopped before its end, or every trial failed.
    """
    values = {full_path(path): value for path, value in (overrides or {}).items()}
    if not isinstance(config, SweepConfig):
        config = load_space(config, values)
    elif values:
        config = with_overrides(config, values)
    space = with_home(config)
    check_draws(space)
    where = new_output(space, None if output is None else str(output))
    check(space, where)
    status = run(
        space,
        where,
        program="latentwire tune",
        command=f"latentwire.tune(output={str(where)!r})",
        verbose=verbose,
    )
    if status == SIGINT_STATUS:
        raise KeyboardInterrupt
    if status:
        raise SweepError(
            f"the sweep in {where} must come to its end, it ended with status {status}; see its report"
        )
    return SweepResult(where)


def new_output(space: SweepConfig, output: str | None) -> Place:
    """Return the directory of a new sweep: ``output``, or one named by the time.

    Raises :class:`~latentwire.config.resolve.ConfigError` where something lies in it.
    """
    name = time.strftime("tune-%Y%m%d-%H%M%S")
    where = (place(at_home(output)) if output else place(space.tune.storage_path) / name).absolute()
    if not lease.is_empty(where):
        raise ConfigError(
            f"output must not exist yet, got {where}; name another one, or --resume {where}"
        )
    return where


def check(space: SweepConfig, output: Place) -> None:
    """Raise a :class:`~latentwire.errors.UserError` for what could never run, before Ray starts."""
    check_start(space.run)
    # Where the data are searched, trials say which there are.
    if not any(knob_of(path).startswith("data.") for path in space.search):
        for stage in stages_of(space.run):
            sources.check(stage.run.data)
    check_searchable(space)
    check_trackers(space.tune, output)


def run(
    space: SweepConfig,
    output: Place,
    *,
    program: str,
    command: str,
    repeated: Mapping[str, Any] | None = None,
    retry: bool = False,
    force: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
) -> int:
    """Plan a checked sweep on the cluster and run it; return the exit status.

    Args:
        space: what is searched.
        output: the sweep's directory.
        program: words with which a person runs the command that goes on.
        command: the whole command, for the record.
        repeated: the manifest whose trial this is, where it is one.
        retry: take its failed trials up again.
        force: take the sweep over from a driver that has given no heartbeat for long.
        dry_run: print plan, forecast and configuration, and stop.
        verbose: show what workers and libraries print.
    """
    cluster.start_ray(verbose)
    sweep = resolve(space)
    plan = planner.plan_on_cluster(sweep)
    rate = remote.measure_rate(sweep.largest, plan.gpus_per_worker) if dry_run else None
    plan = forecast.show(sweep, plan, output, rate)
    if dry_run:
        print(space.model_dump_json(indent=1))
        return 0
    return drive(sweep, plan, output, program, command, repeated, retry=retry, force=force)


def drive(
    sweep: ResolvedSweep,
    plan: Plan,
    output: Place,
    program: str,
    command: str,
    repeated: Mapping[str, Any] | None = None,
    *,
    retry: bool = False,
    force: bool = False,
) -> int:
    """Run a sweep as its only driver; returns the exit status.

    Args:
        sweep: what is searched, resolved.
        plan: how many trials fit.
        output: the sweep's directory.
        program: words with which a person runs the command that goes on, e.g. ``latentwire tune``.
        command: the whole command, for the record.
        repeated: the manifest whose trial this is, where it is one.
        retry: take its failed trials up again.
        force: take the sweep over from a driver that has given no heartbeat for long.

    Raises:
        LeaseError: another driver has the sweep; nothing was touched.
    """
    stop, space = Stop(), sweep.space
    try:
        with lease.held(output, force, stop.lose) as stop.lease, stop.by_signals():
            write_space(space, output)
            LOG.open(path_beside(output))
            if retry:
                lines = resume.retry_failed(space, output) or ["no trial has failed"]
                print("\n".join(lines), flush=True)
            status = search(sweep, plan, output, command, repeated, stop)
            again = f"{program} --resume {shlex.quote(str(output))}"
            orders.refuse_open(output, objections.came_late(output, again))
            return status
    # Ray raises one of its own where a signal's handler raised in the middle of a call.
    except KeyboardInterrupt:
        stop.ask("Ctrl-C", SIGINT_STATUS)
    return explain_stop(stop, space, output, f"{program} --resume {shlex.quote(str(output))}")


def explain_stop(stop: Stop, space: SweepConfig, output: Place, again: str) -> int:
    """Print why a sweep stopped and how it goes on, and return the exit status.

    Args:
        stop: its reason.
        space: what is searched.
        output: the sweep's directory.
        again: the command that goes on with it.
    """
    with read_study(output / JOURNAL, output.name, objectives(space)) as study:
        states = [trial.state for trial in own_trials(study)]
    ended = sum(state.is_finished() for state in states)
    # Orders may have changed it.
    trials = resume.read_space(output, []).tune.trials
    print(
        f"stopped: {stop.reason}; {ended} of {trials} trials have ended, what has not goes on from its "
        f"checkpoints; all is kept, nothing was scored",
        flush=True,
    )
    if LOG.path is not None:
        print(f"log: {LOG.path}", flush=True)
    if stop.taken:
        return stop.status
    print(f"go on: {again}", flush=True)
    if 0 < ended < trials:
        print(
            f"or choose and score the best of those that have ended: {again} --set tune.trials={ended}",
            flush=True,
        )
    return stop.status


def search(
    sweep: ResolvedSweep,
    plan: Plan,
    output: Place,
    command: str,
    repeated: Mapping[str, Any] | None = None,
    stop: Stop | None = None,
) -> int:
    """Go from shards over trials, re-runs and scores to export and report; return the exit status.

    Args:
        sweep: what is searched, resolved.
        plan: how many trials fit.
        output: the sweep's directory.
        command: the whole command, for the record.
        repeated: the manifest whose trial this is; data and receivers must be the same.
        stop: may end it before, by :class:`~latentwire.tuning.stopping.SweepStopped`.

    Returns:
        1 where every trial has failed, else 0.
    """
    stop, space = stop or Stop(), sweep.space
    if left := orphans.remove_orphaned_groups():
        print(f"removed {len(left)} placement group(s) that ended jobs had left: {', '.join(left)}")
    files = sweep_files.prepare(sweep, plan.gpus_per_worker)
    protocol = sweep_files.common_protocol_hash(space, sweep_files.compared_on(files))
    if repeated is not None:
        manifest.check_data(repeated, files, protocol)
    stop.check_taken()
    # Written before the first trial, and again with the study when all have ended.
    document = manifest.describe(space, files, protocol, output, command)
    manifest.write(output / manifest.MANIFEST, document)
    expected = None if repeated is None else repeated["receivers"]
    with replica_sets.serving(space, plan.sharing, expected) as served:
        study = searching.run_sweep(
            space, plan, files, output, expected, served, stop, takes_orders=True
        )
        # Orders may have changed the number of trials.
        space = with_trials(space, resume.read_space(output, []).tune.trials)
        document = manifest.describe(space, files, protocol, output, command, study)
        manifest.write(output / manifest.MANIFEST, document)
        try:
            best, finalists = reruns.rerun_best(space, plan, files, output, study, served, stop)
        except results.SweepError as error:
            return _without_winner(
                results.trial_rows(study, space.tune), space, output, command, error
            )
    stages = placed(with_values(space.run, best.values))
    run = stages[-1].run
    paths = files[variant_key(run)].shards
    # A driver that has lost its lease must write nothing more: asked anew before each large step.
    stop.check_taken()
    resume.set_aside(output / "best")
    scored = remote.score_and_export(
        run, plan.gpus_per_worker, best.checkpoint, paths, output / "best"
    )
    stop.check_taken()
    manifest.write(output / "best" / manifest.PROVENANCE, document | {"trial": best.trial})
    rows = results.trial_rows(study, space.tune)
    grids = tables.sweep_tables(rows, finalists, scored, best, run, space)
    gap = results.selection_gap(best, scored.scores, space.tune.metric)
    summary = {
        "command": command,
        "best": vars(best),
        "selection": gap,
        "trials": rows,
    } | scored.document
    summary |= {"evaluation_pin": protocol, "finalists": [vars(finalist) for finalist in finalists]}
    if stages[:-1]:
        summary["stages"] = reports(stages)
    scoring.write_results(output, summary)
    tables.show(tables.sweep_tables(rows, finalists, scored, best, run, space, brief=True))
    verdict = tables.verdict(best, gap, space.tune.metric)
    print(line := "; ".join([verdict, *scored.notes]))
    if repeated is not None:
        was = repeated["trials"][str(repeated["trial"])]["score"]
        print(
            f"repeated trial {repeated['trial']}: {space.tune.metric} {best.score!r}, was {was!r}"
        )
    searching.tidy_at_last(space, output)
    held = checkpoint_budget.bytes_in([output / "trials", output / reruns.RERUNS])
    print(f"checkpoints kept: {held / 1e6:,.1f} MB in {output}; log: {LOG.path}")
    print(f"exported: {output / 'best'}")
    line = f"{line}; exported to `{output / 'best'}`"
    print(f"report: {tables.write_report(output, line, grids, command)}, {html.write(output)}")
    return 1 if all(row["state"] == "failed" for row in rows) else 0


def _without_winner(
    rows: list[dict[str, Any]],
    space: SweepConfig,
    output: Place,
    command: str,
    error: results.SweepError,
) -> int:
    """Report what the trials reached without a winner; return the exit status."""
    grids = tables.trial_tables(rows, space)
    tables.show(grids)
    print(
        f"report: {tables.write_report(output, f'No winner: {error}', grids, command)}, {html.write(output)}"
    )
    status = fail(error)
    return 1 if all(row["state"] == "failed" for row in rows) else status
