"""Errors that a user can cause; commands print them as one line instead of a traceback."""

from __future__ import annotations

import re
import sys

RETRIES = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts.*", re.DOTALL)
"""Text that Ray Data appends to every error in a task: how its own retries are set."""


class UserError(Exception):
    """An error that a user caused, or can mend: it quotes the rule, the value and the next move.

    Each room has its own kind; whoever wants them all catches this.
    """


def fail(error: Exception) -> int:
    """Print one clear error and return the exit status for it.

    An error from a Ray task has the task's traceback for a text. Its cause has the one line, and
    Ray Data's advice after it.
    """
    # Ray wraps errors in errors: the innermost ``cause`` is ours.
    while isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    print(f"error: {RETRIES.sub('', str(error))}", file=sys.stderr, flush=True)
    return 2
