"""Make shards, for ``ray job submit``: ``latentwire preprocess`` with the same flags.

python ray_jobs/preprocess.py --space search_spaces/small.yaml --data_dir <directory with squad parquet>
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would come first, and its evaluate.py hide Hugging Face's package.
    sys.path[0] = str(Path(__file__).parents[1])
    from latentwire.cli import as_written, main

    sys.exit(main(["preprocess", *as_written(sys.argv[1:])]))
