"""The live page in a real browser: what its script shows, renews and keeps open."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer

from latentwire.reports.live import LivePage, application
from tests.reports.test_live import report, sweep  # noqa: F401  (a fixture)
from tests.tuning.test_steering import Sweep

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the path"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0"
).split()


class Browser:
    """One page of a headless browser, spoken to by its DevTools protocol."""

    def __init__(self, socket, process: subprocess.Popen) -> None:
        self.process = process
        self._socket, self._asked = socket, 0

    async def value(self, script: str):
        """Return what a script is in the page."""
        self._asked += 1
        call = {"expression": script, "returnByValue": True}
        ask = {"id": self._asked, "method": "Runtime.evaluate", "params": call}
        await self._socket.send_json(ask)
        async for message in self._socket:
            answer = json.loads(message.data)
            if answer.get("id") == self._asked:
                return answer["result"]["result"].get("value")
        raise AssertionError("the browser has gone")

    async def until(self, script: str) -> None:
        """Wait until a script is true in the page."""
        for _ in range(300):
            if await self.value(script):
                return
            await asyncio.sleep(0.1)
        shown = await self.value("document.body.innerText")
        raise AssertionError(f"{script} stayed false; the page shows: {shown}")


async def opened(session: ClientSession, address: str, profile: Path) -> Browser:
    """Open a page in a browser of its own."""
    assert BROWSER is not None
    words = [BROWSER, *FLAGS, f"--user-data-dir={profile}", address]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        port_file = profile / "DevToolsActivePort"
        if port_file.exists() and (port := port_file.read_text().partition("\n")[0]):
            break
        await asyncio.sleep(0.1)
    pages = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
    (page,) = [page for page in pages if page["type"] == "page"]
    return Browser(await session.ws_connect(page["webSocketDebuggerUrl"]), process)


def test_the_script_renews_what_is_shown(sweep: Sweep, tmp_path: Path) -> None:  # noqa: F811
    async def visit() -> None:
        server = TestServer(application(LivePage(sweep.output, "again", seconds=0.3)))
        await server.start_server()
        async with ClientSession() as session:
            browser = await opened(session, str(server.make_url("/")), tmp_path / "profile")
            try:
                shown = "document.getElementById('standing').innerText"
                await browser.until(f"{shown}.includes('trial 0, dev_f1 0.75 at step 9')")
                await browser.until(
                    "document.querySelectorAll('#curves .scatterlayer .trace').length == 2"
                )
                assert await browser.value("document.getElementById('silent').hidden")
                await browser.value("document.querySelector('details').open = true")
                report(sweep, "b", 6, 0.875)
                await browser.until(f"{shown}.includes('trial 1, dev_f1 0.875 at step 6')")
                assert await browser.value("document.querySelector('details').open")
                await server.close()
                await browser.until("!document.getElementById('silent').hidden")
                assert "No answer" in await browser.value(
                    "document.getElementById('silent').innerText"
                )
            finally:
                browser.process.terminate()
                browser.process.wait(30)

    asyncio.run(visit())
