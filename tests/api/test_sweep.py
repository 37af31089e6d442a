"""A sweep is looked at and steered from outside, whether its driver lives, is dead, or has ended."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from latentwire.api.sweep import Sweep
from latentwire.cli import main
from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError
from latentwire.tuning import lease, orders, resume
from latentwire.tuning import study as studies
from latentwire.tuning.lease import LEASE_FILE, Lease
from latentwire.tuning.orders import ORDERS, OrderError
from latentwire.tuning.results import REPORTED
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import write_space
from latentwire.tuning.steering import Steering
from latentwire.tuning.study import JOURNAL

RATE = "training.encoder_lr"
SEARCH = {RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}


def begun(output: Path, trials: int = 4, **tune: Any) -> StudySearch:
    """A sweep whose first trial is complete, whose second failed and whose third runs."""
    space = SweepConfig.model_validate({"search": SEARCH, "tune": {"trials": trials} | tune})
    write_space(space, output)
    search = StudySearch(
        space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials"
    )
    for name in ("a", "b", "c"):
        search.suggest(name)
    search.on_trial_result("a", report(3, 0.8))
    search.on_trial_complete("a", report(9, 0.6))
    search.on_trial_complete("b", error=True)
    search.on_trial_result("c", report(6, 0.7))
    return search


def report(step: int, score: float) -> dict[str, Any]:
    values = {"step": step, "total_steps": 9, "dev_f1": score, "wire_bytes": 64}
    return values | dict.fromkeys(REPORTED[1:], 1.0)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    begun(tmp_path / "sweep")
    return tmp_path / "sweep"


def hold(output: Path, **changed: Any) -> None:
    """A driver's lease."""
    driver = asdict(replace(Lease(output).me, **changed))
    (output / LEASE_FILE).write_text(json.dumps(driver))


def shown(output: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["sweep", str(output), *words]) == 0
    return capsys.readouterr().out


def row_of(page: str, trial: int) -> str:
    """A trial's row in the table."""
    (row,) = [
        line for line in page.splitlines() if line.split()[:1] == [str(trial)] and "/" in line
    ]
    return row


def test_the_status_says_how_trials_stand(output: Path) -> None:
    status = Sweep(output).status()
    rows = {row["trial"]: row for row in status.trials}
    assert [row["trial"] for row in status.trials] == [0, 2, 1]
    assert (rows[0]["state"], rows[0]["dev_f1"], rows[0]["best_step"]) == ("done", 0.8, 3)
    assert (rows[2]["step"], rows[2]["total_steps"]) == (6, 9)
    assert rows[1]["error"] == "the trial's driver died; see Tune's log"
    assert status.best == rows[0] and status.ended == 2 and status.space.tune.trials == 4
    assert not status.has_driver and not status.is_over and status.orders == []


def test_a_dead_sweep_shows_its_failures_and_how_it_goes_on(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = shown(output, capsys, "status")
    assert f"no driver; go on: latentwire tune --resume {output}\n" in page
    assert "2 of 4 trials have ended\n" in page
    assert "best so far: trial 0, dev_f1 0.8 at step 3\n" in page
    assert "the trial's driver died; see Tune's log" in page
    unfinished = row_of(page, 2)
    assert "unfinished" in unfinished and "6/9" in unfinished and "0.7" in unfinished
    assert shown(output, capsys) == page  # what it does by itself


@pytest.mark.parametrize(
    ("changed", "line", "state"),
    [
        ({}, r"driver: process \d+ on .*, heartbeat \d s old", "running"),
        ({"heartbeat": 1.0, "machine": "x"}, r"its driver has been silent for \d+ h .* --force", "unfin"),
        ({"started": "0"}, r"its driver is gone \(process .*\); go on: latentwire", "unfinished"),
    ],
    ids=["alive", "silent", "gone"],
)  # fmt: skip
def test_the_status_says_whether_a_driver_lives(
    output: Path, capsys: pytest.CaptureFixture[str], changed: dict, line: str, state: str
) -> None:
    hold(output, **changed)
    page = shown(output, capsys, "status")
    assert re.search(line, page) and state in page
    assert ("unfinished" in page) == (state != "running")


def test_an_order_is_given_and_what_became_of_it_is_shown(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = shown(output, capsys, "stop", "2")
    (given,) = orders.given(output)
    assert told.startswith(f"order {given.id}: stop trial 2; what becomes of it: latentwire sweep ")
    assert "no driver; go on: latentwire tune --resume" in told
    shown(output, capsys, "add", "--trials", "3")
    shown(output, capsys, "end")
    read = [each.order for each in orders.given(output) if each.order]
    assert [(order.kind, order.trial, order.trials) for order in read] == [
        ("stop", 2, None), ("add", None, 3), ("end", None, None),
    ]  # fmt: skip
    orders.answer(output, given.id, "refused", "it came to its end")
    page = shown(output, capsys, "status")
    assert re.search(r"stop trial 2 +refused +it came to its end", page)
    assert re.search(r"add 3 trials +open", page) and re.search(r"end +open", page)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["stop", "9"], "stop must name a trial of the sweep, which has trials 0 to 2, got 9; latentwire"),
        (["stop", "0"], "stop is for a trial that runs, trial 0 has ended: it came to its end; nothing"),
        (["stop", "1"], "trial 1 has ended: it failed (the trial's driver died; see Tune's log); nothing"),
        (["stop"], "stop, pause, resume, clone take TRIAL, clone also --set PATH=VALUE, add --trials N, status and"),
        (["end", "2"], "status and end nothing, got end with trial 2, --trials None, --set ; latentwire"),
        (["add"], "status and end nothing, got add with trial None, --trials None"),
        (["add", "--trials", "0"], "got trials: Input should be greater than or equal to 1"),
        (["resume", "2"], "resume is for a paused trial, trial 2 is not paused; where a pause is open,"),
        (["halt"], 'Invalid value "halt"'),
    ],
)  # fmt: skip
def test_what_cannot_be_ordered_is_one_line(
    output: Path, capsys: pytest.CaptureFixture[str], words: list[str], rule: str
) -> None:
    assert main(["sweep", str(output), *words]) == 2
    error = capsys.readouterr().err
    assert rule in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not (output / ORDERS).exists()


def test_a_directory_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a sweep's directory must hold space\.json, got .*, which does not"
    ):
        Sweep(tmp_path)


def test_a_starting_point_and_a_retried_trial_take_no_orders(output: Path) -> None:
    study = studies.open_study(output / JOURNAL, output.name, {"dev_f1": "max"})
    study.enqueue_trial({RATE: 2e-3})
    with pytest.raises(
        OrderError, match="stop is for a trial that has begun, trial 3 waits for its"
    ):
        Sweep(output).stop(3)
    assert Sweep(output).status().waiting == 1
    studies.retry_failed(study)
    with pytest.raises(
        OrderError, match="trial 1 failed and is retried as trial 4; give the order"
    ):
        Sweep(output).stop(1)


def test_a_sweep_that_is_over_takes_no_orders_and_says_how_to_get_more_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep"
    search = begun(output, trials=3)
    search.on_trial_complete("c", report(9, 0.7))
    order = Sweep(output).add(1)  # all have ended, nothing is scored: the next driver may add some
    (output / ORDERS / f"{order.id}.json").unlink()
    (output / resume.RESULTS).write_text("{}")
    for give in (
        lambda sweep: sweep.stop(2),
        lambda sweep: sweep.add(2),
        lambda sweep: sweep.end(),
    ):
        with pytest.raises(OrderError, match=r"sweep is over: 3 of 3 .* tune --resume .*trials=4$"):
            give(Sweep(output))
    page = shown(output, capsys, "status")
    assert "no driver: the sweep is over" in page and "3 of 3 trials have ended" in page


def test_a_grid_that_is_walked_takes_no_more_trials(tmp_path: Path) -> None:
    search = {RATE: {"type": "categorical", "choices": [1e-3, 2e-3]}}
    tune = {"sampler": {"name": "grid"}, "trials": 2}
    space = SweepConfig.model_validate({"search": search, "tune": tune})
    write_space(space, tmp_path)
    with pytest.raises(
        OrderError, match=r"sampler grid has 2 combinations here, tune\.trials must be"
    ):
        Sweep(tmp_path).add(1)


def test_an_order_that_was_given_is_carried_out_by_a_driver(output: Path) -> None:
    order = Sweep(output).stop(2)
    space = resume.read_space(output, [])
    search = StudySearch(space, journal=output / JOURNAL, name=output.name, trial_dir=output)
    Steering(search, output).look(now=True)
    (given,) = Sweep(output).status().orders
    assert given.order == order and given.outcome is not None and given.outcome.state == "done"
    (row,) = [row for row in Sweep(output).status().trials if row["trial"] == 2]
    assert (row["state"], row["stopped_by"]) == ("stopped", order.who)


def test_nothing_of_it_starts_ray(output: Path) -> None:
    sweep = Sweep(output)
    sweep.stop(2), sweep.status()
    assert not ray.is_initialized()


def test_a_silent_driver_counts_as_none(output: Path) -> None:
    hold(output, heartbeat=1.0, machine="another")
    assert not Sweep(output).status().has_driver
    hold(output)
    assert Sweep(output).status().has_driver and lease.read(output) is not None


def test_a_paused_trial_is_shown_and_takes_no_second_pause(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(output, capsys, "pause", "2")
    space = resume.read_space(output, [])
    search = StudySearch(space, journal=output / JOURNAL, name=output.name, trial_dir=output)
    Steering(search, output).look(now=True)
    page = shown(output, capsys, "status")
    assert "paused" in row_of(page, 2) and "2 of 4 trials have ended" in page
    with pytest.raises(
        OrderError, match=r"trial 2 is paused already; latentwire sweep .* resume 2"
    ):
        Sweep(output).pause(2)
    assert Sweep(output).resume(2).kind == "resume"
