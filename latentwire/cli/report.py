"""``latentwire report``: write a sweep's report anew, or set seeds side by side."""

from __future__ import annotations

from latentwire.cli.flags import input_place
from latentwire.reports import html, seeds


def report(run: str, /, *others: str) -> int:
    """Write report.html anew for a sweep, finished or not; or print the mean and range of several seeds.

    Args:
        run: The sweep's directory or URI. With others: directory of a finished run, or an evaluation's output.
        others: The same of other seeds, scored by the same protocol.
    """
    if others:
        places = [input_place(address).absolute() for address in (run, *others)]
        seeds.show([seeds.read(output) for output in places])
        return 0
    print(f"report: {html.write(input_place(run).absolute())}")
    return 0
