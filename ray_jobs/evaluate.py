"""Score a checkpoint or export in a Ray task, where the cluster's GPUs are.

python ray_jobs/evaluate.py --checkpoint runs/<sweep>/best --split validation
"""

from __future__ import annotations

import sys

from latentwire.config import SpaceFile
from latentwire.data import pipeline
from latentwire.errors import USER_ERRORS, fail
from latentwire.evaluate import finish, parser
from latentwire.options import override_run, with_home
from latentwire.storage import local
from latentwire.training import checkpoints
from latentwire.tuning import planner, results, sweep


def main() -> int:
    """Make the split's shards where needed, score on one worker's resources, print."""
    options = parser().parse_args()
    checkpoint = options.checkpoint.absolute()
    try:
        with local(checkpoint) as folder:
            checkpoints.read_manifest(folder)
            run = with_home(SpaceFile(run=override_run(checkpoints.read_run(folder), options.assignments))).run
        results.check_questions(run)
        sweep.start_ray()
        plan = planner.plan_on_cluster(SpaceFile(run=run))
        path = pipeline.ensure_shards(run, options.split)
        scores, _ = results.on_cluster(
            run, plan.gpus_per_worker, results.score, checkpoint, path, tuple(options.modes), run
        )
    except USER_ERRORS as error:
        return fail(error)
    return finish(options, scores, run)


if __name__ == "__main__":
    sys.exit(main())
