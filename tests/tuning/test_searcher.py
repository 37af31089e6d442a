"""The study is told what happened: stopped, failed, complete; and a restart finds everything as it was."""

import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from ray.tune import ExperimentAnalysis
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY
from ray.tune.search.optuna import OptunaSearch

from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError, load_space
from latentwire.distributed.task import EARLIER, ERROR_FILE
from latentwire.distributed.trial import NUMBER, TAKES_UP, trial_path
from latentwire.storage import StorageError
from latentwire.tuning import searcher
from latentwire.tuning import study as studies
from latentwire.tuning.results import find_best
from latentwire.tuning.samplers import CLASSES, make_sampler
from latentwire.tuning.searcher import StudySearch, check_draws, check_searchable
from latentwire.tuning.study import CAUSE, JOURNAL, evaluations, open_study, own_trials

RATE = "training.encoder_lr"
SPACE = {RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}


def search_over(folder: Path, search: dict[str, Any] = SPACE, **tune: Any) -> StudySearch:
    space = SweepConfig.model_validate({"search": search, "tune": tune})
    return StudySearch(
        space, journal=folder / JOURNAL, name=folder.name, trial_dir=folder / "trials"
    )


@pytest.fixture
def search(tmp_path: Path) -> StudySearch:
    return search_over(tmp_path)


def report(step: int, value: float | None) -> dict:
    return {"step": step, "total_steps": 3, "training_iteration": step} | (
        {} if value is None else {"dev_f1": value}
    )


def run(
    search: object, values: list[float | None], trial_id: str = "a", error: bool = False
) -> None:
    search.suggest(trial_id)  # type: ignore[attr-defined]
    for step, value in enumerate(values[:-1], start=1):
        search.on_trial_result(trial_id, report(step, value))  # type: ignore[attr-defined]
    last = report(len(values), values[-1]) if values else None
    search.on_trial_complete(trial_id, last, error)  # type: ignore[attr-defined]


def stock(**options: Any) -> OptunaSearch:
    space = {RATE: FloatDistribution(1e-4, 1e-2, log=True)}
    sampler = optuna.samplers.TPESampler(seed=0)
    return OptunaSearch(
        space, metric="dev_f1", mode="max", study_name="stock", sampler=sampler, **options
    )


def only(study: optuna.Study) -> optuna.trial.FrozenTrial:
    (trial,) = study.trials
    return trial


def test_a_complete_trial_counts_with_its_best_evaluation(search: StudySearch) -> None:
    run(search, [0.1, 0.6, 0.5])
    trial = only(search.study)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.6)
    assert trial.intermediate_values == {1: 0.1, 2: 0.6, 3: 0.5}


def test_a_stopped_trial_is_pruned(search: StudySearch) -> None:
    run(search, [0.1, 0.2])
    assert only(search.study).state == TrialState.PRUNED
    assert only(search.study).intermediate_values == {1: 0.1, 2: 0.2}
    run(ray := stock(), [0.1, 0.2])
    assert only(ray._ot_study).state == TrialState.COMPLETE  # what makes the subclass necessary


@pytest.mark.parametrize("last", [float("nan"), None])
def test_a_trial_without_a_usable_metric_fails_with_its_cause(
    search: StudySearch, last: float | None
) -> None:
    run(search, [0.1, last])
    assert only(search.study).state == TrialState.FAIL
    assert "finite dev_f1 needed, got {'dev_f1': " in only(search.study).user_attrs[CAUSE]


def test_the_stock_class_leaves_nan_running_for_ever() -> None:
    run(ray := stock(), [0.1, float("nan")])
    assert only(ray._ot_study).state == TrialState.RUNNING


def test_a_report_without_the_metric_is_no_error(search: StudySearch) -> None:
    run(search, [None, 0.4, 0.5])
    assert only(search.study).intermediate_values == {2: 0.4, 3: 0.5}
    with pytest.raises(KeyError):
        run(stock(), [None, 0.4, 0.5])


def test_a_trial_that_raised_fails_with_what_its_driver_left(
    search: StudySearch, tmp_path: Path
) -> None:
    run(search, [0.1, 0.2], error=True)
    folder = trial_path(tmp_path / "trials", 1)
    folder.mkdir(parents=True)
    (folder / ERROR_FILE).write_text("CUDA out of memory")
    run(search, [0.1, 0.2], "b", error=True)
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL] * 2
    assert [trial.user_attrs[CAUSE] for trial in search.study.trials] == [
        "the trial's driver died; see Tune's log", "CUDA out of memory",
    ]  # fmt: skip


def test_a_trial_that_ended_before_its_first_evaluation_fails_with_its_cause(
    search: StudySearch, tmp_path: Path
) -> None:
    """So Tune tells it: no error, and of results only what it adds itself."""
    search.suggest("a")
    folder = trial_path(tmp_path / "trials", 0)
    folder.mkdir(parents=True)
    (folder / ERROR_FILE).write_text("gradients must be finite")
    nothing = {"trial_id": "a", "done": True, "pid": 7}
    search.on_trial_result("a", nothing)
    search.on_trial_complete("a", nothing)
    trial = only(search.study)
    assert (trial.state, trial.user_attrs[CAUSE]) == (TrialState.FAIL, "gradients must be finite")


def test_a_store_that_does_not_say_why_a_trial_failed_ends_no_sweep(
    search: StudySearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(_: object) -> str:
        raise StorageError("s3://bucket cannot be read")

    monkeypatch.setattr(searcher, "cause_left", unreadable)
    run(search, [0.1, 0.2, 0.3])
    run(search, [0.1, 0.2], "b")
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert (
        "for a reason that cannot be read: s3://bucket" in search.study.trials[1].user_attrs[CAUSE]
    )


def test_a_failed_trial_is_retried_by_another_in_its_directory(
    search: StudySearch, tmp_path: Path
) -> None:
    """Twice: the second time, the trial that had retried the first one is retried."""
    run(search, [0.1], error=True)
    run(search, [0.1, 0.2, 0.3], "b")
    rate = search.study.trials[0].params[RATE]
    for number in (2, 3):
        failed = [trial.number for trial in own_trials(search.study, (TrialState.FAIL,))]
        assert {new: old.number for new, old in studies.retry_failed(search.study).items()} == {
            number: failed[0]
        }
        assert studies.retry_failed(search.study) == {}  # it is retried once
        again = search_over(tmp_path)
        assert again.suggest("x") == {RATE: rate, NUMBER: number, TAKES_UP: 0}
        folder = trial_path(tmp_path / "trials", 0)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR_FILE).write_text("out of memory")  # where its driver leaves it
        again.on_trial_complete("x", {})
        assert again.study.trials[number].user_attrs[CAUSE] == "out of memory"
        assert [t.number for t in own_trials(again.study)] == [1, number]
    assert [t.state.name for t in again.study.trials] == ["FAIL", "COMPLETE", "FAIL", "FAIL"]


def test_nothing_is_told_twice(search: StudySearch) -> None:
    run(search, [0.1, 0.2, 0.3])
    search.on_trial_result("a", report(4, 0.9))
    search.on_trial_complete("a", report(4, 0.9))
    assert only(search.study).value == 0.3 and len(only(search.study).intermediate_values) == 3


def test_a_resumed_trial_tells_what_was_on_its_way_when_it_died(search: StudySearch) -> None:
    search.suggest("a")
    search.on_trial_result("a", report(1, 0.1))
    again = report(3, 0.5) | {EARLIER: json.dumps([report(1, 0.9), report(2, 0.6)])}
    search.on_trial_result("a", again)
    search.on_trial_complete("a", again)
    trial = only(search.study)
    assert (trial.value, trial.intermediate_values) == (0.6, {1: 0.1, 2: 0.6, 3: 0.5})
    assert [sorted(told) for told in evaluations(trial)] == [
        ["dev_f1", "step", "total_steps", "training_iteration"]
    ] * 3


def test_a_new_driver_goes_on_with_what_the_last_one_left(
    search: StudySearch, tmp_path: Path
) -> None:
    """Finished trials stay told once, unfinished ones come first with their own values, and none is left over."""
    run(search, [0.1, 0.2, 0.3])
    left = [search.suggest("b"), search.suggest("c")]
    search.on_trial_result("b", report(1, 0.4))
    search.study.ask()  # a driver that died before it drew anything
    pickle.loads(
        pickle.dumps(search)
    )  # as Tune does; it is the same driver, which takes nothing over
    again = search_over(tmp_path)
    assert [again.suggest("x"), again.suggest("y")] == left
    assert [again.suggest("z")[NUMBER], again.suggest("new")[NUMBER]] == [3, 4]
    again.on_trial_result(
        "x", report(1, 0.4)
    )  # reported again after a resume from the checkpoint before
    for trial_id in ("x", "y", "z", "new"):
        again.on_trial_complete(trial_id, report(3, 0.5))
    assert {trial.state for trial in again.study.trials} == {TrialState.COMPLETE} and len(
        again.study.trials
    ) == 5
    assert again.study.trials[1].intermediate_values == {1: 0.4, 3: 0.5}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sweep_in_pieces_draws_what_it_draws_in_one(tmp_path: Path, sampler: str) -> None:
    drawn = []
    for name, pieces in (("whole", 1), ("parted", 4)):
        values = []
        for _ in range(pieces):
            search = search_over(tmp_path / name, sampler={"name": sampler})
            for number in range(12 // pieces):
                values.append(search.suggest(str(number))[RATE])
                search.on_trial_complete(str(number), report(3, -values[-1]))
        drawn.append(values)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 12


def test_the_sampler_learns_from_what_was_told(search: StudySearch) -> None:
    for number in range(30):
        trial_id = str(number)
        rate = search.suggest(trial_id)[RATE]
        search.on_trial_complete(trial_id, report(3, -abs(rate - 1e-3)))
    late = [search.study.trials[i].params[RATE] for i in range(20, 30)]
    assert sum(abs(rate - 1e-3) for rate in late) / 10 < 2e-3


def test_starting_points_are_drawn_once(tmp_path: Path) -> None:
    points = [{RATE: 2e-3}, {RATE: 5e-3}]
    search = search_over(tmp_path, start_with=points)
    assert search.suggest("a")[RATE] == 2e-3
    again = search_over(tmp_path, start_with=points)
    assert [again.suggest("a")[RATE], again.suggest("b")[RATE]] == [2e-3, 5e-3]
    assert again.suggest("c")[RATE] not in (2e-3, 5e-3)
    assert len(again.study.trials) == 3


def test_the_rest_of_a_starting_point_is_drawn_by_its_own_number(tmp_path: Path) -> None:
    anchors = {"prompt.anchor": {"type": "categorical", "choices": ["A: ", "B: ", "C: "]}}
    points = [{"prompt.anchor": choice} for choice in ("A: ", "B: ", "C: ")]
    search = search_over(tmp_path, SPACE | anchors, start_with=points)
    assert len({search.suggest(name)[RATE] for name in "abcd"}) == 4


def test_the_stock_class_enqueues_its_starting_points_again(tmp_path: Path) -> None:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
    )
    for _ in range(2):
        search = stock(storage=storage, points_to_evaluate=[{RATE: 2e-3}])
        assert search.suggest(str(_))[RATE] == 2e-3


def test_an_earlier_sweep_warms_a_new_one(tmp_path: Path) -> None:
    earlier = search_over(tmp_path / "earlier")
    for number in range(12):
        rate = earlier.suggest(str(number))[RATE]
        earlier.on_trial_complete(str(number), report(3, -abs(rate - 1e-3)))
    run(earlier, [0.1, float("nan")], "nan")
    narrow = {RATE: SPACE[RATE] | {"low": 5e-4}}
    for _ in range(2):  # the second opens the same study again
        warm = search_over(tmp_path / "warm", narrow, warm_start=str(tmp_path / "earlier"))
        inside = [
            trial
            for trial in earlier.study.trials
            if trial.params[RATE] >= 5e-4 and trial.state.name != "FAIL"
        ]
        assert 0 < len(inside) < 12 and len(warm.study.trials) == len(inside)
        assert own_trials(warm.study) == []
    with pytest.raises(
        ConfigError,
        match=r"must have the objectives \[\['dev_em', 'max'\]\], got \[\['dev_f1', 'max'\]\]",
    ):
        check_searchable(
            search_over(
                tmp_path / "other", metric="dev_em", warm_start=str(tmp_path / "earlier")
            ).space
        )
    with pytest.raises(
        ConfigError, match=r"must be a sweep's directory or its study\.journal, got nowhere"
    ):
        check_searchable(search_over(tmp_path / "other", warm_start="nowhere").space)


def test_scores_of_another_protocol_are_not_compared(tmp_path: Path) -> None:
    """An earlier sweep, a resumed one and its re-runs open a study, which holds its protocol hash."""
    space = SweepConfig.model_validate({"search": SPACE})

    def opened(name: str, protocol: str, **tune: Any) -> StudySearch:
        other = space.model_copy(update={"tune": space.tune.model_copy(update=tune)})
        folder = tmp_path / name
        return StudySearch(
            other, journal=folder / JOURNAL, name=name, trial_dir=folder, protocol=protocol
        )

    run(opened("first", "old"), [0.1, 0.2, 0.3])
    run(opened("first", "old"), [0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match="have the protocol hash old, new ones would have new"):
        assert opened("first", "new").study
    warm = {"warm_start": str(tmp_path / "first")}
    assert len(opened("same", "old", **warm).study.trials) == 2
    with pytest.raises(
        ConfigError, match=r"tune\.warm_start must have the protocol hash new, got old"
    ):
        assert opened("other", "new", **warm).study


def test_earlier_scores_of_several_objectives_are_taken_over(tmp_path: Path) -> None:
    sizes = {"objectives": {"wire_bytes": "min"}}
    earlier = search_over(tmp_path / "earlier", **sizes)
    earlier.suggest("a")
    earlier.on_trial_complete("a", report(3, 0.5) | {"wire_bytes": 64})
    warm = search_over(tmp_path / "warm", warm_start=str(tmp_path / "earlier"), **sizes)
    assert [trial.values for trial in warm.study.trials] == [[0.5, 64.0]]
    space = {RATE: FloatDistribution(1e-4, 1e-2, log=True)}
    ray = OptunaSearch(
        space, metric=["dev_f1", "wire_bytes"], mode=["max", "min"], study_name="stock"
    )
    with pytest.raises(TypeError, match="must be real number"):
        ray.add_evaluated_point({RATE: 1e-3}, [0.5, 64.0])  # type: ignore[arg-type]


def test_a_conditional_space_can_be_pickled(tmp_path: Path) -> None:
    kind = {"encoder.kind": {"type": "categorical", "choices": ["byte", "lm"]}}
    rank = {
        "encoder.lora_rank": {"type": "int", "low": 2, "high": 8, "when": {"encoder.kind": "lm"}}
    }
    space = {"run": {"encoder": {"model": "receiver:llama"}}, "search": kind | rank}
    search = StudySearch(
        SweepConfig.model_validate(space),
        journal=tmp_path / JOURNAL,
        name="sweep",
        trial_dir=tmp_path / "trials",
    )
    values = [pickle.loads(pickle.dumps(search)).suggest(str(number)) for number in range(12)]
    assert {"encoder.lora_rank" in value for value in values} == {True, False}
    ray = OptunaSearch(
        lambda trial: {"rate": trial.suggest_float("rate", 0, 1)}, metric="dev_f1", mode="max"
    )
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(ray)


def test_sweeps_that_share_a_storage_stay_apart(tmp_path: Path) -> None:
    journal = tmp_path / "shared" / JOURNAL
    for name in ("one", "two"):
        space = SweepConfig.model_validate({"search": SPACE})
        run(
            StudySearch(space, journal=journal, name=name, trial_dir=tmp_path / name),
            [0.1, 0.2, 0.3],
        )
    assert len(open_study(journal, "one", {"dev_f1": "max"}).trials) == 1
    storage = optuna.storages.InMemoryStorage()
    space = {RATE: FloatDistribution(1e-4, 1e-2, log=True)}
    for _ in range(2):
        ray = OptunaSearch(space, metric="dev_f1", mode="max", storage=storage)
        ray.suggest("a")
    assert len(ray._ot_study.trials) == 2  # the default name mixes them


def test_the_best_trial_is_the_one_with_the_best_evaluation(tmp_path: Path) -> None:
    """Ray names the best last report, whose checkpoint may be worse than an earlier one of another trial."""
    search = search_over(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")  # stands for that of every checkpoint
    stand_ins: list[Any] = []
    for number, scores in enumerate(([0.9, 0.2, 0.3], [0.1, 0.4, 0.5])):
        search.suggest(str(number))
        for step, score in enumerate(scores, start=1):
            path = {CHECKPOINT_PATH_KEY: str(tmp_path)}
            search.on_trial_result(str(number), report(step, score) | path)
        search.on_trial_complete(str(number), report(3, scores[-1]) | path)
        measured = {"dev_f1": {"last": scores[-1], "max": max(scores), "min": min(scores)}}
        stand_ins.append(SimpleNamespace(metric_analysis=measured, trial_id=str(number)))
    best = find_best(search.study, search.space.tune)
    assert (best.trial, best.step, best.score) == (0, 1, 0.9)
    analysis = ExperimentAnalysis.__new__(ExperimentAnalysis)
    analysis.trials = stand_ins
    assert analysis.get_best_trial("dev_f1", "max", scope="last").trial_id == "1"


def test_population_based_training_is_not_offered(tmp_path: Path) -> None:
    """Under Train V2 Tune has no checkpoints of its trials, which PBT copies."""
    (tmp_path / "space.yaml").write_text("tune: {scheduler: pbt}")
    with pytest.raises(
        ConfigError, match="scheduler: input should be 'asha', 'median' or 'none', got 'pbt'"
    ):
        load_space(tmp_path / "space.yaml")


def test_several_objectives_and_a_limit(tmp_path: Path) -> None:
    """Values are those of the evaluation that is best by the first; a trial beyond the limit is told so."""
    search = search_over(
        tmp_path, objectives={"wire_bytes": "min"}, constraints={"wire_bytes": {"max": 100}}
    )
    for trial_id, size in (("a", 60.0), ("b", 140.0)):
        search.suggest(trial_id)
        search.on_trial_result(trial_id, report(1, 0.5) | {"wire_bytes": size})
        search.on_trial_complete(trial_id, report(3, 0.4) | {"wire_bytes": size})
    run(search, [0.9, 0.9, 0.9], "c")
    assert [trial.state for trial in search.study.trials] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.FAIL,
    ]
    assert search.study.trials[0].values == [0.5, 60.0]
    assert [trial.constraints for trial in search.study.trials[:2]] == [
        {"wire_bytes": -40},
        {"wire_bytes": 40},
    ]
    assert [trial.number for trial in search.study.best_trials] == [0]
    assert "finite dev_f1, wire_bytes needed" in search.study.trials[2].user_attrs[CAUSE]


def test_an_earlier_sweeps_trials_are_held_to_this_ones_limits(tmp_path: Path) -> None:
    """A sampler takes a trial without a constraint to be within every limit, or refuses it."""
    earlier = search_over(tmp_path / "earlier")
    for trial_id, size in (("a", 60.0), ("b", 140.0), ("c", None)):
        earlier.suggest(trial_id)
        sizes = {} if size is None else {"wire_bytes": size}
        earlier.on_trial_complete(trial_id, report(3, 0.4) | sizes)
    for name in ("tpe", "gp"):
        options = {"n_startup_trials": 1}
        warm = search_over(
            tmp_path / name,
            warm_start=str(tmp_path / "earlier"),
            constraints={"wire_bytes": {"max": 100}},
            sampler={"name": name, "options": options},
        )
        # The third has no size to hold to the limit, so nothing is learnt from it.
        assert [trial.constraints for trial in warm.study.trials] == [
            {"wire_bytes": -40},
            {"wire_bytes": 40},
        ]
        warm.suggest("new")
        warm.on_trial_complete("new", report(3, 0.5) | {"wire_bytes": 80.0})
        assert warm.suggest("next") is not None


def test_a_limit_on_what_is_not_reported_is_a_failure_with_its_cause(tmp_path: Path) -> None:
    search = search_over(tmp_path, constraints={"wire_bytes": {"max": 100}})
    run(search, [0.1, 0.2, 0.3])
    assert only(search.study).state == TrialState.FAIL
    assert (
        only(search.study).user_attrs[CAUSE]
        == "finite wire_bytes needed for tune.constraints, got None"
    )


def test_tunes_own_record_of_the_searcher_says_where_the_study_is(
    search: StudySearch, tmp_path: Path
) -> None:
    run(search, [0.1, 0.2, 0.3])
    search.save(str(tmp_path / "searcher"))
    other = search_over(tmp_path / "other")
    other.restore(str(tmp_path / "searcher"))
    assert [trial.value for trial in other.study.trials] == [0.3]


def test_a_study_that_cannot_be_copied_does_not_end_the_sweep(
    search: StudySearch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies: list[int] = []

    def keep(journal: object) -> None:
        copies.append(1)
        time.sleep(0.02)
        raise StorageError("the bucket cannot be written; it does not answer")

    monkeypatch.setattr(studies, "keep_journal", keep)
    search.suggest("a")
    search.on_trial_result("a", report(1, 0.1))  # right after the last copy: left out
    search.on_trial_complete("a", report(3, 0.2))
    assert len(copies) == 2 and only(search.study).state == TrialState.COMPLETE
    assert "study not copied this time: the bucket cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "grid"])
def test_every_sampler_searches(tmp_path: Path, name: str) -> None:
    latents = {"encoder.latent_len": {"type": "int", "low": 4, "high": 16, "step": 4}}
    search = search_over(tmp_path, SPACE | latents, sampler={"name": name})
    for number in range(8):
        values = search.suggest(str(number))
        assert 1e-4 <= values[RATE] <= 1e-2 and values["encoder.latent_len"] in (4, 8, 12, 16)
        search.on_trial_complete(str(number), report(3, -values[RATE]))
    assert {trial.state for trial in search.study.trials} == {TrialState.COMPLETE}


def test_the_grid_visits_every_combination(tmp_path: Path) -> None:
    latents = {"encoder.latent_len": {"type": "int", "low": 4, "high": 12, "step": 4}}
    anchors = {"prompt.anchor": {"type": "categorical", "choices": ["A: ", ""]}}
    search = search_over(tmp_path, latents | anchors, sampler={"name": "grid"}, trials=6)
    drawn = set()
    for number in range(6):
        values = search.suggest(str(number))
        drawn.add((values["encoder.latent_len"], values["prompt.anchor"]))
        search.on_trial_complete(str(number), report(3, 0.1))
    assert len(drawn) == 6


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"sampler": {"name": "tpe", "options": {"n_startup_trial": 3}}}, r"n_startup_trial of sampler tpe .* mean n_startup_trials"),
        ({"sampler": {"name": "cmaes"}, "objectives": {"wire_bytes": "min"}}, "cmaes takes one objective, got 2"),
        ({"sampler": {"name": "qmc", "options": {"qmc_type": "cubic"}}}, "sampler qmc refuses its options"),
        ({"sampler": {"name": "grid"}}, r"needs choices or a step, without log, for search\.training\.encoder_lr"),
    ],
)  # fmt: skip
def test_a_sampler_that_cannot_serve_is_refused(tmp_path: Path, tune: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sampler(search_over(tmp_path, **tune).space)


def test_a_grid_smaller_than_the_sweep_is_refused(tmp_path: Path) -> None:
    anchors = {"prompt.anchor": {"type": "categorical", "choices": ["A: ", ""]}}
    with pytest.raises(
        ConfigError, match=r"has 2 combinations here, tune\.trials must be ≤ that, got 6"
    ):
        make_sampler(search_over(tmp_path, anchors, sampler={"name": "grid"}, trials=6).space)
    two: dict[str, Any] = {"sampler": {"name": "grid"}, "trials": 2}
    with pytest.raises(ConfigError, match=r"visits every combination; leave tune\.start_with out"):
        make_sampler(
            search_over(tmp_path, anchors, start_with=[{"prompt.anchor": ""}], **two).space
        )
    conditional = anchors | {
        "encoder.latent_len": {"type": "int", "low": 4, "high": 8, "when": {"prompt.anchor": ""}}
    }
    with pytest.raises(
        ConfigError, match=r"takes no conditions, got search\.encoder\.latent_len\.when"
    ):
        make_sampler(search_over(tmp_path, conditional, **two).space)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"encoder.d_model": {"type": "int", "low": 64, "high": 128}},
         r"d_model must be a multiple of 2 × heads, got d_model \d+, heads 4 \(a trial that draws \{'encoder.d_model': \d+\}; give"),
        ({"adapter.slot_positions": {"type": "categorical", "choices": [True, False]},
          "encoder.split": {"type": "categorical", "choices": ["none", "lines"]}},
         r"slot_positions needs a fixed number of slots.*'encoder.split': 'lines'"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together_are_refused_before_the_sweep(
    tmp_path: Path, search: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_draws(search_over(tmp_path, search).space)
    whole = {"encoder.d_model": {"type": "int", "low": 64, "high": 128, "step": 8}}
    check_draws(search_over(tmp_path, whole).space)


def test_a_study_keeps_its_objectives(search: StudySearch) -> None:
    assert search.study.user_attrs["objectives"] == [["dev_f1", "max"]]
    with pytest.raises(
        ConfigError, match=r"has objectives \[\['dev_f1', 'max'\]\], got \[\['dev_em', 'max'\]\]"
    ):
        open_study(search.journal, search.name, {"dev_em": "max"})


def test_what_is_kept_of_an_evaluation_is_plain_and_finite(search: StudySearch) -> None:
    search.suggest("a")
    said = report(1, 0.25) | {
        "note": "ok",
        "parts": [1, 2],
        "config": {"a": 1},
        "nothing": None,
        EARLIER: "[]",
    }
    search.on_trial_result("a", said)
    for value in (float("nan"), float("inf"), "0.5", None):
        search.on_trial_result("a", report(2, 0.5) | {"dev_f1": value})
    search.on_trial_result("a", report(1, 0.75))  # a step is told once
    assert evaluations(only(search.study)) == [report(1, 0.25) | {"note": "ok"}]
    assert only(search.study).intermediate_values == {1: 0.25}


def test_the_smaller_is_the_better_where_that_is_asked_for(tmp_path: Path) -> None:
    search = search_over(tmp_path, metric="dev_loss", mode="min")
    search.suggest("a")
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
        search.on_trial_result("a", report(step, None) | {"dev_loss": loss})
    search.on_trial_complete("a", report(3, None) | {"dev_loss": 0.75})
    assert only(search.study).value == 0.25
    assert search.study.direction == optuna.study.StudyDirection.MINIMIZE


def test_a_driver_that_died_without_a_report_is_told_so(search: StudySearch) -> None:
    search.suggest("a")
    search.on_trial_complete("a", None)
    assert only(search.study).state == TrialState.FAIL
    assert only(search.study).user_attrs[CAUSE] == "finite dev_f1 needed, got no result"
    search.suggest("b")
    search.on_trial_result("b", report(3, 0.5))
    search.on_trial_complete("b", None)  # its last report is the last that is known
    assert search.study.trials[1].state == TrialState.COMPLETE


def test_copies_take_a_small_share_of_the_time(
    search: StudySearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a copy of two seconds none is made for forty, unless a trial ends."""
    clock, copies = [100.0], list[float]()

    def keep(journal: object) -> None:
        copies.append(clock[0])
        clock[0] += 2

    monkeypatch.setattr(studies, "keep_journal", keep)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    search.suggest("a")
    for step, at in ((1, 120.0), (2, 141.5), (3, 142.5)):
        clock[0] = at
        search.on_trial_result("a", report(step, 0.5) | {"total_steps": 9})
    assert copies == [100.0, 142.5]
    clock[0] = 150.0
    search.on_trial_complete("a", report(9, 0.5) | {"total_steps": 9})
    # The last report fell into the pause; its end did not.
    assert copies == [100.0, 142.5, 150.0]


def test_what_is_drawn_on_paper_is_no_news(tmp_path: Path) -> None:
    before = optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        check_draws(search_over(tmp_path).space)
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
        with pytest.raises(ConfigError):
            check_draws(
                search_over(
                    tmp_path, {"encoder.d_model": {"type": "int", "low": 64, "high": 128}}
                ).space
            )
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    finally:
        optuna.logging.set_verbosity(before)


def test_an_unpickled_searcher_has_its_session_and_nothing_open(search: StudySearch) -> None:
    run(search, [0.1, 0.2, 0.3])
    again = pickle.loads(pickle.dumps(search))
    assert again.session == search.session and again.study is not search.study
    assert [trial.value for trial in again.study.trials] == [0.3]
    assert again.space == search.space and (again.metric, again.mode) == ("dev_f1", "max")
    fresh = StudySearch(
        search.space, journal=search.journal, name=search.name, trial_dir=search.trial_dir
    )
    assert fresh.session != search.session


def test_restored_searchers_forget_what_they_had_open(search: StudySearch, tmp_path: Path) -> None:
    run(search, [0.1, 0.2, 0.3])
    search.save(str(tmp_path / "record"))
    other = search_over(tmp_path / "other")
    run(other, [0.1, 0.2, 0.9], "theirs")
    other.restore(str(tmp_path / "record"))
    assert (other.journal, other.name) == (search.journal, search.name)
    assert [trial.value for trial in other.study.trials] == [0.3] and not other._trials
