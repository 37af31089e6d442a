"""Write a sweep's report anew: ``latentwire report``.

python latentwire/report.py runs/tune-<time>
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would come first, and its evaluate.py hide Hugging Face's package.
    sys.path[0] = str(Path(__file__).parents[1])
    from latentwire.cli import as_written, main

    sys.exit(main(["report", *as_written(sys.argv[1:])]))
