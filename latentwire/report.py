"""Write a sweep's report anew: ``latentwire report``.

python latentwire/report.py runs/tune-<time>
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(
        Path(__file__).parents[1]
    )  # else this folder's evaluate.py hides Hugging Face's
    from latentwire.cli import as_written, main

    sys.exit(main(["report", *as_written(sys.argv[1:])]))
