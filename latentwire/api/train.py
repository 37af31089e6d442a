"""Train one wire, in this process or on Ray, score it once, and export it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.places import at_home, with_home
from latentwire.config.resolve import ConfigError, last_stage, load_space, stages_of, with_values
from latentwire.data import shards, sources, streams
from latentwire.data.stages import PlacedStage, placed, reports
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation import scoring
from latentwire.evaluation.protocol import pins
from latentwire.evaluation.scoring import Scored
from latentwire.exports import read_run
from latentwire.model import LatentWire
from latentwire.planning import planner
from latentwire.planning.stages import check_start
from latentwire.planning.variants import check_seed, variant_key
from latentwire.reports import heads, tables
from latentwire.reports import seeds as seeds_of_wire
from latentwire.storage import Place, local, place, text_if_there
from latentwire.threads import cores, use_threads
from latentwire.training import stages, step_checkpoints, text_readers
from latentwire.training.checkpoints import check_development, check_same_run
from latentwire.training.local import metric_of, train_here
from latentwire.training.loop import TrainingError
from latentwire.training.profile import profile_steps


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    output: Place
    """Directory of its checkpoints and results."""
    checkpoint: Place
    """The best checkpoint by the development rows."""
    scores: dict[str, Any]
    """Condition → receiver → metrics on the validation split; empty for a wire pretrained on texts alone."""

    @property
    def export(self) -> Place:
        """Directory of the trained wire, for :meth:`LatentWire.from_pretrained`."""
        return self.output / "best"


def train(
    config: RunConfig | SweepConfig | str | Path | None = None,
    *,
    output: str | Path,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_ray: bool = False,
    verbose: bool = False,
) -> TrainResult:
    """Train one wire, score its best checkpoint once on the validation split, and export it.

    Args:
        config: a run, the name of a shipped configuration, or a YAML file; None: every knob's default.
        output: directory (on Ray also a URI) for checkpoints, results and the export.
        overrides: path → value laid over the configuration, e.g. ``{"training.max_steps": 200}``.
        resume: go on in ``output`` from its last checkpoint.
        on_ray: use the workers of ``RAY_ADDRESS``'s cluster, or of a Ray started here.
        verbose: show what workers and libraries print.

    Raises:
        UserError: a value that cannot be, too little memory, a directory that is taken.
    """
    where = place(at_home(str(output))).absolute()
    return run(
        _space_of(config, overrides),
        where,
        command=f"latentwire.train(output={str(where)!r})",
        resume=resume,
        on_ray=on_ray,
        verbose=verbose,
    )


def train_seeds(
    config: RunConfig | SweepConfig | str | Path | None = None,
    *,
    seeds: Sequence[int],
    output: str | Path,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_ray: bool = False,
    verbose: bool = False,
) -> list[TrainResult]:
    """Train one wire once for each seed, and print the mean and range of their scores.

    Each run is one of :func:`train`, with that ``training.seed``, in ``<output>/seed-<seed>``.

    Args:
        config: as for :func:`train`.
        seeds: two or more, all different.
        output: directory (on Ray also a URI) for the runs' directories.
        overrides: as for :func:`train`.
        resume: go on in ``output``: finished runs are read, the others go on or begin.
        on_ray: as for :func:`train`.
        verbose: as for :func:`train`.

    Raises:
        UserError: as for :func:`train`; a finished run of another configuration.
    """
    where = place(at_home(str(output))).absolute()
    return run_seeds(
        _space_of(config, overrides),
        where,
        seeds,
        command=f"latentwire.train_seeds(output={str(where)!r}, seeds={list(seeds)})",
        resume=resume,
        on_ray=on_ray,
        verbose=verbose,
    )


def _space_of(
    config: RunConfig | SweepConfig | str | Path | None, overrides: Mapping[str, Any] | None
) -> SweepConfig:
    match config:
        case RunConfig():
            space = SweepConfig(run=config)
        case SweepConfig():
            space = config
        case _:
            space = load_space(config)
    if overrides:
        space = space.model_copy(update={"run": with_values(space.run, dict(overrides))})
    return space


def run(
    space: SweepConfig,
    output: Place,
    *,
    command: str,
    resume: bool = False,
    on_ray: bool = False,
    verbose: bool = False,
) -> TrainResult:
    """Train ``space.run`` as :func:`train` does. ``command``: for the record in ``results.json``."""
    with _claimed(output):
        space = prepared(space, output, resume)
        train_and_score = partial(_on_ray, verbose) if on_ray else partial(_here, resume)
        best, validation, scored = train_and_score(space, output)
    document = {"command": command, "best": best} | scored.document
    if space.run.stages:
        document["stages"] = reports(placed(space.run))
    scoring.write_results(output, document)
    run = last_stage(space.run)
    title = f"{run.data.dataset} validation, {shards.read_manifest(validation)['rows']} rows, {best.name}"
    tables.show(tables.scored_tables(scored, title, run))
    if scored.scores:
        print("\n".join(scored.notes))
    train_shards = shards.shard_path(run, "train")
    for page in heads.write_pictures(run, output / "best", output, train_shards):
        print(f"picture: {page}")
    print(f"exported: {output / 'best'}")
    return TrainResult(output, best, scored.scores)


@contextmanager
def _claimed(output: Place) -> Iterator[None]:
    """Keep a directory for one run while it lasts, or raise ConfigError; a store has no claim."""
    if not isinstance(output, Path):
        yield
        return
    # Beside the directory and not in it: --output must not exist yet.
    lock = FileLock(output.parent / f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output_dir is for one run at a time, another one trains in {output}; wait for its end, "
            f"or name another directory"
        ) from error
    except OSError as error:
        raise ConfigError(f"output must be writable, got {output}: {error}; name one") from error
    try:
        yield
    finally:
        # Removed while it is held: after the release the next run's lock could be removed.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def run_seeds(
    space: SweepConfig,
    output: Place,
    seeds: Sequence[int],
    *,
    command: str,
    resume: bool = False,
    on_ray: bool = False,
    verbose: bool = False,
) -> list[TrainResult]:
    """Train ``space.run`` with each seed as :func:`train_seeds` does."""
    if len(set(seeds)) < max(2, len(seeds)):
        raise ConfigError(
            f"seeds must be two or more, all different, got {', '.join(map(str, seeds))}; "
            f"training.seed is that of a single run"
        )
    check_seed(space.run)
    _check_output(output, resume)
    results = []
    for seed in seeds:
        seeded = space.model_copy(update={"run": with_values(space.run, {"training.seed": seed})})
        folder = output / f"seed-{seed}"
        result = _finished(seeded, folder)
        if result is None:
            print(f"seed {seed}: {folder}", flush=True)
            result = run(
                seeded,
                folder,
                command=command,
                resume=folder.exists(),
                on_ray=on_ray,
                verbose=verbose,
            )
        results.append(result)
    if all(result.scores for result in results):
        seeds_of_wire.show([seeds_of_wire.read(result.output) for result in results])
    return results


def _finished(space: SweepConfig, output: Place) -> TrainResult | None:
    """Return a run that has ended in ``output``; ``None`` where none has.

    Raises :class:`~latentwire.config.resolve.ConfigError` where its configuration is another one.
    """
    text = text_if_there(output / "results.json")
    if text is None:
        return None
    results = json.loads(text)
    checkpoint = place(results["best"])
    with local(checkpoint) as folder:
        check_same_run(read_run(folder), last_stage(planner.alone(with_home(space)).run), output)
    return TrainResult(output, checkpoint, results["validation"])


def prepared(space: SweepConfig, output: Place, resume: bool) -> SweepConfig:
    """Return the run as planned alone, with absolute paths.

    Raises :class:`~latentwire.config.resolve.ConfigError` for a directory that is taken, and
    :class:`~latentwire.exports.CheckpointError` where it would begin with half a checkpoint.
    """
    _check_output(output, resume)
    if (output / "best").exists():
        raise ConfigError(
            f"output must not hold a finished run, got {output}; score it by `latentwire evaluate --checkpoint "
            f"{output / 'best'}`, or name another output"
        )
    space = planner.alone(with_home(space))
    check_start(space.run)
    for stage in stages_of(space.run):
        sources.check(stage.run.data)
    return space


def _check_output(output: Place, resume: bool) -> None:
    if output.exists() and not resume:
        raise ConfigError(
            f"output must not exist yet, got {output}; name another one, or --resume {output}"
        )
    if resume and not output.exists():
        raise ConfigError(
            f"--resume must name a run's directory, got {output}, which is not there; leave it out"
        )


def profile(space: SweepConfig, output: Path, steps: int) -> str:
    """Measure a few training steps in this process; return a table of where their time goes.

    A Chrome trace lands in ``output/profile``.
    """
    space = prepared(space, output, resume=False)
    paths, run = _planned_here(space), last_stage(space.run)
    wire = LatentWire(run)
    train = streams.training_table(run, paths["train"])
    return profile_steps(wire, train, steps, output / "profile", paths["train"])


def _planned_here(space: SweepConfig) -> Mapping[shards.ShardSplit, Place]:
    """Print configuration and plan of a run in this process, and return its shards."""
    run = space.run
    print(
        f"run, where it is not the default: {run.model_dump_json(exclude_defaults=True)}",
        flush=True,
    )
    print(
        f"threads: {use_threads(run.training.cpus_per_worker)} of {cores()} cores (training.cpus_per_worker)"
    )
    # More than any run asks for: in this process only memory can be too small.
    here = {"CPU": 1e6, "GPU": 1e6 if planner.on_cuda() else 0.0}
    print(planner.plan(space, here, planner.node_memory()), flush=True)
    *earlier, last = stages_of(run)
    for stage in earlier:
        local_shards(stage.run, ("train", "dev"))
    return local_shards(last.run)


def _here(resume: bool, space: SweepConfig, output: Place) -> tuple[Place, Place, Scored]:
    """Train and score in this process; return the best checkpoint, the validation shards and scores."""
    if not isinstance(output, Path):
        raise ConfigError(
            f"output must be a path on this machine, got {output}; name a local directory, or train with --ray"
        )
    paths = _planned_here(space)
    all_stages = placed(space.run)
    last = all_stages[-1]
    if space.run.stages:
        _train_earlier_here(all_stages, output)
    elif not resume:
        # Before receivers are loaded, which takes long.
        check_development(space.run, paths["dev"])
    best = train_here(LatentWire(last.run), paths, output, last.title, last.before)
    tuned = partial(text_readers.ready, paths=paths)
    scored = scoring.score_and_export(best, paths["validation"], output / "best", tuned=tuned)
    return best, paths["validation"], scored


def _train_earlier_here(all_stages: Sequence[PlacedStage], output: Path) -> None:
    """Train the stages before the last one that are not there, in this process; none where that one has begun."""
    *earlier, last = all_stages
    if begun := step_checkpoints.finished(output / "checkpoints"):
        stages.check_same_stages(begun[-1], last)
        return
    stages.check_documents(all_stages, lambda run: shards.shard_paths(run, ("train", "dev")))
    for stage in earlier:
        paths = shards.shard_paths(stage.run, ("train", "dev"))
        stages.ensure(stage, partial(stages.train_stage_here, paths))


def _on_ray(verbose: bool, space: SweepConfig, output: Place) -> tuple[Place, Place, Scored]:
    """Train by a TorchTrainer and score on a worker; return as :func:`_here`."""
    from ray.train import TrainingFailedError

    from latentwire.distributed import cluster, remote, sweep_files, task, trial
    from latentwire.distributed.driver_log import LOG, path_beside

    cluster.start_ray(verbose, training=True)
    # log.txt is the worker's.
    LOG.open(path_beside(output, "driver.txt"))
    plan = planner.plan_on_cluster(space)
    print(plan, flush=True)
    all_files = sweep_files.prepare(space, plan.gpus_per_worker)
    all_stages = placed(space.run)
    run, last = all_stages[-1].run, all_stages[-1]
    files = all_files[variant_key(run)]
    step_checkpoints.clear_debris(output)

    def variant_of(run: RunConfig) -> trial.Variant:
        stage_files = all_files[variant_key(run)]
        datasets = sweep_files.load_datasets(stage_files, run.data.in_memory)
        train, hashes = stage_files.shards["train"], pins(stage_files.shards, run)
        return trial.Variant(datasets, stage_files.train_rows, train, hashes)

    try:
        if space.run.stages:
            # The last stage's own, if it has begun; none otherwise.
            for checkpoint in step_checkpoints.finished(output)[-1:]:
                stages.check_same_stages(checkpoint, last)
            trial.train_earlier(all_stages, variant_of, output, plan.gpus_per_worker)
    except TrainingFailedError as error:
        raise TrainingError(str(error)) from error
    metric, mode = metric_of(run)
    trainer = trial.make_trainer(
        run,
        sweep_files.load_datasets(files, run.data.in_memory),
        files.train_rows,
        files.shards["train"],
        folder=output,
        gpus_per_worker=plan.gpus_per_worker,
        pins=pins(files.shards, run) | ({"stages": dict(last.before)} if last.before else {}),
        metric=metric,
        mode=mode,
        stage=last.title,
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(str(error)) from error
    if cause := task.cause_left(output):
        raise TrainingError(cause)
    best = step_checkpoints.best_of(step_checkpoints.finished(output), metric, mode)
    scored = remote.score_and_export(run, plan.gpus_per_worker, best, files.shards, output / "best")
    return best, files.shards["validation"], scored
