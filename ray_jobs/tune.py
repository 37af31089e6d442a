"""The main job: search a space on Ray, score the best wire once on the untouched split, export it.

    python ray_jobs/tune.py                                              # the embedded toy pair, two cores
    python ray_jobs/tune.py --space search_spaces/small.yaml --data_dir <directory with squad parquet>
    python ray_jobs/tune.py --resume runs/tune-<time>                    # after any death; --set tune.trials=20: more
    python ray_jobs/tune.py --resume runs/tune-<time> --retry_failed     # and take up again what failed
    python ray_jobs/tune.py --resume runs/tune-<time> --force            # whose driver is dead on another machine
    python ray_jobs/tune.py --from_manifest runs/tune-<time>/manifest.json --trial 3     # one of its trials again
    ray job submit --working-dir . -- python ray_jobs/tune.py            # on a cluster

Everything lands in ``<storage_path>/<name>``: trials, ``best/`` (the export), ``predictions.parquet``,
``manifest.json``, ``results.json``, ``report.md`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from latentwire.api import driver
from latentwire.cli.flags import add_flags, input_place, output_place, read_space, refuse_flags
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError
from latentwire.distributed import cluster
from latentwire.errors import UserError, fail
from latentwire.planning import forecast, planner
from latentwire.storage import place
from latentwire.tuning import lease, manifest, resume
from latentwire.tuning.console import check_trackers
from latentwire.tuning.searcher import check_draws, check_searchable

DEFAULT_SPACE = Path(__file__).parent.parent / "search_spaces" / "toy.yaml"


def main() -> int:
    """Plan, prepare shards, search, score, export, report. Exit status 2 for a plain error, 1 for a failed sweep or a time
    budget that is over, 130 and 143 for Ctrl-C and SIGTERM."""
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
    parser.add_argument(
        "--force",
        action="store_true",
        help="take the sweep over from a driver that has given no heartbeat for two minutes",
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
            if not options.dry_run:
                lease.check(output, options.force)
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
            if not lease.is_empty(output):
                raise ConfigError(
                    f"output_dir must not exist yet, got {output}; name another one, or --resume {output}"
                )
        planner.check_start(space.run)
        check_searchable(space)
        check_trackers(space.tune, output)
        cluster.start_ray()
        plan = forecast.show(space, planner.plan_on_cluster(space), output, measured=options.dry_run)
        if options.dry_run:
            print(space.model_dump_json(indent=1))
            return 0
        retry = options.retry_failed
        return driver.drive(space, plan, output, sys.argv, repeated, retry=retry, force=options.force)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        print("stopped: Ctrl-C, before anything was written", flush=True)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
