"""A page for a person: how a sweep stands, and what became of its orders."""

import time
from pathlib import Path
from typing import Any

from latentwire.config import SweepConfig
from latentwire.reports import status as page
from latentwire.reports import tables
from latentwire.tuning import orders

SPACE = SweepConfig()
CLONE = {"parent": 2, "step": 60, "changed": {"training.encoder_lr": 0.001}}


def row(trial: int, state: str, **more: Any) -> dict[str, Any]:
    return {"trial": trial, "state": state, "values": {}, "error": "", "front": False} | more


def test_a_row_says_why_a_trial_ended_and_where_it_came_from() -> None:
    rows = [
        row(5, "done", clone=CLONE, step=9, total_steps=9, dev_f1=0.5),
        row(1, "failed", error="Traceback\nout of memory\n", retries=0),
        row(0, "stopped", stopped_by="ada@lab", step=3, total_steps=9, dev_f1=0.25),
        row(3, "unfinished"),
        row(4, "paused", step=6, total_steps=9, dev_f1=0.1),
    ]
    _, header, body = page.trials_table(rows, SPACE, True)
    assert header == ["trial", "state", "step", "dev_f1", "note"]
    assert body == [
        ["5", "done", "9/9", "0.5", "clone of 2 at step 60 with training.encoder_lr=0.001"],
        ["1", "failed", "–", "–", "out of memory; retries 0"],
        ["0", "stopped", "3/9", "0.25", "by ada@lab"],
        ["3", "starting", "–", "–", ""],
        ["4", "paused", "6/9", "0.1", ""],
    ]
    _, _, body = page.trials_table(rows[3:], SPACE, False)  # without a driver nobody starts it
    assert [line[1] for line in body] == ["unfinished", "paused"]


def test_a_sweeps_report_names_clones_and_trials_that_an_order_stopped() -> None:
    rows = [row(5, "done", clone=CLONE), row(0, "stopped", stopped_by="ada@lab")]
    _, _, body = tables.trials_table(rows, SPACE)
    assert [line[:2] for line in body] == [
        ["5 (clone of 2 at step 60)", "done"],
        ["0", "stopped by order"],
    ]


def test_an_order_that_nobody_can_read_is_shown_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / orders.ORDERS).mkdir()
    (tmp_path / orders.ORDERS / "0.json").write_text("{")
    order = orders.give(tmp_path, orders.draft("stop", trial=3))
    orders.answer(tmp_path, order.id, "done", "stopped at step 3")
    _, _, (unreadable, done) = page.orders_table(orders.given(tmp_path))
    assert (
        unreadable[:5] == ["0", "–", "–", "unreadable", "open"] and "as latentwire" in unreadable[5]
    )
    given = time.strftime("%F %T", time.localtime(order.time))
    assert done == [order.id, given, order.who, "stop trial 3", "done", "stopped at step 3"]
