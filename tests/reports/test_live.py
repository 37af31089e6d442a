"""The live page of a sweep: what it shows, how often it looks, and where it cannot be served."""

import asyncio
import socket
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from latentwire.config.resolve import ConfigError
from latentwire.reports import live
from latentwire.reports.live import LivePage, application
from latentwire.tuning import standing
from tests.tuning.test_steering import Sweep


def report(sweep: Sweep, name: str, step: int, score: float) -> None:
    result = {
        "step": step, "total_steps": 9, "dev_f1": score, "wire_bytes": 64, "first_train_loss": 3.0,
        "train_loss": 1.0, "examples_per_s": 8.0, "train_seconds": 2.0 * step,
    }  # fmt: skip
    if step == 9:
        sweep.search.on_trial_complete(name, result)
    else:
        sweep.search.on_trial_result(name, result)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Three trials: one that ended, one that runs, one that failed with a cause that is no HTML."""
    sweep = Sweep(tmp_path / "sweep")
    sweep.begin("a", "b", "c")
    report(sweep, "a", 3, 0.25)
    report(sweep, "a", 9, 0.75)
    report(sweep, "b", 3, 0.5)
    sweep.search.on_trial_complete("c", {"cause": "no"}, error=True)
    return sweep


def test_the_page_shows_the_sweep_and_renews_it(sweep: Sweep) -> None:
    async def visit() -> tuple[str, dict, dict]:
        page = LivePage(sweep.output, "latentwire tune --resume x", seconds=0.0)
        async with TestClient(TestServer(application(page))) as client:
            whole = await (await client.get("/")).text()
            before = await (await client.get("/standing")).json()
            report(sweep, "b", 6, 0.875)
            after = await (await client.get("/standing")).json()
        return whole, before, after

    whole, before, after = asyncio.run(visit())
    assert 'fetch("standing"' in whole and "Plotly" in whole and "<h1>sweep</h1>" in whole
    assert "2 of 3" in before["html"] and "trial 2 failed" in before["html"]
    assert "best so far: trial 0, dev_f1 0.75 at step 9" in before["html"]
    assert "best so far: trial 1, dev_f1 0.875 at step 6" in after["html"]
    lines = {line["name"]: (line["x"], line["y"]) for line in after["curves"]["data"]}
    assert lines == {"trial 1": ([3, 6], [0.5, 0.875]), "trial 0": ([3, 9], [0.25, 0.75])}
    assert not before["over"]


def test_texts_are_escaped(sweep: Sweep) -> None:
    page = LivePage(sweep.output, "<b>again</b>", seconds=0.0)
    html = page.look()["html"]
    assert "&lt;b&gt;again&lt;/b&gt;" in html and "<b>again" not in html


def test_many_pages_are_one_look(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(LivePage, "look", lambda page: looks.append(1) or {"over": False})

    async def visits(seconds: float) -> int:
        looks.clear()
        page = LivePage(sweep.output, "again", seconds)
        await asyncio.gather(*(page.standing() for _ in range(8)))
        return len(looks)

    assert asyncio.run(visits(60.0)) == 1
    assert asyncio.run(visits(0.0)) == 8


def test_the_time_left_goes_by_steps_and_trials_at_a_time(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = standing.read(sweep.output)
    assert now.seconds_left is None and live.time_left(now) == ""  # without a driver
    monkeypatch.setattr(standing.SweepStatus, "has_driver", True)
    # 24 seconds for 12 steps, and 6 steps left of the one that runs.
    assert now.seconds_left == 12.0 and live.time_left(now) == "about 12 s left"


def test_where_nothing_can_listen_is_one_line(sweep: Sweep) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"must be able to listen at .*:{port}, got"):
            live.serve(sweep.output, "again", "127.0.0.1", port)
    with pytest.raises(ConfigError):
        live.serve(sweep.output.parent, "again", "127.0.0.1", 0)
