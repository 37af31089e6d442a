"""``latentwire report``: write a sweep's report anew."""

from __future__ import annotations

from latentwire.cli.flags import input_place
from latentwire.reports import html


def report(run: str, /) -> int:
    """Write report.html anew for a sweep that is there, finished or not.

    Args:
        run: The sweep's directory or URI.
    """
    print(f"report: {html.write(input_place(run).absolute())}")
    return 0
