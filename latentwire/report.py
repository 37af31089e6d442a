"""Write ``report.html`` anew for a sweep that is there, finished or not.

python latentwire/report.py runs/tune-<time>
"""

from __future__ import annotations

import argparse
import sys

from latentwire.cli.flags import input_place
from latentwire.errors import UserError, fail
from latentwire.reports import html


def main() -> int:
    """Read the sweep's files, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sweep", type=input_place, help="directory or URI of a sweep (one with space.json and study.journal)"
    )
    try:
        print(html.write(parser.parse_args().sweep.absolute()))
    except UserError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
