"""What a user can cause, for the entry points to print as one line instead of a traceback."""

from __future__ import annotations

import re
import sys

RETRIES = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts.*", re.DOTALL)
"""What Ray Data appends to the text of every error in a task: how its own retries are set."""


class UserError(Exception):
    """What a user did wrong, or can put right: the message quotes the rule, the value and the next move.

    Each room has its own kind; whoever wants them all catches this.
    """


def fail(error: Exception) -> int:
    """Print one clear error and return the exit status for it.

    What a Ray task raised comes with the task's traceback for a text; its cause has the one line, and Ray Data's advice after it.
    """
    while isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    print(f"error: {RETRIES.sub('', str(error))}", file=sys.stderr, flush=True)
    return 2
