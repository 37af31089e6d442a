"""What a search space asks of its trials: metrics they report, shards they need, the largest and the longest of them."""

from __future__ import annotations

import functools
import json
from typing import Any

from latentwire.config import CategoricalDimension, RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, knobs, search_order, with_values
from latentwire.data.shards import SHARD_KNOBS
from latentwire.data.teachers import TEACHER_KNOBS, TEACHER_SIZES


def check_metrics(space: SweepConfig) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where a sweep would choose by a metric that its trials do not report."""
    tune, texts = space.tune, space.run.data.dataset == "text"
    if texts and not (tune.metric.startswith("dev_loss") and tune.mode == "min"):
        raise ConfigError(
            f"tune.metric must be dev_loss and tune.mode min for dataset text, which has no answers to score; "
            f"got {tune.metric} and {tune.mode}"
        )
    names = ["", *(f"_{receiver.name}" for receiver in space.run.receivers)]
    kinds = ("dev_loss",) if texts else ("dev_f1", "dev_em", "dev_loss")
    known = [f"{kind}{name}" for kind in kinds for name in names] + ([] if texts else ["wire_bytes"])
    for place, named in (
        ("metric", (tune.metric,)),
        ("objectives", tune.objectives),
        ("constraints", tune.constraints),
    ):
        for metric in named:
            if metric not in known:
                raise ConfigError(
                    f"tune.{place} must name a reported metric, got {metric}; there are {', '.join(known)}"
                )
    if tune.finalists and "training.seed" in space.search:
        raise ConfigError(
            "tune.finalists are trained with fresh seeds, so training.seed cannot be searched; leave it out"
        )
    if tune.metric in tune.objectives:
        raise ConfigError(f"tune.objectives are those besides tune.metric, got {tune.metric} in both")


def data_variants(space: SweepConfig) -> list[RunConfig]:
    """The configurations whose shards or teachers' columns differ: every combination of searched choices of what they hang on
    that a trial can draw.

    Weights of the teachers' terms, and ``k``, stand at their largest: the columns then serve every trial. Raises
    :class:`~latentwire.config.resolve.ConfigError` where such a dimension is not categorical: each of its values needs files
    of its own, so there must be a few of them, known beforehand.
    """
    drawn: list[dict[str, Any]] = [{}]
    for dotted in search_order(space.search):
        if not _needs_files(dotted):
            continue
        dim = space.search[dotted]
        if not isinstance(dim, CategoricalDimension):
            raise ConfigError(f"search.{dotted} must be categorical, got {dim.type}: each value needs files of its own")
        elsewhere = any(not _needs_files(other) for other in dim.when)  # then it may be drawn or not
        longer: list[dict[str, Any]] = []
        for values in drawn:
            holds = all(values.get(other) in wanted for other, wanted in dim.when.items() if _needs_files(other))
            if elsewhere or not holds:
                longer.append(values)
            if holds:
                longer += [values | {dotted: choice} for choice in dim.choices]
        drawn = longer
    largest = {name: value for name, value in _largest(space).items() if name in TEACHER_SIZES}
    return [with_values(space.run, largest | values) for values in drawn]


def variant_key(run: RunConfig) -> str:
    """Names a run's shards and teachers' columns among those of its sweep: all that they hang on, and no tokenizer is loaded.

    A bundle is left out, since the knobs that it sets tell of it.
    """
    told = [path for path, _ in knobs() if _needs_files(path) and path != "losses.bundle"]
    return json.dumps({path: functools.reduce(getattr, path.split("."), run) for path in told})


def _needs_files(dotted: str) -> bool:
    """Whether a knob is one, or lies in a section, that shards or teachers' columns hang on."""
    return any(
        dotted.startswith(knob) if knob.endswith(".") else dotted == knob for knob in (*SHARD_KNOBS, *TEACHER_KNOBS)
    )


SMALLER_COSTS_MORE = ("encoder.tokens_per_latent", "training.accumulation", "training.coarsening_from")
"""Knobs whose smaller values make longer messages or larger batches."""


def largest_run(space: SweepConfig) -> RunConfig:
    """The shared configuration with every searched number at the end that costs more: what a trial may cost at most."""
    return with_values(space.run, _largest(space), "largest trial of the space")


def longest_run(space: SweepConfig) -> RunConfig:
    """The shared configuration with what is searched of rows and steps at the end that makes for most steps."""
    values: dict[str, Any] = {}
    for dotted in ("training.epochs", "training.max_steps", "training.batch_size"):
        if (dim := space.search.get(dotted)) is not None:
            ends = list(dim.choices) if isinstance(dim, CategoricalDimension) else [dim.low, dim.high]
            values[dotted] = (min if dotted.endswith("batch_size") else max)(ends)
    return with_values(space.run, values, "longest trial of the space")


def _largest(space: SweepConfig) -> dict[str, Any]:
    """A conditional dimension brings what it hangs on, unless another one has decided otherwise: then no trial has both."""
    values: dict[str, Any] = {}
    for dotted in search_order(space.search):
        dim = space.search[dotted]
        if any(values.get(other, wanted[0]) not in wanted for other, wanted in dim.when.items()):
            continue
        values |= {other: wanted[0] for other, wanted in dim.when.items() if other not in values}
        if not isinstance(dim, CategoricalDimension):
            values[dotted] = dim.low if dotted in SMALLER_COSTS_MORE else dim.high
        elif all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in dim.choices):
            values[dotted] = (min if dotted in SMALLER_COSTS_MORE else max)(dim.choices)
    return values


def total_steps(run: RunConfig, train_rows: int) -> int:
    """Optimiser steps of a run on that many rows."""
    return min(run.training.epochs * max(1, train_rows // run.training.batch_size), run.training.max_steps or 10**12)
