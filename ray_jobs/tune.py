"""The main job, for ``ray job submit``: ``latentwire tune`` with the same flags.

python ray_jobs/tune.py                                              # the embedded toy pair, two cores
python ray_jobs/tune.py --space search_spaces/small.yaml --data_dir <directory with squad parquet>
python ray_jobs/tune.py --resume runs/tune-<time>                    # after any death; --set tune.trials=20: more
ray job submit --working-dir . -- python ray_jobs/tune.py            # on a cluster
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would come first, and its evaluate.py hide Hugging Face's package.
    sys.path[0] = str(Path(__file__).parents[1])
    from latentwire.cli import as_written, main

    sys.exit(main(["tune", *as_written(sys.argv[1:])]))
