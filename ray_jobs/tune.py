"""The main job: search a space on Ray, score the best wire once on the untouched split, export it.

    python ray_jobs/tune.py                                              # the embedded toy pair, two cores
    python ray_jobs/tune.py --space search_spaces/small.yaml --data_dir <directory with squad parquet>
    python ray_jobs/tune.py --resume runs/tune-<time>                    # after any death; --set tune.trials=20: more
    python ray_jobs/tune.py --resume runs/tune-<time> --retry_failed     # and take up again what failed
    python ray_jobs/tune.py --from_manifest runs/tune-<time>/manifest.json --trial 3     # one of its trials again
    ray job submit --working-dir . -- python ray_jobs/tune.py            # on a cluster

Everything lands in ``<storage_path>/<name>``: trials, ``best/`` (the export), ``predictions.parquet``,
``manifest.json``, ``results.json``, ``report.md`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from latentwire.config.resolve import ConfigError
from latentwire.errors import UserError, fail
from latentwire.options import add_flags, input_place, output_place, read_space, refuse_flags, with_home
from latentwire.storage import place
from latentwire.tuning import forecast, job, manifest, planner, resume, sweep
from latentwire.tuning.progress import check_trackers
from latentwire.tuning.searcher import check_draws, check_searchable

DEFAULT_SPACE = Path(__file__).parent.parent / "search_spaces" / "toy.yaml"


def main() -> int:
    """Plan, prepare shards, search, score, export, report. Exit status 2 for a plain error, 1 for a failed sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--output_dir", type=output_place, help="directory or URI where results go; must not exist yet")
    parser.add_argument(
        "--resume", type=output_place, help="a sweep's directory: finish it, or add trials by --set tune.trials=N"
    )
    parser.add_argument(
        "--retry_failed",
        action="store_true",
        help="with --resume: take failed trials up again, from their last checkpoints",
    )
    parser.add_argument("--from_manifest", type=input_place, help="manifest of a sweep: run one of its trials again")
    parser.add_argument("--trial", type=int, help="which one (default: the best)")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved space and the plan, then stop")
    options = parser.parse_args()
    repeated: dict[str, Any] | None = None
    try:
        if options.resume or options.from_manifest:
            refuse_flags(options, "a resumed sweep" if options.resume else "a repeated trial")
        if options.retry_failed and not options.resume:
            raise ConfigError(
                "--retry_failed takes up the failed trials of a sweep that --resume names, got no --resume"
            )
        if options.resume:
            output = options.resume.absolute()
            space = resume.read_space(output, options.assignments)
            retried = options.retry_failed and resume.has_failed(space, output)
            if resume.is_finished(space, output) and not retried:
                print(f"{output} has its {space.tune.trials} trials; add some by --set tune.trials=<more>")
                return 0
        else:
            if options.from_manifest:
                space, repeated = manifest.one_trial(options.from_manifest, options.trial, options.assignments)
            else:
                space = with_home(read_space(options, DEFAULT_SPACE))
            check_draws(space)
            name = time.strftime("tune-%Y%m%d-%H%M%S")
            output = (options.output_dir or place(space.tune.storage_path) / name).absolute()
            if output.exists():
                raise ConfigError(
                    f"output_dir must not exist yet, got {output}; name another one, or --resume {output}"
                )
        planner.check_start(space.run)
        check_searchable(space)
        check_trackers(space.tune)
        sweep.start_ray()
        plan = forecast.show(space, planner.plan_on_cluster(space), output, measured=options.dry_run)
        if options.dry_run:
            print(space.model_dump_json(indent=1))
            return 0
        resume.write_space(space, output)
        if options.retry_failed:
            print("\n".join(resume.retry_failed(space, output) or ["no trial has failed"]), flush=True)
        return job.search(space, plan, output, shlex.join(["python", *sys.argv]), repeated)
    except UserError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
