"""A sweep from its shards to its report: what ``ray_jobs/tune.py`` does once everything that could be refused has been."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentwire.config import SweepConfig
from latentwire.config.resolve import with_values
from latentwire.distributed import orphans, remote, replica_sets, sweep_files
from latentwire.errors import fail
from latentwire.evaluation import readings, scoring
from latentwire.planning.planner import Plan
from latentwire.planning.variants import variant_key
from latentwire.reports import html, tables
from latentwire.storage import Place
from latentwire.tuning import checkpoint_budget, manifest, reruns, results, resume, sweep
from latentwire.tuning.stopping import Stop


def search(
    space: SweepConfig,
    plan: Plan,
    output: Place,
    command: str,
    repeated: Mapping[str, Any] | None = None,
    stop: Stop | None = None,
) -> int:
    """Shards, trials, finals, scores, export, report; returns the exit status: 1 where every trial has failed.

    ``repeated``: the manifest whose trial this is, whose data and receivers must be the same. ``stop``: may end it before, by
    :class:`~latentwire.tuning.stopping.SweepStopped`.
    """
    stop = stop or Stop()
    if left := orphans.remove_orphaned_groups():
        print(f"removed {len(left)} placement group(s) that ended jobs had left: {', '.join(left)}")
    files = sweep_files.prepare(space, plan.gpus_per_worker)
    pin = sweep_files.common_protocol_hash(space, {own.shards["dev"] for own in files.values()})
    if repeated is not None:
        manifest.check_data(repeated, files, pin)
    stop.check_taken()
    manifest.write(output / manifest.MANIFEST, manifest.describe(space, files, pin, output, command))
    expected = None if repeated is None else repeated["receivers"]
    with replica_sets.serving(space, plan.sharing, expected) as served:
        study = sweep.run_sweep(space, plan, files, output, expected, served, stop)
        document = manifest.describe(space, files, pin, output, command, study)
        manifest.write(output / manifest.MANIFEST, document)
        try:
            best, finalists = reruns.rerun_best(space, plan, files, output, study, served, stop)
        except results.SweepError as error:
            return _without_winner(results.trial_rows(study, space.tune), space, output, command, error)
    run = with_values(space.run, best.values)
    validation = files[variant_key(run)].shards["validation"]
    stop.check_taken()
    resume.set_aside(output / "best")
    scored = remote.on_cluster(
        run, plan.gpus_per_worker, scoring.score_and_export, best.checkpoint, validation, output / "best"
    )
    stop.check_taken()
    manifest.write(output / "best" / manifest.PROVENANCE, document | {"trial": best.trial})
    rows = results.trial_rows(study, space.tune)
    grids = tables.sweep_tables(rows, finalists, scored, best, run, space.tune)
    gap = results.selection_gap(best, scored.scores, space.tune.metric)
    found = {"command": command, "best": vars(best), "selection": gap, "trials": rows} | scored.document
    found |= {"evaluation_pin": pin, "finalists": [vars(finalist) for finalist in finalists]}
    scoring.write_results(output, found)
    tables.show(grids)
    print(line := f"{tables.verdict(best, gap, space.tune.metric)}; {readings.sentence(scored.readings)}")
    if repeated is not None:
        was = repeated["trials"][str(repeated["trial"])]["score"]
        print(f"repeated trial {repeated['trial']}: {space.tune.metric} {best.score!r}, was {was!r}")
    sweep.tidy_at_last(space, output)
    held = checkpoint_budget.bytes_in([output / "trials", output / reruns.RERUNS])
    print(f"checkpoints kept: {held / 1e6:,.1f} MB in {output}")
    print(f"exported: {output / 'best'}")
    line = f"{line}; exported to `{output / 'best'}`"
    print(f"report: {tables.write_report(output, line, grids, command)}, {html.write(output)}")
    return 1 if all(row["state"] == "failed" for row in rows) else 0


def _without_winner(
    rows: list[dict[str, Any]], space: SweepConfig, output: Place, command: str, error: results.SweepError
) -> int:
    """What the trials came to all the same; returns the exit status."""
    grids = tables.trial_tables(rows, space.tune)
    tables.show(grids)
    print(f"report: {tables.write_report(output, f'No winner: {error}', grids, command)}, {html.write(output)}")
    status = fail(error)
    return 1 if all(row["state"] == "failed" for row in rows) else status
