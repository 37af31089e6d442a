"""Conclusions from a search space: metrics that can be chosen by, files that trials need, the largest and longest trial."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from latentwire.config import CategoricalDimension, RunConfig, SweepConfig
from latentwire.config.knobs import knob_of, knobs, parted, paths_with
from latentwire.config.resolve import ConfigError, last_stage, search_order, stages_of, with_values
from latentwire.data import positions, streams
from latentwire.storage import Place

NAMES_FILES = frozenset(paths_with("shards") + paths_with("teachers", "value"))
"""Knobs whose values need shards or teachers' columns of their own."""
SEEDS_SPREAD = 1.1
"""Steps of a run with any seed over those with one, at most: its batches are as full, in another order."""


def check_metrics(space: SweepConfig) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where a sweep would choose by a metric that no trial reports."""
    run = last_stage(space.run)
    tune, texts = space.tune, not run.data.source.has_questions
    if texts and not (tune.metric.startswith("dev_loss") and tune.mode == "min"):
        raise ConfigError(
            f"tune.metric must be dev_loss and tune.mode min for dataset {run.data.dataset}, which has no answers to score; "
            f"got {tune.metric} and {tune.mode}"
        )
    # The mean over the receivers, and each one's own: dev_f1, dev_f1_qwen, …
    names = ["", *(f"_{receiver.name}" for receiver in run.receivers)]
    kinds = ("dev_loss",) if texts else ("dev_f1", "dev_em", "dev_loss")
    reported = []
    for kind in kinds:
        reported += [f"{kind}{name}" for name in names]
    if not texts:
        reported.append("wire_bytes")
    for knob, metrics in (
        ("metric", [tune.metric]),
        ("objectives", tune.objectives),
        ("constraints", tune.constraints),
    ):
        for metric in metrics:
            if metric not in reported:
                raise ConfigError(
                    f"tune.{knob} must name a reported metric, got {metric}; there are {', '.join(reported)}"
                )
    searched = [path for path in space.search if knob_of(path) == "training.seed"]
    if tune.finalists and searched:
        raise ConfigError(
            f"tune.finalists are trained with fresh seeds, so training.seed cannot be searched, got {', '.join(searched)}; "
            f"leave it out"
        )
    if tune.finalists:
        check_seed(space.run)
    if tune.metric in tune.objectives:
        raise ConfigError(
            f"tune.objectives are those besides tune.metric, got {tune.metric} in both; take it out there"
        )


def check_seed(run: RunConfig) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where a run's last stage would not change with its seed."""
    last = stages_of(run)[-1]
    if "training.seed" in last.config.values:
        raise ConfigError(
            f"fresh seeds are those of the run, which its last stage {last.name} does not have, got training.seed "
            f"{last.run.training.seed} there; set it under run, or in earlier stages alone, which all then share"
        )


def data_variants(space: SweepConfig) -> list[RunConfig]:
    """Return a configuration for each set of shards and teachers' columns that trials of a sweep can need.

    They are all combinations that a trial can draw of searched knobs of :data:`NAMES_FILES`. Weights
    of the teachers' terms, and ``k``, stand at their largest: the columns then serve every trial.
    Each stage of such a configuration has files of its own.

    Raises:
        ConfigError: such a dimension is not categorical. Each of its values needs files of its own,
            so there must be a few of them, known beforehand.
    """
    combinations: list[dict[str, Any]] = [{}]
    for path in search_order(space.search):
        if knob_of(path) not in NAMES_FILES:
            continue
        dim = space.search[path]
        if not isinstance(dim, CategoricalDimension):
            raise ConfigError(
                f"search.{path} must be categorical, got {dim.type}: each value needs files of its own"
            )
        conditions = {}
        for other, choices in dim.when.items():
            if knob_of(other) in NAMES_FILES:
                conditions[other] = choices
        may_be_left_out = len(conditions) < len(dim.when)  # by a condition that names no files
        extended: list[dict[str, Any]] = []
        # A search order: what a condition names has been drawn before.
        for values in combinations:
            is_drawn = all(values.get(other) in choices for other, choices in conditions.items())
            if may_be_left_out or not is_drawn:
                extended.append(values)
            if is_drawn:
                extended += [values | {path: choice} for choice in dim.choices]
        combinations = extended
    # Columns for the largest k and weights serve smaller ones too.
    sizes = paths_with("teachers", "size")
    largest = {path: value for path, value in _largest(space).items() if knob_of(path) in sizes}
    return [with_values(space.run, largest | values) for values in combinations]


def calibration_runs(space: SweepConfig, run: RunConfig) -> list[RunConfig]:
    """Return a configuration for each calibration of retrieval heads that trials can need.

    Args:
        space: the search.
        run: one of :func:`data_variants`, or its first stage: later ones begin from that one's wire.

    Raises:
        ConfigError: a dimension on which a calibration hangs is not categorical.
    """
    takes_prefix = run.prefix is not None and run.prefix.begin == "reader"
    if run.adapter.kind != "heads" and not takes_prefix:
        return []
    combinations: list[dict[str, Any]] = [{}]
    for searched in search_order(space.search):
        stage, path = parted(searched)
        # Only the first stage is calibrated: its own dimensions count, and those of all stages.
        if path not in paths_with("calibrates") or stage not in (None, *list(space.run.stages)[:1]):
            continue
        dim = space.search[searched]
        if not isinstance(dim, CategoricalDimension):
            raise ConfigError(
                f"search.{searched} must be categorical where adapter.kind is heads, got {dim.type}: each value needs a "
                f"calibration of its own"
            )
        drawn = []
        for values in combinations:
            drawn += [values | {path: choice} for choice in dim.choices]
        # Under a condition some trials keep the value of the space's run.
        combinations = [*combinations, *drawn] if dim.when else drawn
    if run.adapter.kind != "heads":
        return [with_values(run, values) for values in combinations]
    runs = []
    for values in combinations:
        # The width of a latent does not matter here, but must fit its tokens.
        tokens = values.get("encoder.tokens_per_latent", run.encoder.tokens_per_latent)
        runs.append(with_values(run, values | {"encoder.d_z": tokens}))
    return runs


def variant_key(run: RunConfig) -> str:
    """Return a text that is the same for runs with the same shards and teachers' columns; loads no tokenizer.

    ``run``: without stages, or one stage. A bundle is left out of it: the knobs that it sets are in it.
    """
    paths = [path for path, _ in knobs() if path in NAMES_FILES and path != "losses.bundle"]
    # getattr along "data.seed" and the like, from the run down.
    return json.dumps({path: functools.reduce(getattr, path.split("."), run) for path in paths})


def largest_run(space: SweepConfig) -> RunConfig:
    """Return the shared configuration with every searched number at the end that needs more memory."""
    return with_values(space.run, _largest(space), "largest trial of the space")


def longest_run(space: SweepConfig) -> RunConfig:
    """Return the shared configuration with the searched rows and steps at the end that makes for most steps.

    Where positions fill batches, what makes for more of them makes for more steps.
    """
    return with_values(space.run, _longest(space), "longest trial of the space")


def _longest(space: SweepConfig) -> dict[str, Any]:
    """Return values by path for :func:`longest_run`."""
    values: dict[str, Any] = _largest(space) if fills_by_positions(space) else {}
    for extreme, paths in ((max, paths_with("steps", "more")), (min, paths_with("steps", "fewer"))):
        for path, dim in space.search.items():
            if knob_of(path) in paths:
                ends = dim.choices if isinstance(dim, CategoricalDimension) else (dim.low, dim.high)
                values[path] = extreme(ends)
    return values


def _largest(space: SweepConfig) -> dict[str, Any]:
    """Return values by path for :func:`largest_run`.

    A conditional dimension brings the values that it is drawn under, unless another dimension has
    brought other ones: then no trial has both.
    """
    values: dict[str, Any] = {}
    smaller_costs_more = paths_with("smaller_costs_more")
    for path in search_order(space.search):
        dim = space.search[path]
        if any(values.get(other, choices[0]) not in choices for other, choices in dim.when.items()):
            continue
        values |= {other: choices[0] for other, choices in dim.when.items() if other not in values}
        costliest = min if knob_of(path) in smaller_costs_more else max
        if not isinstance(dim, CategoricalDimension):
            values[path] = costliest(dim.low, dim.high)
            continue
        # Choices have a largest where all are numbers; True and False are integers in Python.
        if all(type(each) in (int, float) for each in dim.choices):
            values[path] = costliest(dim.choices)
    return values


def fills_by_positions(space: SweepConfig) -> bool:
    """Return whether the batches of a space's trials are filled by positions, in their last stage."""
    return last_stage(space.run).training.positions_per_batch is not None


def total_steps(run: RunConfig, train_rows: int) -> int:
    """Return the optimiser steps of a run on that many rows, where batches are filled by rows."""
    # The last short batch of an epoch is left out, unless it is the only one.
    steps_per_epoch = max(1, train_rows // run.training.rows_per_batch)
    return min(run.training.epochs * steps_per_epoch, run.training.max_steps or 10**12)


def most_steps(space: SweepConfig, train_rows: int, trains: Mapping[str, Place]) -> int:
    """Return the most optimiser steps of a trial on that many rows, in its last stage.

    Where batches are filled by positions, they are counted on the training shards, and seeds that
    trials may have besides make for a few batches more or less.

    Args:
        space: the search.
        train_rows: rows.
        trains: key of each of :func:`data_variants` → its training shards; read for positions alone.
    """
    longest = last_stage(longest_run(space))
    if not fills_by_positions(space):
        return total_steps(longest, train_rows)
    # Each variant keeps its own shards, and is as long as a trial on them may be.
    longest_values = _longest(space).items()
    values = {path: value for path, value in longest_values if knob_of(path) not in NAMES_FILES}
    counts = []
    for variant in data_variants(space):
        run = last_stage(with_values(variant, values, "longest trial of the space"))
        units = positions.units_of(run, trains[variant_key(last_stage(variant))])
        assert units is not None
        counts.append(streams.packed_steps(run.training, units))
    return min(math.ceil(SEEDS_SPREAD * max(counts)), longest.training.max_steps or 10**12)
