"""``python -m latentwire``: the console command."""

import sys

from latentwire.cli import main

sys.exit(main())
