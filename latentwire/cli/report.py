"""``latentwire report``: write a sweep's report anew, show it live, or set seeds side by side."""

from __future__ import annotations

from latentwire.api.sweep import Sweep
from latentwire.cli.flags import input_place
from latentwire.config.resolve import ConfigError
from latentwire.reports import html, seeds


def report(
    run: str, /, *others: str, serve: bool = False, host: str = "127.0.0.1", port: int = 8270
) -> int:
    """Write report.html anew for a sweep, finished or not; or print the mean and range of several seeds.

    Args:
        run: The sweep's directory or URI. With others: directory of a finished run, or an evaluation's output.
        others: The same of other seeds, scored by the same protocol.
        serve: Serve a page that shows the sweep as it runs, renewed in place, until Ctrl-C. Nothing is written.
        host: With --serve: the address to listen at. Whoever reaches it reads the sweep's values and scores.
        port: With --serve: the port.
    """
    if others and serve:
        raise ConfigError(
            f"--serve shows one sweep, got {1 + len(others)} directories; name one of them"
        )
    if others:
        places = [input_place(address).absolute() for address in (run, *others)]
        seeds.show([seeds.read(output) for output in places])
        return 0
    output = input_place(run).absolute()
    if serve:
        # aiohttp comes with it, which nothing else here needs.
        from latentwire.reports import live

        live.serve(output, Sweep(output).again, host, port)
        return 0
    print(f"report: {html.write(output)}")
    return 0
