"""A sweep that is stopped ends in good order: what was cut is unfinished, and the command says how to go on."""

import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search.searcher import Searcher

from latentwire.api import tune as api
from latentwire.config import SweepConfig
from latentwire.planning.resolved import ResolvedSweep, resolve
from latentwire.tuning import lease, resume, stopping
from latentwire.tuning.lease import LEASE_FILE, LeaseError
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import SPACE_FILE
from latentwire.tuning.stopping import Stop, SweepStopped
from latentwire.tuning.study import JOURNAL

COMMAND = ("latentwire tune", "latentwire tune --config space.yaml")
NO_PLAN: Any = None


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)


def searching(output: Path, stop: Stop) -> StudySearch:
    return StudySearch(
        SweepConfig(),
        journal=output / JOURNAL,
        name=output.name,
        trial_dir=output / "trials",
        stop=stop,
    )


def report(step: int, score: float = 0.5) -> dict[str, Any]:
    return {"step": step, "total_steps": 9, "dev_f1": score, "wire_bytes": 64}


@pytest.mark.parametrize("error", [False, True], ids=["cut", "driver ended by it"])
def test_a_cut_trial_stays_unfinished_and_goes_on(tmp_path: Path, error: bool) -> None:
    stop = Stop()
    search = searching(tmp_path, stop)
    for number in range(3):
        search.suggest(str(number))
    search.on_trial_result("0", report(3))
    search.on_trial_result("2", report(9))
    stop.ask("Ctrl-C", 130)
    search.on_trial_complete("0", None if error else report(6), error)
    search.on_trial_complete("1", None, error)
    search.on_trial_complete("2", None if error else report(9))
    assert search.suggest("3") == Searcher.FINISHED
    states = [trial.state for trial in search.study.trials]
    assert states == [
        TrialState.RUNNING,
        TrialState.RUNNING,
        TrialState.COMPLETE,
    ]  # the last had come to its end
    again = searching(tmp_path, Stop())
    assert [again.suggest(name)["study_trial"] for name in ("a", "b", "c")] == [0, 1, 3]


def test_a_driver_that_lost_the_sweep_writes_nothing_more(tmp_path: Path) -> None:
    stop = Stop()
    search = searching(tmp_path, stop)
    search.suggest("0")
    before = (tmp_path / JOURNAL).read_bytes()
    stop.lose("another driver has taken it")
    search.on_trial_result("0", report(3))
    search.on_trial_complete("0", report(9))
    assert search.suggest("1") == Searcher.FINISHED and (tmp_path / JOURNAL).read_bytes() == before
    with pytest.raises(SweepStopped, match="another driver"):
        stop.check_taken()


def test_a_time_budget_ends_the_search_and_nothing_that_is_complete() -> None:
    stop = Stop()
    with stop.searching(0.001):
        assert not stop.stop_all()
        time.sleep(0.1)
        assert stop.stop_all() and stop.status == 1
    with stop.searching(60):  # the re-runs have what is left of it
        assert stop.stop_all()
    stop.check(complete=True)
    with pytest.raises(SweepStopped, match=r"tune\.time_budget_minutes is over"):
        stop.check(complete=False)
    with Stop().searching(None) as _:
        pass


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_search_end_and_a_second_one_does_not(
    number: signal.Signals, status: int
) -> None:
    stop, before = Stop(), signal.getsignal(number)
    with stop.by_signals():
        with stop.searching(None):
            os.kill(os.getpid(), number)
            assert stop.stop_all() and stop.status == status
            with pytest.raises(SweepStopped):
                os.kill(os.getpid(), number)
        with pytest.raises(SweepStopped):
            stop.check(complete=True)
    assert signal.getsignal(number) == before
    with stop.by_signals(), pytest.raises(SweepStopped):  # outside of the search at once
        os.kill(os.getpid(), number)


def test_tune_may_pickle_it() -> None:
    stop = Stop()
    stop.ask("Ctrl-C", 130)
    assert pickle.loads(pickle.dumps(stop)).reason is None


def test_a_stopped_driver_gives_the_sweep_back_and_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, space = tmp_path / "a sweep", SweepConfig.model_validate({"tune": {"trials": 3}})

    def search(
        sweep: ResolvedSweep, plan: Any, output: Path, command: str, repeated: Any, stop: Stop
    ) -> int:
        assert (output / LEASE_FILE).exists() and (output / SPACE_FILE).exists()
        with pytest.raises(LeaseError, match=f"has process {os.getpid()} on"):
            api.drive(resolve(space), NO_PLAN, output, *COMMAND, force=True)
        held = searching(output, stop)
        for number in range(2):
            held.suggest(str(number))
        held.on_trial_complete("0", report(9))
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("goes on")

    monkeypatch.setattr(api, "search", search)
    assert api.drive(resolve(space), NO_PLAN, output, *COMMAND) == 130
    told = capsys.readouterr().out
    assert "stopped: Ctrl-C; 1 of 3 trials have ended" in told and "nothing was scored" in told
    assert f"\ngo on: latentwire tune --resume '{output}'\n" in told
    assert f"--resume '{output}' --set tune.trials=1\n" in told
    assert not (output / LEASE_FILE).exists() and not (output / "results.json").exists()


def test_rays_own_interrupt_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "search", search)
    assert api.drive(resolve(SweepConfig()), NO_PLAN, tmp_path, *COMMAND) == stopping.SIGINT_STATUS
    assert "stopped: Ctrl-C; 0 of" in capsys.readouterr().out


def test_failed_trials_are_taken_up_again_by_the_driver_that_holds_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retry(space: SweepConfig, output: Path) -> list[str]:
        assert (output / LEASE_FILE).exists()
        return ["retried"]

    monkeypatch.setattr(resume, "retry_failed", retry)
    monkeypatch.setattr(api, "search", lambda *_: 0)
    assert api.drive(resolve(SweepConfig()), NO_PLAN, tmp_path, *COMMAND, retry=True) == 0


def test_a_lease_that_was_lost_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(
        sweep: ResolvedSweep, plan: Any, output: Path, command: str, repeated: Any, stop: Stop
    ) -> int:
        (output / LEASE_FILE).write_text(
            (output / LEASE_FILE).read_text().replace(stop.lease.me.token, "another")
        )
        stop.lease.beat()
        stop.check_taken()
        raise AssertionError("goes on")

    monkeypatch.setattr(api, "search", search)
    assert api.drive(resolve(SweepConfig()), NO_PLAN, tmp_path, *COMMAND) == 1
    told = capsys.readouterr().out
    assert "stopped: another driver has taken" in told and "go on:" not in told
    assert (tmp_path / LEASE_FILE).exists()


def test_the_first_signal_after_the_time_budget_ends_the_search_in_good_order() -> None:
    stop = Stop()
    with stop.by_signals(), stop.searching(0.0):
        time.sleep(0.01)
        assert stop.stop_all() and stop.by_budget
        os.kill(os.getpid(), signal.SIGINT)  # no second one: nothing is raised
        assert stop.stop_all() and stop.status == stopping.SIGINT_STATUS
        with pytest.raises(SweepStopped):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SweepStopped, match="Ctrl-C"):  # and nothing is scored
        stop.check(complete=True)
