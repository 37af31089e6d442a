"""Score a checkpoint or export beside full text, closed book and shuffled messages.

    python latentwire/evaluate.py --checkpoint runs/test/best
    python latentwire/evaluate.py --checkpoint runs/test/best --split dev --modes latent text

The wire's own configuration says which data; ``--set data.…`` and the data flags override it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from latentwire.config import RunConfig
from latentwire.data import shards
from latentwire.errors import USER_ERRORS, fail
from latentwire.evaluation.baselines import MODES
from latentwire.options import override_run
from latentwire.storage import local, place
from latentwire.training import checkpoints
from latentwire.tuning import planner, report, results


def parser() -> argparse.ArgumentParser:
    """The flags, shared with ``ray_jobs/evaluate.py``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=place, required=True, help="directory or URI of a checkpoint or export")
    parser.add_argument("--split", choices=shards.SPLITS, default="validation", help="rows to score")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what stands in for the context")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
                        help="override a knob of the checkpoint's configuration, e.g. --set data.validation_samples=100")  # fmt: skip
    parser.add_argument("--output", type=Path, help="also write the scores here, as JSON")
    return parser


def finish(options: argparse.Namespace, scores: dict, run: RunConfig) -> int:
    """Print the table and write the file."""
    report.show([report.scores_table(scores, f"{options.checkpoint}, {options.split}", run)])
    if options.output:
        options.output.write_text(json.dumps(scores, indent=1))
    return 0


def main() -> int:
    """Make the split's shards where needed, load, score, print."""
    options = parser().parse_args()
    try:
        with local(options.checkpoint) as folder:
            checkpoints.read_manifest(folder)
            run = override_run(checkpoints.read_run(folder), options.assignments)
        results.check_questions(run)
        path = planner.local_shards(run, (options.split,))[options.split]
        scores, _ = results.score(options.checkpoint, path, tuple(options.modes), run)
    except USER_ERRORS as error:
        return fail(error)
    return finish(options, scores, run)


if __name__ == "__main__":
    sys.exit(main())
