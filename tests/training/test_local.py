"""A run in this process: best and last checkpoints stay, and so does everything that is not ours."""

import gc
import json
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire import exports
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import shards, streams
from latentwire.data.positions import units_of
from latentwire.data.sources import DataError
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation.protocol import protocol_hash
from latentwire.model import LatentWire
from latentwire.training import checkpoints
from latentwire.training.local import metric_of, train_here
from latentwire.training.loop import Trainer, TrainingError
from latentwire.training.step_checkpoints import best_of, finished
from tests.conftest import shard_table


@pytest.fixture
def paths(run: RunConfig, tmp_path: Path) -> dict[shards.ShardSplit, Path]:
    """Complete shards of sixteen rows for each split, none of them in two."""
    found: dict[shards.ShardSplit, Path] = {}
    for seed, split in enumerate(shards.SPLITS):
        table = shard_table(run, 16, seed=seed)
        table = table.set_column(0, "id", pa.array([f"{split}-{row}" for row in range(16)]))
        found[split] = tmp_path / split
        found[split].mkdir()
        pq.write_table(table, found[split] / "0.parquet")
        manifest = {"key": split, "rows": table.num_rows, "files": ["0.parquet"]}
        (found[split] / "manifest.json").write_text(json.dumps(manifest))
    return found


def test_batches_filled_by_positions_end_with_the_last_epoch(
    run: RunConfig, paths: dict, tmp_path: Path
) -> None:
    packed = {
        "training.batch_size": None,
        "training.positions_per_batch": 200,
        "training.epochs": 2,
    }
    run = with_values(run, packed)
    best = train_here(LatentWire(run), paths, tmp_path / "run")
    units = units_of(run, shards.read_table(paths["train"]))
    assert units is not None
    steps = streams.packed_steps(run.training, units)
    assert steps > 2
    last = exports.read_manifest(finished(best.parent)[-1])["metrics"]
    assert last["step"] == last["total_steps"] == steps


def test_best_and_last_are_kept_and_foreign_files_stay(
    run: RunConfig, paths: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.9, 0.2, 0.3])
    evaluate = Trainer.evaluate
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self, dev: evaluate(self, dev) | {"dev_f1": next(scores)}
    )
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / "step-00000001" / "notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    values = {"training.evaluate_every": 2, "training.epochs": 2}
    best = train_here(LatentWire(with_values(run, values)), paths, tmp_path / "run")
    assert [path.name for path in finished(folder)] == ["step-00000004", "step-00000008"]
    assert best == best_of(finished(folder)) == folder / "step-00000004"
    assert (folder / "step-00000001" / "notes.txt").exists() and (folder / "notes.txt").exists()


@pytest.mark.parametrize(("best_by", "best"), [(None, 2), ("dev_f1", 2), ("dev_loss", 6)])
def test_what_is_asked_for_chooses_the_best_checkpoint(
    best_by: str | None,
    best: int,
    run: RunConfig,
    paths: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = iter([(0.9, 3.0), (0.1, 2.0), (0.2, 1.0), (0.3, 2.5)])
    monkeypatch.setattr(
        Trainer,
        "evaluate",
        lambda self, dev: dict(zip(("dev_f1", "dev_loss"), next(scores), strict=True)),
    )
    values = {"training.evaluate_every": 2, "training.epochs": 2, "training.best_by": best_by}
    assert (
        train_here(LatentWire(with_values(run, values)), paths, tmp_path / "run").name
        == f"step-{best:08d}"
    )


def test_training_rows_train_and_development_rows_choose(
    run: RunConfig, paths: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation rows are for the chosen wire alone."""
    seen: dict[str, set[str]] = {"step": set(), "evaluate": set()}
    for name, ids in seen.items():
        method = getattr(Trainer, name)

        def spied(self: Trainer, rows: pa.Table, method: Any = method, ids: set[str] = ids) -> Any:
            ids.update(rows["id"].to_pylist())
            return method(self, rows)

        monkeypatch.setattr(Trainer, name, spied)
    best = train_here(LatentWire(run), paths, tmp_path / "run")
    assert seen["step"] == {f"train-{row}" for row in range(16)}
    assert seen["evaluate"] == {f"dev-{row}" for row in range(16)}
    pinned = exports.read_manifest(best)["pins"]
    assert pinned["evaluation_pin"] == protocol_hash(paths["dev"], run)


def test_texts_without_answers_have_only_a_loss(run: RunConfig) -> None:
    texts = {"data.dataset": "text", "losses.bundle": "pretrain"}
    assert metric_of(with_values(run, texts)) == ("dev_loss", "min")
    with pytest.raises(ConfigError, match=r"training\.best_by must be dev_loss for dataset text"):
        with_values(run, texts | {"training.best_by": "dev_f1"})


def test_removing_a_checkpoint_leaves_what_it_did_not_write(
    wire: LatentWire, tmp_path: Path
) -> None:
    path = checkpoints.save(tmp_path / "one", wire, {}, {})
    (path / "adapters" / "notes.txt").write_text("mine")
    checkpoints.remove(path)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == [
        "one/adapters/notes.txt"
    ]
    checkpoints.remove(checkpoints.save(tmp_path / "other", wire, {}, {}))
    assert not (tmp_path / "other").exists()


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask each run to stop in the step that comes after so many."""
    step = Trainer.step

    def stopping(self: Trainer, batches: list) -> dict[str, float]:
        self.stop_asked = self.progress.step == steps
        return step(self, batches)

    patch.setattr(Trainer, "step", stopping)


def test_a_stopped_run_is_saved_and_goes_on(
    run: RunConfig, paths: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_values(run, {"training.epochs": 2, "training.evaluate_every": 100})
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(
            TrainingError, match="stopped by SIGTERM after step 3 and saved; add --resume"
        ):
            train_here(LatentWire(run), paths, tmp_path / "run")
    assert [path.name for path in finished(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert train_here(LatentWire(run), paths, tmp_path / "run").name == "step-00000008"


def test_a_run_that_is_stopped_in_its_last_step_is_evaluated_when_it_goes_on(
    run: RunConfig, paths: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_values(run, {"training.epochs": 1, "training.evaluate_every": 100})
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(TrainingError, match="stopped by SIGTERM after step 4"):
            train_here(LatentWire(run), paths, tmp_path / "run")
    (saved,) = finished(tmp_path / "run" / "checkpoints")
    assert exports.read_manifest(saved)["metrics"] == {}
    assert train_here(LatentWire(run), paths, tmp_path / "run") == saved
    metrics = exports.read_manifest(saved)["metrics"]
    whole = train_here(LatentWire(run), paths, tmp_path / "whole")
    assert metrics["dev_loss"] == exports.read_manifest(whole)["metrics"]["dev_loss"]


def test_a_run_leaves_neither_its_wire_in_memory_nor_debris(
    run: RunConfig, paths: dict, tmp_path: Path
) -> None:
    """What is scored next loads a wire of its own: two of large receivers do not fit."""
    debris = tmp_path / "run" / "checkpoints" / ".step-00000002.part-0123abcd"
    debris.mkdir(parents=True)
    wire, before = LatentWire(run), signal.getsignal(signal.SIGTERM)
    left = weakref.ref(wire)
    train_here(wire, paths, tmp_path / "run")
    del wire
    gc.collect()
    assert left() is None and signal.getsignal(signal.SIGTERM) is before and not debris.exists()


def test_missing_shards_without_ray_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    own = with_values(RunConfig(), {"data.shard_dir": str(tmp_path)})
    with pytest.raises(
        DataError,
        match=r"Ray, which makes them, is not installed, got none at .*toy-dev-.*; make them by",
    ):
        local_shards(own, ("dev",))
