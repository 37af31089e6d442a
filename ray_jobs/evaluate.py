"""Score a checkpoint on Ray, for ``ray job submit``: ``latentwire evaluate --ray`` with the same flags.

python ray_jobs/evaluate.py --checkpoint runs/<sweep>/best --split validation
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would come first, and its evaluate.py hide Hugging Face's package.
    sys.path[0] = str(Path(__file__).parents[1])
    from latentwire.cli import as_written, main

    sys.exit(main(["evaluate", "--ray", *as_written(sys.argv[1:])]))
