"""Score a checkpoint or export by a Ray Data actor pool: every GPU (or core) of the cluster takes part of the rows.

    python ray_jobs/evaluate.py --checkpoint runs/<sweep>/best --split validation
    python ray_jobs/evaluate.py --checkpoint runs/<sweep>/best --copies 2 --output runs/<sweep>/scores

The flags are those of latentwire/evaluate.py, and so are the scores, bit for bit.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import ray

from latentwire import exports
from latentwire.config import SweepConfig
from latentwire.config.overrides import override_run
from latentwire.config.places import with_home
from latentwire.data import pipeline
from latentwire.distributed import cluster, remote, scoring_pool
from latentwire.errors import UserError, fail
from latentwire.evaluate import official, parser
from latentwire.evaluation import scoring
from latentwire.planning import planner
from latentwire.reports.scores import asked, known_of, show_and_write
from latentwire.storage import local


def main() -> int:
    """Make the split's shards where needed, share its rows out, print."""
    flags = parser()
    flags.add_argument("--copies", type=int, help="wires at once (default: as many as the cluster holds)")
    options = flags.parse_args()
    try:
        if options.predictions:
            return official(options)
        checkpoint = options.checkpoint.absolute()
        with local(checkpoint) as folder:
            exports.read_manifest(folder)
            run = with_home(SweepConfig(run=override_run(exports.read_run(folder), options.assignments))).run
            exports.check_models(folder, run)
        wanted = asked(options, run)
        cluster.start_ray()
        plan = planner.plan_on_cluster(SweepConfig(run=run))
        there, memory = ray.cluster_resources(), planner.node_memory(run.training.gpus_per_worker)
        path = pipeline.ensure_shards(run, options.split)
        copies = options.copies or scoring_pool.copies_at_once(there, plan, memory)
        share = {"copies": copies, "cpus": plan.cpus_per_worker, "gpus": plan.gpus_per_worker}
        with local(checkpoint) as folder:
            known = known_of(folder, options.split, path)
        predictions = scoring_pool.predict_pool(checkpoint, path, wanted.rows, run, joint=not options.no_joint, **share)
        probes = (
            remote.on_cluster(run, plan.gpus_per_worker, scoring.diagnose_here, checkpoint, path, run)
            if options.diagnose
            else None
        )
        return show_and_write(options, wanted, predictions, run, replace(known, probes=probes))
    except UserError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
