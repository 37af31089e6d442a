"""Make the shards and the teachers' columns that a space needs, and nothing else.

python ray_jobs/preprocess.py --space search_spaces/small.yaml --data_dir <directory with squad parquet>
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from latentwire.cli.flags import add_flags, read_space
from latentwire.config.places import with_home
from latentwire.distributed import cluster, sweep_files
from latentwire.errors import UserError, fail
from latentwire.planning import autoscaler

DEFAULT_SPACE = Path(__file__).parent.parent / "search_spaces" / "toy.yaml"


def main() -> int:
    """Read, clean, tokenise, write; complete shards are left alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    options = parser.parse_args()
    try:
        space = with_home(read_space(options, DEFAULT_SPACE))
        cluster.start_ray()
        sweep_files.prepare(space, space.run.training.gpus_each(autoscaler.cluster_resources()))
    except UserError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
