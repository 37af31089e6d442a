"""What a sweep takes is told from the cluster's nodes to its disk, and what cannot fit is refused."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import with_values
from latentwire.config.space import CategoricalDimension, IntDimension
from latentwire.data import calibrations, teachers
from latentwire.data.positions import units_of
from latentwire.data.shards import shard_path
from latentwire.data.streams import packed_steps
from latentwire.planning.calibrations import CalibrationForecast
from latentwire.planning.forecast import BYTES_PER_PARAMETER, fit, forecast
from latentwire.planning.planner import PlanError, plan
from tests.conftest import HEADS, shard_table

ENOUGH = 64e9


def space(folder: Path, **sections: dict) -> SweepConfig:
    run = {
        "data": {"shard_dir": str(folder), "samples": 640},
        "training": {"batch_size": 32, "epochs": 2},
    }
    return SweepConfig.model_validate({"run": run | sections.pop("run", {})} | sections)


def node(name: str, cpus: float, memory: float = ENOUGH, alive: bool = True) -> dict:
    return {
        "Alive": alive,
        "NodeManagerAddress": name,
        "Resources": {"CPU": cpus, "memory": memory},
    }


def test_trials_at_once_are_counted_node_by_node(tmp_path: Path) -> None:
    planned = plan(space(tmp_path, run={"training": {"cpus_per_worker": 2}}), {"CPU": 9}, ENOUGH)
    assert planned.max_concurrent_trials == 4
    fitted, lines = fit(
        planned, [node("a", 3), node("b", 3), node("c", 3), node("gone", 64, alive=False)]
    )
    assert fitted.max_concurrent_trials == 3  # a core of each node is left over
    assert [line.split(":")[1] for line in lines] == [" 1 worker(s)"] * 3
    assert (
        fit(planned, [node("a", 9, memory=2.5 * planned.bytes_per_worker)])[0].max_concurrent_trials
        == 2
    )


def test_a_worker_that_no_node_can_host_is_refused(tmp_path: Path) -> None:
    planned = plan(space(tmp_path, run={"training": {"cpus_per_worker": 4}}), {"CPU": 6}, ENOUGH)
    with pytest.raises(
        PlanError,
        match=r"needs 1 worker\(s\) of 4 CPU.*each on one node, and there is room for 0 \(node a",
    ):
        fit(planned, [node("a", 3), node("b", 3)])


def test_steps_runs_hours_and_disk(tmp_path: Path) -> None:
    fresh_runs = space(
        tmp_path, tune={"trials": 5, "finalists": 2, "final_seeds": 3, "keep_checkpoints": 4}
    )
    planned = plan(fresh_runs, {"CPU": 2}, ENOUGH)
    estimate = forecast(fresh_runs, planned, tmp_path / "sweep")
    assert (estimate.runs, estimate.steps_per_run) == (11, 40)
    assert estimate.checkpoint_bytes == BYTES_PER_PARAMETER * planned.trainable_parameters
    assert estimate.disk_bytes == (4 + 6 + 2 * 2 + 1) * estimate.checkpoint_bytes
    text = "\n".join(estimate.lines(planned, 1e11))
    assert "to be made" in text and "at most 40 in a run, 440 in all" in text
    assert (
        "CPU-hours: " in text
        and "100 GFLOP/s (a matrix product on one worker, just measured)" in text
    )
    assert "hours" not in "\n".join(estimate.lines(planned, None))


def test_steps_that_read_no_receiver_or_one_of_them_take_less(tmp_path: Path) -> None:
    def flop(**training: object) -> float:
        varied = space(tmp_path, run={"training": {"batch_size": 32, "epochs": 2} | training})
        estimate = forecast(varied, plan(varied, {"CPU": 2}, ENOUGH), tmp_path).flop_per_run
        assert estimate is not None
        return estimate

    planned = plan(space(tmp_path), {"CPU": 2}, ENOUGH)
    assert all(0 < r.multiplied < r.parameters for r in planned.receivers)
    whole, aligned, alone = flop(), flop(alignment_steps=40), flop(receivers_per_step="one")
    assert aligned < alone < whole and whole - aligned == pytest.approx(2 * (whole - alone))


def test_teachers_columns_count_as_disk(tmp_path: Path) -> None:
    with_kd = space(tmp_path, run={"losses": {"kd_weight": 1.0, "k": 4, "kd_top_k": 32}})
    planned = plan(with_kd, {"CPU": 2}, ENOUGH)
    more = (
        forecast(with_kd, planned, tmp_path).disk_bytes
        - forecast(space(tmp_path), planned, tmp_path).disk_bytes
    )
    assert more == with_kd.run.data.samples * 2 * 4 * (32 * 6 + 2)


def test_columns_to_be_made_for_shards_that_are_there_count_as_disk(tmp_path: Path) -> None:
    def columns_bytes(**sections: dict) -> int:
        losses = {"kd_weight": 1.0, "k": 4, "kd_top_k": 32}
        with_kd = space(tmp_path, run={"losses": losses} | sections)
        estimates = (
            forecast(each, plan(each, {"CPU": 2}, ENOUGH), tmp_path)
            for each in (with_kd, space(tmp_path, run=sections))
        )
        with_columns, without = (estimate.disk_bytes for estimate in estimates)
        return with_columns - without

    stages = {name: {"training": {"max_steps": 5}} for name in ("first", "second")}
    row = 4 * (32 * 6 + 2)
    assert columns_bytes(stages=stages) == 2 * 640 * row  # both stages read the same columns
    run = space(tmp_path, run={"losses": {"kd_weight": 1.0}}).run
    train, files = shard_path(run, "train"), ["0.parquet", "1.parquet"]
    train.mkdir(parents=True)
    (train / "manifest.json").write_text(json.dumps({"files": files, "rows": 100, "key": "k"}))
    assert columns_bytes() == columns_bytes(stages=stages) == 2 * 100 * row
    for number, path in enumerate(teachers.paths(run, train).values(), start=1):
        path.mkdir()
        for file in files[:number]:
            (path / file).touch()
    assert columns_bytes() == 50 * row  # of one receiver a file of two is missing


def test_rows_that_are_not_counted_yet_are_not_guessed(tmp_path: Path) -> None:
    unknown = space(
        tmp_path, run={"data": {"dataset": "custom", "data_dir": str(tmp_path), "samples": 0}}
    )
    (tmp_path / "train.jsonl").write_text('{"context": "a", "question": "b", "answers": ["c"]}\n')
    (tmp_path / "validation.jsonl").write_text(
        '{"context": "a", "question": "b", "answers": ["c"]}\n'
    )
    estimate = forecast(unknown, plan(unknown, {"CPU": 2}, ENOUGH), tmp_path)
    assert estimate.steps_per_run is None
    assert "known when the shards are made" in "\n".join(
        estimate.lines(plan(unknown, {"CPU": 2}, ENOUGH), 1e11)
    )


def test_a_calibration_that_is_to_be_made_is_counted(tmp_path: Path) -> None:
    """Each ranking and sum once for all trials, in tasks that hold all models, their sums beside them."""

    def told(**changed: object) -> tuple[CalibrationForecast, str]:
        run = with_values(RunConfig(), HEADS | {"data.shard_dir": str(tmp_path)} | changed)
        chosen = SweepConfig(run=run, search=search)
        planned = plan(chosen, {"CPU": 2}, ENOUGH)
        estimate = forecast(chosen, planned, tmp_path)
        assert estimate.calibration is not None
        (line,) = (li for li in estimate.lines(planned, 1e11) if li.startswith("calibration: "))
        return estimate.calibration, line

    search: dict[str, Any] = {}
    closed = {"closed_form": {"texts": 100, "gradient_texts": 30}}
    ranked, _ = told()
    both, line = told(**closed)
    assert (ranked.missing, both.missing, both.there) == (2, 3, 0)
    assert ranked.flop and both.flop and both.flop > 1.5 * ranked.flop
    recital = {"adapter": HEADS["adapter"] | {"ranking_texts": 2 * 96}}
    assert told(**recital)[0].flop == pytest.approx(2 * ranked.flop)
    # 2 depths of 128 and 112 wide; 3 of 8 heads of 32, 3 of 8 of 28: keys and values, in double.
    width, entries = 480, (2 * 3 * 32, 2 * 3 * 28)
    assert both.bytes_per_task - ranked.bytes_per_task == 8 * (
        width**2 + sum(size * (width + size) for size in entries)
    )
    assert line.startswith(
        "calibration: 3 to be made, 0 there; a task of 1 CPU, 0 GPU takes about "
    )
    assert "CPU-hours (" in line
    reader = {
        "prefix": {"tokens": 3, "begin": "reader"},
        "evaluation.tuned_text": {"tokens": 3, "steps": 4, "batch_size": 4, "trials": 2},
    }
    read, _ = told(**closed, **reader)
    assert read.missing == 5 and read.flop and read.flop > both.flop
    search = {"encoder.tokens_per_latent": {"type": "categorical", "choices": [2, 4]}}
    assert told(**closed)[0].missing == 4  # rankings serve both
    search = {}

    # With shards there, what is missing is known by name.
    train = Path(str(shard_path(with_values(RunConfig(), HEADS), "train")))
    train = tmp_path / train.name
    train.mkdir()
    (train / "manifest.json").write_text('{"key": "some", "rows": 4, "files": []}')
    run = with_values(RunConfig(), HEADS | closed | {"data.shard_dir": str(tmp_path)})
    ranking, *_ = calibrations.paths(run, train)
    Path(str(ranking)).write_text("{}")
    part, line = told(**closed)
    assert (part.missing, part.there) == (2, 1) and part.flop and part.flop < both.flop
    for path in calibrations.paths(run, train):
        Path(str(path)).write_text("{}")
    assert told(**closed)[1] == "calibration: 0 to be made, 3 there"
    plain = space(tmp_path)
    assert forecast(plain, plan(plain, {"CPU": 2}, ENOUGH), tmp_path).calibration is None


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        PlanError, match=r"a sweep needs about .* GB free: lower tune\.keep_checkpoints \(now 4\)"
    ):
        forecast(space(tmp_path), plan(space(tmp_path), {"CPU": 2}, ENOUGH), tmp_path / "sweep")


def written(run: RunConfig, rows: int) -> pa.Table:
    """Write a run's training shards and return their rows."""
    table, train = shard_table(run, rows, questions=2), shard_path(run, "train")
    if not run.training.questions_together:
        table = table.drop_columns(["sender_hash"])
    train.mkdir(parents=True)
    pq.write_table(table, train / "0.parquet")
    (train / "manifest.json").write_text(json.dumps({"files": ["0.parquet"], "rows": rows}))
    return table


def test_steps_of_batches_of_positions_are_counted_on_the_shards(tmp_path: Path) -> None:
    training = {"positions_per_batch": 600, "epochs": 2, "questions_together": True}
    packed = space(tmp_path, run={"training": training})
    planned = plan(packed, {"CPU": 2}, ENOUGH)
    before = forecast(packed, planned, tmp_path)
    assert (before.steps_per_run, before.flop_per_run) == (None, None)
    assert "known when the shards are made" in "\n".join(before.lines(planned, 1e11))
    table = written(packed.run, 40)
    units = units_of(packed.run, table)
    assert units is not None
    steps = packed_steps(packed.run.training, units)
    estimate = forecast(packed, planned, tmp_path)
    assert estimate.steps_per_run == math.ceil(1.1 * steps) and estimate.flop_per_run
    half = packed.model_copy(
        update={"run": with_values(packed.run, {"training.positions_per_batch": 300})}
    )
    more = forecast(half, planned, tmp_path).steps_per_run
    assert more is not None and more > 1.5 * estimate.steps_per_run
    limited = packed.model_copy(update={"run": with_values(packed.run, {"training.max_steps": 3})})
    assert forecast(limited, planned, tmp_path).steps_per_run == 3
    searched = IntDimension(type="int", low=300, high=600)
    wide = packed.model_copy(update={"search": {"training.positions_per_batch": searched}})
    assert forecast(wide, planned, tmp_path).steps_per_run == more
    # Each choice has shards of its own; those of single rows have no column that joins them.
    choice = CategoricalDimension(type="categorical", choices=[True, False])
    both = packed.model_copy(update={"search": {"training.questions_together": choice}})
    alone = with_values(packed.run, {"training.questions_together": False})
    written(alone, 40)
    units = units_of(alone, shard_path(alone, "train"))
    assert units is not None
    most = max(steps, packed_steps(alone.training, units))
    assert forecast(both, planned, tmp_path).steps_per_run == math.ceil(1.1 * most)
