"""Earlier stages of runs: trained once, kept whole, and the same as stages that are run by hand."""

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire import exports
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, stages_of, with_values
from latentwire.data.stages import PlacedStage, is_there, placed, report_of
from latentwire.model import LatentWire
from latentwire.planning.stages import check_start
from latentwire.storage import Place
from latentwire.training import stages, step_checkpoints
from latentwire.training.local import train_here
from latentwire.training.loop import Trainer
from tests.conftest import shard_table

FIRST = {"training.max_steps": 6, "training.evaluate_every": 2, "training.encoder_lr": 4e-3}
FIRST |= {"training.best_by": "dev_loss", "losses.bundle": "autoencode"}
LAST = {"training.max_steps": 4, "training.evaluate_every": 2, "training.seed": 5}
SPLITS = ("train", "dev")


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        section, name = path.split(".")
        tree.setdefault(section, {})[name] = value
    return tree


@pytest.fixture
def plain(run: RunConfig, tmp_path: Path) -> RunConfig:
    """The run that its stages share."""
    return with_values(run, {"training.epochs": 9, "data.shard_dir": str(tmp_path / "shards")})


@pytest.fixture
def staged(plain: RunConfig) -> RunConfig:
    return with_values(plain, {"stages": {"recite": nested(FIRST), "answers": nested(LAST)}})


@pytest.fixture
def paths(run: RunConfig, tmp_path: Path) -> dict[Any, Path]:
    """Complete shards of sixteen rows for each split, of documents of their own."""
    found = {}
    for seed, split in enumerate((*SPLITS, "validation")):
        table = shard_table(run, 16, seed=seed)
        found[split] = tmp_path / split
        found[split].mkdir()
        pq.write_table(table, found[split] / "0.parquet")
        manifest = {"key": split, "rows": table.num_rows, "files": ["0.parquet"]}
        (found[split] / "manifest.json").write_text(json.dumps(manifest))
    return found


def keys(run: RunConfig) -> list[str]:
    return [*SPLITS]


def weights(folder: Place) -> dict[str, bytes]:
    assert isinstance(folder, Path)
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def go_through(run: RunConfig, paths: dict[Any, Path], output: Path) -> Place:
    """All stages of a run, as a plain command trains them."""
    *earlier, last = placed(run, keys)
    for stage in earlier:
        stages.ensure(stage, lambda stage, work: stages.train_stage_here(paths, stage, work))
    return train_here(LatentWire(last.run), paths, output, last.title, last.before)


def test_stages_are_what_runs_by_hand_are_one_after_the_other(
    plain: RunConfig,
    staged: RunConfig,
    paths: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = train_here(LatentWire(with_values(plain, FIRST)), paths, tmp_path / "first")
    begun = with_values(plain, LAST | {"training.init_from": str(first)})
    by_hand = train_here(LatentWire(begun), paths, tmp_path / "second")
    capsys.readouterr()
    best = go_through(staged, paths, tmp_path / "run")
    recite, last = placed(staged, keys)
    assert recite.path is not None
    of_training = "training_state.safetensors"
    kept, left = weights(recite.path), weights(first)
    assert of_training in left and kept == {k: v for k, v in left.items() if k != of_training}
    assert weights(best) == weights(by_hand) and best.name == by_hand.name
    # What it began with is named by what made it, in lines, manifests and records.
    told = capsys.readouterr().out
    assert "stage recite 1/2  step 6/6" in told and "stage answers 2/2  step 4/4" in told
    assert "stage recite 1/2: dev_loss" in told and "made in" in told
    manifest = exports.read_manifest(Path(str(best)))
    assert manifest["pins"]["stages"] == {"recite": recite.path.name} == last.before
    assert manifest["trained_on"]["documents"] == 16 and manifest["trained_on"]["known"]
    report = report_of(recite.path)
    assert [one["step"] for one in report["evaluations"]] == [2, 4, 6]
    losses = [one["dev_loss"] for one in report["evaluations"]]
    assert report["step"] == 2 * (losses.index(min(losses)) + 1)
    assert report["metrics"]["dev_loss"] == min(losses)
    assert sorted(p.name for p in recite.path.parent.iterdir()) == [recite.path.name]


def test_a_stage_may_leave_its_last_wire(staged: RunConfig, paths: dict, tmp_path: Path) -> None:
    run = with_values(
        staged, {"stages.recite.keep": "last", "stages.recite.training.encoder_lr": 1.0}
    )
    (stage, _), (other, _) = placed(run, keys), placed(staged, keys)
    stages.ensure(stage, lambda stage, work: stages.train_stage_here(paths, stage, work))
    assert stage.path != other.path and stage.path is not None
    report = report_of(stage.path)
    losses = [one["dev_loss"] for one in report["evaluations"]]
    assert report["step"] == 6 and min(losses) != losses[-1]  # the best would be another


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("step", [1, 5])
def test_a_stage_that_was_killed_goes_on_to_the_same_weights(
    staged: RunConfig, paths: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = weights(go_through(staged, paths, tmp_path / "whole"))
    again = with_values(staged, {"data.shard_dir": str(tmp_path / "others")})
    one_step, steps = Trainer.step, []

    def dying(self: Trainer, table: pa.Table) -> dict[str, float]:
        steps.append(self.progress.step)
        if len(steps) == step + 1:
            raise Killed
        return one_step(self, table)

    monkeypatch.setattr(Trainer, "step", dying)
    with pytest.raises(Killed):
        go_through(again, paths, tmp_path / "killed")
    path = placed(again, keys)[0].path
    assert path is not None and not path.exists()
    assert weights(go_through(again, paths, tmp_path / "killed")) == whole
    goes_on_at = step - step % 2
    assert steps[step + 1 :] == [*range(goes_on_at, 6), *range(4)]
    assert [entry.name for entry in (tmp_path / "others").iterdir()] == [path.name]


def trained(stage: PlacedStage, work: Place) -> list[str]:
    raise AssertionError("nothing is to be trained")


def test_two_that_need_a_stage_train_it_once(
    staged: RunConfig, paths: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Signals are for main threads.
    monkeypatch.setattr(Trainer, "stopped_by", lambda *_: contextlib.nullcontext())
    stage, count, lines = placed(staged, keys)[0], [], []
    both_wait = threading.Barrier(2, timeout=60)

    def train(stage: PlacedStage, work: Place) -> None:
        count.append(work)
        both_wait.wait()  # the other has found it taken
        stages.train_stage_here(paths, stage, work)

    def say(line: str) -> None:
        lines.append(line)
        if "is waited for" in line:
            both_wait.wait()

    def need() -> None:
        stages.ensure(stage, train, say)

    threads = [threading.Thread(target=need) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1 and is_there(stage.path)  # type: ignore[arg-type]
    assert [how for how in ("made in", "reused from") if sum(how in x for x in lines) == 1] == [
        "made in", "reused from",
    ]  # fmt: skip
    assert sum("another process trains it" in line for line in lines) == 1
    stages.ensure(stage, trained)  # type: ignore[arg-type]


def names(run: RunConfig, keys: Any = keys) -> list[str]:
    return [stage.path.name for stage in placed(run, keys) if stage.path is not None]


def test_a_stage_is_named_by_what_its_wire_depends_on(staged: RunConfig, tmp_path: Path) -> None:
    run = with_values(staged, {"stages.more": {}})
    first, second = names(run)
    for values in (
        {"stages.more.training.encoder_lr": 1e-4},
        {"stages.recite.training.log_every": 7, "training.cpus_per_worker": 2},
        {"data.shard_dir": "elsewhere", "data.validation_samples": 3, "receivers.0.device": "cpu"},
        {"training.encoder_lr": 1e-2, "stages.answers.training.encoder_lr": run.training.encoder_lr},
    ):  # fmt: skip
        assert names(with_values(run, values)) == [first, second], values
    others = {
        (first,): {"stages.answers.training.encoder_lr": 1e-4},
        (second, first): {"stages.recite.training.encoder_lr": 1e-4},
    }
    for kept, values in others.items():
        made = names(with_values(run, values))
        assert set(made).isdisjoint({first, second} - set(kept)) and (first in made) == (
            kept == (first,)
        )
    for values in (
        {"training.encoder_lr": 1e-2, "stages.answers.training.encoder_lr": 1e-3},
        {"encoder.latent_len": 5},
        {"stages.recite.keep": "last"},
        {"receivers.1.dtype": "float16"},
    ):
        assert first not in names(with_values(run, values)) or "training.encoder_lr" in values
    assert names(run, lambda run: ["other", "dev"])[0] != first
    start = tmp_path / "start"
    start.mkdir()
    (start / "manifest.json").write_text('{"files": {"a": "1"}}')
    begun = with_values(run, {"training.init_from": str(start)})
    before = names(begun)
    assert before[0] != first
    (start / "manifest.json").write_text('{"files": {"a": "2"}}')
    assert names(begun)[0] != before[0]


def test_documents_of_an_earlier_stage_are_no_development_rows(
    staged: RunConfig, paths: dict
) -> None:
    both = stages_of(staged)
    stages.check_documents(both, lambda run: paths)
    leaking = {"train": paths["train"], "dev": paths["train"]}
    with pytest.raises(
        ConfigError, match=r"the wire of stage recite has not trained on, got 16 of 16"
    ):
        stages.check_documents(both, lambda run: leaking if run is both[1].run else paths)


def test_a_resumed_run_keeps_its_stages(staged: RunConfig, paths: dict, tmp_path: Path) -> None:
    go_through(staged, paths, tmp_path / "run")
    checkpoint = step_checkpoints.finished(tmp_path / "run" / "checkpoints")[-1]
    stages.check_same_stages(checkpoint, placed(staged, keys)[-1])
    other = with_values(staged, {"stages.recite.training.encoder_lr": 1e-4})
    with pytest.raises(
        ConfigError, match=r"a resumed run keeps its stages, .* came after stage-recite-"
    ):
        stages.check_same_stages(checkpoint, placed(other, keys)[-1])


NO_BLOCK = r"have a wire of one shape, .*blocks\.1.* is none in stage recite .*stages\.answers\.encoder\.layers"
WIDER = (
    "in stage recite and .*16.* in stage answers; set for all of them, under run, what decides it"
)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"encoder.layers": 2}, NO_BLOCK),
        ({"encoder.d_z": 16}, WIDER),
        ({"features.deep_prefix": {"hidden": 16}}, None),
    ],
)
def test_stages_whose_wires_do_not_fit_are_refused_before_anything_is_made(
    staged: RunConfig, values: dict[str, Any], rule: str | None
) -> None:
    run = with_values(staged, {f"stages.answers.{path}": value for path, value in values.items()})
    if rule is None:  # a feature may begin with a later stage
        check_start(run)
        return
    with pytest.raises(ConfigError, match=rule):
        check_start(run)
