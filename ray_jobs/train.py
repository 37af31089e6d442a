"""One run on Ray: a TorchTrainer with one or more data-parallel workers.

    python ray_jobs/train.py --samples 2000 --max_steps 200 --output_dir runs/one
    python ray_jobs/train.py --num_workers 2 --output_dir runs/two
    python ray_jobs/train.py --add_receiver name=<Hub id or directory> --from runs/one/best --output_dir runs/three

The same command continues an interrupted run from the last checkpoint in its output directory.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ray.train import TrainingFailedError

from latentwire.cli.flags import add_flags, add_start, output_place, read_space
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError
from latentwire.distributed import cluster, remote, sweep_files, trial
from latentwire.errors import UserError, fail
from latentwire.evaluation import readings, scoring
from latentwire.evaluation.protocol import pins
from latentwire.planning import planner
from latentwire.planning.variants import variant_key
from latentwire.reports import tables
from latentwire.training import step_checkpoints
from latentwire.training.local import metric_of
from latentwire.training.loop import TrainingError

DEFAULT_SPACE = Path(__file__).parent.parent / "search_spaces" / "toy.yaml"


def main() -> int:
    """Plan, prepare shards, train, score the best checkpoint once, export it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    add_start(parser)
    parser.add_argument("--output_dir", type=output_place, required=True, help="where checkpoints and the export go")
    options = parser.parse_args()
    try:
        space = planner.alone(with_home(read_space(options, DEFAULT_SPACE)))
        run, output = space.run, options.output_dir.absolute()
        if (output / "best").exists():
            raise ConfigError(f"output_dir must not hold a finished run, got {output}; name another one")
        planner.check_start(run)
        cluster.start_ray()
        plan = planner.plan_on_cluster(space)
        print(plan, flush=True)
        files = sweep_files.prepare(space, plan.gpus_per_worker)[variant_key(run)]
        step_checkpoints.clear_debris(output)
        metric, mode = metric_of(run)
        trial.make_trainer(
            run,
            sweep_files.load_datasets(files, run.data.in_memory),
            files.train_rows,
            files.shards["train"],
            folder=output,
            gpus_per_worker=plan.gpus_per_worker,
            pins=pins(files.shards, run),
            metric=metric,
            mode=mode,
        ).fit()
        if cause := trial.cause_left(output):
            raise TrainingError(cause)
        best = step_checkpoints.best_of(step_checkpoints.finished(output), metric, mode)
        scored = remote.on_cluster(
            run,
            plan.gpus_per_worker,
            scoring.score_and_export,
            best,
            files.shards["validation"],
            output / "best",
        )
    except UserError as error:
        return fail(error)
    except TrainingFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", *sys.argv])
    scoring.write_results(output, {"command": command, "best": best} | scored.document)
    tables.show(tables.scored_tables(scored, f"{run.data.dataset} validation", run))
    if scored.scores:
        print(readings.sentence(scored.readings))
    print(f"exported: {output / 'best'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
