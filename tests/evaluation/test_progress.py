"""A scoring says how far it is, in a terminal and in a log."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from latentwire.data import shards
from latentwire.evaluation import progress, scoring
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.progress import ScoringProgress, duration
from latentwire.model import LatentWire


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ScoringProgress(1_000, Console(file=io.StringIO(), force_terminal=False)) as rows:
        for second in range(1, 201):
            clock[0] = second
            rows.advance("latents", 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "scoring latents: 300/1,000 rows, about 2 min 20 s left",
        "scoring latents: 600/1,000 rows, about 1 min 20 s left",
        "scoring latents: 900/1,000 rows, about 20 s left",
    ]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with ScoringProgress(8, console) as rows:
        rows.advance("latents", 4)
        rows.bar.refresh()
        shown = screen.getvalue()
    assert "scoring latents" in shown and "4/8" in shown and "left:" in shown
    assert capsys.readouterr().out == ""


def test_times_are_said_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3_725)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 2 min",
    ]


def test_a_scoring_shows_each_batch(
    wire: LatentWire,
    table: pa.Table,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """16 rows in batches of 8, two conditions: a line after each batch but the last."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(shards, "read_table", lambda path: table)
    conditions = (Condition("closed_book"), Condition("text"))
    predictions = scoring.predict_conditions(wire, Path("somewhere"), conditions, joint=False)
    assert [len(found) for found in predictions.values()] == [16 * len(wire.receivers)] * 2
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scoring ")]
    done = [re.search(r": (\d+)/32 rows, about .* left$", line) for line in said]
    assert [int(found[1]) for found in done if found] == [8, 16, 24]


def test_whoever_watches_is_told_what_is_scored_how_far_and_of_how_many() -> None:
    told: list[dict] = []
    quiet = Console(file=io.StringIO(), force_terminal=False)
    with ScoringProgress(8, quiet, watch=lambda **said: told.append(said)) as rows:
        rows.advance("text", 4)
        rows.advance("latents", 3)
    assert told == [
        {"what": "text", "done": 4, "total": 8},
        {"what": "latents", "done": 7, "total": 8},
    ]
