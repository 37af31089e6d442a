"""A live page of a sweep: its trials as they stand, renewed in place while it runs."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import plotly.io
from aiohttp import web
from plotly.offline import get_plotlyjs

from latentwire.config.resolve import ConfigError
from latentwire.evaluation.progress import duration
from latentwire.reports import figures, status
from latentwire.reports.templates import TEMPLATES
from latentwire.storage import Place
from latentwire.tuning import standing
from latentwire.tuning.standing import SweepStatus

SECONDS = 5.0
"""Between two looks at the sweep, however many pages are open."""


class LivePage:
    """What the page of one sweep shows."""

    def __init__(self, output: Place, again: str, seconds: float = SECONDS) -> None:
        """Show the sweep in ``output``.

        Args:
            output: its directory.
            again: the command that goes on with it.
            seconds: between two looks at it.
        """
        self.output, self.again, self.seconds = output, again, seconds
        # Pages that ask at the same moment wait for one look at the sweep, and share it.
        self._looking = asyncio.Lock()
        self._last: tuple[float, dict[str, Any]] | None = None

    def page(self) -> str:
        """Return the page, which fetches what it shows."""
        template = TEMPLATES.get_template("live.html.jinja")
        return template.render(title=self.output.name, seconds=self.seconds, plotly=get_plotlyjs())

    def look(self) -> dict[str, Any]:
        """Return the sweep as it stands: a piece of HTML, and its learning curves for plotly."""
        sweep = standing.read(self.output)
        curves = figures.curves(sweep.curves, sweep.space.tune.metric)
        failures = [row for row in sweep.trials if row["error"].strip()]
        html = TEMPLATES.get_template("standing.html.jinja").render(
            driver=status.driver_line(sweep.driver, sweep.is_over, self.again),
            best=status.best_line(sweep.best, sweep.space.tune.metric),
            ended=sweep.ended,
            every=sweep.space.tune.trials,
            left=time_left(sweep),
            grids=[
                status.trials_table(sweep.trials, sweep.space, sweep.has_driver),
                status.orders_table(sweep.orders),
            ],
            failures=failures,
            at=time.strftime("%F %T"),
        )
        # plotly's own JSON, read back, so that the whole answer is one JSON document.
        picture = None if isinstance(curves, str) else json.loads(plotly.io.to_json(curves))
        return {"html": html, "curves": picture, "over": sweep.is_over}

    async def standing(self) -> dict[str, Any]:
        """Return :meth:`look`, at most ``seconds`` old."""
        async with self._looking:
            now = time.monotonic()
            if self._last is None or now - self._last[0] >= self.seconds:
                # In a thread: reading the study would block every other page.
                self._last = now, await asyncio.to_thread(self.look)
            return self._last[1]


def time_left(sweep: SweepStatus) -> str:
    """Return about how long the trials still take; empty where nobody can tell."""
    seconds = sweep.seconds_left
    return "" if seconds is None else f"about {duration(seconds)} left"


def application(page: LivePage) -> web.Application:
    """Return the page as an application: ``/``, and ``/standing`` as JSON."""

    async def whole(_: web.Request) -> web.Response:
        return web.Response(text=page.page(), content_type="text/html")

    async def standing_now(_: web.Request) -> web.Response:
        return web.json_response(await page.standing())

    application = web.Application()
    application.add_routes([web.get("/", whole), web.get("/standing", standing_now)])
    return application


def serve(output: Place, again: str, host: str, port: int) -> None:
    """Serve a sweep's page until Ctrl-C.

    Raises :class:`~latentwire.config.resolve.ConfigError` where there is no sweep, and where nothing
    can listen there.
    """
    # Before anything listens: a directory without a sweep is an error at once.
    standing.read(output)
    shown = f"http://{host}:{port}"
    try:
        web.run_app(
            application(LivePage(output, again)),
            host=host,
            port=port,
            print=lambda *_: print(f"{output.name}: {shown} (Ctrl-C ends it)", flush=True),
            access_log=None,
        )
    except OSError as error:
        raise ConfigError(
            f"--serve must be able to listen at {shown}, got {error.strerror or error}; name another --port, or "
            f"a --host of this machine"
        ) from error
