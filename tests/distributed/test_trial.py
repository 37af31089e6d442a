"""What a trial's failure leaves behind, and what a worker does on its own: resume, save at a preemption, give up."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire import exports
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import with_values
from latentwire.distributed import trial, worker
from latentwire.distributed.task import EARLIER, ERROR_FILE, WorkerTask, cause_left, leave_cause
from latentwire.distributed.trial import NUMBER, Variant, drive_trial
from latentwire.model import LatentWire
from latentwire.planning.variants import variant_key
from latentwire.pretrained.weights import ReceiverError
from latentwire.receivers.memory import is_out_of_memory
from latentwire.storage import StorageError, write_text
from latentwire.training import checkpoints, step_checkpoints
from latentwire.training.local import train_here
from latentwire.training.loop import Trainer, TrainingError
from latentwire.tuning import study as studies
from latentwire.tuning.results import find_best, trial_rows
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL, own_trials
from tests.conftest import shard_table

HEAVY = ("transformers.modeling_utils", "transformers.tokenization_utils_base", "scipy", "optuna")
"""What takes seconds to import, and is for whoever loads a model, scores, or searches."""
KILLED_BY_RAY = ray.exceptions.OutOfMemoryError(
    "Task was killed due to the node running low on memory."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        KILLED_BY_RAY,
        ray.train.WorkerGroupError(
            "rank 0 died", {0: torch.OutOfMemoryError("CUDA out of memory")}
        ),
        ray.train.WorkerGroupError("rank 1 died", {1: KILLED_BY_RAY}),
    ],
)
def test_out_of_memory_is_told_with_the_size(
    run: RunConfig, tmp_path: Path, error: BaseException
) -> None:
    assert is_out_of_memory(error)
    leave_cause(tmp_path, run, error)
    cause = cause_left(tmp_path)
    assert cause is not None
    assert (
        "out of memory with batch_size 4 over 1 worker(s)" in cause
        and "latent_len 6, d_z 32, toy-llama" in cause
    )
    assert [file.name for file in tmp_path.iterdir()] == [ERROR_FILE]


def task_of(run: RunConfig, folder: Path, **values: Any) -> WorkerTask:
    """The work of a run's workers, with values of its own where it matters."""
    plain: dict[str, Any] = {
        "pins": {},
        "train_rows": 16,
        "train_shards": folder,
        "began": 0.0,
        "gpus": 0.0,
    }
    plain |= {"metric": "dev_f1", "mode": "max", "served": None}
    return WorkerTask(run=run, folder=folder, **(plain | values))


def allocate_too_much_with_torch() -> None:
    torch.empty(10**15)


def allocate_too_much_with_arrow() -> None:
    pa.allocate_buffer(10**15)


@pytest.mark.parametrize("allocate", [allocate_too_much_with_torch, allocate_too_much_with_arrow])
def test_a_cpu_that_has_no_more_memory_is_recognised(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocate: Callable[[], None]
) -> None:
    monkeypatch.setattr(worker, "_train", lambda *_: allocate())
    worker.train(task_of(run, tmp_path))
    assert "out of memory with batch_size 4" in str(cause_left(tmp_path))


def test_other_failures_are_not_taken_for_it(run: RunConfig, tmp_path: Path) -> None:
    error = ray.train.WorkerGroupError("rank 0 died", {0: ValueError("no such file")})
    assert not is_out_of_memory(error)
    leave_cause(tmp_path, run, error)
    assert cause_left(tmp_path) == "rank 0 died"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        TrainingError("gradients must be finite"),
    ],
)
def test_what_would_fail_again_ends_the_run_at_once(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "_train", failing)
    task = task_of(run, tmp_path)
    worker.train(task)
    assert cause_left(tmp_path)
    two = task_of(with_values(run, {"training.num_workers": 2}), tmp_path)
    with pytest.raises(type(error)):  # the other worker waits for this one until Ray ends both
        worker.train(two)
    error = ValueError("a network that may come back")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="network"):
        worker.train(task)


class Stream:
    """Rows as a worker's share of a Ray dataset gives them, in one order."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, batch_size: int | None, **_: Any) -> Iterator[pa.Table]:
        size = batch_size or self.table.num_rows
        for start in range(0, self.table.num_rows, size):
            yield self.table.slice(start, size)


def shards_of(table: pa.Table, path: Path) -> Path:
    """The rows as complete shards; those of an earlier call, where they are there."""
    if not path.exists():
        path.mkdir(parents=True)
        pq.write_table(table, path / "0.parquet")
        (path / "manifest.json").write_text(
            json.dumps({"files": ["0.parquet"], "rows": table.num_rows})
        )
    return path


class Process(BaseException):
    """The worker's process, or its node, is gone."""


def work(
    run: RunConfig,
    table: pa.Table,
    folder: Path,
    patch: pytest.MonkeyPatch,
    *,
    notice_at: int = 99,
    dies_at: int = 99,
) -> list[dict[str, Any]]:
    """Run a worker here; Ray gives notice at one step, and the process dies at another. Returns what it reported."""
    reports: list[dict[str, Any]] = []
    step = Trainer.step
    seen = SimpleNamespace(step=0)

    def stepping(self: Trainer, batches: pa.Table) -> dict[str, float]:
        if self.progress.step >= dies_at:
            raise Process
        values = step(self, batches)
        seen.step = self.progress.step
        return values

    notice = SimpleNamespace(preempted_node_ids=["abc"])
    with patch.context() as ours:
        ours.setattr(Trainer, "step", stepping)
        ours.setattr(worker, "PREEMPTION_STEPS", 1)
        ours.setattr(worker, "broadcast_from_rank_zero", lambda value: value)
        ours.setattr(ray.train, "get_dataset_shard", lambda name: Stream(table))
        ours.setattr(
            ray.train, "get_preemption_info", lambda: notice if seen.step >= notice_at else None
        )
        ours.setattr(ray.train, "report", reports.append)
        pins = {"shards": {}, "evaluation": {}}
        rows = shards_of(table, folder.parent / "shards")
        task = task_of(run, folder, pins=pins, train_rows=table.num_rows, train_shards=rows)
        with contextlib.suppress(Process):
            worker.train(task)
    return reports


def test_a_preempted_worker_saves_and_another_goes_on(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_values(
        run, {"training.epochs": 2, "training.evaluate_every": 4, "training.bucket_batches": 1}
    )
    (*_, whole) = work(run, table, tmp_path / "whole", monkeypatch)
    folder = tmp_path / "parted"
    assert work(run, table, folder, monkeypatch, notice_at=2, dies_at=3) == []
    assert [path.name for path in step_checkpoints.finished(folder)] == ["step-00000002"]
    reports = work(run, table, folder, monkeypatch, dies_at=6)
    assert [report["step"] for report in reports] == [4]
    (again, last) = work(
        run, table, folder, monkeypatch
    )  # whoever saved step 4 may have died before it could report it
    assert (again["step"], last["step"], again["dev_loss"]) == (4, 8, reports[0]["dev_loss"])
    assert last["dev_loss"] == whole["dev_loss"] and last["train_loss"] == whole["train_loss"]
    assert Path(last[CHECKPOINT_PATH_KEY]) == folder / "step-00000008"
    record = exports.read_manifest(folder / "step-00000008")["trained_on"]
    assert record["documents"] == len(set(table["document"].to_pylist())) == 16
    assert [stage["documents"] for stage in record["stages"]] == [16] and record["known"]
    (only,) = work(
        run, table, folder, monkeypatch
    )  # died after its last checkpoint: told again, nothing is trained
    assert only["dev_loss"] == last["dev_loss"]
    (earlier,) = json.loads(only[EARLIER])  # which may not have arrived either
    assert (
        earlier["dev_loss"] == reports[0]["dev_loss"]
        and Path(earlier[CHECKPOINT_PATH_KEY]) == folder / "step-00000004"
    )


def test_the_last_worker_of_an_elastic_run_trains_as_a_lone_one(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_values(run, {"training.evaluate_every": 4})
    elastic = with_values(run, {"training.num_workers": 4, "training.min_workers": 1})
    (*_, lone) = work(run, table, tmp_path / "lone", monkeypatch)
    (*_, last) = work(elastic, table, tmp_path / "elastic", monkeypatch)
    assert (last["step"], last["dev_loss"]) == (lone["step"], lone["dev_loss"])


def test_a_worker_trains_on_batches_of_positions_as_a_run_without_ray(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batches, also after a death within an epoch; and the steps are told."""
    run = with_values(
        run,
        {
            "training.batch_size": None,
            "training.positions_per_batch": 160,
            "training.questions_together": True,
            "training.epochs": 2,
            "training.evaluate_every": 3,
        },
    )
    table = shard_table(run, 24, questions=2)
    (*_, whole) = work(run, table, tmp_path / "whole", monkeypatch)
    paths: Any = dict.fromkeys(("train", "dev"), tmp_path / "shards")
    monkeypatch.setattr("latentwire.training.local.pins", lambda *_: {})
    monkeypatch.setattr(checkpoints, "check_development", lambda *_: None)
    train_here(LatentWire(run), paths, tmp_path / "here")
    here = step_checkpoints.finished(tmp_path / "here" / "checkpoints")[-1]
    metrics = step_checkpoints.metrics_of(here)
    steps = whole["total_steps"]
    assert metrics["step"] == whole["step"] == steps == metrics["total_steps"]
    assert metrics["dev_loss"] == whole["dev_loss"]
    folder = tmp_path / "parted"
    work(run, table, folder, monkeypatch, dies_at=5)
    (*_, last) = work(run, table, folder, monkeypatch)
    assert (last["step"], last["dev_loss"]) == (steps, whole["dev_loss"])


@pytest.mark.parametrize(
    ("values", "shared"),
    [
        ({}, ["train"]),
        ({"training.batch_size": None, "training.positions_per_batch": 160}, []),
        ({"training.min_workers": 1}, []),
    ],
    ids=["rows", "positions", "elastic"],
)
def test_workers_share_rows_unless_each_plans_the_batches_of_all(
    run: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    shared: list[str],
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(trial, "name_cluster", lambda: None)
    monkeypatch.setattr(trial, "PatientTrainer", lambda *_, **named: SimpleNamespace(**named))
    two = with_values(run, {"training.num_workers": 2} | values)
    made: Any = trial.make_trainer(
        two,
        {},
        16,
        tmp_path,
        folder=tmp_path,
        gpus_per_worker=0.0,
        pins={},
        metric="dev_f1",
        mode="max",
    )
    assert made.dataset_config._datasets_to_split == shared
    elastic = two.training.min_workers is not None
    assert made.scaling_config.num_workers == ((1, 2) if elastic else 2)


def test_a_trial_that_takes_up_a_failed_one_goes_on_from_its_checkpoint(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through study, driver and worker, of which the last ends as one whose process died."""
    run = with_values(
        run, {"training.epochs": 2, "training.evaluate_every": 4, "training.bucket_batches": 1}
    )
    (*_, whole) = work(run, table, tmp_path / "whole", monkeypatch)
    space = SweepConfig(run=run)
    variants: Any = {variant_key(run): Variant({}, table.num_rows, tmp_path, {})}

    def driver() -> StudySearch:
        return StudySearch(
            space, journal=tmp_path / JOURNAL, name="sweep", trial_dir=tmp_path / "trials"
        )

    def go_on(search: StudySearch, dies_at: int = 99) -> list[dict[str, Any]]:
        """Drive a trial, as Tune does, with a worker in this process."""
        reports: list[dict[str, Any]] = []

        def make_trainer(run: RunConfig, *_: Any, folder: Path, **__: Any) -> Any:
            return SimpleNamespace(
                fit=lambda: reports.extend(work(run, table, folder, monkeypatch, dies_at=dies_at))
            )

        monkeypatch.setattr(trial, "make_trainer", make_trainer)
        monkeypatch.setattr(trial, "TuneReport", SimpleNamespace)
        values = search.suggest("a")
        drive_trial(
            values,
            space=space,
            variants=variants,
            gpus_per_worker=0.0,
            trial_dir=tmp_path / "trials",
        )
        for report in reports:
            search.on_trial_result("a", report)
        search.on_trial_complete("a", reports[-1], error=dies_at < 99)
        return reports

    first = driver()
    assert [report["step"] for report in go_on(first, dies_at=6)] == [4]
    (new,) = studies.retry_failed(first.study)
    again, last = go_on(driver())
    assert (again["step"], last["step"], last["dev_loss"]) == (4, 8, whole["dev_loss"])
    study = driver().study
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE"] and new == 1
    (counted,) = own_trials(study)
    assert [report["step"] for report in studies.evaluations(counted)] == [4, 8]
    best = find_best(study, space.tune)
    assert best.trial == 1 and best.checkpoint.parent == tmp_path / "trials" / "trial-0"
    (row,) = trial_rows(study, space.tune)
    assert (row["state"], row["retries"]) == ("done", 0)


def test_a_trial_that_begins_with_a_wire_is_not_compared_on_what_that_has_trained_on(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = with_values(run, {"training.max_steps": 1, "evaluation.max_answer_tokens": 1})
    assert work(once, table, tmp_path / "first", monkeypatch)
    (first,) = step_checkpoints.finished(tmp_path / "first")
    begun = with_values(
        once, {"training.init_from": str(first)}
    )  # as a search may draw it, after the sweep was checked
    assert work(begun, table, tmp_path / "second", monkeypatch) == []
    cause = str(cause_left(tmp_path / "second"))
    assert (
        f"development rows must be of documents that the wire of {first} has not trained on, got 16 of 16"
        in cause
    )
    assert "data.dev_fraction to at most 0.05" in cause and not step_checkpoints.finished(
        tmp_path / "second"
    )


def test_a_trial_whose_values_do_not_go_together_leaves_the_rule(tmp_path: Path) -> None:
    values = {NUMBER: 3, "encoder.d_model": 65}
    drive_trial(values, space=SweepConfig(), variants={}, gpus_per_worker=0.0, trial_dir=tmp_path)
    assert str(cause_left(tmp_path / "trial-3")).startswith(
        "d_model must be a multiple of 2 × heads, got d_model 65"
    )


@pytest.mark.parametrize("again", [True, False])
def test_a_driver_leaves_the_cause_whatever_ended_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Here of a trial of two workers: what would fail again ends it, anything else Tune tries again."""
    error = (
        TrainingError("gradients must be finite") if again else ValueError("a fault of a driver")
    )
    failed = ray.train.WorkerGroupError(
        "rank 1:\nValueError: " + str(error), {1: UserExceptionWithTraceback(error, "…")}
    )

    def make_trainer(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(fit=lambda: (_ for _ in ()).throw(failed))

    monkeypatch.setattr(trial, "make_trainer", make_trainer)
    monkeypatch.setattr(trial, "TuneReport", SimpleNamespace)
    space = SweepConfig()
    variants: Any = {variant_key(space.run): Variant({}, 16, tmp_path, {})}
    log = tmp_path / "trial-3" / "log-1.txt"  # of the worker that failed
    write_text(log, "step 1")
    with contextlib.nullcontext() if again else pytest.raises(ray.train.WorkerGroupError):
        drive_trial(
            {NUMBER: 3}, space=space, variants=variants, gpus_per_worker=0.0, trial_dir=tmp_path
        )
    assert cause_left(tmp_path / "trial-3") == f"ValueError: {error}; output: {log}"


def test_a_trainer_that_cannot_be_made_is_a_failure_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_trainer(*_: Any, **__: Any) -> Any:
        raise ReceiverError("receiver llama: no decoder")

    monkeypatch.setattr(trial, "make_trainer", make_trainer)
    monkeypatch.setattr(trial, "TuneReport", SimpleNamespace)
    space = SweepConfig()
    variants: Any = {variant_key(space.run): Variant({}, 16, tmp_path, {})}
    drive_trial(
        {NUMBER: 3}, space=space, variants=variants, gpus_per_worker=0.0, trial_dir=tmp_path
    )
    log = tmp_path / "trial-3" / "log.txt"
    assert (
        cause_left(tmp_path / "trial-3") == f"receiver llama: no decoder; output: {log}"
        and log.exists()
    )


def test_what_would_fail_again_ends_the_trial_and_a_store_that_does_not_answer_does_not(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(run, tmp_path)
    fault: list[Exception] = [
        ReceiverError("receiver llama: no decoder"),
        StorageError("the bucket cannot be read"),
    ]

    def failing(*_: object) -> None:
        raise fault.pop(0)

    monkeypatch.setattr(worker, "_train", failing)
    worker.train(task)
    assert cause_left(tmp_path) == "receiver llama: no decoder"
    with pytest.raises(StorageError):
        worker.train(task)


def test_receivers_of_other_weights_are_refused(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(run, tmp_path, pins={"receivers": {"llama": "0" * 64}})
    worker.train(task)
    assert "receivers must hash to {'llama': '0000" in str(cause_left(tmp_path))


@pytest.mark.parametrize(
    "module", ["latentwire.distributed.trial", "latentwire.distributed.worker"]
)
def test_a_trials_processes_import_no_more_than_they_must(module: str) -> None:
    told = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
