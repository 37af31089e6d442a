"""A driver carries out each order once, and finds what an earlier driver has done of it."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search.searcher import Searcher

from latentwire.config import SweepConfig
from latentwire.distributed.trial import NUMBER
from latentwire.storage import StorageError
from latentwire.tuning import orders, resume, steering
from latentwire.tuning.orders import Kind, Order
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import SPACE_FILE, write_space
from latentwire.tuning.steering import Steering
from latentwire.tuning.stopping import Stop
from latentwire.tuning.study import JOURNAL, own_trials, stopped_by


class Sweep:
    """A sweep without Ray: what Tune would ask of its searcher and its stopper."""

    def __init__(self, output: Path, **tune: Any) -> None:
        space = SweepConfig.model_validate({"tune": {"trials": 3} | tune})
        if (output / SPACE_FILE).exists():
            space = resume.read_space(output, [])
        else:
            output.mkdir()
            write_space(space, output)
        self.output, self.said = output, list[str]()
        self.search = StudySearch(
            space,
            journal=output / JOURNAL,
            name=output.name,
            trial_dir=output / "trials",
            stop=Stop(),
        )
        self.steering = Steering(self.search, output, self.said.append)

    def again(self) -> "Sweep":
        """A new driver on the same sweep."""
        return Sweep(self.output)

    def begin(self, *names: str) -> list[int]:
        numbers = []
        for name in names:
            values = self.search.suggest(name)
            assert isinstance(values, dict), values
            numbers.append(values["study_trial"])
        return numbers

    def report(self, name: str, step: int, score: float = 0.5) -> str:
        """A trial's report, as Tune passes it on; whether the trial goes on."""
        result = {"step": step, "total_steps": 9, "dev_f1": score, "wire_bytes": 64}
        if self.steering(name, result) or step == 9:
            self.search.on_trial_complete(name, result)
            return "ended"
        self.search.on_trial_result(name, result)
        return "goes on"

    def give(self, kind: Kind, **more: Any) -> Order:
        return orders.give(self.output, orders.draft(kind, **more))

    def look(self) -> None:
        self.steering.look(now=True)

    def outcomes(self) -> list[tuple[str, str]]:
        return [
            ("open", "") if each.is_open or each.outcome is None
            else (each.outcome.state, each.outcome.reason)
            for each in orders.given(self.output)
        ]  # fmt: skip

    def states(self) -> list[str]:
        return [trial.state.name for trial in own_trials(self.search.study)]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "sweep")


def test_a_stopped_trial_ends_at_its_next_report_and_says_by_whom(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    order = sweep.give("stop", trial=0)
    sweep.look()
    assert sweep.outcomes() == [("open", "")] and sweep.states() == ["RUNNING", "RUNNING"]
    assert sweep.report("b", 3) == "goes on" and sweep.report("a", 3) == "ended"
    sweep.look()
    assert sweep.outcomes() == [("done", "trial 0 is stopped at step 3 of 9")]
    assert sweep.states() == ["PRUNED", "RUNNING"]
    trial = sweep.search.study.trials[0]
    assert trial.intermediate_values == {3: 0.5} and stopped_by(trial)["who"] == order.who
    assert sweep.said == [f"order {order.id} done: trial 0 is stopped at step 3 of 9"]


def test_a_driver_that_died_after_the_deed_leaves_only_the_answer(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    sweep.give("stop", trial=0)
    sweep.look()
    sweep.report("a", 3)  # and here it dies
    again = sweep.again()
    again.look()
    assert again.outcomes() == [("done", "trial 0 is stopped at step 3 of 9")]
    assert again.begin("x", "y") == [1, 2]  # the stopped one is not handed out


def test_a_driver_that_died_before_the_deed_leaves_it_to_the_next(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    sweep.report("a", 3)
    sweep.give("stop", trial=0)
    again = sweep.again()
    again.look()  # nobody runs the trial now, so it need not report first
    assert again.outcomes() == [("done", "trial 0 is stopped at step 3 of 9")]
    assert again.states() == ["PRUNED", "RUNNING"] and again.begin("x") == [1]


def test_a_trial_that_had_reported_nothing_is_stopped_by_the_next_driver(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    order = sweep.give("stop", trial=0)
    again = sweep.again()
    again.look()
    assert again.outcomes()[0][0] == "done" and again.states() == ["PRUNED", "RUNNING"]
    assert stopped_by(again.search.study.trials[0])["who"] == order.who
    assert again.begin("x") == [1]


def test_a_trial_that_comes_to_its_end_before_it_could_be_stopped_is_complete(sweep: Sweep) -> None:
    sweep.begin("a")
    sweep.give("stop", trial=0)
    sweep.look()
    sweep.report("a", 9)
    sweep.look()
    assert sweep.states() == ["COMPLETE"] and not stopped_by(sweep.search.study.trials[0])
    ((state, reason),) = sweep.outcomes()
    assert state == "refused" and "trial 0 has ended: it came to its end" in reason


def test_a_trial_whose_last_report_is_there_is_complete_though_its_driver_died(
    sweep: Sweep,
) -> None:
    sweep.begin("a")
    result = {"step": 9, "total_steps": 9, "dev_f1": 0.5, "wire_bytes": 64}
    sweep.search.on_trial_result("a", result)
    sweep.give("stop", trial=0)
    again = sweep.again()
    again.look()
    assert again.states() == ["COMPLETE"] and again.outcomes()[0][0] == "refused"


def test_more_trials_begin_while_the_last_one_runs(sweep: Sweep) -> None:
    sweep.begin("a", "b", "c")
    assert sweep.search.suggest("d") is None  # one may still be added
    sweep.give("add", trials=2)
    sweep.look()
    assert sweep.outcomes() == [("done", "tune.trials is 5")]
    assert sweep.begin("d", "e") == [3, 4] and sweep.search.suggest("f") is None
    for name in "abcde":
        sweep.report(name, 9)
    assert sweep.search.suggest("f") == Searcher.FINISHED
    assert sweep.again().search.space.tune.trials == 5  # and in every driver to come


def test_trials_are_added_once_wherever_the_driver_dies(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before space.json is written, then after it, then before the outcome."""

    class Death(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Death

    sweep.begin("a")
    sweep.give("add", trials=2)
    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(steering, "write_space", die)
        sweep.look()
    assert resume.read_space(sweep.output, []).tune.trials == 3

    def write_and_die(space: SweepConfig, output: Path) -> None:
        write_space(space, output)
        raise Death

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(steering, "write_space", write_and_die)
            sweep.again().look()
    again = sweep.again()
    again.look()
    assert again.outcomes() == [("done", "tune.trials is 5")]
    assert resume.read_space(sweep.output, []).tune.trials == 5
    again.look()
    assert again.again().search.space.tune.trials == 5


def test_an_end_cuts_what_runs_and_asks_for_no_more_trials(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    sweep.report("a", 9), sweep.report("b", 3)
    sweep.give("end")
    sweep.look()
    assert sweep.steering.stop_all() and sweep.search.suggest("c") == Searcher.FINISHED
    late = sweep.give("add", trials=2)
    sweep.look()
    sweep.steering.finish()
    (state, reason), (late_state, late_reason) = sweep.outcomes()
    assert state == "done" and reason.startswith("the search ended with 1 of 3 trials")
    assert "kept: trials 1; re-runs, scores, export and report follow" in reason
    assert late_state == "refused" and "the search ends by an order" in late_reason, late.id
    assert sweep.states() == ["COMPLETE", "RUNNING"]  # as after Ctrl-C: it can go on
    assert resume.read_space(sweep.output, []).tune.trials == 1


def test_an_end_is_carried_out_by_the_next_driver(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    sweep.report("a", 9)
    sweep.give("end")
    again = sweep.again()
    again.look()
    assert again.search.suggest("x") == Searcher.FINISHED
    again.steering.finish()
    assert again.outcomes()[0][0] == "done" and again.states() == ["COMPLETE", "RUNNING"]
    third = again.again()
    third.look()
    assert not third.steering.stop_all() and third.search.space.tune.trials == 1


def test_a_stop_and_an_end_are_both_carried_out(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    sweep.report("a", 3), sweep.report("b", 3)
    sweep.give("stop", trial=1)
    sweep.look()
    sweep.give("end")
    sweep.look()
    sweep.steering.finish()  # Tune cuts its trials, of which no report comes any more
    assert sweep.states() == ["RUNNING", "PRUNED"]
    assert sorted(state for state, _ in sweep.outcomes()) == ["done", "done"]


def test_a_paused_trial_gives_its_place_to_nobody_and_is_taken_up_again(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    sweep.give("pause", trial=0)
    sweep.look()
    assert sweep.report("a", 3) == "ended" and sweep.report("b", 3) == "goes on"
    sweep.look()
    assert sweep.outcomes() == [("done", "trial 0 is paused at step 3 of 9")]
    assert sweep.states() == ["RUNNING", "RUNNING"]  # it has not ended, and has not failed
    assert sweep.begin("c") == [2] and sweep.search.suggest("d") is None
    sweep.give("resume", trial=0)
    sweep.look()
    assert sweep.outcomes()[1] == ("done", "trial 0 goes on at step 3 of 9 when there is room")
    assert sweep.begin("d") == [0] and sweep.report("d", 6) == "goes on"
    for name in "bcd":
        sweep.report(name, 9)
    assert sweep.states() == ["COMPLETE"] * 3 and sweep.search.suggest("e") == Searcher.FINISHED
    assert sweep.search.study.trials[0].intermediate_values == {3: 0.5, 6: 0.5, 9: 0.5}
    assert sweep.search.stop.reason is None


def test_a_pause_outlives_the_driver_which_may_die_at_any_point(sweep: Sweep) -> None:
    """Before the deed, between deed and answer, and before the order that takes the trial up again is read."""
    sweep.begin("a", "b")
    sweep.report("a", 3), sweep.report("b", 3)
    sweep.give("pause", trial=0)
    second = sweep.again()  # the first one never read it
    second.look()
    assert second.outcomes() == [("done", "trial 0 is paused at step 3 of 9")]
    assert second.begin("x") == [1]
    sweep.give("pause", trial=1)
    second.look()
    second.report("x", 6)  # it dies before it has answered
    third = second.again()
    third.look()
    assert third.outcomes()[1] == ("done", "trial 1 is paused at step 6 of 9")
    assert third.begin("y") == [2] and third.search.suggest("z") is None
    sweep.give("resume", trial=1)
    fourth = third.again()
    assert fourth.begin("y", "z") == [1, 2]


def test_a_sweep_of_which_only_paused_trials_are_left_stops_and_says_so(sweep: Sweep) -> None:
    sweep.begin("a", "b", "c")
    sweep.give("pause", trial=1)
    sweep.look()
    sweep.report("b", 3), sweep.report("a", 9), sweep.report("c", 9)
    assert sweep.search.suggest("d") == Searcher.FINISHED
    reason = sweep.search.stop.reason
    assert reason and reason.startswith(
        "of its trials only paused ones are left (1), which latentwire"
    )
    assert sweep.search.stop.stop_all() and sweep.search.stop.status == 1
    again = sweep.again()
    again.look()
    again.steering.stop_if_all_is_paused()
    assert again.search.stop.reason == reason
    sweep.give("resume", trial=1)
    last = sweep.again()
    last.look()
    last.steering.stop_if_all_is_paused()
    assert last.search.stop.reason is None and last.begin("x") == [1]


def test_a_paused_trial_waits_for_the_end_of_the_process_that_ran_it(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead: list[str] = []
    monkeypatch.setattr(steering, "is_dead", lambda actor_id: actor_id in dead)
    sweep.begin("a", "b", "c")
    for number, name in ((0, "a"), (1, "b")):
        sweep.give("pause", trial=number)
        sweep.look()
        sweep.report(name, 3)
        actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda name=name: f"actor {name}"))
        sweep.steering.on_trial_complete(
            1, [], SimpleNamespace(config={NUMBER: number}, temporary_state=SimpleNamespace(ray_actor=actor))
        )  # fmt: skip
    sweep.report("c", 9)
    sweep.look()
    sweep.give("resume", trial=1)
    assert sweep.search.suggest("d") is None and sweep.outcomes()[2] == ("open", "")
    assert sweep.search.stop.reason is None  # nothing runs, but something is about to
    dead.append("actor b")
    assert sweep.begin("d") == [1] and sweep.outcomes()[2][0] == "done"


def test_a_paused_trial_can_be_stopped_and_a_stop_wins_over_a_pause(sweep: Sweep) -> None:
    sweep.begin("a", "b")
    sweep.give("pause", trial=0), sweep.give("pause", trial=1), sweep.give("stop", trial=1)
    sweep.look()
    sweep.report("a", 3), sweep.report("b", 3)
    sweep.look()
    assert sweep.states() == ["RUNNING", "PRUNED"]
    sweep.give("stop", trial=0)
    sweep.look()
    assert sweep.states() == ["PRUNED", "PRUNED"]
    assert sorted(state for state, _ in sweep.outcomes()) == ["done", "done", "done", "refused"]


def test_a_trial_that_fails_before_it_could_be_paused_has_failed(sweep: Sweep) -> None:
    sweep.begin("a")
    sweep.give("pause", trial=0)
    sweep.look()
    sweep.search.on_trial_complete("a", error=True)
    sweep.look()
    ((state, reason),) = sweep.outcomes()
    assert state == "refused" and "trial 0 has ended: it failed (the trial's driver died" in reason


def test_what_cannot_be_done_is_refused_with_the_reason(sweep: Sweep) -> None:
    sweep.begin("a")
    sweep.give("stop", trial=7)
    (sweep.output / orders.ORDERS / "0-by-hand.json").write_text("stop!")
    sweep.look()
    by_hand, unknown = sweep.outcomes()
    assert by_hand[0] == unknown[0] == "refused"
    assert "an order must be as latentwire sweep writes it" in by_hand[1]
    assert "which has trials 0 to 0, got 7" in unknown[1]


def test_orders_are_looked_for_now_and_then(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.begin("a")
    looks: list[Path] = []
    monkeypatch.setattr(orders, "given", lambda output, without: looks.append(output) or [])
    for _ in range(5):
        sweep.steering.on_step_end(1, [])
    assert looks == []  # it has just looked, for the first trial
    monkeypatch.setattr(sweep.steering, "_look_again", 0.0)
    for _ in range(5):
        sweep.steering.on_step_end(1, [])
    assert looks == [sweep.output]


def test_a_store_that_does_not_answer_is_asked_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.begin("a")
    sweep.give("add", trials=1)

    def gone(journal: Path) -> None:
        raise StorageError("the bucket does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(steering, "keep_journal", gone)
        sweep.look()
    assert "orders not carried out this time: the bucket does not answer" in capsys.readouterr().err
    assert sweep.outcomes() == [("open", "")] and sweep.search.space.tune.trials == 3
    sweep.look()
    assert sweep.outcomes() == [("done", "tune.trials is 4")]


def test_a_driver_that_lost_the_sweep_carries_nothing_out(sweep: Sweep) -> None:
    sweep.begin("a")
    sweep.give("add", trials=1)
    sweep.search.stop.lose("another driver has taken it")
    sweep.look()
    assert sweep.outcomes() == [("open", "")]


def test_tune_may_pickle_it(sweep: Sweep) -> None:
    sweep.give("end")
    sweep.look()
    copy = pickle.loads(pickle.dumps(sweep.steering))
    assert not copy.stop_all() and not copy("a", {})
    assert pickle.loads(pickle.dumps(sweep.search)).session == sweep.search.session


def test_without_orders_tune_counts_the_trials(tmp_path: Path) -> None:
    space = SweepConfig.model_validate({"tune": {"trials": 1}})
    search = StudySearch(space, journal=tmp_path / JOURNAL, name="s", trial_dir=tmp_path)
    assert [isinstance(search.suggest(name), dict) for name in "abc"] == [True] * 3
    assert {trial.state for trial in search.study.trials} == {TrialState.RUNNING}
