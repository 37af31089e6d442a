"""Score a checkpoint or export beside its baselines, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentwire import exports
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.places import sought, with_home
from latentwire.config.resolve import with_values
from latentwire.data import shards
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation import scoring
from latentwire.evaluation.baselines import DEFAULT_MODES, Mode
from latentwire.evaluation.diagnostics import diagnose
from latentwire.message import Bits
from latentwire.model import load_wire
from latentwire.planning import planner
from latentwire.reports.scores import Evaluation, Questions, known_of, questions_of
from latentwire.storage import Place, local
from latentwire.threads import use_threads
from latentwire.training import text_readers


def evaluate(
    checkpoint: str | Path,
    *,
    split: shards.ShardSplit = "validation",
    modes: Sequence[Mode] = DEFAULT_MODES,
    tokens_per_latent: Sequence[int] = (),
    latent_len: Sequence[int] = (),
    bits: Sequence[Bits] = (),
    compare: Sequence[str] | None = None,
    joint: bool = True,
    probes: bool = False,
    overrides: Mapping[str, Any] | None = None,
    on_ray: bool = False,
    copies: int | None = None,
    verbose: bool = False,
) -> Evaluation:
    """Score a checkpoint or export on a split.

    Args:
        checkpoint: directory or URI of a checkpoint or export.
        split: rows to score.
        modes: what stands in for the context.
        tokens_per_latent: lengths of message to score, each beside text cut to as many tokens.
        latent_len: the same for a wire whose messages have a fixed length.
        bits: also send the latents in packets of these widths.
        compare: two conditions to set side by side, paired; empty: latents and each baseline.
        joint: whether receivers also score each other's answers.
        probes: also look into the latents.
        overrides: path → value laid over the checkpoint's configuration.
        on_ray: share the rows out over the cluster's workers; the scores are the same, bit for bit.
        copies: wires at once on Ray; None: as many as the cluster holds.
        verbose: show what workers and libraries print.

    Raises:
        UserError: no checkpoint there, unknown conditions, data that cannot be read.
    """
    where = sought(str(checkpoint)).absolute()
    with local(where) as folder:
        manifest = exports.read_manifest(folder)
        run = with_values(exports.read_run(folder), dict(overrides or {}))
        # Relative paths become absolute here: Ray's workers run in directories of their own.
        run = with_home(SweepConfig(run=run)).run
        exports.check_models(folder, run)
        # What is asked is checked before rows are made and weights are loaded.
        questions = questions_of(run, split, modes, tokens_per_latent, latent_len, bits, compare)
        if not on_ray:
            use_threads(run.training.cpus_per_worker)
            paths = local_shards(run, splits_of(run, questions, split), begins=False)
            path = paths[split]
            wire, _ = load_wire(folder, run, manifest)
            readers = text_readers.ready(wire, questions.conditions, paths)
            looked = diagnose(wire, shards.read_table(path)) if probes else None
            reports = {key: reader.reports for key, reader in readers.items() if reader.reports}
            known = known_of(folder, manifest, run, split, path, looked, reports)
            predictions = scoring.predict_conditions(
                wire, path, questions.conditions, joint=joint, readers=readers
            )
            return Evaluation(run, questions, predictions, known)
    return _on_ray(where, manifest, run, split, questions, joint, probes, copies, verbose)


def splits_of(
    run: RunConfig, questions: Questions, split: shards.ShardSplit
) -> tuple[shards.ShardSplit, ...]:
    """Return the splits that an evaluation reads: its own, and those that text readers train on."""
    tuned = not run.is_reader and any(row.tuned for row in questions.conditions)
    trained_on: tuple[shards.ShardSplit, ...] = ("train", "dev") if tuned else ()
    return tuple(dict.fromkeys((*trained_on, split)))


def _on_ray(
    checkpoint: Place,
    manifest: dict[str, Any],
    run: RunConfig,
    split: shards.ShardSplit,
    questions: Questions,
    joint: bool,
    probes: bool,
    copies: int | None,
    verbose: bool,
) -> Evaluation:
    """Score by a Ray Data actor pool: every GPU (or core) of the cluster takes part of the rows."""
    # Here, since an evaluation in this process must not need Ray.
    import ray

    from latentwire.data import pipeline
    from latentwire.distributed import cluster, remote, scoring_pool
    from latentwire.distributed.worker_output import tell

    cluster.start_ray(verbose)
    plan = planner.plan_on_cluster(SweepConfig(run=run))
    memory = planner.node_memory(run.training.gpus_per_worker)
    splits = splits_of(run, questions, split)
    paths = {part: pipeline.ensure_shards(run, part) for part in splits}
    path, places, reports = paths[split], {}, {}
    # Readers are trained on one worker and kept; the pool's workers load them by their places.
    if len(splits) > 1:
        arguments = checkpoint, run, questions.conditions, paths, tell
        places, reports = remote.on_cluster(
            run, plan.gpus_per_worker, text_readers.ensure_at, *arguments
        )
    looked = None
    if probes:
        looked = remote.on_cluster(
            run, plan.gpus_per_worker, scoring.diagnose_here, checkpoint, path, run
        )
    with local(checkpoint) as folder:
        known = known_of(folder, manifest, run, split, path, looked, reports)
    predictions = scoring_pool.predict_pool(
        checkpoint,
        path,
        questions.conditions,
        run,
        joint=joint,
        copies=copies or scoring_pool.copies_at_once(ray.cluster_resources(), plan, memory),
        cpus=plan.cpus_per_worker,
        gpus=plan.gpus_per_worker,
        readers=places,
    )
    return Evaluation(run, questions, predictions, known)
