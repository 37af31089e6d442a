"""One run on Ray, for ``ray job submit``: ``latentwire train --ray`` with the same flags.

    python ray_jobs/train.py --samples 2000 --max_steps 200 --output_dir runs/one
    python ray_jobs/train.py --num_workers 2 --output_dir runs/two

The same command goes on where an interrupted run of its output directory stopped.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would come first, and its evaluate.py hide Hugging Face's package.
    sys.path[0] = str(Path(__file__).parents[1])
    from latentwire.cli import as_written, main

    sys.exit(main(["train", "--ray", *as_written(sys.argv[1:], goes_on=True, config="toy")]))
