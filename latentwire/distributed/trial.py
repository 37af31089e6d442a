"""One run on Ray: the trial's driver, and the TorchTrainer that it starts.

Every trial has a driver, a fresh process that imports this module: it is light on purpose, and what the workers run lies in
:mod:`latentwire.distributed.worker`. The driver is the trial's controller too (:mod:`latentwire.distributed.controller`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    ENABLE_PRINT_PATCH_ENV_VAR,
    ENV_VARS_TO_PROPAGATE,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import with_values
from latentwire.data.stages import PlacedStage, placed
from latentwire.distributed.controller import TuneReport
from latentwire.distributed.task import ERROR_FILE, WorkerTask, cause_left, leave_cause
from latentwire.distributed.waiting import PatientTrainer, is_lasting
from latentwire.distributed.worker_output import tell, trial_log
from latentwire.planning.variants import variant_key
from latentwire.receivers.memory import is_out_of_memory
from latentwire.storage import Place, delete

NUMBER = "study_trial"
"""Key of a trial's number among the values that Tune gets."""
TAKES_UP = "takes_up_trial"
"""Key, there too, of the number of the failed trial whose directory a trial goes on in."""

ROOM_SECONDS = "120"
"""Seconds after which a trial that waits for room says so again. It waits for as long as it takes: the
planner has refused what could never start."""
POLL_SECONDS = "1"
"""Seconds between two looks of a trial's driver at its workers, and the longest that the end of a training goes unnoticed."""
START_FAILURES = 2
"""Deaths of a trial's workers as they start that count as no failure of the training."""
GROW_SECONDS = 300.0
"""Seconds between two looks for room for more workers, of a run that goes on with fewer. To grow it starts
again from its last checkpoint."""


ZERO_COPY = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
"""Lets Ray put tensors into shared memory without another copy; set where a process starts."""


def train_worker(config: dict[str, Any]) -> None:
    """Run :func:`latentwire.distributed.worker.train` on a worker.

    ``config``: the ``task``, in a dictionary as Ray Train asks for.
    """
    task: WorkerTask = config["task"]
    with trial_log(task.home, ray.train.get_context().get_world_rank()):
        # Here alone: the trial's driver, which imports this module too, needs no receivers. What
        # fails in the import stands in the trial's log.
        from latentwire.distributed import worker

        worker.train(task)


@dataclass(frozen=True)
class Variant:
    """Training data of one data variant's trials, and the hashes that their metrics depend on."""

    datasets: dict[str, ray.data.Dataset]
    """``train``, of ``train_rows``, and ``dev``."""
    train_rows: int
    train_shards: Place
    """Directory of ``train``: a wire keeps which documents it has trained on."""
    pins: dict[str, Any]


def trial_path(trial_dir: Place, number: int) -> Place:
    """Return the directory of a trial's checkpoints, whichever driver runs it."""
    return trial_dir / f"trial-{number}"


def drive_trial(
    values: dict[str, Any],
    *,
    space: SweepConfig,
    variants: Mapping[str, Variant],
    gpus_per_worker: float,
    trial_dir: Place,
    served: Any = None,
) -> None:
    """Drive one trial: resolve its configuration, and run a TorchTrainer that goes on from its checkpoints.

    Its earlier stages come first (:func:`train_earlier`). The cause of a failure is left in :data:`ERROR_FILE`. A trial that
    would fail again in the same way (values that do not go together, out of memory, no finite gradients) leaves it and returns;
    any other is raised, for Tune to start the trial again.
    """
    path = trial_path(trial_dir, values.get(TAKES_UP, values[NUMBER]))
    run = space.run
    with trial_log(path):
        try:
            settings = {k: value for k, value in values.items() if k not in (NUMBER, TAKES_UP)}
            run = with_values(run, settings)
            last = None
            if run.stages:
                stages = placed(run, lambda run: keys_of(variants[variant_key(run)]))
                # The placed run begins with the wire that the stage before leaves.
                run, last = stages[-1].run, stages[-1]
                train_earlier(
                    stages, lambda run: variants[variant_key(run)], path, gpus_per_worker, served
                )
            variant = variants[variant_key(run)]
            make_trainer(
                run,
                variant.datasets,
                variant.train_rows,
                variant.train_shards,
                folder=path,
                gpus_per_worker=gpus_per_worker,
                pins=variant.pins if last is None else variant.pins | pins_of(last),
                metric=space.tune.metric,
                mode=space.tune.mode,
                callbacks=[TuneReport()],
                served=served,
                stage="" if last is None else last.title,
            ).fit()
        except Exception as error:
            leave_cause(path, run, error)
            # What is not raised has ended for Tune, and the search reads the cause that is left.
            if not (is_lasting(error) or is_out_of_memory(error)):
                raise


def keys_of(variant: Variant) -> list[str]:
    """Return the hashes that name the training and development rows of a data variant."""
    return [variant.pins["shards"]["train"], variant.pins["shards"]["dev"]]


def pins_of(stage: PlacedStage) -> dict[str, Any]:
    """Return what a stage's metrics depend on besides its rows and receivers."""
    return {"evaluation": stage.run.evaluation.model_dump(), "stages": dict(stage.before)}


def train_earlier(
    stages: Sequence[PlacedStage],
    variant_of: Callable[[RunConfig], Variant],
    output: Place,
    gpus_per_worker: float,
    served: Any = None,
) -> None:
    """Train the stages of a run before its last that are not there; none where the last one has a checkpoint already.

    One that another trial trains is waited for; no workers are held meanwhile.

    Args:
        stages: all of the run.
        variant_of: the training data of a stage.
        output: directory of the run, or trial; its log has the workers' output.
        gpus_per_worker: GPUs of one worker.
        served: replicas of the receivers, where the workers hold none themselves.
    """
    # They load what training needs, which the driver of a trial without stages does without.
    from latentwire.training import step_checkpoints
    from latentwire.training.local import metric_of
    from latentwire.training.loop import TrainingError
    from latentwire.training.stages import checkpoints_of, ensure

    def train(stage: PlacedStage, work: Place) -> None:
        variant, folder = variant_of(stage.run), checkpoints_of(work)
        # The pin of the evaluation is the last stage's; an earlier one has its own (pins_of).
        shared = {k: pin for k, pin in variant.pins.items() if k in ("shards", "receivers")}
        metric, mode = metric_of(stage.run)
        step_checkpoints.clear_debris(folder)
        make_trainer(
            stage.run,
            variant.datasets,
            variant.train_rows,
            variant.train_shards,
            folder=folder,
            gpus_per_worker=gpus_per_worker,
            pins=shared | pins_of(stage),
            metric=metric,
            mode=mode,
            served=served,
            stage=stage.title,
            output=output,
        ).fit()
        if cause := cause_left(folder):
            raise TrainingError(f"stage {stage.title}: {cause}")

    # A last stage that has begun holds all that the earlier ones gave.
    for checkpoint in step_checkpoints.finished(output)[-1:]:
        tell(f"{output.name}: goes on with stage {stages[-1].title} from {checkpoint.name}")
        return
    for stage in stages[:-1]:
        ensure(stage, train, lambda line: tell(f"{output.name}: {line}"))


def name_cluster() -> None:
    """Tell the actors that Train starts which Ray they belong to, as it hands its own settings on.

    Train's cleaner of placement groups asks the State API, which looks for a Ray on the machine. Where it finds several it
    refuses, and the trial would never end.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def data_config(shared: Sequence[str] = ("train",)) -> ray.train.DataConfig:
    """Return how Train hands datasets to workers: ``shared`` ones in shares, others whole, all in order.

    Train reads them by options of its own, not by those that they were made with. A resumed run skips
    the batches that it has used: in an order that hangs on which task ends first it would repeat some
    rows and leave out others.
    """
    in_order = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(datasets_to_split=list(shared), execution_options=in_order)


def make_trainer(
    run: RunConfig,
    datasets: dict[str, ray.data.Dataset],
    train_rows: int,
    train_shards: Place,
    *,
    folder: Place,
    gpus_per_worker: float,
    pins: dict[str, Any],
    metric: str,
    mode: str,
    callbacks: list[Any] | None = None,
    served: Any = None,
    stage: str = "",
    output: Place | None = None,
) -> TorchTrainer:
    """Return a TorchTrainer for one run, which goes on from the last checkpoint in ``folder``.

    ``datasets``: ``train``, of so many rows from ``train_shards``, and ``dev``. The best checkpoint by ``metric`` and the last
    one are kept.
    Ray is told where they are but does not keep them: its record of them is not written in one go, and a run whose driver
    died in that moment could never go on. ``served``: replicas of the receivers, where the workers hold none themselves. ``stage``:
    name and place of the stage that this is, where the run has several. ``output``: directory of the log; None: ``folder``.
    """
    delete(folder / ERROR_FILE)
    name_cluster()
    os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, ROOM_SECONDS)  # Train hands both on
    os.environ.setdefault(ENABLE_PRINT_PATCH_ENV_VAR, "0")  # it prints every line of a worker twice
    os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, POLL_SECONDS)
    os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"  # the trainer has one without a process
    resources = {"CPU": run.training.cpus_per_worker} | run.training.worker_resources
    if gpus_per_worker:
        resources["GPU"] = gpus_per_worker
    rows = None
    training = run.training
    workers: int | tuple[int, int] = training.num_workers
    if training.is_elastic:
        workers = training.fewest_workers, training.num_workers
    # A lone worker reads the object store by itself, and no process hands rows out.
    if training.num_workers == 1 and run.data.in_memory:
        (rows,) = data_config(()).configure(datasets, 1, None, None)
    return PatientTrainer(
        train_worker,
        train_loop_config={
            "task": WorkerTask(
                run=run,
                pins=pins,
                train_rows=train_rows,
                train_shards=train_shards,
                began=time.time(),
                folder=folder,
                metric=metric,
                mode=mode,
                gpus=gpus_per_worker,
                served=served,
                stage=stage,
                output=output,
                rows=rows,
            )
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=GROW_SECONDS,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=callbacks,
            worker_runtime_env={} if served is None else {"env_vars": ZERO_COPY},
            failure_config=ray.train.FailureConfig(
                max_failures=run.training.max_failures, controller_failure_limit=START_FAILURES
            ),
        ),
        datasets=datasets if rows is None else {},
        # Batches of positions are planned for all workers together, and those of a run whose workers come and go must not
        # hang on how many there are: each worker reads all rows and takes its share of every batch.
        dataset_config=data_config(
            () if training.positions_per_batch or training.is_elastic else ("train",)
        ),
    )
