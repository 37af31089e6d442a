"""Earlier stages under Ray: trials that agree in one train it once, and whoever dies, it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.train

from latentwire import exports
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import stages_of, with_values
from latentwire.data.stages import placed
from latentwire.distributed import trial, worker
from latentwire.distributed.task import WorkerTask, cause_left
from latentwire.distributed.trial import NUMBER, Variant, drive_trial, keys_of
from latentwire.planning.variants import variant_key
from latentwire.training import step_checkpoints
from latentwire.training.loop import Trainer
from tests.conftest import shard_table
from tests.distributed.test_trial import Process, Stream, shards_of

STAGES: dict[str, Any] = {
    "recite": {
        "losses": {"bundle": "autoencode"},
        "training": {"max_steps": 4, "evaluate_every": 2, "best_by": "dev_loss"},
    },
    "answers": {"training": {"max_steps": 2, "evaluate_every": 2}},
}


@pytest.fixture
def space(run: RunConfig, tmp_path: Path) -> SweepConfig:
    shared = {"training.epochs": 3, "data.shard_dir": str(tmp_path / "shards"), "stages": STAGES}
    return SweepConfig(run=with_values(run, shared))


class Cluster:
    """Runs workers in this process, and counts the steps of each training."""

    def __init__(self, space: SweepConfig, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.space, self.folder = space, folder
        self.trained: list[tuple[str, int]] = []
        """Stage of each step that was taken, and its number."""
        self.dies_at: tuple[str, int] | None = None
        table, dev = shard_table(space.run, 16, seed=1), shard_table(space.run, 16, seed=2)
        rows = shards_of(table, folder / "rows")
        pins = {"shards": {"train": "rows", "dev": "others"}}
        keys = {variant_key(stage.run) for stage in stages_of(space.run)}
        self.variants: Any = {key: Variant({}, table.num_rows, rows, pins) for key in keys}
        streams = {"train": Stream(table), "dev": Stream(dev)}
        patch.setattr(worker, "broadcast_from_rank_zero", lambda value: value)
        patch.setattr(ray.train, "get_dataset_shard", streams.__getitem__)
        patch.setattr(ray.train, "get_preemption_info", lambda: None)
        patch.setattr(ray.train, "report", lambda metrics: None)
        patch.setattr(trial, "make_trainer", self.make_trainer)
        patch.setattr(trial, "TuneReport", SimpleNamespace)
        step = Trainer.step

        def stepping(trainer: Trainer, rows: pa.Table) -> dict[str, float]:
            here = (trainer.title.split()[0], trainer.progress.step)
            if here == self.dies_at:
                raise Process
            self.trained.append(here)
            return step(trainer, rows)

        patch.setattr(Trainer, "step", stepping)

    def make_trainer(
        self, run: RunConfig, datasets: Any, train_rows: int, train_shards: Any, **given: Any
    ) -> Any:
        given = {name: value for name, value in given.items() if name != "callbacks"}
        gpus = given.pop("gpus_per_worker")
        rows = {"train_rows": train_rows, "train_shards": train_shards}
        task = WorkerTask(run=run, began=0.0, gpus=gpus, **rows, **({"served": None} | given))
        return SimpleNamespace(fit=lambda: worker.train(task))

    def drive(self, number: int, **values: Any) -> Path:
        """Drive a trial to its end; returns its directory."""
        named = {path.replace("__", "."): value for path, value in values.items()}
        drive_trial(
            {NUMBER: number} | named,
            space=self.space,
            variants=self.variants,
            gpus_per_worker=0.0,
            trial_dir=self.folder / "trials",
        )
        return self.folder / "trials" / f"trial-{number}"

    def stages_there(self) -> list[Path]:
        return sorted((self.folder / "shards").glob("stage-*"))

    def of(self, stage: str) -> list[int]:
        return [step for name, step in self.trained if name == stage]


@pytest.fixture
def cluster(space: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(space, tmp_path, monkeypatch)


def test_trials_that_agree_in_a_stage_train_it_once(cluster: Cluster) -> None:
    for number, rate in enumerate((1e-3, 2e-3, 3e-3)):
        folder = cluster.drive(number, stages__answers__training__encoder_lr=rate)
        assert cause_left(folder) is None
    (recite,) = cluster.stages_there()
    assert cluster.of("recite") == [0, 1, 2, 3] and cluster.of("answers") == [0, 1] * 3
    for number in range(3):
        last = step_checkpoints.finished(cluster.folder / "trials" / f"trial-{number}")[-1]
        manifest = exports.read_manifest(Path(str(last)))
        assert manifest["pins"]["stages"] == {"recite": recite.name}
        assert exports.read_run(Path(str(last))).training.init_from == str(recite)
        assert manifest["trained_on"]["documents"] == 16
    report = json.loads((recite / "manifest.json").read_text())["stage"]
    assert [one["step"] for one in report["evaluations"]] == [2, 4]
    log = (cluster.folder / "trials" / "trial-0" / "log.txt").read_text()
    assert "trial-0: stage recite 1/2 is trained first" in log and "stage answers 2/2  step" in log
    assert "reused from" in (cluster.folder / "trials" / "trial-2" / "log.txt").read_text()


def test_trials_that_differ_in_a_stage_train_one_each(cluster: Cluster) -> None:
    for number, rate in enumerate((1e-3, 2e-3, 1e-3)):
        cluster.drive(number, stages__recite__training__encoder_lr=rate)
    assert len(cluster.stages_there()) == 2
    assert cluster.of("recite") == [0, 1, 2, 3] * 2 and cluster.of("answers") == [0, 1] * 3
    cluster.drive(3, training__seed=4)  # of all stages
    assert len(cluster.stages_there()) == 3


@pytest.mark.parametrize("dies_at", [("recite", 0), ("recite", 3), ("answers", 1)])
def test_a_trial_that_dies_in_a_stage_goes_on_from_its_last_checkpoint(
    cluster: Cluster, dies_at: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = step_checkpoints.finished(cluster.drive(0))[-1]
    moved = with_values(cluster.space.run, {"data.shard_dir": str(tmp_path / "again" / "shards")})
    other = Cluster(SweepConfig(run=moved), tmp_path / "again", monkeypatch)
    other.dies_at = dies_at
    with pytest.raises(Process):
        other.drive(0)
    other.dies_at = None
    again = step_checkpoints.finished(other.drive(0))[-1]
    for file in Path(str(whole)).rglob("*.safetensors"):
        name = file.relative_to(str(whole))
        assert file.read_bytes() == (Path(str(again)) / name).read_bytes(), name
    (recite,) = other.stages_there()
    assert sorted(set(other.of("recite"))) == [0, 1, 2, 3]
    # What had a checkpoint is not trained again.
    assert other.of("recite").count(0) == 1 and other.of("recite").count(2) <= 2
    assert [entry.name for entry in recite.parent.iterdir()] == [recite.name]


def test_a_trial_with_a_checkpoint_needs_no_earlier_stage_any_more(cluster: Cluster) -> None:
    cluster.drive(0)
    (recite,) = cluster.stages_there()
    recite.rename(recite.with_name("elsewhere"))
    folder = cluster.drive(0)
    assert cause_left(folder) is None and cluster.of("recite") == [0, 1, 2, 3]
    assert "goes on with stage answers 2/2" in (folder / "log.txt").read_text()


def test_what_ends_a_stage_ends_its_trial_with_the_cause(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "cap_memory", lambda gpus: bytearray(10**15))
    folder = cluster.drive(0)
    assert not step_checkpoints.finished(folder) and not cluster.stages_there()
    assert str(cause_left(folder)).startswith("stage recite 1/2: out of memory with batch_size 4")


def test_the_rows_name_a_stage_as_the_configuration_does(cluster: Cluster) -> None:
    variant = next(iter(cluster.variants.values()))
    assert keys_of(variant) == ["rows", "others"]
    ours = placed(cluster.space.run, lambda run: keys_of(variant))[0].path
    cluster.drive(0)
    assert cluster.stages_there() == [ours]
