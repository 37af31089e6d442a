"""The main job: search a space on Ray, score the best wire once on the untouched split, export it.

    python ray_jobs/tune.py                                              # the embedded toy pair, two cores
    python ray_jobs/tune.py --space search_spaces/small.yaml --data_dir <directory with squad parquet>
    python ray_jobs/tune.py --resume runs/tune-<time>                    # after any death; --set tune.trials=20: more
    ray job submit --working-dir . -- python ray_jobs/tune.py            # on a cluster

Everything lands in ``<storage_path>/<name>``: trials, ``best/`` (the export), ``predictions.parquet``,
``results.json`` and ``report.md``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from latentwire.config import SpaceFile
from latentwire.config.resolve import ConfigError, with_values
from latentwire.errors import USER_ERRORS, fail
from latentwire.options import add_flags, read_space, with_home
from latentwire.storage import Place, place
from latentwire.tuning import finals, planner, report, results, resume, sweep
from latentwire.tuning.searcher import check_searchable

DEFAULT_SPACE = Path(__file__).parent.parent / "search_spaces" / "toy.yaml"


def main() -> int:
    """Plan, prepare shards, search, score, export, report. Exit status 2 for a plain error, 1 for a failed sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--output_dir", type=place, help="directory or URI where results go; must not exist yet")
    parser.add_argument(
        "--resume", type=place, help="a sweep's directory: finish it, or add trials by --set tune.trials=N"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the resolved space and the plan, then stop")
    options = parser.parse_args()
    try:
        if options.resume:
            output = options.resume.absolute()
            space = resume.read_space(output, options.assignments)
            if resume.is_finished(space, output):
                print(f"{output} has its {space.tune.trials} trials; add some by --set tune.trials=<more>")
                return 0
        else:
            space = with_home(read_space(options, DEFAULT_SPACE))
            name = time.strftime("tune-%Y%m%d-%H%M%S")
            output = (options.output_dir or place(space.tune.storage_path) / name).absolute()
            if output.exists():
                raise ConfigError(
                    f"output_dir must not exist yet, got {output}; name another one, or --resume {output}"
                )
        check_searchable(space)
        sweep.start_ray()
        plan = planner.plan_on_cluster(space)
        print(plan, flush=True)
        if options.dry_run:
            print(space.model_dump_json(indent=1))
            return 0
        resume.write_space(space, output)
        return search(space, plan, output)
    except USER_ERRORS as error:
        return fail(error)


def search(space: SpaceFile, plan: planner.Plan, output: Place) -> int:
    """The sweep itself, after everything that could be refused has been."""
    files = sweep.prepare(space, plan.gpus_per_worker)
    study = sweep.run_sweep(space, plan, files, output)
    best, finalists = finals.run_finals(space, plan, files, output, study)
    run = with_values(space.run, best.values)
    validation = files[sweep.variant_key(run)].shards["validation"]
    resume.set_aside(output / "best")
    scores = results.on_cluster(
        run, plan.gpus_per_worker, results.score_and_export, best.checkpoint, validation, output / "best"
    )
    rows = results.trial_rows(study, space.tune)
    grids = report.sweep_tables(rows, finalists, scores, best, run, space.tune)
    command = shlex.join(["python", *sys.argv])
    gap = results.selection_gap(best, scores, space.tune.metric)
    document = {"command": command, "best": vars(best), "selection": gap, "validation": scores, "trials": rows}
    results.write_results(output, document | {"finalists": [vars(finalist) for finalist in finalists]})
    report.show(grids)
    print(line := report.verdict(best, gap, space.tune.metric))
    print(f"exported: {output / 'best'}")
    print(f"report: {report.write_report(output, line, grids, command)}")
    failed = [row for row in rows if row["state"] == "failed"]
    for row in failed:
        print(f"failed: trial {row['trial']}: {row['error'].strip().splitlines()[-1]}", file=sys.stderr)
    return 1 if len(failed) == len(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
