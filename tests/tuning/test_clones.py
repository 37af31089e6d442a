"""A clone begins with its parent's last checkpoint, is in the study as what it is, and is made once."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from latentwire import exports
from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.distributed.trial import NUMBER, TAKES_UP, trial_path
from latentwire.training import step_checkpoints
from latentwire.tuning import clones, manifest, orders, reruns, results, resume
from latentwire.tuning import study as studies
from latentwire.tuning.checkpoint_budget import clear_debris
from latentwire.tuning.orders import Order
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import SPACE_FILE, write_space
from latentwire.tuning.steering import Steering
from latentwire.tuning.study import CLONE, JOURNAL, run_values

RATE, SIZE, WARMUP = "training.encoder_lr", "training.batch_size", "training.warmup_steps"
SEARCH = {
    RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    SIZE: {"type": "categorical", "choices": [8, 16]},
    "training.prefix_lr": {"type": "float", "low": 1e-3, "high": 1e-1, "when": {SIZE: [16]}},
}
START = {RATE: 1e-3, SIZE: 8}


class Sweep:
    """A sweep whose trial 0 has reported and saved, as far as orders look at it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        if not (output / SPACE_FILE).exists():
            tree = {"search": SEARCH, "tune": {"trials": 2, "start_with": [START]}}
            write_space(SweepConfig.model_validate(tree), output)
        self.space = resume.read_space(output, [])
        self.search = StudySearch(
            self.space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials"
        )
        self.steering = Steering(self.search, output, lambda line: None)

    def report(self, name: str, step: int, score: float = 0.5) -> dict[str, Any]:
        number = self.search.number_of(name)
        path = save(trial_path(self.output / "trials", number), step, score)
        result = {"step": step, "total_steps": 9, "dev_f1": score, "wire_bytes": 64}
        result |= dict.fromkeys(results.REPORTED[1:], 1.0) | {"checkpoint_path": str(path)}
        self.search.on_trial_result(name, result)
        return result

    def clone(self, trial: int = 0, **values: Any) -> Order:
        named = {path.replace("__", "."): value for path, value in values.items()}
        return orders.give(self.output, orders.draft("clone", trial=trial, values=named))

    def look(self) -> tuple[str, str]:
        """Carry out what is open; the last order's outcome."""
        self.steering.look(now=True)
        outcome = orders.given(self.output)[-1].outcome
        assert outcome is not None
        return outcome.state, outcome.reason


def save(folder: Path, step: int, score: float) -> Path:
    path = folder / step_checkpoints.step_name(step)
    path.mkdir(parents=True)
    (path / "wire.safetensors").write_bytes(f"weights of {step}".encode())
    digest = hashlib.sha256((path / "wire.safetensors").read_bytes()).hexdigest()
    files = {"wire.safetensors": digest}
    document = {"format_version": exports.FORMAT_VERSION, "files": files, "metrics": {"dev_f1": score}}  # fmt: skip
    (path / exports.MANIFEST).write_text(json.dumps(document))
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep(tmp_path / "sweep")
    made.search.suggest("a"), made.search.suggest("b")
    made.report("a", 3)
    return made


def test_a_clone_trains_under_the_changed_values_from_a_copy_of_the_last_checkpoint(
    sweep: Sweep,
) -> None:
    sweep.report("a", 6)
    order = sweep.clone(training__encoder_lr=5e-3, training__warmup_steps=7)
    state, reason = sweep.look()
    assert (state, reason) == (
        "done",
        "trial 2 is a clone of 0 at step 6 with training.encoder_lr=0.005, training.warmup_steps=7; "
        "tune.trials is 3",
    )
    start = sweep.output / "trials" / f"clone-{order.id}" / "step-00000006"
    shutil.rmtree(trial_path(sweep.output / "trials", 0))  # the parent's own may go
    assert (start / "wire.safetensors").read_text() == "weights of 6"
    values = sweep.search.suggest("c")
    assert values == {
        RATE: 5e-3, SIZE: 8, WARMUP: 7, NUMBER: 2, "training.init_from": str(start),
        "training.alignment_steps": 0, "training.coarsening_steps": 0,
    }  # fmt: skip
    trial = sweep.search.study.trials[2]
    assert trial.params == {RATE: 5e-3, SIZE: 8}  # what the sampler learns from
    record = trial.user_attrs[CLONE]
    assert (record["parent"], record["step"], record["order"]) == (0, 6, order.id)
    assert record["changed"] == {RATE: 5e-3, WARMUP: 7}
    run = with_values(sweep.space.run, run_values(trial))
    assert run.training.init_from == str(start) and run.training.warmup_steps == 7
    assert resume.read_space(sweep.output, []).tune.trials == 3


def test_a_clone_that_a_driver_left_unfinished_goes_on_as_it_was(sweep: Sweep) -> None:
    sweep.clone(training__encoder_lr=5e-3)
    sweep.look()
    values = sweep.search.suggest("c")
    again = Sweep(sweep.output)
    handed = [again.search.suggest(name) for name in "xyz"]
    assert values in handed
    again.search.on_trial_complete("z", error=True)
    studies.retry_failed(again.search.study)
    last = Sweep(sweep.output)
    retried = [last.search.suggest(name) for name in "xyz"][-1]
    assert isinstance(values, dict)
    assert retried == values | {NUMBER: 3, TAKES_UP: 2}


@pytest.mark.parametrize("death", ["copy_start", "enqueue", "write_space"])
def test_a_clone_is_made_once_wherever_the_driver_dies(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    """After the copy, after the trial is enqueued, and after the number of trials is written."""

    class Death(BaseException):
        pass

    from latentwire.tuning import steering

    module: Any = steering if death == "write_space" else clones
    real = getattr(module, death)

    def do_and_die(*arguments: Any) -> None:
        real(*arguments)
        raise Death

    order = sweep.clone(training__encoder_lr=5e-3)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(module, death, do_and_die)
            Sweep(sweep.output).look()
    shutil.rmtree(trial_path(sweep.output / "trials", 0))  # what was settled is not asked for again
    again = Sweep(sweep.output)
    assert again.look()[0] == "done"
    made = [trial.number for trial in again.search.study.trials if CLONE in trial.user_attrs]
    assert made == [2] and again.search.space.tune.trials == 3
    assert len(list(sweep.output.glob(f"trials/clone-{order.id}/step-*"))) == 1


def test_what_a_dead_driver_left_of_a_copy_is_cleared(sweep: Sweep) -> None:
    half = sweep.output / "trials" / "clone-x" / ".step-00000003.part-0123abcd"
    half.mkdir(parents=True)
    (half / "wire.safetensors").write_text("half")
    assert clear_debris(sweep.output / "trials") == 1 and not half.exists()


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("training.learning_rate", 1, "a clone changes knobs of run, got training.learning_rate; did you"),
        ("data.dev_samples", 8, "a clone keeps its parent's data.dev_samples: it makes other rows; it may"),
        ("losses.kd_weight", 1.0, "its parent's losses.kd_weight: it makes other teachers' columns; it"),
        ("evaluation.max_answer_tokens", 4, "max_answer_tokens: scores under it could not be compared"),
        ("training.epochs", 3, "training.epochs: it makes for another number of steps than the sweep is"),
        ("training.compile", True, "training.compile: trials that differ in it cannot share receivers"),
        ("encoder.d_z", 8, "its parent's encoder.d_z: the parent's wire was made with it; it may change"),
        (RATE, 0.5, "a clone's training.encoder_lr must be a number from 0.0001 to 0.01, got 0.5 (search"),
        (WARMUP, -1, "warmup_steps must be ≥ 0, got -1 (a clone of trial 0: training.warmup_steps)"),
        ("training.prefix_lr", 0.05, "is drawn only with training.batch_size [16], which trial 0 has not"),
    ],
)  # fmt: skip
def test_a_knob_that_may_not_change_is_refused_with_its_rule(
    sweep: Sweep, path: str, value: Any, rule: str
) -> None:
    orders.give(sweep.output, orders.draft("clone", trial=0, values={path: value}))
    state, reason = sweep.look()
    assert state == "refused" and rule in reason
    assert len(sweep.search.study.trials) == 2 and sweep.search.space.tune.trials == 2
    assert not list(sweep.output.glob("trials/clone-*"))


def test_a_clone_needs_a_change_and_a_parent_that_has_saved(sweep: Sweep) -> None:
    orders.give(sweep.output, orders.draft("clone", trial=0))
    assert "a clone needs a changed value, got none" in sweep.look()[1]
    sweep.clone(trial=1, training__encoder_lr=5e-3)
    assert "trial 1 has none: it has not reported yet" in sweep.look()[1]
    sweep.clone(trial=4, training__encoder_lr=5e-3)
    assert "clone must name a trial of the sweep, which has trials 0 to 1" in sweep.look()[1]


def test_a_parent_that_replaces_its_checkpoint_meanwhile_is_asked_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, copied = clones._copy, []

    def replaced(source: Path, target: Path) -> None:
        copied.append(source.name)
        if len(copied) == 1:
            shutil.rmtree(source)
            save(source.parent, 6, 0.7)
        real(source, target)

    monkeypatch.setattr(clones, "_copy", replaced)
    sweep.clone(training__encoder_lr=5e-3)
    assert "clone of 0 at step 6" in sweep.look()[1]
    assert copied == ["step-00000003", "step-00000006"]


def test_a_clone_of_a_clone_has_what_both_changed(sweep: Sweep) -> None:
    sweep.clone(training__warmup_steps=7)
    sweep.look()
    sweep.search.suggest("c")
    sweep.report("c", 3)
    order = sweep.clone(trial=2, training__encoder_lr=5e-3)
    sweep.look()
    values = sweep.search.suggest("d")
    assert isinstance(values, dict) and (values[RATE], values[WARMUP]) == (5e-3, 7)
    assert values["training.init_from"].endswith(f"clone-{order.id}/step-00000003")


def test_records_say_what_a_clone_is_and_its_values_are_not_taken_for_a_whole_trial(
    sweep: Sweep, tmp_path: Path
) -> None:
    sweep.clone(training__encoder_lr=5e-3)
    sweep.look()
    sweep.search.suggest("c")
    for name, score in (("a", 0.6), ("b", 0.4), ("c", 0.9)):
        sweep.search.on_trial_complete(name, sweep.report(name, 9, score))
    space, study = sweep.search.space, sweep.search.study
    best = results.find_best(study, space.tune)
    assert best.trial == 2 and best.values["training.alignment_steps"] == 0
    rows = {row["trial"]: row for row in results.trial_rows(study, space.tune)}
    assert rows[2][CLONE] == {"parent": 0, "step": 3, "changed": {RATE: 5e-3}}
    assert [trial.number for trial in reruns.best_trials(study, finalists(space))] == [0, 1]
    assert [trial.number for trial in studies.read_earlier(sweep.output, {"dev_f1": "max"})] == [
        0,
        1,
    ]
    document = {
        "manifest_version": 1, "space": space.model_dump(mode="json"), "receivers": {"llama": "x"},
        "trials": manifest.trials(study, space),
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(
        ConfigError, match=r"trial 2 of .* is a clone of trial 0 at step 3, .* --trial 0"
    ):
        manifest.one_trial(tmp_path, None, [])


def finalists(space: SweepConfig) -> SweepConfig:
    return space.model_copy(update={"tune": space.tune.model_copy(update={"finalists": 3})})
